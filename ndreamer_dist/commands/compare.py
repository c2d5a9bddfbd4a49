"""Compare matching spaces on one cohort: `ndreamer-dist compare`, `nd.compare`.

The command runs a cohort in every space, in one run directory, or compares the spaces of a finished run. It writes a table,
a figure and a recommendation to the run directory, where the report reads them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ndreamer_dist import keys
from ndreamer_dist.comparison.labels import chosen_populations
from ndreamer_dist.comparison.table import SAMPLED_CELLS, Comparison, compare_spaces
from ndreamer_dist.errors import QueryError, RunError, SettingsError, listing, suggest
from ndreamer_dist.pipeline import run as run_job
from ndreamer_dist.results.export import TABLES, checked, save_table
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.stats.results import Results, open_results

logger = logging.getLogger(__name__)

UNTRAINED = (keys.SPACE_PCA, keys.HARMONY, keys.STATE)
"""Default spaces for a cohort: those that need no training."""


def compare(
    source: str | os.PathLike[str] | AnnData,
    *,
    embedding: str | Sequence[str] | None = None,
    by: str | pd.Series | None = None,
    donor_key: str | None = None,
    cohort: str | os.PathLike[str] | AnnData | None = None,
    save: str | os.PathLike[str] | None = None,
    **how: Any,
) -> Comparison:
    """Compare matching spaces on one cohort, and recommend one (METHOD section 9).

    Parameters
    ----------
    source
        A cohort, as for `run`, to run in every space, in one run directory; or the directory of a finished run, whose
        spaces are compared as they are.
    embedding
        Names of the spaces, separated by commas or as a list. By default `pca`, `harmony` and `state` for a cohort, and all
        finished spaces of a run.
    by
        Column of `obs` that names cell types, or a Series of labels by cell. By default the low clusters of the run, if all
        cells were clustered together, else the populations of the state space, else clusters made here; `populations` of the
        returned object says which.
    donor_key
        Column of `obs` that names the donor; by default the batch.
    cohort
        Input cohort of a finished run, to measure how much of the cell state a space keeps.
    save
        File for the table: `.csv`, `.tsv` or `.parquet`; the figure is written beside it, as PNG. Both are also written to
        `report/` in the run directory, unless it is read-only.
    how
        Arguments of `run`: `out` (required for a cohort), `condition_key`, `control`, `batch_key`, `preset`, `config`,
        `settings`, `redo`, `fresh`.

    Returns
    -------
    Comparison
        `table`, a row per space; `advice`, the recommended space, the reason, and every column in which it loses;
        `missing`, the columns that could not be computed, and why. It prints as text; `to_json` returns all of it.

    Raises
    ------
    NDreamerError
        `run` refuses the cohort, a space does not exist, or an argument of `run` is given for a finished run.
    """
    target = None if save is None else checked(save, TABLES)
    names = embedding.split(",") if isinstance(embedding, str) else embedding
    if names is not None:
        names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not isinstance(source, AnnData) and RunDirectory.at(source).storage.exists(keys.RUN_JSON):
        _refuse_run_arguments(source, how)
        directory = RunDirectory.at(source)
    else:
        cohort, names = source if cohort is None else cohort, names or list(UNTRAINED)
        directory = _run_all(source, names, how)
    spaces = _finished(directory, names)
    populations = chosen_populations(spaces, by, SAMPLED_CELLS)
    logger.info("compare: %s, by %s", ", ".join(spaces), populations.source)
    comparison = compare_spaces(directory, spaces, populations, donor_key, cohort)
    _write(comparison, directory, target)
    return comparison


def _refuse_run_arguments(run: Any, how: dict[str, Any]) -> None:
    """Refuse arguments that a finished run does not need; settings of `run.*` are harmless."""
    settings = how.get("settings")
    harmless = not isinstance(settings, Settings) and all(name.startswith("run.") for name in settings or ())
    unused = [name for name in how if name != "settings" or not harmless]
    if unused:
        table = "; --table FILE writes the table" if "out" in unused else ""
        msg = f"{run} is a finished run, and {listing(unused)} would be for a cohort to run; leave it out{table}"
        raise SettingsError(msg)


def _run_all(cohort: Any, names: Sequence[str], how: dict[str, Any]) -> RunDirectory:
    """Run a cohort in every space; unknown spaces are refused before the first run."""
    if how.get("out") is None:
        msg = "a cohort needs a run directory to be compared in; name it with --out"
        raise RunError(msg)
    for name in names:
        Settings.build(overrides={"embed.method": name})
    for number, name in enumerate(names):
        logger.info("compare: space %s, %d of %d", name, number + 1, len(names))
        run_job(cohort, embedding=name, **how if number == 0 else {**how, "fresh": False})
    return RunDirectory.at(how["out"])


def _finished(directory: RunDirectory, names: Sequence[str] | None) -> dict[str, Results]:
    """Open the results of the spaces, by name; by default those of all finished spaces."""
    places = directory.spaces()
    finished = [name for name, place in places.items() if place.storage.exists(f"{keys.RESULTS}/zarr.json")]
    unknown = [name for name in names or () if name not in finished]
    if unknown or not finished:
        there = f"finished are {listing(finished)}.{suggest(unknown[0], finished)}" if finished else "none is finished."
        msg = f"{directory.url} has no results of {listing(unknown) or 'any space'}; {there} `run` with --embedding adds one"
        raise QueryError(msg)
    opened = {name: open_results(directory.storage, embedding=name) for name in names or finished}
    first = next(iter(opened.values()))
    for name, results in opened.items():
        alike = np.array_equal(results.packed_obs.index, first.packed_obs.index) and results.design == first.design
        if not alike:
            msg = f"{directory.url}: the space {name!r} is of other cells; add it again with --redo"
            raise RunError(msg)
    return opened


def _write(comparison: Comparison, directory: RunDirectory, target: Path | None) -> None:
    """Write table and figure to the run directory, unless it is read-only, and to `target`, if there is one."""
    from ndreamer_dist.figures.plots import spaces as draw  # imports matplotlib

    if not directory.storage.is_read_only:
        directory.storage.write_atomic(keys.COMPARISON_TABLE, comparison.table.to_csv(index=False).encode())
        draw(comparison, save=f"{directory.url}/{keys.COMPARISON_PICTURE}")
        directory.write_json(keys.COMPARISON, comparison.as_object())
    if target is not None:
        save_table(comparison.table, target)
        draw(comparison, save=target.with_suffix(".png"))
