"""Compare matching spaces on one cohort: `ndreamer-dist compare`, `nd.compare`.

The command runs a cohort in every space, in one run directory, or takes a finished run with its spaces. Output: the table,
a picture and the advice. The report reads them from the run directory.
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
"""Spaces that a cohort is run in where none is named: those that need no training."""


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
    """Measure matching spaces on one cohort side by side, and say which to take (METHOD section 9).

    Parameters
    ----------
    source
        A cohort, as for `run`, which is then run in every space, in one run directory; or the directory of a finished
        run, whose spaces are measured as they are.
    embedding
        Names of the spaces, several separated by commas or as a list. By default `pca`, `harmony` and `state` of a cohort, and
        all that are finished of a run.
    by
        Column of `obs` that names cell types, or a Series of labels by cell. By default the low clusters of a run, where all cells
        were clustered together, else the populations of the state space, else clusters made here; `populations` says which.
    donor_key
        Column of `obs` that names the donor; by default the batch.
    cohort
        The input again, for the state held of a finished run.
    save
        File for the table: `.csv`, `.tsv` or `.parquet`; the picture goes beside it, as PNG. Both are in `report/` of the run
        directory as well, where that can be written.
    how
        Arguments of `run`: `out`, which a cohort needs, `condition_key`, `control`, `batch_key`, `preset`, `config`,
        `settings`, `redo`, `fresh`.

    Returns
    -------
    Comparison
        `table`, a row per space; `advice`, which to take and why, with every column in which it loses; `missing`, the
        columns that could not be had, and why. It prints as text, and `to_json` gives all of it.

    Raises
    ------
    NDreamerError
        What `run` raises; there is no such space; or an argument is for a cohort, and this is a run.
    """
    target = None if save is None else checked(save, TABLES)
    wanted = embedding.split(",") if isinstance(embedding, str) else embedding
    names = None if wanted is None else list(dict.fromkeys(name.strip() for name in wanted if name.strip()))
    if not isinstance(source, AnnData) and RunDirectory.at(source).storage.exists(keys.RUN_JSON):
        _refuse(source, how)
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


def _refuse(run: Any, how: dict[str, Any]) -> None:
    """Refuse what a finished run has no use for; settings that say how to work do no harm."""
    settings = how.get("settings")
    harmless = not isinstance(settings, Settings) and all(name.startswith("run.") for name in settings or ())
    unused = [name for name in how if name != "settings" or not harmless]
    if unused:
        table = "; --table FILE writes the table" if "out" in unused else ""
        msg = f"{run} is a finished run, and {listing(unused)} would be for a cohort to run; leave it out{table}"
        raise SettingsError(msg)


def _run_all(cohort: Any, names: Sequence[str], how: dict[str, Any]) -> RunDirectory:
    """Run a cohort in every space; a name that is none is refused before the first."""
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
    """Open the results of the spaces, in the order that was asked for; by default of all that are finished."""
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
    """Keep the comparison in the run directory, where that can be written, and in a file of its own, if one is named."""
    from ndreamer_dist.figures.plots import spaces as draw  # with it comes matplotlib

    if not directory.storage.is_read_only:
        directory.storage.write_atomic(keys.COMPARISON_TABLE, comparison.table.to_csv(index=False).encode())
        draw(comparison, save=f"{directory.url}/{keys.COMPARISON_PICTURE}")
        directory.write_json(keys.COMPARISON, comparison.as_object())
    if target is not None:
        save_table(comparison.table, target)
        draw(comparison, save=target.with_suffix(".png"))
