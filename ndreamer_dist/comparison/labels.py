"""The populations of a comparison: a column of `obs`, the clusters of a run, or clusters computed here.

Input: results in several spaces. Output: a population code per cell, and the origin of the populations in words.
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

ADVICE = "purity is no criterion for clusters; name a column of cell types with --by"


@dataclass(frozen=True)
class CellPopulations:
    """A population per cell.

    Attributes
    ----------
    names, codes
        Names of the populations, and (cells,) the code of every packed row, -1 for none.
    source
        Origin of the populations, in words.
    clustered
        Whether they are clusters of the expression rather than labels.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    source: str
    clustered: bool = False


def chosen_populations(spaces: Mapping[str, Results], by: str | pd.Series | None, cells: int) -> CellPopulations:
    """Return the populations of the comparison.

    They are the labels of `by`, if given; else the low clusters of a run, if all cells were clustered together; else
    the populations of the `state` space (setting `state.by`); else clusters computed here.

    Parameters
    ----------
    by
        Column of `obs`, or a Series of labels by cell.
    cells
        Approximate number of cells to cluster, if clusters are computed here.
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
    """Cluster a sample of cells, and give every other cell the label of its nearest sampled cells.

    The sample takes the same share of every group: its first cells, which are in random order. Expression is centred
    within groups, so that a batch or a strong effect forms no cluster of its own; where groups differ in cell types,
    this shifts the types slightly.
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
        names, codes, f"clusters of {len(centred)} cells, computed for this table; {ADVICE}", clustered=True
    )


def _of_column(results: Results, name: str, source: str) -> CellPopulations:
    names, codes = populations_of(results.packed_obs, name)
    return CellPopulations(tuple(names), codes, source)


def _clustered_together(results: Results) -> bool:
    """Return whether the low clusters are comparable between groups."""
    settings = ClustersSettings(**_settings(results).get("clusters", {}))
    return clustered_by(settings, results.design.n_cells, len(results.design.groups)) != "group"


def _settings(results: Results) -> dict[str, Any]:
    return dict(json.loads(results.uns["settings"]))
