"""NDreamer at scale: batch-effect removal and single-cell treatment effects for cohorts of any size, on Ray.

`run` does the whole job and `plan` tells what it will need, `open_results` reads what it wrote, `simulate` makes a cohort with known truth.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndreamer_dist.datasets import simulate
    from ndreamer_dist.errors import NDreamerError
    from ndreamer_dist.pipeline import Run, add_matches, plan, run
    from ndreamer_dist.results.reader import Results, open_results
    from ndreamer_dist.settings import Settings
    from ndreamer_dist.wide import all_genes

__version__ = version("ndreamer-dist")
__all__ = [
    "NDreamerError",
    "Results",
    "Run",
    "Settings",
    "add_matches",
    "all_genes",
    "open_results",
    "plan",
    "run",
    "simulate",
]

_HOMES = {
    "NDreamerError": "errors",
    "Results": "results.reader",
    "Run": "pipeline",
    "Settings": "settings",
    "add_matches": "pipeline",
    "all_genes": "wide",
    "open_results": "results.reader",
    "plan": "pipeline",
    "run": "pipeline",
    "simulate": "datasets",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package alone loads neither torch nor Ray."""
    if name not in _HOMES:
        msg = f"module 'ndreamer_dist' has no attribute {name!r}"
        raise AttributeError(msg)
    from importlib import import_module

    return getattr(import_module(f"ndreamer_dist.{_HOMES[name]}"), name)
