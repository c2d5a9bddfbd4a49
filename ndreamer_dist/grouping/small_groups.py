"""Encode names of conditions and batches, and find the groups with too few cells and what happens to them. Pure.

Input: columns of a table of cells. Output: each cell's codes, the sizes of the groups, and the cells that are left out
with small groups. A screen has many conditions with few cells each; there the least number of cells applies to each
condition, and its small batches are merged.
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
"""Least number of conditions, including the control, of a screen."""

MERGED = "merged"
"""Name of the batch of merged cells; underscores are appended if a batch of this name exists."""

MERGED_SHARE = 4
"""A batch of a condition is merged if it has fewer cells than the least number of a condition divided by this."""

MOST_GROUPS_NAMED = 50
"""Most small groups that a note names."""

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
    """A table of cells with access by column: a data frame, or a stored table that reads columns on access."""

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
    """List the columns of obs for a message."""
    return listing(obs.columns) or "none"


@dataclass(frozen=True)
class NamedColumn:
    """A column of names: its levels by appearance, and the code of each cell's level, (cells,) int32."""

    levels: tuple[str, ...]
    codes: np.ndarray


def named_column(obs: ColumnTable, name: str) -> NamedColumn:
    """Read a column as names.

    Raises
    ------
    CohortError
        The column has missing values, values that cannot be names, or names that are not Unicode text.
    """
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
    # 1 and "1" are two values with one name, so the names are factorized again.
    again, names = pd.factorize(np.array([str(level) for level in levels], dtype=object))
    return NamedColumn(tuple(str(n) for n in names), again.astype(np.int32)[codes])


def restricted(column: NamedColumn, keep: np.ndarray) -> NamedColumn:
    """Restrict a column to the kept cells, with levels by appearance among them."""
    codes, levels = pd.factorize(column.codes[keep])
    return NamedColumn(tuple(column.levels[level] for level in levels), codes.astype(np.int32))


def combined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return one code per row for the combination of its codes in several columns, numbered by appearance: int32."""
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
    """Return code, name and size of the groups that have kept cells, but fewer than `limit`."""
    counts = np.bincount(pairs[keep], minlength=int(pairs.max(initial=-1)) + 1)
    _, first = np.unique(pairs, return_index=True)
    groups = []
    for pair in np.flatnonzero((counts > 0) & (counts < limit)):
        *levels, condition = (column.levels[column.codes[first[pair]]] for column in columns)
        groups.append((int(pair), group_name(levels, condition), int(counts[pair])))
    return groups


@dataclass(frozen=True)
class SmallGroupsReport:
    """The groups of a cohort before small ones are left out, and the treatment of small ones.

    Attributes
    ----------
    sizes
        Kept cells of each group, by name in order of appearance; merged batches are one group.
    min_group_cells
        Least number of cells of a group, or in a screen of a condition.
    rule
        The setting `small_groups` with `auto` resolved.
    merged
        Number of merged batches, by condition.
    rare
        Number of cells of each condition with fewer than `min_group_cells`, by name.
    """

    sizes: dict[str, int]
    min_group_cells: int
    rule: SmallGroups
    merged: dict[str, int]
    rare: dict[str, int]

    def notes(self) -> list[str]:
        """Return sentences on the treatment of small groups; empty if there are none."""
        least = self.min_group_cells
        small = {name: cells for name, cells in self.sizes.items() if cells < least}
        if self.rule != "merge":
            done = "left out" if self.rule == "drop" else "kept"
            return [
                f"{number_of(len(small), 'group')} of fewer than {least} cells {done}: {_named_sizes(small)}"
            ] * bool(small)
        notes = []
        if small:
            notes.append(
                f"a screen: {least} cells are asked of a condition and {_least_merged(least)} of each of its batches; "
                f"{number_of(len(small), 'group')} of fewer than {least} cells"
            )
        if self.merged:
            notes.append(
                f"batches with fewer than {_least_merged(least)} cells of a condition merged, in "
                f"{number_of(len(self.merged), 'condition')}: {_named_sizes(self.merged, 'batches')}"
            )
        if self.rare:
            notes.append(
                f"{number_of(len(self.rare), 'condition')} of fewer than {least} cells left out: {_named_sizes(self.rare)}"
            )
        return notes


def report_small_groups(obs: ColumnTable, cohort: CohortSettings, keep: np.ndarray) -> SmallGroupsReport:
    """Return the sizes of all groups among the kept cells, and the treatment of small ones."""
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
    """Resolve the rule `auto`: `merge` in a screen, else `drop`."""
    if small_groups != "auto":
        return small_groups
    return "merge" if len(np.unique(conditions.codes[keep])) >= SCREEN_CONDITIONS else "drop"


def cells_of_small_groups(
    columns: Sequence[NamedColumn], keep: np.ndarray, limit: int, rule: SmallGroups
) -> np.ndarray:
    """Return the cells to leave out because their group, or with `merge` their condition, is too small: (cells,) bool.

    Raises
    ------
    CohortError
        The rule is `error` and there is a small group.
    """
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
    """Return the first reason that holds for each cell: (cells,) categorical, the empty text if none holds.

    Parameters
    ----------
    cells
        By reason, in order of precedence: (cells,) bool.
    """
    codes = np.zeros(len(next(iter(cells.values()))), dtype=np.int8)
    for number, here in reversed(list(enumerate(cells.values(), start=1))):
        codes[here] = number
    return pd.Categorical.from_codes(codes, pd.Index(["", *cells]))


def first_reason(one: pd.Categorical[Any], other: pd.Categorical) -> pd.Categorical[Any]:
    """Merge two results of `why_left_out`: the reason in `one`, or if that is empty, the reason in `other`."""
    names = list(dict.fromkeys([*one.categories, *other.categories]))
    codes = [reasons.set_categories(names).codes for reasons in (one, other)]
    return pd.Categorical.from_codes(np.where(codes[0] > 0, *codes), pd.Index(names))


def vanishing(column: NamedColumn, before: np.ndarray, cut: np.ndarray) -> list[str]:
    """Return the conditions that have cells in `before`, and none without the cells in `cut`."""
    already = set(absent_levels(column, before))
    return [name for name in absent_levels(column, before & ~cut) if name not in already]


def would_vanish(gone: list[str], control: str, limit: int, rule: SmallGroups) -> str:
    """Return the error message for conditions that would lose all cells, with the remedies."""
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
    """Merge small batches of each condition if the rule is `merge`.

    All batches of a condition with fewer than a quarter of `min_group_cells` cells become one batch, `merged` in each
    batch column. If that has fewer than a quarter as well, the next larger batches join it. A condition is not changed
    if only one batch would be merged, or if it has fewer than `min_group_cells` cells.

    Returns
    -------
    The columns, and the number of merged batches by condition.
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
    """Return the distinct values of sorted codes, and the places of each."""
    values, starts = np.unique(codes, return_index=True)
    return values, np.split(places, starts[1:])


def _relabelled(column: NamedColumn, cells: np.ndarray) -> NamedColumn:
    """Return the column with the new level `merged` for some cells."""
    if not cells.any():
        return column
    name = MERGED
    while name in column.levels:
        name += "_"
    return NamedColumn((*column.levels, name), np.where(cells, len(column.levels), column.codes))


def _least_merged(min_group_cells: int) -> int:
    return -(-min_group_cells // MERGED_SHARE)


def absent_levels(column: NamedColumn, keep: np.ndarray) -> list[str]:
    """Return the levels that no kept cell has."""
    counts = np.bincount(column.codes[keep], minlength=len(column.levels))
    return [name for name, count in zip(column.levels, counts, strict=True) if count == 0]


def named_conditions(names: list[str], control: str) -> str:
    """List conditions for a message; only the control if it is among them."""
    if control in names:
        return f"the control {quoted(control)}"
    return f"condition {quoted(names[0])}" if len(names) == 1 else f"{len(names)} conditions, {listing(names)},"


def _word(name: str) -> str:
    """Quote a name for a shell."""
    return shlex.quote(name) if len(name) <= LONGEST_NAME else quoted(name)


def _named_sizes(sizes: dict[str, int], what: str = "") -> str:
    """List groups or conditions with their sizes for a message, at most 50."""
    named = [f"{name} ({number}{' ' + what if what else ''})" for name, number in sizes.items()]
    more = f" and {len(named) - MOST_GROUPS_NAMED} more" if len(named) > MOST_GROUPS_NAMED else ""
    return ", ".join(named[:MOST_GROUPS_NAMED]) + more


def _sizes(small: Sequence[tuple[int, str, int]]) -> str:
    return ", ".join(f"{name} ({cells})" for _, name, cells in small[:8]) + (", ..." if len(small) > 8 else "")


def number_of(number: int, noun: str) -> str:
    """Return a number and a noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
