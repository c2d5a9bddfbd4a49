"""Covariates of donors are constant columns of obs, centred and scaled over the replicates that are compared."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ndreamer_dist.grouping.covariates import as_numbers, constant_columns


def test_cells_of_other_conditions_have_no_say_in_the_covariates_of_two() -> None:
    cells = pd.DataFrame({"sex": list("mmfmff"), "age": [20.0, 20.0, 40.0, 7.0, 9.0, 60.0]})
    replicates = np.array([0, 0, 1, -1, -1, 2])
    table = constant_columns(cells, replicates)
    pd.testing.assert_frame_equal(table, pd.DataFrame({"sex": list("mff"), "age": [20.0, 40.0, 60.0]}))
    numbers = as_numbers(cells, replicates, np.arange(3), ("one", "two", "three"))
    np.testing.assert_allclose(numbers[:, 0] * np.sqrt(2 / 3), [-1, 0, 1])
