"""NDreamer at scale: batch-effect removal and single-cell treatment effects for cohorts of any size, on Ray.

`run` does the whole job, and `plan` shows what it needs. `compare` recommends a matching space. `map` adds new cells to a
finished run. `open_results` reads the results, `pl` draws them, `screen` summarises many conditions, `interaction`
compares two contrasts, and `report` writes one page about all of them. `simulate` makes a cohort with known effects.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ndreamer_dist.commands.all_genes import all_genes
    from ndreamer_dist.commands.compare import compare
    from ndreamer_dist.commands.mapping import map  # noqa: A004 - used as `nd.map`
    from ndreamer_dist.commands.ndreamer import NDreamer
    from ndreamer_dist.commands.ndreamer_layout import export
    from ndreamer_dist.commands.verify import check
    from ndreamer_dist.comparison.interaction import interaction
    from ndreamer_dist.comparison.screen import screen
    from ndreamer_dist.datasets import simulate
    from ndreamer_dist.errors import NDreamerError
    from ndreamer_dist.figures import plots as pl
    from ndreamer_dist.pipeline import Run, add_matches, plan, run
    from ndreamer_dist.report.page import report
    from ndreamer_dist.settings import Settings
    from ndreamer_dist.stats.results import Results, open_results

__version__ = version("ndreamer-dist")
__all__ = [
    "NDreamer",
    "NDreamerError",
    "Results",
    "Run",
    "Settings",
    "add_matches",
    "all_genes",
    "check",
    "compare",
    "export",
    "interaction",
    "map",
    "open_results",
    "pl",
    "plan",
    "report",
    "run",
    "screen",
    "simulate",
]

_HOMES = {
    "NDreamer": "commands.ndreamer",
    "NDreamerError": "errors",
    "Results": "stats.results",
    "Run": "pipeline",
    "Settings": "settings",
    "add_matches": "pipeline",
    "all_genes": "commands.all_genes",
    "check": "commands.verify",
    "compare": "commands.compare",
    "export": "commands.ndreamer_layout",
    "interaction": "comparison.interaction",
    "map": "commands.mapping",
    "open_results": "stats.results",
    "plan": "pipeline",
    "run": "pipeline",
    "screen": "comparison.screen",
    "simulate": "datasets",
}
REMOVED_NAMES = {"fetch": "download the file with `curl -C - -O URL` and compare its sha256sum"}
"""Functions and commands of earlier versions, and what replaces them."""
_MODULES = {"pl": "figures.plots", "report": "report"}  # the module `report` can be called like the function


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that importing the package loads neither torch nor Ray."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"ndreamer_dist.{_MODULES[name]}")
    if name not in _HOMES:
        hint = f"; it was removed: {REMOVED_NAMES[name]}" if name in REMOVED_NAMES else ""
        msg = f"module 'ndreamer_dist' has no attribute {name!r}{hint}"
        raise AttributeError(msg)
    return getattr(import_module(f"ndreamer_dist.{_HOMES[name]}"), name)
