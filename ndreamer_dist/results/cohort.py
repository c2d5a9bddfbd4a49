"""Read the input cohort of a finished run again, for expression of any of its genes.

Input: a cohort, and the description of the run's cohort in the results. Output: expression by packed row, normalised
exactly as in the run, so that modelled genes have the same bits as in results.zarr. Any other cohort is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.source import Source, fingerprint, open_cohort
from ndreamer_dist.cohort.statistics import normalised
from ndreamer_dist.errors import CohortError, StoreError, listing
from ndreamer_dist.settings import CohortSettings

READ_ROWS_AT_ONCE = 4096
"""Largest number of input rows that are read at a time."""


@dataclass(frozen=True)
class GivenExpression:
    """Expression of the input cohort by packed row; implements `Expression`.

    Attributes
    ----------
    input_row
        (cells,) input row of every packed row.
    totals
        (cells,) total counts by which cells are normalised; `None` if the cohort is log-normalised.
    """

    source: Source
    input_row: np.ndarray
    totals: np.ndarray | None

    @property
    def density(self) -> float:
        """See `Expression.density`."""
        return self.source.nnz / (self.source.n_cells * self.source.n_genes)

    def read(self, rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        """See `Expression.read`; rows are read in the order of the cohort."""
        order = np.argsort(self.input_row[rows], kind="stable")
        parts = _by_rows(self.source, self.input_row[rows][order], columns)
        values = sparse.vstack(list(parts), format="csr")[np.argsort(order, kind="stable")]
        return values if self.totals is None else normalised(values, self.totals[rows])


Cohort: TypeAlias = str | os.PathLike[str] | anndata.AnnData | Source | GivenExpression


def given_expression(cohort: Cohort, description: Mapping[str, Any], cells: pd.DataFrame) -> GivenExpression:
    """Open the input cohort of some results, and check that it is the same.

    Parameters
    ----------
    cohort
        The input of `run`: an AnnData, or the path or URL of an h5ad file or a zarr store. A cohort that this function
        returned is checked and returned.
    description
        `Results.uns`, whose entries have been checked.
    cells
        `obs` of the results in packed order.

    Raises
    ------
    CohortError
        It is a different cohort; the message names the difference.
    StoreError
        The results do not say how the cohort was normalised.
    """
    rows = cells[keys.OBS_INPUT_ROW].to_numpy(dtype=np.int64)
    if isinstance(cohort, GivenExpression):
        _check_cells(cohort.source, rows, cells.index)
        return cohort
    settings = _cohort_settings(description)
    source = open_cohort(cohort, settings)
    _check_cells(source, rows, cells.index)
    if "input" in description:
        _check_fingerprint(source, json.loads(description["input"]), settings)
    if "normalise" not in description or (description["normalise"] == "counts" and keys.OBS_TOTAL not in cells):
        msg = "the results do not say how the cohort was normalised; run their effects again (`run --redo`)"
        raise StoreError(msg)
    counts = description["normalise"] == "counts"
    source = source.in_natural_logs(float(description["log_base"]) if "log_base" in description else None)
    return GivenExpression(source, rows, cells[keys.OBS_TOTAL].to_numpy(dtype=np.float64) if counts else None)


def _check_cells(source: Source, rows: np.ndarray, names: pd.Index) -> None:
    if source.n_cells <= int(rows.max(initial=-1)):
        msg = f"{source.name} is not the cohort of these results: it has {source.n_cells} cells, too few"
        raise CohortError(msg)
    differ = np.flatnonzero(np.asarray(source.cell_names, dtype=object)[rows] != np.asarray(names, dtype=object))
    if len(differ):
        row = int(rows[differ[0]])
        msg = (
            f"{source.name} is not the cohort of these results: its cell in row {row} is "
            f"{source.cell_name(row)!r}, theirs was {str(names[differ[0]])!r}"
        )
        raise CohortError(msg)


def _cohort_settings(description: Mapping[str, Any]) -> CohortSettings:
    values = json.loads(description["settings"]).get("cohort", {})
    try:
        held = {name: values[name] for name in ("gene_names", "normalise") if name in values}
        return CohortSettings(**held, **{name: values[name] for name in ("layer", "condition_key", "batch_key")})
    except (KeyError, TypeError, ValueError) as error:
        msg = f"the entry 'settings' of uns['{keys.UNS}'] is damaged ({type(error).__name__})"
        raise StoreError(msg) from error


def _check_fingerprint(source: Source, expected: Mapping[str, Any], settings: CohortSettings) -> None:
    missing = {str(settings.condition_column), *settings.batch_key} - set(source.cells.columns)
    if missing:
        msg = f"{source.name} is not the cohort of these results: obs has no {listing(sorted(missing))}"
        raise CohortError(msg)
    found = fingerprint(source, settings.condition_column, settings.batch_key)
    differ = [name for name, value in expected.items() if found.get(name) != value]
    if differ:
        msg = (
            f"{source.name} is not the cohort of these results: it differs in {listing(differ)}; give the one that "
            "`run` was given"
        )
        raise CohortError(msg)


def _by_rows(source: Source, wanted: np.ndarray, columns: np.ndarray) -> Iterator[sparse.csr_matrix]:
    """Yield the wanted input rows (ascending) in pieces; every piece is cut from one range of rows that is read."""
    for chunk in np.split(wanted, np.flatnonzero(np.diff(wanted // READ_ROWS_AT_ONCE)) + 1):
        first = int(chunk[0])
        rows = source.read_rows(first, int(chunk[-1]) + 1)
        yield rows[chunk - first][:, columns]
