"""The interaction of two factors: the difference between two contrasts, with donors as replicates.

Input: the donors' means of both contrasts (`Results.donor_means`). Output: a row per population and gene.
"""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
from scipy import stats

from ndreamer_dist.results.reader import PopulationLabels
from ndreamer_dist.stats.results import Results
from ndreamer_dist.stats.sign_test import benjamini_hochberg

SIGNS = (1, -1, -1, 1)
"""Signs of the means in a difference of differences: first condition, its baseline, second condition, its baseline."""


def interaction(
    results: Results,
    by: PopulationLabels,
    first: tuple[str, str],
    second: tuple[str, str],
    *,
    donor_key: str | None = None,
) -> pd.DataFrame:
    """Return how much the effect of contrast `first` differs from that of `second`: the interaction of two factors.

    Parameters
    ----------
    by, donor_key
        As in `Results.donor_means`.
    first, second
        A condition and its baseline each, e.g. `("drug:mut", "none:mut")` and `("drug:wt", "none:wt")`.

    Returns
    -------
    A DataFrame with a row per population and gene: `interaction`, the effect of the first contrast minus that of the
    second; Welch's `statistic` and `p`; `p_adjusted` over the genes of a population; the number of `donors`. All donors
    of `donor_means` take part, also those that `cate` leaves out because they have no pair. A donor seen under several
    of the four conditions is treated as paired. Populations with fewer than two donors under any of the four are left
    out.

    Raises
    ------
    QueryError
        A name is unknown, or there is neither a donor column nor a batch key.
    """
    results, by = results.labelled(by)
    column = str(by)
    means = [results.donor_means(column, condition=c, baseline=b, donor_key=donor_key) for c, b in (first, second)]
    return interaction_table(means, column, (*first, *second))


def interaction_table(means: list[anndata.AnnData], by: str, names: tuple[str, ...]) -> pd.DataFrame:
    """Return the interaction in every population with two donors under each of the four conditions.

    Parameters
    ----------
    means
        `Results.donor_means` of both contrasts.
    by
        Column of `obs` with the populations.
    names
        The four conditions, in the order of `SIGNS`.
    """
    keyed = [side.to_df().set_axis(pd.MultiIndex.from_frame(side.obs[[by, "condition", "donor"]])) for side in means]
    groups = pd.concat(keyed, keys=(0, 1)).groupby(level=[0, 1, 2])
    sides = {key: part.droplevel([0, 1, 2]) for key, part in groups if len(part) >= 2}
    tables = []
    for population in means[0].obs[by].unique():
        arms = [(side, population, name) for side, name in zip((0, 0, 1, 1), names, strict=True)]
        if set(arms) <= set(sides):
            tables.append(difference_of_differences([sides[key] for key in arms]).assign(**{by: population}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def difference_of_differences(sides: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the interaction and its test, a row per gene.

    The squared error is summed over donors, so that a donor's means under several conditions are treated as paired.
    With four disjoint sets of donors this is Welch's t for four means; with a single set it is the t-test of the
    donors' own differences of differences.

    Parameters
    ----------
    sides
        (donors, genes) means under the four conditions, in the order of `SIGNS`, of at least two donors each.
    """
    signed = [sign * side for sign, side in zip(SIGNS, sides, strict=True)]
    effect = sum(side.mean().to_numpy() for side in signed)
    parts = [(side - side.mean()) / np.sqrt(len(side) * (len(side) - 1)) for side in signed]
    squares = pd.concat(parts).groupby(level=0).sum() ** 2
    # Donors seen under the same set of conditions share a variance.
    alike = squares.groupby(np.array([str([name in side.index for side in sides]) for name in squares.index]))
    error = squares.sum().to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = error**2 / (alike.sum() ** 2).div((alike.size() - 1).clip(lower=1), axis=0).sum().to_numpy()
        statistic = effect / np.sqrt(error)
        p = 2 * stats.t.sf(np.abs(statistic), freedom)
    table = {"gene": sides[0].columns, "interaction": effect, "statistic": statistic, "p": p}
    return pd.DataFrame({**table, "p_adjusted": benjamini_hochberg(p), "donors": len(squares)})
