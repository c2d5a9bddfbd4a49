"""The populations of a comparison: a column of `obs`, clusters of the run, or clusters made here.

Input: runs in several spaces. Output: a code per cell, and a sentence that names the origin of the labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by
from ndreamer_dist.cohort.graph import QUERY_ROWS
from ndreamer_dist.cohort.sketch import clustered_sketch, nearest_labels, project, sketch_spans
from ndreamer_dist.settings import ClustersSettings
from ndreamer_dist.stats.cate_table import populations_of
from ndreamer_dist.stats.results import Results

ADVICE = "purity does not count by clusters: name a column of cell types with --by"


@dataclass(frozen=True)
class CellPopulations:
    """A population per cell.

    Attributes
    ----------
    names, codes
        Names, and the code of every packed row, -1 for none.
    source
        Where they are from, in words.
    clustered
        Whether they are clusters of the expression, and no labels.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    source: str
    clustered: bool = False


def chosen_populations(spaces: Mapping[str, Results], by: str | pd.Series | None, cells: int) -> CellPopulations:
    """Return the populations to compare by.

    A column or Series of labels, if one is named; else the low clusters of a run, where all cells were clustered
    together; else the populations of a state space (`state.by`); else clusters made here.

    Parameters
    ----------
    cells
        About how many cells are clustered, where clusters are made here.
    """
    first = next(iter(spaces.values()))
    if by is not None:
        labelled, name = first.labelled(by)
        return _of_column(labelled, str(name), f"column {name!r} of obs")
    for space, results in spaces.items():
        if keys.OBS_LOW in results.packed_obs and _clustered_together(results):
            low = _of_column(results, keys.OBS_LOW, f"the low clusters of the run in {space}; {ADVICE}")
            return replace(low, clustered=True)
    if (
        keys.STATE in spaces
        and (column := _settings(spaces[keys.STATE]).get("state", {}).get("by")) in first.packed_obs
    ):
        return _of_column(
            first, str(column), f"column {column!r} of obs, the populations of the state space (state.by)"
        )
    return graph_clusters(first, cells)


def graph_clusters(results: Results, cells: int) -> CellPopulations:
    """Cluster a sample of cells, expression centred inside groups, and label every other cell by its nearest of these.

    The sample has the same share of every group, its first cells, which are in random order. Centring keeps a batch or
    a strong effect from making clusters of its own; where groups differ in their types it moves them a little.
    """
    source = results._statistics_input(None, None)
    design, settings = source.design, ClustersSettings()
    parts = [source.expression.read(np.arange(*span), source.columns) for span in sketch_spans(design, cells)]
    means = [np.asarray(part.mean(axis=0, dtype=np.float64)).ravel() for part in parts]
    centred = np.concatenate([part.toarray() - mean for part, mean in zip(parts, means, strict=True)])
    sketch = clustered_sketch(sparse.csr_matrix(centred.astype(np.float32)), settings, source.seed)
    codes = np.zeros(design.n_cells, dtype=np.int64)
    for group, mean in zip(design.groups, means, strict=True):
        for start in range(group.start, group.stop, QUERY_ROWS):
            rows = np.arange(start, min(start + QUERY_ROWS, group.stop))
            points = project(source.expression.read(rows, source.columns), mean + sketch.mean, sketch.axes)
            codes[rows] = nearest_labels(points, sketch, settings.n_neighbors)[0]
    names = tuple(str(code) for code in range(int(codes.max()) + 1))
    return CellPopulations(
        names, codes, f"clusters of {len(centred)} cells, made for this table; {ADVICE}", clustered=True
    )


def _of_column(results: Results, name: str, source: str) -> CellPopulations:
    names, codes = populations_of(results.packed_obs, name)
    return CellPopulations(tuple(names), codes, source)


def _clustered_together(results: Results) -> bool:
    """Return whether low clusters mean the same in every group."""
    settings = ClustersSettings(**_settings(results).get("clusters", {}))
    return clustered_by(settings, results.design.n_cells, len(results.design.groups)) != "group"


def _settings(results: Results) -> dict[str, Any]:
    return dict(json.loads(results.uns["settings"]))
