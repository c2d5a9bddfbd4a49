"""Names of conditions and batches as codes, and what becomes of groups with few cells. Pure.

Input: columns of a table of cells. Output: every cell's codes, the sizes of groups, and which cells go with small ones. In
a screen, which has many conditions of few cells each, cells are asked of a condition, and its small batches are merged.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from ndreamer_dist.errors import LONGEST_NAME, CohortError, is_unicode, listing, quoted
from ndreamer_dist.settings import CohortSettings

SCREEN_CONDITIONS = 20
"""From so many conditions on, the control included, a cohort is a screen: small groups are looked at by condition."""

MERGED = "merged"
"""Batch of the cells of a condition's batches that have too few each; with underscores where a batch has this name."""

MERGED_SHARE = 4
"""In a screen a group needs one in so many of the cells that a condition needs; smaller ones are merged."""

MOST_GROUPS_NAMED = 50
"""Small groups that a note names."""

SmallGroups = Literal["auto", "drop", "merge", "keep", "error"]


def escaped(name: str) -> str:
    r"""Escape `\`, `|` and `+` in a name, so that joined names can be told apart."""
    return name.replace("\\", "\\\\").replace("|", "\\|").replace("+", "\\+")


def batch_name(levels: Iterable[str]) -> str:
    """Return the name of a batch: its levels joined by `+`."""
    return "+".join(escaped(level) for level in levels)


def group_name(levels: Iterable[str], condition: str) -> str:
    """Return the name of a group, `batch|condition`; without a batch key, the condition alone."""
    batch = batch_name(levels)
    return f"{batch}|{escaped(condition)}" if batch else escaped(condition)


class ColumnTable(Protocol):
    """A table of cells by columns: a data frame, or one whose columns are read when they are asked for."""

    @property
    def columns(self) -> pd.Index:
        """Names of the columns."""
        ...

    @property
    def index(self) -> pd.Index:
        """Names of the cells."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, name: Any, /) -> bool: ...

    def __getitem__(self, name: Any, /) -> Any: ...


def columns_of(obs: ColumnTable) -> str:
    """Return the names of the columns of obs, for a message."""
    return listing(obs.columns) or "none"


@dataclass(frozen=True)
class NamedColumn:
    """A column of names: its levels by appearance, and every cell's code, (cells,) int32."""

    levels: tuple[str, ...]
    codes: np.ndarray


def named_column(obs: ColumnTable, name: str) -> NamedColumn:
    """Read a column as names; `CohortError` counts its missing values."""
    values = obs[name]
    absent = values.isna().to_numpy()
    if absent.any():
        first = obs.index[int(absent.argmax())]
        msg = (
            f"column {name!r} has {number_of(int(absent.sum()), 'missing value')}, cell {str(first)!r} first; "
            "fill them in or leave those cells out"
        )
        raise CohortError(msg)
    try:
        codes, levels = pd.factorize(values)
    except TypeError as error:
        msg = f"column {quoted(name)} holds lists or tables; expected names"
        raise CohortError(msg) from error
    odd = next((level for level in map(str, levels) if not is_unicode(level)), None)
    if odd is not None:
        msg = f"column {quoted(name)} holds the name {quoted(odd)}, which is not Unicode text; rename it"
        raise CohortError(msg)
    # 1 and "1" are two values with one name, so names are made codes once more.
    again, names = pd.factorize(np.array([str(level) for level in levels], dtype=object))
    return NamedColumn(tuple(str(n) for n in names), again.astype(np.int32)[codes])


def restricted(column: NamedColumn, keep: np.ndarray) -> NamedColumn:
    """Return a column of the kept cells only, its levels by appearance among them."""
    codes, levels = pd.factorize(column.codes[keep])
    return NamedColumn(tuple(column.levels[level] for level in levels), codes.astype(np.int32))


def combined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return one code per row for the observed combinations of several columns of codes, by appearance: int32."""
    joined = np.zeros(len(columns[0]), dtype=np.int32)
    for codes in columns:
        pairs = joined.astype(np.int64)
        pairs *= int(codes.max(initial=0)) + 1
        pairs += codes
        joined = pd.factorize(pairs)[0].astype(np.int32)
    return joined


def _small_groups(
    pairs: np.ndarray, columns: Sequence[NamedColumn], keep: np.ndarray, limit: int
) -> list[tuple[int, str, int]]:
    """Return code, name and size of the groups that have kept cells, but fewer than the limit."""
    counts = np.bincount(pairs[keep], minlength=int(pairs.max(initial=-1)) + 1)
    _, first = np.unique(pairs, return_index=True)
    found = []
    for pair in np.flatnonzero((counts > 0) & (counts < limit)):
        *levels, condition = (column.levels[column.codes[first[pair]]] for column in columns)
        found.append((int(pair), group_name(levels, condition), int(counts[pair])))
    return found


@dataclass(frozen=True)
class SmallGroupsReport:
    """The groups of a cohort before small ones are left out, and what is done with those.

    Attributes
    ----------
    sizes
        Kept cells of every group, by name in order of appearance; batches that are merged count as one.
    rule
        `auto` resolved.
    merged
        Number of batches that were merged, by condition.
    rare
        Cells of the conditions that have too few, by name.
    """

    sizes: dict[str, int]
    min_group_cells: int
    rule: SmallGroups
    merged: dict[str, int]
    rare: dict[str, int]

    def notes(self) -> list[str]:
        """Say what is done with small groups; nothing where there is none."""
        least = self.min_group_cells
        small = {name: cells for name, cells in self.sizes.items() if cells < least}
        if self.rule != "merge":
            done = "left out" if self.rule == "drop" else "kept"
            return [
                f"{number_of(len(small), 'group')} of fewer than {least} cells {done}: {_named_sizes(small)}"
            ] * bool(small)
        found = []
        if small:
            found.append(
                f"a screen: {least} cells are asked of a condition and {_least_merged(least)} of each of its batches; "
                f"{number_of(len(small), 'group')} of fewer than {least} cells"
            )
        if self.merged:
            found.append(
                f"batches with fewer than {_least_merged(least)} cells of a condition merged, in "
                f"{number_of(len(self.merged), 'condition')}: {_named_sizes(self.merged, 'batches')}"
            )
        if self.rare:
            found.append(
                f"{number_of(len(self.rare), 'condition')} of fewer than {least} cells left out: {_named_sizes(self.rare)}"
            )
        return found


def report_small_groups(obs: ColumnTable, cohort: CohortSettings, keep: np.ndarray) -> SmallGroupsReport:
    """Return the number of kept cells of every group, small ones too, and what is done with small ones."""
    columns = [named_column(obs, name) for name in (*cohort.batch_key, str(cohort.condition_column))]
    least, rule = cohort.min_group_cells, resolved_rule(cohort.small_groups, columns[-1], keep)
    columns, merged = with_merged_batches(columns, keep, least, rule)
    pairs = combined([column.codes for column in columns])
    sizes = {name: cells for _, name, cells in _small_groups(pairs, columns, keep, len(obs) + 1)}
    cells = np.bincount(columns[-1].codes[keep], minlength=len(columns[-1].levels))
    few = (cells > 0) & (cells < least)
    rare = {columns[-1].levels[code]: int(cells[code]) for code in np.flatnonzero(few)}
    return SmallGroupsReport(sizes, least, rule, merged, rare)


def resolved_rule(small_groups: SmallGroups, conditions: NamedColumn, keep: np.ndarray) -> SmallGroups:
    """Return what is done with small groups: in a screen other than in a cohort of few conditions."""
    if small_groups != "auto":
        return small_groups
    return "merge" if len(np.unique(conditions.codes[keep])) >= SCREEN_CONDITIONS else "drop"


def cells_of_small_groups(
    columns: Sequence[NamedColumn], keep: np.ndarray, limit: int, rule: SmallGroups
) -> np.ndarray:
    """Return the cells that small groups, or conditions, take with them: (cells,) bool; refuse where asked."""
    if rule == "merge":
        codes = columns[-1].codes
        return keep & (np.bincount(codes[keep], minlength=len(columns[-1].levels)) < limit)[codes]
    pairs = combined([column.codes for column in columns])
    small = _small_groups(pairs, columns, keep, limit)
    if small and rule == "error":
        msg = (
            f"{number_of(len(small), 'group')} hold fewer than {limit} cells: {_sizes(small)}; leave them out "
            "(--set cohort.small_groups=drop) or keep them (--set cohort.small_groups=keep)"
        )
        raise CohortError(msg)
    return keep & np.isin(pairs, [pair for pair, _, _ in small if rule == "drop"])


def why_left_out(cells: Mapping[str, np.ndarray]) -> pd.Categorical[Any]:
    """Return why each cell is left out, the first reason that holds: (cells,) categories, empty where none does.

    Parameters
    ----------
    cells
        By reason, (cells,) bool.
    """
    codes = np.zeros(len(next(iter(cells.values()))), dtype=np.int8)
    for number, here in reversed(list(enumerate(cells.values(), start=1))):
        codes[here] = number
    return pd.Categorical.from_codes(codes, pd.Index(["", *cells]))


def first_reason(one: pd.Categorical[Any], other: pd.Categorical) -> pd.Categorical[Any]:
    """Return why each cell is left out: by one account, or where that is empty by another."""
    names = list(dict.fromkeys([*one.categories, *other.categories]))
    codes = [account.set_categories(names).codes for account in (one, other)]
    return pd.Categorical.from_codes(np.where(codes[0] > 0, *codes), pd.Index(names))


def vanishing(column: NamedColumn, before: np.ndarray, cut: np.ndarray) -> list[str]:
    """Return the conditions of which no cell is left where some are cut."""
    already = set(absent_levels(column, before))
    return [name for name in absent_levels(column, before & ~cut) if name not in already]


def would_vanish(gone: list[str], control: str, limit: int, rule: SmallGroups) -> str:
    """Say which conditions would vanish, and what can be done."""
    others = [name for name in gone if name != control]
    alone = len(gone) == 1 or control in gone  # of several, the control alone is named
    has = f"no group of {'it' if alone else 'them'} has {limit} cells"
    if rule == "merge":
        has = f"{'it has' if alone else 'they have'} fewer than {limit} cells{'' if alone else ' each'}"
    leave = f"leave out ({' '.join(f'--exclude-condition {_word(name)}' for name in others[:8])}" if others else ""
    leave += f" and {len(others) - 8} more" if len(others) > 8 else ""
    leave += ", or all: --set cohort.rare_conditions=drop), " if len(others) > 1 else "), " if others else ""
    return (
        f"{named_conditions(gone, control)} would vanish: {has} (min_group_cells); {leave if control not in gone else ''}lower "
        "it (--set cohort.min_group_cells=N) or keep small groups (--set cohort.small_groups=keep)"
    )


def with_merged_batches(
    columns: list[NamedColumn], keep: np.ndarray, min_group_cells: int, rule: SmallGroups
) -> tuple[list[NamedColumn], dict[str, int]]:
    """Return the columns with batches merged where a condition has few cells of them, and how many, by condition.

    Of each condition the smallest batches become one, until that one has enough cells. It gets a level of its own in
    every batch column.
    """
    *batches, condition = columns
    if rule != "merge" or not batches:
        return columns, {}
    pairs = combined([column.codes for column in columns])
    present, first, sizes = np.unique(np.where(keep, pairs, -1), return_index=True, return_counts=True)
    known = present >= 0
    present, of, sizes = present[known], condition.codes[first[known]], sizes[known]
    merged, least = {}, _least_merged(min_group_cells)
    chosen = np.zeros(int(pairs.max(initial=-1)) + 1, dtype=bool)
    order = np.lexsort((present, sizes, of))
    for code, places in zip(*_runs(of[order], order), strict=True):
        before = np.cumsum(sizes[places]) - sizes[places]
        joined = places[(sizes[places] < least) | (before < least)]
        if sizes[places[0]] < least and len(joined) > 1 and sizes[places].sum() >= min_group_cells:
            chosen[present[joined]] = True
            merged[condition.levels[code]] = len(joined)
    cells = keep & chosen[pairs]
    return [*(_relabelled(column, cells) for column in batches), condition], merged


def _runs(codes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the codes that stand next to each other, and the places of each."""
    found, starts = np.unique(codes, return_index=True)
    return found, np.split(places, starts[1:])


def _relabelled(column: NamedColumn, cells: np.ndarray) -> NamedColumn:
    """Return a column in which some cells have a level of their own."""
    if not cells.any():
        return column
    name = MERGED
    while name in column.levels:
        name += "_"
    return NamedColumn((*column.levels, name), np.where(cells, len(column.levels), column.codes))


def _least_merged(min_group_cells: int) -> int:
    return -(-min_group_cells // MERGED_SHARE)


def absent_levels(column: NamedColumn, keep: np.ndarray) -> list[str]:
    """Return the names that no kept cell has."""
    counts = np.bincount(column.codes[keep], minlength=len(column.levels))
    return [name for name, count in zip(column.levels, counts, strict=True) if count == 0]


def named_conditions(names: list[str], control: str) -> str:
    """Name conditions in a message; the control alone where it is among them."""
    if control in names:
        return f"the control {quoted(control)}"
    return f"condition {quoted(names[0])}" if len(names) == 1 else f"{len(names)} conditions, {listing(names)},"


def _word(name: str) -> str:
    """Return a name as a shell takes it."""
    return shlex.quote(name) if len(name) <= LONGEST_NAME else quoted(name)


def _named_sizes(sizes: dict[str, int], what: str = "") -> str:
    """Name groups or conditions with their numbers; of many, the first."""
    told = [f"{name} ({number}{' ' + what if what else ''})" for name, number in sizes.items()]
    return ", ".join(told[:MOST_GROUPS_NAMED]) + (
        f" and {len(told) - MOST_GROUPS_NAMED} more" if len(told) > MOST_GROUPS_NAMED else ""
    )


def _sizes(small: Sequence[tuple[int, str, int]]) -> str:
    return ", ".join(f"{name} ({cells})" for _, name, cells in small[:8]) + (", ..." if len(small) > 8 else "")


def number_of(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
