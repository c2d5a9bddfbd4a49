"""NDreamer at scale: batch-effect removal and single-cell treatment effects for cohorts of any size, on Ray.

`run` does the whole job. `plan` says what the job will need, and `compare` which matching space a cohort favours.
`map` puts new cells onto a finished run. `open_results` reads the results, `pl` draws them, `screen` looks at many
conditions together, `interaction` at how two contrasts differ, and `report` sums all up on one page. `simulate` makes a cohort whose
true effects are known.
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
_REMOVED = {"fetch": "download the file with `curl -C - -O URL` and compare its sha256sum"}
_MODULES = {"pl": "figures.plots", "report": "report"}  # the latter is called like a function


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing the package alone loads neither torch nor Ray."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"ndreamer_dist.{_MODULES[name]}")
    if name not in _HOMES:
        hint = f"; it was removed: {_REMOVED[name]}" if name in _REMOVED else ""
        msg = f"module 'ndreamer_dist' has no attribute {name!r}{hint}"
        raise AttributeError(msg)
    return getattr(import_module(f"ndreamer_dist.{_HOMES[name]}"), name)
