"""Diagnostics of a run: overlap, reuse of matches, design of donors and conditions, mixing of batches, distortion.

Input: the results of a run. Output: small tables with a row per group, population or condition. Diagnostics that read
expression use the first cells of every group, a random sample because packed rows are in random order; all others use
all cells. None of them is a statistical test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import linalg, sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Group
from ndreamer_dist.effects.averages import effective_number
from ndreamer_dist.matching.exact import nearest
from ndreamer_dist.matching.stage import CROWDED
from ndreamer_dist.results.on_demand import compute, layer_question
from ndreamer_dist.stats.cate_table import StatisticsInput, column, populations_of, replicates_of
from ndreamer_dist.stats.populations import Replicates
from ndreamer_dist.storage.arrays import open_array

DonorLayout = Literal["nested", "crossed", "partly crossed", "no donors"]

NEIGHBOURS = 15
"""Nearest neighbours per cell in the measure of mixing."""
DIMENSIONS = 50
"""Principal components of the input expression in which mixing is measured."""
DISTORTION_CELLS = 512
"""Most cells of a group for the measure of distortion."""
DISTORTION_VALUES = 2**22
"""Most values (cells times genes) of a group for the measure of distortion."""
MOST_DISTORTED = 100
"""Most groups of a screen in which distortion is measured, evenly spaced among all groups."""
MOST_MIXED = 20
"""Most conditions of a screen in which mixing is measured: the first ones."""
NOT_MEASURED = (np.nan, np.nan)


@dataclass(frozen=True)
class Diagnostics:
    """Diagnostics of a run; the columns are documented in `Results.diagnostics`."""

    layout: DonorLayout
    donors: str
    groups: pd.DataFrame
    populations: pd.DataFrame
    mixing: pd.DataFrame
    notes: tuple[str, ...] = ()


def diagnose(
    source: StatisticsInput, *, by: str | None, donor_key: str | None, cells: int, stored_denoised: bool
) -> Diagnostics:
    """Return the diagnostics; `Results.diagnostics` documents arguments and columns."""
    column(source.cells, keys.OBS_OVERLAP)  # refuses results of earlier versions, which lack the column
    names, codes = populations_of(source.cells, by)
    layout, donors = donor_layout(source, donor_key)
    every = -(-len(source.design.groups) // MOST_DISTORTED) if source.design.is_screen else 1
    groups = pd.DataFrame(
        [
            group_row(group, source, stored_denoised=stored_denoised, measured=group.code % every == 0)
            for group in source.design.groups
        ]
    )
    populations = population_overlap(source, names, codes)
    notes = tuple(crowding(source, names, codes, donor_key))
    return Diagnostics(layout, donors, groups, populations, mixing(source, codes, cells), notes)


def crowding(source: StatisticsInput, names: list[str], codes: np.ndarray, donor_key: str | None) -> Iterator[str]:
    """Yield a note for each neighbour setting above 4 % of a donor's cells in some population (METHOD section 9)."""
    if donor_key is None and not source.design.batch_keys:
        return
    counts = replicates_of(source, donor_key).counts(codes)
    for setting, k, what in (
        ("match.neighbours", source.counterparts.neighbours, "a shift of state comes back as an effect"),
        ("denoise.neighbours", source.counterparts.denoise_neighbours, "denoised follows the state less closely there"),
    ):
        few = (counts > 0) & (k > CROWDED * counts) & (k > 1)
        if few.any():
            number, _ = np.unravel_index(int(np.where(few, counts, counts.max() + 1).argmin()), counts.shape)
            yield (
                f"{setting} ({k}) is more than {CROWDED:.0%} of a donor's cells in {int(few.sum())} of "
                f"{int((counts > 0).sum())} pairs of population and donor ({names[number]}: {counts[few].min()} cells); "
                f"{what}"
            )


def donor_layout(source: StatisticsInput, donor_key: str | None) -> tuple[DonorLayout, str]:
    """Return whether donors are nested in conditions or crossed with them, and a sentence that says so."""
    if donor_key is None and not source.design.batch_keys:
        return "no donors", "The donors are unknown: the run has no batch key, and no column of donors was named."
    replicates = replicates_of(source, donor_key)
    conditions_of_donor = pd.Series(replicates.conditions).groupby(list(replicates.donors)).nunique()
    conditions, several = len(source.design.conditions), int((conditions_of_donor > 1).sum())
    donors = len(conditions_of_donor)
    if not several:
        return "nested", f"Each of the {donors} donors is in one condition only (nested): {_numbers(replicates)}."
    if (conditions_of_donor == conditions).all():
        who = f"Each of the {donors} donors" if donors > 1 else "The only donor"
        return "crossed", f"{who} is in every condition (crossed)."
    where = f"{'is' if several == 1 else 'are'} in {'several' if conditions > 2 else 'both'} conditions"
    return "partly crossed", f"{several} of the {donors} donors {where} (partly crossed): {_numbers(replicates)}."


def _numbers(replicates: Replicates) -> str:
    counts = np.bincount(replicates.conditions, minlength=len(replicates.design.conditions))
    return ", ".join(f"{n} {name}" for n, name in zip(counts, replicates.design.conditions, strict=True))


def group_row(
    group: Group, source: StatisticsInput, *, stored_denoised: bool, measured: bool = True
) -> dict[str, object]:
    """Return the table row of one group: overlap, reuse of its cells as matches, and distortion if `measured`."""
    rows = np.arange(group.start, group.stop)
    cells = source.cells.iloc[group.start : group.stop]
    own = source.counterparts.edges(rows, [(group.code, group.code)])[group.code, group.code][1][:, 0]
    times = cells[keys.OBS_TIMES_MATCHED].to_numpy(dtype=np.float64)
    cells_read = min(group.cells, DISTORTION_CELLS, max(1, DISTORTION_VALUES // len(source.columns)))
    cells_read = cells_read if measured else 0
    correlation, difference = (
        distortion(rows[:cells_read], source, stored_denoised=stored_denoised) if cells_read else NOT_MEASURED
    )
    return {
        "group": group.name,
        "batch": source.design.batches[group.batch],
        "condition": source.design.conditions[group.condition],
        "cells": group.cells,
        **_overlap(cells),
        "own_distance": float(np.nanmedian(own)) if np.isfinite(own).any() else np.nan,
        "times_matched_mean": times.mean(),
        "times_matched_max": int(times.max()),
        "never_matched": float((times == 0).mean()),
        "effective_cells": effective_number(times),
        "effective_controls": effective_controls(group, source),
        "distortion_cells": cells_read,
        "correlation": correlation,
        "squared_difference": difference,
    }


def effective_controls(group: Group, source: StatisticsInput) -> float:
    """Return the effective number of control cells that the group is matched with; NaN for a control group."""
    if group.condition == 0:
        return np.nan
    rows = np.arange(group.start, group.stop)
    pairs = [(group.code, control.code) for control in source.design.counted(0, group)]
    edges = source.counterparts.edges(rows, pairs, distances=False)
    near = np.concatenate([rows[:, : source.counterparts.neighbours].ravel() for rows, _ in edges.values()])
    return effective_number(np.bincount(near[near >= 0]))


def _overlap(cells: pd.DataFrame) -> dict[str, float]:
    """Return the share of cells with a near control match and the median match distance; NaN if no cell has a match."""
    matched = cells[cells[keys.OBS_MATCH_DISTANCE].notna()]
    return {
        "overlap": float(matched[keys.OBS_OVERLAP].mean()) if len(matched) else np.nan,
        "match_distance": float(matched[keys.OBS_MATCH_DISTANCE].median()) if len(matched) else np.nan,
    }


def distortion(rows: np.ndarray, source: StatisticsInput, *, stored_denoised: bool) -> tuple[float, float]:
    """Return the correlation of denoised with measured expression, mean over cells, and the mean squared difference."""
    raw = source.expression.read(rows, source.columns).toarray().astype(np.float64)
    if stored_denoised:
        denoised = source.counterparts.dense(f"layers/{keys.LAYER_DENOISED}", rows, source.columns)
    else:
        question = layer_question(keys.LAYER_DENOISED)
        denoised = compute(question, source.counterparts, source.expression, rows, source.columns)
    denoised = denoised.astype(np.float64)
    x, y = (values - values.mean(axis=1, keepdims=True) for values in (raw, denoised))
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    varying = scale > 0
    correlation = float(((x * y).sum(axis=1)[varying] / scale[varying]).mean()) if varying.any() else np.nan
    return correlation, float(((raw - denoised) ** 2).mean())


def population_overlap(source: StatisticsInput, names: list[str], codes: np.ndarray) -> pd.DataFrame:
    """Return the overlap of every population in every condition, one row each."""
    conditions = source.design.group_conditions[source.design.group_of(np.arange(source.design.n_cells))]
    table = source.cells[[keys.OBS_MATCH_DISTANCE, keys.OBS_OVERLAP]]
    pairs = np.where(codes >= 0, codes * len(source.design.conditions) + conditions, -1)
    rows = []
    for pair, cells in table[codes >= 0].groupby(pairs[codes >= 0]):
        number, code = divmod(int(str(pair)), len(source.design.conditions))
        labels = {"population": names[number], "condition": source.design.conditions[code]}
        rows.append({**labels, "cells": len(cells), **_overlap(cells)})
    return pd.DataFrame(rows)


# --- mixing ----------------------------------------------------------------------------------------------------------


def mixing(source: StatisticsInput, populations: np.ndarray, cells: int) -> pd.DataFrame:
    """Return how well batches mix, in the input expression and in the embedding: one row per condition.

    Parameters
    ----------
    populations
        (cells,) population code of every packed row, -1 for none. Neighbours come from the same population and
        condition.
    cells
        Approximate size of the sample, which takes the same share of every group.
    """
    design = source.design
    condition_codes = range(MOST_MIXED if design.is_screen else len(design.conditions))
    groups = [group for group in design.groups if group.condition in condition_codes]
    share = min(1.0, cells / sum(group.cells for group in groups))
    rows = np.concatenate([np.arange(g.start, g.start + int(np.ceil(share * g.cells))) for g in groups])
    rows = rows[populations[rows] >= 0]
    name = f"obsm/{source.embedding}"
    embedded = source.counterparts.dense(name, rows, np.arange(open_array(source.storage, name).shape[1]))
    measured = principal_components(source.expression.read(rows, source.columns))
    of = design.group_of(rows)
    batches, conditions = np.array([group.batch for group in design.groups])[of], design.group_conditions[of]
    table = []
    for code in condition_codes:
        here = np.flatnonzero(conditions == code)
        strata = [here[populations[rows[here]] == p] for p in np.unique(populations[rows[here]])]
        strata = [part for part in strata if len(np.unique(batches[part])) > 1]
        cells_compared = sum(len(part) for part in strata)
        shares = [_shares(part, batches[part], (measured, embedded)) for part in strata]
        shares_of_condition = np.sum(shares, axis=0) / cells_compared if cells_compared else np.full(3, np.nan)
        table.append(
            {
                "condition": design.conditions[code], "cells": cells_compared, "batches": len(np.unique(batches[here])),
                **dict(zip(("expected", "input", "embedding"), shares_of_condition.tolist(), strict=True)),
            }
        )  # fmt: skip
    return pd.DataFrame(table)


def _shares(part: np.ndarray, batches: np.ndarray, points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the share of neighbours from other batches, summed over cells: expected by chance, and in both spaces."""
    _, code, counts = np.unique(batches, return_inverse=True, return_counts=True)
    others = len(part) - counts[code]
    sums = [float((others / (len(part) - 1)).sum())]
    for space in points:
        here = np.ascontiguousarray(space[part], dtype=np.float32)
        near = nearest(here, here, min(NEIGHBOURS, len(part) - 1), exclude=np.arange(len(part))).rows
        sums.append(float((batches[near] != batches[:, None]).mean(axis=1).sum()))
    return np.array(sums)


def principal_components(expression: sparse.csr_matrix | np.ndarray) -> np.ndarray:
    """Return the cells' coordinates on the leading principal axes: (cells, at most 50).

    With more genes than cells, the smaller Gram matrix (cells by cells) is decomposed instead of the covariance.
    """
    if expression.shape[1] > expression.shape[0]:
        return _by_cells(sparse.csr_matrix(expression, dtype=np.float64))
    values = np.asarray(expression if isinstance(expression, np.ndarray) else expression.toarray())
    centred = values - values.mean(axis=0)
    genes = centred.shape[1]
    _, axes = linalg.eigh(centred.T @ centred, subset_by_index=(max(0, genes - DIMENSIONS), genes - 1))
    return np.asarray(centred @ axes)


def _by_cells(expression: sparse.csr_matrix) -> np.ndarray:
    """Return the coordinates from the centred Gram matrix: eigenvectors times the square roots of the eigenvalues."""
    products = (expression @ expression.T).toarray()
    means = products.mean(axis=0)
    products += means.mean() - means[:, None] - means[None, :]
    cells = len(products)
    sizes, axes = linalg.eigh(products, subset_by_index=(max(0, cells - DIMENSIONS), cells - 1))
    return np.asarray(axes * np.sqrt(np.maximum(sizes, 0)))
