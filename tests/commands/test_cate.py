"""What `cate` prints of the table that it has written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ndreamer_dist.commands.cate import TableCounts


def test_the_readings_add_up_to_the_rows() -> None:
    rows = [("within", 0.5), ("neither", 0.5), ("", 0.5), ("", np.nan), ("", np.nan)]
    part = pd.DataFrame(rows, columns=["reading", "state_reliability"])
    part = part.assign(population="T", p=0.5, p_adjusted=0.5, within_state_p=0.5)
    counts = TableCounts()
    counts.add(part)
    counts.add(part)
    said = list(counts.lines(Path("x.csv")))
    assert said[0].startswith("wrote x.csv: 1 populations, 10 rows")
    assert said[1].endswith(
        ": within 2, state 0, both 0, neither 2; no reading 6 "
        "(4 of populations without coordinates of state, 2 without a test)"
    )
    full = TableCounts()
    full.add(part.iloc[:2])
    assert list(full.lines(Path("x.csv")))[1].endswith("neither 1")
