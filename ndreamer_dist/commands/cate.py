"""Write the whole CATE table to a file: `ndreamer-dist cate`. The table of a screen is written part by part."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from ndreamer_dist.results.export import SEPARATORS, TABLES, checked, replaced, save_table
from ndreamer_dist.stats.donor_tests import TOO_FEW_DONORS
from ndreamer_dist.stats.results import Results
from ndreamer_dist.stats.sign_test import benjamini_hochberg

ROWS_TOGETHER = 65_536
"""Minimum number of rows of a part of a screen's table."""


@dataclass
class TableCounts:
    """Counts over the rows of a CATE table, updated part by part.

    Attributes
    ----------
    rows
        Number of rows.
    called
        Rows with an adjusted p-value below 0.05.
    tested
        Whether any row has a p-value.
    parted
        Whether any effect is split into the part within a state and the part of a change of state.
    populations
        Names of the populations.
    readings
        Number of rows per value of the column `reading`.
    without_state
        Rows without a reading because their population has no coordinates of state.
    """

    rows: int = 0
    called: int = 0
    tested: bool = False
    parted: bool = False
    populations: set[str] = field(default_factory=set)
    readings: Counter[str] = field(default_factory=Counter)
    without_state: int = 0

    def add(self, part: pd.DataFrame) -> None:
        """Count the rows of a part."""
        self.rows += len(part)
        self.called += int((part["p_adjusted"] < 0.05).sum())
        self.tested |= bool(part["p"].notna().any())
        self.parted |= bool(part["within_state_p"].notna().any())
        self.populations |= set(part["population"].unique())
        self.readings.update(part["reading"])
        self.without_state += int((part["state_reliability"].isna() & (part["reading"] == "")).sum())

    def lines(self, out: Path) -> Iterator[str]:
        """Yield the lines that the command prints."""
        called = f"{self.called} with p_adjusted < 0.05" if self.tested else f"no test was possible: {TOO_FEW_DONORS}"
        yield f"wrote {out}: {len(self.populations)} populations, {self.rows} rows, {called}"
        if self.parted:
            kinds = ", ".join(f"{word} {self.readings[word]}" for word in ("within", "state", "both", "neither"))
            yield f"in cells of the same state, or by a change of state (adjusted p <= 0.05): {kinds}{self._unread()}"

    def _unread(self) -> str:
        """Return how many rows have no reading, and why."""
        untested = self.readings[""] - self.without_state
        why = [f"{self.without_state} of populations without coordinates of state"] if self.without_state else []
        why += [f"{untested} without a test"] if untested else []
        return f"; no reading {self.readings['']} ({', '.join(why)})" if why else ""


def write_cate(results: Results, out: str | os.PathLike[str], *, condition: str | None, **options: Any) -> TableCounts:
    """Write the CATE table to `.csv`, `.tsv` or `.parquet`, and return its counts; arguments as of `Results.cate`.

    For all conditions of a screen, memory holds the rows of a few conditions and all p-values. The rows are then sorted by
    condition and inside it by population; in other cohorts by population and inside it by condition.
    """
    target, counts = checked(out, TABLES), TableCounts()
    if condition is not None or not results.design.is_screen:
        table = results.cate(condition=condition, **options)
        counts.add(table)
        save_table(table, target)
        return counts
    with replaced(target) as file:
        first, p = file.with_name(f"{file.name}.parts"), []
        with _TableWriter(first) as writer:
            for part in _joined(results.cate_parts(**options)):
                counts.add(part)
                p.append(part["p"].to_numpy())
                writer.write(part)
        # The adjustment over all conditions needs every p-value, so a second pass adds it.
        adjusted = benjamini_hochberg(np.concatenate(p))
        with parquet.ParquetFile(first) as parts, _TableWriter(file) as writer:
            start = 0
            for number in range(parts.num_row_groups):
                part = parts.read_row_group(number).to_pandas()
                writer.write(part.assign(p_adjusted_all=adjusted[start : start + len(part)]))
                start += len(part)
    return counts


def _joined(parts: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Join small parts to parts of at least `ROWS_TOGETHER` rows."""
    small: list[pd.DataFrame] = []
    for part in parts:
        small.append(part)
        if sum(map(len, small)) >= ROWS_TOGETHER:
            yield pd.concat(small, ignore_index=True)
            small = []
    if small:
        yield pd.concat(small, ignore_index=True)


class _TableWriter:
    """Write a table to a file part by part; in Parquet each part is a row group."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: parquet.ParquetWriter | None = None

    def __enter__(self) -> _TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, part: pd.DataFrame) -> None:
        """Append a part."""
        separator = SEPARATORS.get(self._path.suffix.lower())
        if separator is not None:
            part.to_csv(self._path, index=False, sep=separator, mode="a", header=not self._path.exists())
            return
        rows = pa.Table.from_pandas(part, preserve_index=False)
        self._writer = self._writer or parquet.ParquetWriter(self._path, rows.schema)
        self._writer.write_table(rows, row_group_size=len(part))
