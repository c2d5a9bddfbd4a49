"""What people look at: figures of a finished run, and one HTML page that tells what it found.

This package carries the name of the function that users call, `nd.report(results)`, so it can be called itself.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that writes the report when it is called: see `ndreamer_dist.report.page.report`."""

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        from ndreamer_dist.report.page import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
