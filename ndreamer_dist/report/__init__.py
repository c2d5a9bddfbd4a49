"""The HTML report of a finished run.

The package has the same name as the public function, `nd.report(results)`, so the package itself is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that writes the report when called; see `ndreamer_dist.report.page.report`."""

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        from ndreamer_dist.report.page import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
