"""Covariates of donors: find the columns of obs that are constant in each donor, and encode them as numbers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.errors import QueryError, listing


def constant_columns(cells: pd.DataFrame, replicates: np.ndarray) -> pd.DataFrame:
    """Return the columns of obs that are constant in every replicate, without ours: one row per replicate.

    Parameters
    ----------
    cells
        `obs`, one row per cell.
    replicates
        (cells,) number of each cell's replicate; -1 for cells without one.
    """
    cells, replicates = cells[replicates >= 0], replicates[replicates >= 0]
    constant = {}
    for name in cells.columns:
        if not str(name).startswith(keys.OBS_PREFIX):
            groups = cells[name].groupby(replicates, observed=True)
            if (groups.nunique(dropna=False) == 1).all():
                constant[str(name)] = groups.first().to_numpy()
    return pd.DataFrame(constant, index=range(int(replicates.max()) + 1))


def as_numbers(cells: pd.DataFrame, replicates: np.ndarray, kept: np.ndarray, donors: Sequence[str]) -> np.ndarray:
    """Return covariates as numeric columns, centred and scaled; a categorical becomes indicator columns.

    Centring keeps large numbers, such as dates or read counts, from swamping the condition in a linear model.

    Parameters
    ----------
    cells
        Covariates, one row per cell.
    replicates
        (cells,) number of each cell's replicate; -1 for cells without one.
    kept
        Numbers of the replicates to return, in order.
    donors
        Name of each replicate's donor.

    Returns
    -------
    (kept replicates, columns) float64.

    Raises
    ------
    QueryError
        A covariate differs between cells of a replicate, or is missing for one.
    """
    table = constant_columns(cells, replicates)
    if varying := [name for name in cells if name not in table]:
        msg = f"{listing(varying)} differs between cells of one donor and condition, so is not a covariate of donors"
        raise QueryError(msg)
    table = table.loc[kept, list(cells)]
    for name, values in table.items():
        if values.isna().any():
            without = listing(dict.fromkeys(donors[r] for r in values.index[values.isna()]))
            msg = f"covariate {str(name)!r} is not known of the donors {without}; give it (`annotate`), or leave the covariate out"
            raise QueryError(msg)
    numbers = pd.get_dummies(table.convert_dtypes(), drop_first=True).to_numpy(dtype=np.float64)
    numbers -= numbers.mean(axis=0)
    spread = numbers.std(axis=0)
    return np.asarray(numbers / np.where(spread > 0, spread, 1.0))
