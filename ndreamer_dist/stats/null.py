"""The calibration of the tests: p-values under permuted donor labels, where there is no effect.

Input: the results of a run. Output: the number of p-values below each level, per population, labelling and test. Each
labelling is treated as the truth, and all tests are run on it. Donors' means do not depend on the labels, so they are
computed once, and permutations read no cells. The sign test is over cells and uses a sample of them.

The permutation test holds its level by construction; the table shows how far the other tests are off on the same cells.
Whether *training* favours the true labels can only be seen by training on permuted labels (`jobs/benchmark_null.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse, special

from ndreamer_dist.effects.expression import HELD_VALUES, Expression
from ndreamer_dist.errors import QueryError
from ndreamer_dist.stats.cate_table import (
    CateQuestion,
    MatchedNeighbours,
    StatisticsInput,
    conditions_of,
    kept_replicates,
    means_of,
    pairs_of,
    populations_of,
    replicates_of,
    space_of,
)
from ndreamer_dist.stats.donor_tests import (
    LEAST_DONORS,
    TOO_FEW_DONORS,
    DonorTest,
    paired_test,
    welch_tests,
    with_arrays,
)
from ndreamer_dist.stats.populations import Nearest, Replicates, first_cells

LEVELS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Levels at which p-values are counted."""
ATTEMPTS = 200
"""Random draws per requested labelling, at most: with few donors, few labellings are distinct."""
SIGN_CELLS = 2_000
"""Approximate most cells of a population in the sign test; with more cells its p-values are further off."""
NO_EFFECT = 1e-9
"""Absolute effect of a cell below which it is rounding and counts as zero."""


def null_table(source: StatisticsInput, question: CateQuestion, *, count: int, seed: int) -> pd.DataFrame:
    """Return the table; `Results.null` documents arguments and columns."""
    conditions = conditions_of(source.design, question.condition)
    names, codes = populations_of(source.cells, question.by)
    everyone = replicates_of(source, question.donor_key)
    space = space_of(source, question, codes, everyone)
    tables = []
    for code in conditions:
        replicates = everyone.against(0, code)
        if not _testable(replicates, replicates.counts(codes) >= question.min_cells, code):
            continue
        means = means_of(source, codes, replicates, question.min_cells, space)
        sample = sampled(codes, replicates, MatchedNeighbours(source))
        for number, name in enumerate(names):
            kept, paired = kept_replicates(replicates, means.included[number], code)
            pairs = pairs_of(replicates, kept) if paired else None
            truth = replicates.conditions[kept] != 0
            if min(truth.sum(), (~truth).sum()) < LEAST_DONORS:
                continue
            labels = permuted_labels(truth, count, np.random.default_rng((seed, number, code)), pairs)
            if not len(labels):
                continue
            matched, own = means.matched[number, kept], means.own[number, kept]
            p_values = donor_p(matched, own, labels, pairs, seed=source.seed)
            if space is not None and space.dimensions[number]:
                within = means.within[number, kept]
                for test, values in (("within_state", within), ("state_shift", own - within)):
                    p_values[test] = tests_of_labellings(values, labels, pairs, source.seed).p
            p_values["sign"] = sign_p(sample.of(number, kept, replicates), labels, source.expression, source.columns)
            counts = counted_below(p_values)
            donors = {"treated_donors": truth.sum(), "control_donors": (~truth).sum()}
            tested = {"population": name, "condition": source.design.conditions[code], **donors}
            tables.append((number, pd.DataFrame(tested, index=counts.index).join(counts)))
    if not tables:
        msg = f"there is no test to calibrate: {TOO_FEW_DONORS}"
        raise QueryError(msg)
    return pd.concat([part for _, part in sorted(tables, key=lambda part: part[0])], ignore_index=True)


def _testable(replicates: Replicates, included: np.ndarray, code: int) -> bool:
    """Return whether some population has enough donors in the condition and in the control."""
    treated = (replicates.conditions == code)[None] & included
    return bool((np.minimum(treated.sum(axis=1), (included & ~treated).sum(axis=1)) >= LEAST_DONORS).any())


def rates(
    table: pd.DataFrame, by: Sequence[str] = ("test",), levels: Sequence[float] = (0.05, 0.01, 0.001)
) -> pd.DataFrame:
    """Return the share of p-values at or below each level, pooled over everything but `by`: one column per level."""
    chosen = table[table["level"].isin(levels)]
    sums = chosen.groupby([*by, "level"], sort=False, observed=True)[["below", "tests"]].sum()
    return (sums["below"] / sums["tests"]).unstack("level")[list(levels)]


def permuted_labels(
    truth: np.ndarray, count: int, generator: np.random.Generator, pairs: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Return random labellings: (labellings, donors) Boolean, True for treated.

    All are distinct from each other and from the truth, also after an exchange of treated and control.

    Parameters
    ----------
    truth
        (donors,) Boolean, which are treated.
    count
        Number of labellings; fewer are returned if there are fewer.
    pairs
        Positions of the treated and the control rows of paired donors; labels are then exchanged only within pairs.
    """
    labellings: list[np.ndarray] = []
    seen = {truth.tobytes(), (~truth).tobytes()}
    for _ in range(ATTEMPTS * count):
        if len(labellings) == count:
            break
        if pairs is None:
            labelling = generator.permutation(truth)
        else:
            labelling = truth.copy()
            labelling[pairs[0]] = generator.random(len(pairs[0])) < 0.5
            labelling[pairs[1]] = ~labelling[pairs[0]]
        if labelling.tobytes() not in seen:
            labellings.append(labelling)
            seen |= {labelling.tobytes(), (~labelling).tobytes()}
    return np.array(labellings, dtype=bool).reshape(len(labellings), len(truth))


def donor_p(
    matched: np.ndarray,
    own: np.ndarray,
    labels: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the p-values of the donor-level tests under every labelling: (labellings, genes) by name of the test.

    Parameters
    ----------
    matched, own
        (donors, genes) means through the matches, and plain means.
    labels
        (labellings, donors) Boolean.
    pairs
        As in `permuted_labels`.
    """
    through, plain = (tests_of_labellings(values, labels, pairs, seed) for values in (matched, own))
    return {
        "main": through.p,
        "permutation": through.p_permutation,
        "welch": through.p_parametric,
        "pseudobulk": plain.p,
    }


def tests_of_labellings(
    values: np.ndarray, labels: np.ndarray, pairs: tuple[np.ndarray, np.ndarray] | None, seed: int
) -> DonorTest:
    """Return the donor-level test of (donors, genes) under every labelling; `pairs` as in `permuted_labels`."""
    if pairs is None:
        return welch_tests(values, labels, seed=seed)
    signs = np.where(labels[:, pairs[0]], 1.0, -1.0)
    differences = values[pairs[0]] - values[pairs[1]]
    tests = [paired_test(differences * sign[:, None], seed=seed) for sign in signs]
    return with_arrays(tests[0], lambda name: np.stack([getattr(test, name) for test in tests]))


def counted_below(p_values: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return a table with the number of p-values, (labellings, genes) by test, at or below each level."""
    parts = []
    for test, p in p_values.items():
        below = np.stack([(p <= level).sum(axis=1) for level in LEVELS], axis=1)
        frame = pd.DataFrame({"below": below.ravel(), "tests": np.isfinite(p).sum(axis=1).repeat(len(LEVELS))})
        frame.insert(0, "labelling", np.arange(len(p)).repeat(len(LEVELS)))
        frame.insert(1, "test", test)
        frame.insert(2, "level", np.tile(LEVELS, len(p)))
        parts.append(frame[frame["tests"] > 0])
    table = pd.concat(parts, ignore_index=True)
    return table.assign(share=table["below"] / table["tests"])


# --- the sign test ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignTestCells:
    """Cells of one population, with their counterparts in every piece of the tested donors.

    Attributes
    ----------
    owner
        (cells,) position of the cell's donor among the tested ones.
    near
        (cells, pieces) packed rows of the counterparts; in its own piece a cell is its own counterpart.
    donor
        (pieces,) position of the piece's donor among the tested ones.
    """

    owner: np.ndarray
    near: np.ndarray
    donor: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A sample of every population's cells, with their counterparts in all pieces; see `SignTestCells`."""

    rows: np.ndarray
    populations: np.ndarray
    near: np.ndarray

    def of(self, population: int, kept: np.ndarray, replicates: Replicates) -> SignTestCells:
        """Return the cells of one population that are in the replicates `kept`."""
        place = np.full(len(replicates), -1)
        place[kept] = np.arange(len(kept))
        donor = place[[piece.replicate for piece in replicates.pieces]]
        owner = place[replicates.of_cell[self.rows]]
        chosen = (self.populations == population) & (owner >= 0)
        return SignTestCells(owner[chosen], self.near[chosen][:, donor >= 0], donor[donor >= 0])


def sampled(populations: np.ndarray, replicates: Replicates, nearest: Nearest, most: int = SIGN_CELLS) -> Sample:
    """Return a sample of about `most` cells of every population: the first of each piece, which are in random order."""
    rows = first_cells(replicates.pieces, populations, most)
    near = [
        np.stack([part if one is other else nearest(part, other.rows, one.rows) for other in replicates.pieces], axis=1)
        for one, part in zip(replicates.pieces, rows, strict=True)
        if len(part)
    ]
    every = np.concatenate(rows)
    return Sample(every, populations[every], np.concatenate(near))


def sign_p(cells_of_test: SignTestCells, labels: np.ndarray, expression: Expression, columns: np.ndarray) -> np.ndarray:
    """Return the sign test's p-values (METHOD section 7) under every labelling: (labellings, genes).

    Under a labelling, cells of treated donors have an effect: the mean expression of their counterparts over treated
    donors, their own included, minus that over control donors.
    """
    shape = len(labels), len(columns)
    cells, signed = np.zeros((len(labels), 1)), np.zeros(shape)  # positive minus negative effects
    pieces = np.bincount(cells_of_test.donor, minlength=labels.shape[1])
    for part in _parts(len(cells_of_test.owner), len(cells_of_test.donor), expression.density * len(columns)):
        near, owner = cells_of_test.near[part], cells_of_test.owner[part]
        held, place = np.unique(near, return_inverse=True)
        values, place = expression.read(held, columns), place.reshape(near.shape)
        for number, treated in enumerate(labels):
            side = np.where(treated, 1 / treated.sum(), -1 / (~treated).sum()) / pieces
            here = treated[owner]
            effects = _averaged(place[here], side[cells_of_test.donor], len(held)) @ values
            large = np.abs(effects.data) > NO_EFFECT
            signed[number] += np.bincount(effects.indices[large], np.sign(effects.data[large]), minlength=len(columns))
            cells[number] += here.sum()
    with np.errstate(invalid="ignore"):
        return np.asarray(special.erfc(np.abs(signed) / np.sqrt(2 * cells)))


def _averaged(place: np.ndarray, weights: np.ndarray, held: int) -> sparse.csr_matrix:
    """Return the matrix of weighted sums over counterparts: (cells, held rows).

    Parameters
    ----------
    place, weights
        (cells, pieces) positions among the held rows, and (pieces,) weights.
    """
    starts = np.arange(len(place) + 1) * place.shape[1]
    return sparse.csr_matrix((np.tile(weights, len(place)), place.ravel(), starts), shape=(len(place), held))


def _parts(cells: int, pieces: int, stored: float) -> Iterator[slice]:
    step = max(1, int(HELD_VALUES / max(1.0, pieces * stored)))
    for start in range(0, cells, step):
        yield slice(start, start + step)
