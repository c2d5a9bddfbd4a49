"""Tests with donors as replicates, on one value per donor and gene. Pure.

Input: `means`, (donors, genes), one row per donor (or per donor and condition, for donors seen in both), and which rows
are treated. Output: an effect and its p-value per gene. The main p-value permutes the donors' labels and so assumes no
distribution of expression. Welch's p-value is reported too, and is the main one where there are too few labellings for
small permutation p-values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from ndreamer_dist.errors import QueryError

MOST_LABELLINGS = 20_000
"""Labellings up to which all are enumerated; beyond it they are drawn at random."""
LEAST_DRAWS = 10_000
"""Least number of random labellings."""
DRAWS_PER_GENE = 20
"""Random labellings per gene, where this is more than `LEAST_DRAWS`."""
ENOUGH_LABELLINGS = 1_000
"""Possible labellings from which on the permutation p-value is the main one."""
LEAST_DONORS = 3
"""Donors per condition below which there are effects but no p-values; of paired donors, the number of pairs."""
TOO_FEW_DONORS = (
    f"no population has {LEAST_DONORS} donors per condition with enough cells each, "
    f"or {LEAST_DONORS} donors seen in both conditions"
)
"""The reason in messages when nothing could be tested."""
FEW_DONORS = 4
"""Donors in a condition up to which a test is flagged as one of few donors."""
LEAST_FLIPPED_PAIRS = 6
"""Pairs from which on signs are flipped; with fewer there is only the paired t-test."""
CHUNK = 2**18
"""Statistics in memory at a time during a permutation."""
TIE = 1e-9
"""Relative difference within which a permuted statistic counts as equal to the observed one."""
ROUNDING = 1e-12
"""Relative rounding error of a sum of squares."""
LARGEST_T = 1e5
"""Larger statistics are cut to this value: they arise only without noise."""
NO_VARIANCE = 1e-12
"""Variance, relative to a gene's squared scale, up to which it is rounding."""

PER_GENE = ("effect", "statistic", "p", "p_permutation", "p_parametric")
"""Fields of `DonorTest` with a value per gene."""

Method = Literal["permutation", "welch", "sign flips", "paired t", "linear model", "none"]


@dataclass(frozen=True)
class DonorTest:
    """Results of a test per gene; NaN where a gene could not be tested.

    Attributes
    ----------
    effect
        (genes,) mean over treated minus mean over control donors; paired: mean difference; linear model: coefficient.
    statistic
        (genes,) t statistic: Welch's, paired, or of the linear model.
    p
        (genes,) main two-sided p-value: `p_permutation` or `p_parametric`.
    p_permutation, p_parametric
        (genes,) p-values of the permutation and of the t distribution; NaN where there is none.
    method
        The method behind `p`.
    p_floor
        Smallest possible value of `p`; 0 for a parametric one, NaN without a test.
    few_donors
        Whether a condition has at most four donors.
    """

    effect: np.ndarray
    statistic: np.ndarray
    p: np.ndarray
    p_permutation: np.ndarray
    p_parametric: np.ndarray
    method: Method
    p_floor: float
    few_donors: bool


def welch_test(means: np.ndarray, treated: np.ndarray, *, seed: int = 0) -> DonorTest:
    """Compare treated with control donors by a permutation of Welch's t.

    Parameters
    ----------
    means
        (donors, genes), finite.
    treated
        (donors,) Boolean.
    seed
        Seed of the random labellings, which are used where there are too many to enumerate.

    Raises
    ------
    ValueError
        A condition has no donor.
    """
    every = welch_tests(means, np.asarray(treated, dtype=bool)[None], seed=seed)
    return with_arrays(every, lambda name: getattr(every, name)[0])


def welch_tests(means: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> DonorTest:
    """Run `welch_test` under several labellings; they share the permutations that they are compared with.

    Parameters
    ----------
    labels
        (labellings, donors) Boolean, with the same number of treated donors in each.

    Returns
    -------
    The tests, with arrays of (labellings, genes).

    Raises
    ------
    ValueError
        A condition has no donor.
    """
    counts = int(labels[0].sum()), int((~labels[0]).sum())
    if min(counts) == 0:
        msg = f"a test needs donors of both conditions, found {counts[0]} treated and {counts[1]} control"
        raise ValueError(msg)
    means = np.asarray(means, dtype=np.float64)
    effect = np.stack([means[treated].mean(axis=0) - means[~treated].mean(axis=0) for treated in labels])
    if min(counts) < LEAST_DONORS:
        return untested(effect)
    t, freedom = _welch(_centred(means), labels)
    parametric = 2 * stats.t.sf(np.abs(t), freedom)
    possible = math.comb(len(means), counts[0])
    complete = possible <= MOST_LABELLINGS
    permuted = labellings(len(means), counts[0], genes=means.shape[1], seed=seed)
    p = _permutation_p(_welch_reaching(_centred(means), t, permuted), t, len(permuted), observed_among=complete)
    floor = (2 if counts[0] == counts[1] else 1) / possible if complete else 1 / (len(permuted) + 1)
    permutation = DonorTest(effect, t, p, p, parametric, "permutation", floor, min(counts) <= FEW_DONORS)
    return _with_enough(permutation, possible, "welch")


def treated_queries_test(means: np.ndarray, treated: np.ndarray, *, seed: int = 0) -> DonorTest:
    """Compare treated with control donors on `A[e, d]` averaged over treated e (see `stats.populations`).

    The query donors e depend on the labels, so every labelling averages A anew. There is no parametric p-value.

    Parameters
    ----------
    means
        (donors e, donors d, genes) A, finite.
    treated
        (donors,) Boolean.
    """
    treated = np.asarray(treated, dtype=bool)
    counts = int(treated.sum()), int((~treated).sum())
    observed = means[treated].mean(axis=0)
    effect = observed[treated].mean(axis=0) - observed[~treated].mean(axis=0)
    if min(counts) < LEAST_DONORS:
        return untested(effect)
    t = _welch(_centred(observed), treated[None])[0][0]
    labels = labellings(len(treated), counts[0], genes=means.shape[2], seed=seed)
    complete = math.comb(len(treated), counts[0]) <= MOST_LABELLINGS
    reached = np.zeros(means.shape[2], dtype=np.int64)
    for label in labels:
        permuted = _welch(_centred(means[label].mean(axis=0)), label[None])[0][0]
        reached += np.where(np.isnan(permuted), 0.0, np.abs(permuted)) >= np.abs(t) * (1 - TIE)
    p = reached / len(labels) if complete else (reached + 1) / (len(labels) + 1)
    p = np.where(np.isfinite(t), p, np.nan)
    floor = 1 / len(labels) if complete else 1 / (len(labels) + 1)
    return DonorTest(effect, t, p, p, np.full(len(p), np.nan), "permutation", floor, min(counts) <= FEW_DONORS)


def paired_test(differences: np.ndarray, *, seed: int = 0) -> DonorTest:
    """Test treated minus control means of paired donors: paired t-test, and from six donors on, sign flips.

    Parameters
    ----------
    differences
        (donors, genes), finite.

    Raises
    ------
    ValueError
        There is no donor.
    """
    differences = np.asarray(differences, dtype=np.float64)
    pairs, genes = differences.shape
    if pairs == 0:
        msg = "a paired test needs donors that were seen in both conditions"
        raise ValueError(msg)
    effect = differences.mean(axis=0)
    if pairs < LEAST_DONORS:
        return untested(effect)
    t = _paired(differences, np.ones((1, pairs)))[0]
    parametric = 2 * stats.t.sf(np.abs(t), pairs - 1)
    few = pairs <= FEW_DONORS
    if pairs < LEAST_FLIPPED_PAIRS:
        return DonorTest(effect, t, parametric, np.full(genes, np.nan), parametric, "paired t", 0.0, few)
    possible = 2**pairs
    complete = possible <= MOST_LABELLINGS
    signs = sign_flips(pairs, genes=genes, seed=seed)
    p = _permutation_p(_paired_reaching(differences, t, signs), t, len(signs), observed_among=complete)
    floor = 2 / possible if complete else 1 / (len(signs) + 1)
    return _with_enough(DonorTest(effect, t, p, p, parametric, "sign flips", floor, few), possible, "paired t")


def linear_test(means: np.ndarray, treated: np.ndarray, covariates: np.ndarray) -> DonorTest:
    """Test the condition in a linear model with donor covariates, by ordinary least squares.

    There is no p-value with fewer than three donors in a condition, or without a residual degree of freedom.

    Parameters
    ----------
    means, treated
        As in `welch_test`.
    covariates
        (donors, columns) numbers; an intercept is added.

    Raises
    ------
    QueryError
        The covariates determine the condition.
    """
    means = np.asarray(means, dtype=np.float64)
    design = np.column_stack([np.asarray(treated, dtype=np.float64), np.ones(len(means)), covariates])
    freedom = len(design) - np.linalg.matrix_rank(design)
    others = np.linalg.lstsq(design[:, 1:], design[:, 0], rcond=None)[0]
    own = design[:, 0] - design[:, 1:] @ others  # the condition, orthogonal to the covariates
    if own @ own < 1e-8:
        msg = "the covariates determine the condition, so its effect cannot be told from theirs; name fewer"
        raise QueryError(msg)
    effect = own @ means / (own @ own)
    few = int(min(np.sum(treated), np.sum(~np.asarray(treated, dtype=bool))))
    if few < LEAST_DONORS or freedom < 1:
        return untested(effect)
    residual = means - design @ np.linalg.lstsq(design, means, rcond=None)[0]
    variance = (residual**2).sum(axis=0) / freedom / (own @ own)
    t = _ratio(effect, np.sqrt(variance), _scale(means))
    p = 2 * stats.t.sf(np.abs(t), freedom)
    return DonorTest(effect, t, p, np.full(len(p), np.nan), p, "linear model", 0.0, few <= FEW_DONORS)


def left_out_effects(values: np.ndarray, treated: np.ndarray, covariates: np.ndarray | None = None) -> np.ndarray:
    """Return the effect without each donor in turn: (donors, genes); NaN if a condition then has no donor.

    Parameters
    ----------
    values
        (donors, genes).
    covariates
        (donors, columns) covariates of the linear model, if it is the test.
    """
    treated = np.asarray(treated, dtype=np.float64)
    others = np.ones((len(treated), 1)) if covariates is None else np.column_stack([np.ones(len(treated)), covariates])
    weights = np.full((len(treated), len(treated)), np.nan)
    for left in range(len(treated)):
        kept = np.arange(len(treated)) != left
        known = others[kept] @ np.linalg.lstsq(others[kept], treated[kept], rcond=None)[0]
        own = treated[kept] - known
        if own @ own > 1e-8:  # else intercept and covariates determine the condition
            weights[left] = 0.0
            weights[left, kept] = own / (own @ own)
    return np.asarray(weights @ values)


def left_out_differences(differences: np.ndarray) -> np.ndarray:
    """Return the mean difference without each paired donor in turn: (donors, genes); NaN for a single donor."""
    if len(differences) < 2:
        return np.full(differences.shape, np.nan)
    return np.asarray((differences.sum(axis=0) - differences) / (len(differences) - 1))


def labellings(donors: int, treated: int, *, genes: int, seed: int = 0) -> np.ndarray:
    """Return labellings, (labellings, donors) Boolean, True for treated: all up to 20 000, else random draws.

    The number of draws is `max(10 000, 20 x genes)`.
    """
    if math.comb(donors, treated) <= MOST_LABELLINGS:
        chosen = np.array(list(itertools.combinations(range(donors), treated)))
    else:
        generator = np.random.default_rng((seed, donors, treated))
        draws = max(LEAST_DRAWS, DRAWS_PER_GENE * genes)
        chosen = np.concatenate(
            [generator.random((part, donors)).argsort(axis=1)[:, :treated] for part in _parts(draws, CHUNK // donors)]
        )
    labels = np.zeros((len(chosen), donors), dtype=bool)
    np.put_along_axis(labels, chosen, values=True, axis=1)
    return labels


def sign_flips(pairs: int, *, genes: int, seed: int = 0) -> np.ndarray:
    """Return signs, (flips, pairs) of +1 and -1: all up to 20 000, else as many random draws as `labellings` makes."""
    if 2**pairs <= MOST_LABELLINGS:
        return 1.0 - 2.0 * (np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1)
    draws = max(LEAST_DRAWS, DRAWS_PER_GENE * genes)
    return np.random.default_rng((seed, pairs)).choice([-1.0, 1.0], size=(draws, pairs))


def _permutation_p(reached: np.ndarray, observed: np.ndarray, labellings: int, *, observed_among: bool) -> np.ndarray:
    """Return the share of labellings that reach the observed statistic.

    With `observed_among`, all labellings were enumerated; else the observed one is added to the random draws.
    """
    share = reached / labellings if observed_among else (reached + 1) / (labellings + 1)
    return np.where(np.isnan(observed), np.nan, share.reshape(observed.shape))


def _bounds(observed: np.ndarray) -> np.ndarray:
    """Return the least t² that reaches the observed statistic: (labellings, genes); 0 for a zero up to rounding."""
    size = np.minimum(np.abs(np.atleast_2d(observed)), LARGEST_T) * (1 - TIE)
    return np.asarray(np.where(size < ROUNDING, 0.0, size) ** 2)


def _welch_reaching(means: np.ndarray, observed: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many labellings have a Welch's |t| as large as each observed one: (observed labellings, genes).

    The means are centred, so the sum f over the n treated donors is minus the sum over the m others. Let q be the sum
    of squares over the treated, S over all donors: t² = f² (1/n + 1/m)² / (q/(n(n-1)) + (S-q)/(m(m-1)) - f²
    (1/(n²(n-1)) + 1/(m²(m-1)))). The comparison needs no division per labelling; if n = m, q cancels.
    """
    n, m = int(labels[0].sum()), int((~labels[0]).sum())
    treated, others = 1 / (n * (n - 1)), 1 / (m * (m - 1))
    bounds = _bounds(observed)
    factor = (1 / n + 1 / m) ** 2 + bounds * (treated / n + others / m)
    share, squares = bounds * (1 - ROUNDING) / factor, means**2
    fixed, total = share * others, squares.sum(axis=0)
    counts = np.zeros(bounds.shape, dtype=np.int64)
    for start in _starts(len(labels), max(1, CHUNK // means.shape[1])):
        weight = labels[start].astype(np.float64)
        sums = np.square(weight @ means)
        chosen = None if n == m else weight @ squares
        for place, (constant, slope) in enumerate(zip(fixed * total, share * (treated - others), strict=True)):
            limit = constant if chosen is None else constant + slope * chosen
            counts[place] += np.count_nonzero(sums >= limit, axis=0)
    return counts


def _paired_reaching(differences: np.ndarray, observed: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return how many sign flips have a paired |t| as large as the observed one: (1, genes).

    Let f be the signed sum of n differences, S the sum of their squares: t² = f² (n-1) / (n S - f²).
    """
    n, bounds = len(differences), _bounds(observed)
    limits = bounds * (1 - ROUNDING) / (n - 1 + bounds) * n * (differences**2).sum(axis=0)
    counts = np.zeros(bounds.shape, dtype=np.int64)
    for start in _starts(len(signs), max(1, CHUNK // differences.shape[1])):
        sums = np.square(signs[start] @ differences)
        for count, limit in zip(counts, limits, strict=True):
            count += np.count_nonzero(sums >= limit, axis=0)
    return counts


def _welch(means: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Welch's t and its degrees of freedom under every labelling: (labellings, genes) each."""
    weight = labels.astype(np.float64)
    n, m = weight.sum(1)[:, None], (1 - weight).sum(1)[:, None]
    squares = means**2
    first, second = weight @ means, weight @ squares
    rest, rest_second = means.sum(0) - first, squares.sum(0) - second
    v = np.maximum(second - first**2 / n, 0) / (n - 1) / n
    w = np.maximum(rest_second - rest**2 / m, 0) / (m - 1) / m
    t = _ratio(first / n - rest / m, np.sqrt(v + w), _scale(means))
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = (v + w) ** 2 / (v**2 / (n - 1) + w**2 / (m - 1))
    return t, freedom


def _paired(differences: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return the paired t under every flip of signs: (flips, genes)."""
    n = len(differences)
    mean = signs @ differences / n
    variance = np.maximum((differences**2).sum(0) - n * mean**2, 0) / (n - 1)
    return _ratio(mean, np.sqrt(variance / n), np.sqrt((differences**2).mean(0)))


def _ratio(effect: np.ndarray, error: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return effect / error; where the error is zero up to rounding, infinite, or NaN if the effect is zero too."""
    no_error = error <= math.sqrt(NO_VARIANCE) * scale
    no_effect = np.abs(effect) <= math.sqrt(NO_VARIANCE) * scale
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where(no_error, np.where(no_effect, np.nan, np.copysign(np.inf, effect)), effect / error)
    return np.asarray(t)


def _scale(means: np.ndarray) -> np.ndarray:
    return np.asarray(means.std(axis=0))


def _centred(means: np.ndarray) -> np.ndarray:
    """Return means minus their average over donors, so that sums of squares lose no digits; no statistic changes."""
    return means - means.mean(axis=0)


def _with_enough(test: DonorTest, possible: int, otherwise: Method) -> DonorTest:
    """Return the test with the main p-value: the parametric one where possible labellings are too few.

    p-values are NaN for genes without a finite statistic.
    """
    permutation, parametric = (
        np.where(np.isfinite(test.statistic), p, np.nan) for p in (test.p_permutation, test.p_parametric)
    )
    test = replace(test, p=permutation, p_permutation=permutation, p_parametric=parametric)
    return test if possible >= ENOUGH_LABELLINGS else replace(test, p=parametric, method=otherwise, p_floor=0.0)


def with_arrays(test: DonorTest, array: Callable[[str], np.ndarray]) -> DonorTest:
    """Return the test with the arrays that `array` returns by field name."""
    changed: dict[str, Any] = {name: array(name) for name in PER_GENE}
    return replace(test, **changed)


def untested(effect: np.ndarray) -> DonorTest:
    """Return effects without a test: every other array is NaN."""
    nothing = np.full(effect.shape, np.nan)
    return DonorTest(effect, nothing, nothing, nothing, nothing, "none", math.nan, few_donors=True)


def _parts(total: int, most: int) -> Iterator[int]:
    for start in range(0, total, max(1, most)):
        yield min(max(1, most), total - start)


def _starts(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, start + step)
