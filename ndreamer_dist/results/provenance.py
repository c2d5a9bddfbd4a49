"""List the counterparts of a cell by name, with their weights in its effects (METHOD section 6)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ndreamer_dist.effects.averages import kernel_weights
from ndreamer_dist.results.on_demand import Counterparts

COLUMNS = ("cell", "batch", "condition", "group", "neighbour", "distance", "weight")


def matches_table(counterparts: Counterparts, names: pd.Index, row: int) -> pd.DataFrame:
    """Return the counterparts of one cell, sorted by group and then by distance.

    Parameters
    ----------
    names
        Names of all cells in packed order.
    row
        Packed row of the cell.

    Returns
    -------
    One row per counterpart; `Results.matches` describes the columns.
    """
    design = counterparts.design
    own = design.groups[int(design.group_of(np.array([row]))[0])]
    lines = [(row, own.code, 0, 0.0, 1.0)]
    for (_, target), stored in counterparts.of_cell(row).items():
        rows, distances = (values[:, : counterparts.neighbours] for values in stored)
        share = design.stands_for(design.groups[target].condition, own) if target != own.code else 0.0
        weights, there = share * kernel_weights(distances, counterparts.bandwidth)[0], np.flatnonzero(rows[0] >= 0)
        lines += [(int(rows[0, i]), target, int(i) + 1, float(distances[0, i]), float(weights[i])) for i in there]
    table = pd.DataFrame(lines, columns=["row", "code", "neighbour", "distance", "weight"])
    table = table.sort_values(["code", "neighbour"], ignore_index=True)
    groups = [design.groups[code] for code in table["code"]]
    table["cell"] = np.asarray(names, dtype=object)[table["row"]]
    table["batch"] = [design.batches[group.batch] for group in groups]
    table["condition"] = [design.conditions[group.condition] for group in groups]
    table["group"] = [group.name for group in groups]
    return table[list(COLUMNS)]
