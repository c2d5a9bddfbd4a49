"""The file of `ndreamer-dist cate`: the whole CATE table, written part by part where a screen has many conditions."""

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
"""Rows of a screen's table that are written together, at the least."""


@dataclass
class Written:
    """What a written table holds, counted while its parts go by."""

    rows: int = 0
    called: int = 0
    tested: bool = False
    parted: bool = False
    populations: set[str] = field(default_factory=set)
    readings: Counter[str] = field(default_factory=Counter)
    without_state: int = 0

    def add(self, part: pd.DataFrame) -> None:
        """Count a part."""
        self.rows += len(part)
        self.called += int((part["p_adjusted"] < 0.05).sum())
        self.tested |= bool(part["p"].notna().any())
        self.parted |= bool(part["within_state_p"].notna().any())
        self.populations |= set(part["population"].unique())
        self.readings.update(part["reading"])
        self.without_state += int((part["state_reliability"].isna() & (part["reading"] == "")).sum())

    def lines(self, out: Path) -> Iterator[str]:
        """Say what was written."""
        called = f"{self.called} with p_adjusted < 0.05" if self.tested else f"no test was possible: {TOO_FEW_DONORS}"
        yield f"wrote {out}: {len(self.populations)} populations, {self.rows} rows, {called}"
        if self.parted:
            kinds = ", ".join(f"{word} {self.readings[word]}" for word in ("within", "state", "both", "neither"))
            yield f"in cells of the same state, or by a change of state (adjusted p <= 0.05): {kinds}{self._unread()}"

    def _unread(self) -> str:
        """Say how many rows have no reading, and why."""
        untested = self.readings[""] - self.without_state
        why = [f"{self.without_state} of populations without coordinates of state"] if self.without_state else []
        why += [f"{untested} without a test"] if untested else []
        return f"; no reading {self.readings['']} ({', '.join(why)})" if why else ""


def write_cate(results: Results, out: str | os.PathLike[str], *, condition: str | None, **asked: Any) -> Written:
    """Write the CATE table to `.csv`, `.tsv` or `.parquet` and return what is in it; arguments as of `Results.cate`.

    In a screen of which all conditions are asked for, no more is held than some conditions' rows and every p-value; rows
    then are by condition and inside it by population, in other cohorts the other way round.
    """
    target, written = checked(out, TABLES), Written()
    if condition is not None or not results.design.is_screen:
        table = results.cate(condition=condition, **asked)
        written.add(table)
        save_table(table, target)
        return written
    with replaced(target) as file:
        first, p = file.with_name("parts.parquet"), []
        with _Tables(first) as tables:
            for part in _gathered(results.cate_parts(**asked)):
                written.add(part)
                p.append(part["p"].to_numpy())
                tables.write(part)
        adjusted = benjamini_hochberg(np.concatenate(p))
        with parquet.ParquetFile(first) as parts, _Tables(file) as tables:
            start = 0
            for number in range(parts.num_row_groups):
                part = parts.read_row_group(number).to_pandas()
                tables.write(part.assign(p_adjusted_all=adjusted[start : start + len(part)]))
                start += len(part)
    return written


def _gathered(parts: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Join small parts."""
    held: list[pd.DataFrame] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= ROWS_TOGETHER:
            yield pd.concat(held, ignore_index=True)
            held = []
    if held:
        yield pd.concat(held, ignore_index=True)


class _Tables:
    """A file of a table that is written part by part, a row group each in Parquet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: parquet.ParquetWriter | None = None

    def __enter__(self) -> _Tables:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, part: pd.DataFrame) -> None:
        """Add a part."""
        separator = SEPARATORS.get(self._path.suffix.lower())
        if separator is not None:
            part.to_csv(self._path, index=False, sep=separator, mode="a", header=not self._path.exists())
            return
        rows = pa.Table.from_pandas(part, preserve_index=False)
        self._writer = self._writer or parquet.ParquetWriter(self._path, rows.schema)
        self._writer.write_table(rows, row_group_size=len(part))
