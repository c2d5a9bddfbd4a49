"""One HTML page with the findings of a finished run.

This package has the name of the function that users call, `nd.report(results)`, so the package itself can be called.
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
