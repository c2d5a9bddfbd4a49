"""The design of a cohort: names and codes of conditions, batches and groups, and the contrasts they allow.

Pure. Names come in (columns of obs) and names go out; integer codes are used only between. The control has code 0. The
other conditions follow in order of appearance. A *batch* is an observed combination of the batch covariates; a *group*
is an observed (batch, condition) pair. Groups are numbered batch by batch, and by condition inside a batch. Each group
owns contiguous rows of the packed store.
"""

from __future__ import annotations

import itertools
import logging
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from ndreamer_dist.errors import LONGEST_NAME, CohortError, QueryError, StoreError, is_unicode, listing, quoted, suggest

logger = logging.getLogger(__name__)

EXCLUDED = "excluded condition"
"""Why a cell of an excluded condition is left out."""
MOST_EDGES = 20_000_000
"""Pairs of groups to match at most: every one is a piece of work of its own."""
SCREEN_CONDITIONS = 20
"""From so many conditions on, the control included, a cohort is a screen: small groups are looked at by condition."""
MERGED = "merged"
"""Batch of the cells of a condition's batches that have too few each; with underscores where a batch has this name."""
MERGED_SHARE = 4
"""In a screen a group needs one in so many of the cells that a condition needs; smaller ones are merged."""

MOST_NAMED = 50
"""Small groups that a note names."""

SmallGroups = Literal["auto", "drop", "merge", "keep", "error"]


@dataclass(frozen=True)
class Group:
    """One observed (batch, condition) pair and its rows `start:stop` in the packed store."""

    code: int
    name: str
    condition: int
    batch: int
    batch_codes: tuple[int, ...]  # one per batch covariate
    start: int
    stop: int

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.stop - self.start


@dataclass(frozen=True)
class Design:
    """Conditions, batch covariates and groups of the kept cells.

    Attributes
    ----------
    conditions
        Names; the control first.
    batch_levels
        Names of the levels of each batch covariate; empty without a batch key.
    batches
        Names of the observed combinations, levels joined by `+`; one empty name without a batch key.
    groups
        In packed order: `groups[i].code == i`.
    """

    condition_key: str
    batch_keys: tuple[str, ...]
    conditions: tuple[str, ...]
    batch_levels: tuple[tuple[str, ...], ...]
    batches: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def n_cells(self) -> int:
        """Number of kept cells."""
        return self.groups[-1].stop

    @property
    def control(self) -> str:
        """Name of the control condition."""
        return self.conditions[0]

    @cached_property
    def starts(self) -> np.ndarray:
        """First packed row of every group, and the number of cells at the end: (groups + 1,) int64."""
        return np.array([group.start for group in self.groups] + [self.n_cells], dtype=np.int64)

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the group code of packed rows: (rows,) int64."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    @cached_property
    def group_conditions(self) -> np.ndarray:
        """Condition code of every group: (groups,) int64."""
        return np.array([group.condition for group in self.groups], dtype=np.int64)

    @cached_property
    def group_batch_codes(self) -> np.ndarray:
        """Level code of every group and batch covariate: (groups, covariates) int64."""
        codes = [group.batch_codes for group in self.groups]
        return np.array(codes, dtype=np.int64).reshape(len(self.groups), len(self.batch_levels))

    def with_condition(self, condition: int) -> list[Group]:
        """Return the groups of a condition."""
        return self._by_condition.get(condition, [])

    @property
    def fewest_groups(self) -> int:
        """How many groups the condition with the fewest has."""
        return min(len(self.with_condition(code)) for code in range(len(self.conditions)))

    def condition_code(self, name: str) -> int:
        """Return a condition's code; `QueryError` lists the names where there is none of this name."""
        if name not in self.conditions:
            msg = (
                f"there is no condition {quoted(name)}; there are {listing(self.conditions)}."
                f"{suggest(name, self.conditions)}"
            )
            raise QueryError(msg)
        return self.conditions.index(name)

    def targets(self, query: Group, edges: Literal["needed", "all"]) -> list[Group]:
        """Return the groups that a group's cells are matched with, in order (see `needed_edges`)."""
        if edges == "all":
            return list(self.groups)
        return self._of_conditions[query.condition]

    @cached_property
    def _by_condition(self) -> dict[int, list[Group]]:
        """Per condition its groups, in order."""
        own: dict[int, list[Group]] = {}
        for group in self.groups:
            own.setdefault(group.condition, []).append(group)
        return own

    @cached_property
    def _of_conditions(self) -> dict[int, list[Group]]:
        """Per condition, the groups of it and of the control, in order."""
        own, control = self._by_condition, self.with_condition(0)
        return {c: sorted({*members, *control}, key=lambda group: group.code) for c, members in own.items()}

    def queries(self, target: Group) -> list[Group]:
        """Return the groups whose cells need matches in a group, in order: the other way round of needed `targets`."""
        return list(self.groups) if target.condition == 0 else self.with_condition(target.condition)

    @property
    def is_screen(self) -> bool:
        """Whether there are so many conditions that they are looked at together and not one by one."""
        return len(self.conditions) >= SCREEN_CONDITIONS

    def needed_edges(self, edges: Literal["needed", "all"]) -> list[tuple[int, int]]:
        """Return the (query group, target group) pairs to search, by query group and then by target group.

        `needed`: every group to the groups of its own condition (itself among them: the nearest *other* cell) and of
        the control. `all`: every pair.
        """
        return [(query.code, target.code) for query in self.groups for target in self.targets(query, edges)]

    def to_json(self) -> dict[str, Any]:
        """Return the design as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Design:
        """Read what `to_json` gave; `StoreError` where it was anything else: it comes from a file."""
        try:
            groups = tuple(Group(**{**group, "batch_codes": tuple(group["batch_codes"])}) for group in value["groups"])
            made = cls(
                condition_key=value["condition_key"],
                batch_keys=tuple(value["batch_keys"]),
                conditions=tuple(value["conditions"]),
                batch_levels=tuple(tuple(levels) for levels in value["batch_levels"]),
                batches=tuple(value["batches"]),
                groups=groups,
            )
            fits = made._fits()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            msg = f"the design is damaged ({type(error).__name__}: {error})"
            raise StoreError(msg) from error
        if not fits:
            msg = "the design is damaged: its groups do not fit together"
            raise StoreError(msg)
        return made

    def _fits(self) -> bool:
        """Return whether the groups follow each other and name conditions and batches that are there."""
        names = (
            self.condition_key,
            *self.batch_keys,
            *self.conditions,
            *self.batches,
            *itertools.chain(*self.batch_levels),
        )
        stops = [0, *(group.stop for group in self.groups)]
        return (
            len(self.conditions) > 1
            and bool(self.groups)
            and all(isinstance(name, str) for name in (*names, *(group.name for group in self.groups)))
            and all(
                group.code == code
                and group.start == stops[code] < group.stop
                and group.condition in range(len(self.conditions))
                and group.batch in range(len(self.batches))
                and len(group.batch_codes) == len(self.batch_levels)
                and all(c in range(len(levels)) for c, levels in zip(group.batch_codes, self.batch_levels, strict=True))
                for code, group in enumerate(self.groups)
            )
        )


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


def build_design(
    obs: pd.DataFrame,
    *,
    condition_key: str | None,
    control: str | None,
    batch_keys: Sequence[str] = (),
    keep: np.ndarray | None = None,
    min_group_cells: int = 1,
    small_groups: SmallGroups = "drop",
    rare_conditions: Literal["error", "drop"] = "error",
    exclude: Sequence[str] = (),
) -> tuple[Design, np.ndarray, np.ndarray]:
    """Return the design of a cohort, the group of every input cell, and why a cell was left out here.

    Parameters
    ----------
    obs
        The cells' table; columns that are not text are named by `str()`.
    keep
        (cells,) bool, the cells to look at; none: all.
    min_group_cells, small_groups
        What is done with groups of fewer cells: `drop` leaves their cells out, `error` refuses, `merge` asks the number
        of a condition, and merges those of its batches that have fewer than a quarter of it; `auto` is `merge` in a
        screen, else `drop`.
    rare_conditions
        What is done with conditions that would vanish by it: `drop` leaves them out, `error` refuses.
    exclude
        Conditions whose cells are left out.

    Returns
    -------
    design
        METHOD's notation: control first, the rest by appearance among the kept cells.
    groups
        (cells,) int32 group codes; -1 for cells left out, by `keep` or here.
    reasons
        (cells,) text; empty for kept cells and for those left out by `keep`.

    Raises
    ------
    CohortError
        A column is missing or has missing values; the control or a second condition is not there, or would vanish.
    """
    keep = np.ones(len(obs), dtype=bool) if keep is None else keep
    condition_key, control, batch_keys = _check_keys(obs, condition_key, control, batch_keys)
    columns = [_named(obs, name) for name in (*batch_keys, condition_key)]
    control = _level(obs[condition_key], columns[-1].levels, control)
    left_out = excluded(obs, condition_key, exclude, control)
    _check_conditions(columns[-1], condition_key, control, keep, left_out)
    reasons = np.where(keep & left_out, EXCLUDED, "").astype(object)
    keep = keep & ~left_out
    small_groups = _rule(small_groups, columns[-1], keep)
    columns, _ = _with_merged(columns, keep, min_group_cells, small_groups)
    cut = _cut(columns, keep, min_group_cells, small_groups)
    merge = small_groups == "merge"
    refuse = rare_conditions == "error"
    _check_nothing_vanishes(columns[-1], keep, cut, control, min_group_cells, refuse=refuse, by_condition=merge)
    reasons[cut] = f"{'condition' if merge else 'group'} of fewer than {min_group_cells} cells"
    keep = keep & ~cut
    design, codes = _coded(condition_key, control, tuple(batch_keys), columns, keep)
    _check_edges(design)
    return design, codes, reasons


def report_design(design: Design, small: SmallGroupsReport) -> list[str]:
    """Log what is worth knowing about a design and return it as notes: small groups, and batches without controls."""
    notes = small.notes()
    for note in notes:
        logger.warning(note)
    with_control = {group.batch for group in design.with_condition(0)}
    without = len(design.batches) - len(with_control)
    if without:
        notes.append(
            f"{without} of {len(design.batches)} batches hold no control: their controls come from the other batches"
        )
        logger.info(notes[-1])
    return notes


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
        least, small = (
            self.min_group_cells,
            {n: cells for n, cells in self.sizes.items() if cells < self.min_group_cells},
        )
        if self.rule != "merge":
            done = "left out" if self.rule == "drop" else "kept"
            return [f"{_count(len(small), 'group')} of fewer than {least} cells {done}: {_named_sizes(small)}"] * bool(
                small
            )
        found = []
        if small:
            found.append(
                f"a screen: {least} cells are asked of a condition and {_least_merged(least)} of each of its batches; "
                f"{_count(len(small), 'group')} of fewer than {least} cells"
            )
        if self.merged:
            found.append(
                f"batches with fewer than {_least_merged(least)} cells of a condition merged, in "
                f"{_count(len(self.merged), 'condition')}: {_named_sizes(self.merged, 'batches')}"
            )
        if self.rare:
            found.append(
                f"{_count(len(self.rare), 'condition')} of fewer than {least} cells left out: {_named_sizes(self.rare)}"
            )
        return found


def report_small_groups(
    obs: pd.DataFrame,
    condition_key: str,
    batch_keys: Sequence[str],
    keep: np.ndarray,
    *,
    min_group_cells: int = 1,
    small_groups: SmallGroups = "drop",
) -> SmallGroupsReport:
    """Return the number of kept cells of every group, small ones too, and what is done with small ones."""
    columns = [_named(obs, name) for name in (*batch_keys, condition_key)]
    rule = _rule(small_groups, columns[-1], keep)
    columns, merged = _with_merged(columns, keep, min_group_cells, rule)
    pairs = _combined([column.codes for column in columns])
    sizes = {name: cells for _, name, cells in _small_groups(pairs, columns, keep, len(obs) + 1)}
    cells = np.bincount(columns[-1].codes[keep], minlength=len(columns[-1].levels))
    few = (cells > 0) & (cells < min_group_cells)
    rare = {columns[-1].levels[code]: int(cells[code]) for code in np.flatnonzero(few)}
    return SmallGroupsReport(sizes, min_group_cells, rule, merged, rare)


def _named_sizes(sizes: dict[str, int], what: str = "") -> str:
    """Name groups or conditions with their numbers; of many, the first."""
    told = [f"{name} ({number}{' ' + what if what else ''})" for name, number in sizes.items()]
    return ", ".join(told[:MOST_NAMED]) + (f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else "")


def pair_codes(obs: pd.DataFrame, condition_key: str, batch_keys: Sequence[str]) -> np.ndarray:
    """Return a code of every cell's (batch, condition) pair, whatever its size: (cells,) int64."""
    return _combined([_named(obs, name).codes for name in (*batch_keys, condition_key)])


@dataclass(frozen=True)
class _Column:
    """A column of names: its levels by appearance, and every cell's code."""

    levels: tuple[str, ...]
    codes: np.ndarray


def _named(obs: pd.DataFrame, name: str) -> _Column:
    """Read a column as names; `CohortError` counts its missing values."""
    values = obs[name]
    absent = values.isna().to_numpy()
    if absent.any():
        first = obs.index[int(absent.argmax())]
        msg = (
            f"column {name!r} has {_count(int(absent.sum()), 'missing value')}, cell {str(first)!r} first; "
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
    return _Column(tuple(str(n) for n in names), again[codes].astype(np.int64))


def _check_keys(
    obs: pd.DataFrame, condition_key: str | None, control: str | None, batch_keys: Sequence[str]
) -> tuple[str, str, tuple[str, ...]]:
    if condition_key is None:
        msg = (
            "no condition key was given; name the column of obs that holds the condition (--condition-key NAME; there "
            f"are {_columns(obs)})"
        )
        raise CohortError(msg)
    for what, name in (("condition key", condition_key), *(("batch key", name) for name in batch_keys)):
        if name not in obs:
            msg = f"{what} {quoted(name)} is no column of obs; there are {_columns(obs)}.{suggest(name, obs.columns)}"
            raise CohortError(msg)
    if condition_key in batch_keys:
        msg = f"column {condition_key!r} is both condition and batch; a batch effect needs a column of its own"
        raise CohortError(msg)
    if len(set(batch_keys)) < len(batch_keys):
        msg = f"a batch key is given twice: {listing(batch_keys)}"
        raise CohortError(msg)
    if control is None:
        levels = listing(_named(obs, condition_key).levels)
        msg = f"no control was given; name one (--control NAME) of what {condition_key!r} holds: {levels}"
        raise CohortError(msg)
    return condition_key, str(control), tuple(batch_keys)


def _columns(obs: pd.DataFrame) -> str:
    return listing(obs.columns) or "none"


def excluded(obs: pd.DataFrame, key: str, names: Sequence[str], control: str | None = None) -> np.ndarray:
    """Return which cells are of an excluded condition: (cells,) bool; `CohortError` where no cell is, or it is the control."""
    column = _named(obs, key)
    levels = [_level(obs[key], column.levels, name) for name in names]
    absent = [name for name in levels if name not in column.levels]
    if absent:
        msg = (
            f"no cell has the excluded condition {listing(absent)} in {key!r}; there are {listing(column.levels)}."
            f"{suggest(absent[0], column.levels)}"
        )
        raise CohortError(msg)
    if control in levels:
        msg = f"{quoted(control)} is the control and cannot be excluded"
        raise CohortError(msg)
    return np.isin(column.codes, [column.levels.index(name) for name in levels])


def _level(values: pd.Series[Any], levels: Sequence[str], name: str) -> str:
    """Return the level that a name means: itself, or where the column holds numbers or yes and no, the one of its value."""
    kind = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    if name in levels:
        return name
    if pd.api.types.is_bool_dtype(kind):
        same = [level for level in levels if level.lower() == name.lower()]
    elif pd.api.types.is_numeric_dtype(kind):
        same = [level for level in levels if _number(level) == _number(name)]
    else:
        same = []
    return same[0] if len(same) == 1 else name


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_conditions(column: _Column, key: str, control: str, keep: np.ndarray, left_out: np.ndarray) -> None:
    if control not in column.levels:
        msg = (
            f"no cell has the control {quoted(control)} in {key!r}; there are {listing(column.levels)}."
            f"{suggest(control, column.levels)}"
        )
        raise CohortError(msg)
    if len(np.unique(column.codes[~left_out])) < 2:
        msg = f"{key!r} holds one condition, {control!r}; effects need a second one"
        raise CohortError(msg)
    gone = set(_absent(column, keep & ~left_out)) - set(_absent(column, ~left_out))
    if gone:
        names = [name for name in column.levels if name in gone]
        msg = (
            f"no cell is left of {_what(names, control)}: all were left out for their counts (see min_genes, min_cells)"
        )
        raise CohortError(msg)


def _check_nothing_vanishes(
    column: _Column, before: np.ndarray, cut: np.ndarray, control: str, limit: int, *, refuse: bool, by_condition: bool
) -> None:
    """Refuse the loss of the control, and where asked that of other conditions."""
    already = set(_absent(column, before))
    gone = [name for name in _absent(column, before & ~cut) if name not in already]
    others = [name for name in gone if name != control]
    left = len(column.levels) - len(already) - len(gone)
    has = f"no group of {'it' if len(gone) == 1 else 'them'} has {limit} cells"
    if by_condition:
        has = (
            f"{'it has' if len(gone) == 1 else 'they have'} fewer than {limit} cells{'' if len(gone) == 1 else ' each'}"
        )
    if not gone or (control not in gone and left > 1 and not refuse):
        return
    leave = f"leave out ({' '.join(f'--exclude-condition {_word(name)}' for name in others[:8])}" if others else ""
    leave += f" and {len(others) - 8} more" if len(others) > 8 else ""
    leave += ", or all: --set cohort.rare_conditions=drop), " if len(others) > 1 else "), " if others else ""
    msg = (
        f"{_what(gone, control)} would vanish: {has} (min_group_cells); {leave if control not in gone else ''}lower it "
        "(--set cohort.min_group_cells=N) or keep small groups (--set cohort.small_groups=keep)"
    )
    raise CohortError(msg)


def _rule(small_groups: SmallGroups, conditions: _Column, keep: np.ndarray) -> SmallGroups:
    """Return what is done with small groups: in a screen other than in a cohort of few conditions."""
    if small_groups != "auto":
        return small_groups
    return "merge" if len(np.unique(conditions.codes[keep])) >= SCREEN_CONDITIONS else "drop"


def _cut(columns: Sequence[_Column], keep: np.ndarray, limit: int, rule: SmallGroups) -> np.ndarray:
    """Return the cells that small groups, or conditions, take with them: (cells,) bool; refuse where asked."""
    if rule == "merge":
        codes = columns[-1].codes
        return keep & (np.bincount(codes[keep], minlength=len(columns[-1].levels)) < limit)[codes]
    pairs = _combined([column.codes for column in columns])
    small = _small_groups(pairs, columns, keep, limit)
    if small and rule == "error":
        msg = (
            f"{_count(len(small), 'group')} hold fewer than {limit} cells: {_sizes(small)}; leave them out "
            "(--set cohort.small_groups=drop) or keep them (--set cohort.small_groups=keep)"
        )
        raise CohortError(msg)
    return keep & np.isin(pairs, [pair for pair, _, _ in small if rule == "drop"])


def _least_merged(min_group_cells: int) -> int:
    return -(-min_group_cells // MERGED_SHARE)


def _with_merged(
    columns: list[_Column], keep: np.ndarray, min_group_cells: int, rule: SmallGroups
) -> tuple[list[_Column], dict[str, int]]:
    """Return the columns with batches merged where a condition has few cells of them, and how many, by condition.

    Of each condition the smallest batches become one, until that one has enough cells. It gets a level of its own in
    every batch column.
    """
    *batches, condition = columns
    if rule != "merge" or not batches:
        return columns, {}
    pairs = _combined([column.codes for column in columns])
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


def _relabelled(column: _Column, cells: np.ndarray) -> _Column:
    """Return a column in which some cells have a level of their own."""
    if not cells.any():
        return column
    name = MERGED
    while name in column.levels:
        name += "_"
    return _Column((*column.levels, name), np.where(cells, len(column.levels), column.codes))


def _word(name: str) -> str:
    """Return a name as a shell takes it."""
    return shlex.quote(name) if len(name) <= LONGEST_NAME else quoted(name)


def _absent(column: _Column, keep: np.ndarray) -> list[str]:
    counts = np.bincount(column.codes[keep], minlength=len(column.levels))
    return [name for name, count in zip(column.levels, counts, strict=True) if count == 0]


def _what(names: list[str], control: str) -> str:
    if control in names:
        return f"the control {quoted(control)}"
    return f"condition {quoted(names[0])}" if len(names) == 1 else f"{len(names)} conditions, {listing(names)},"


def _check_edges(design: Design) -> None:
    edges = sum(len(design.targets(group, "needed")) for group in design.groups)
    if edges > MOST_EDGES:
        msg = (
            f"the {len(design.groups)} groups (batches x conditions) make {edges} pairs to match, more than "
            f"{MOST_EDGES}; is a batch key unique to each cell, or nearly? Choose a coarser one"
        )
        raise CohortError(msg)


def _combined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return one code per row for the observed combinations of several columns of codes, by appearance."""
    joined = np.zeros(len(columns[0]), dtype=np.int64)
    for codes in columns:
        joined = pd.factorize(joined * (int(codes.max(initial=0)) + 1) + codes)[0].astype(np.int64)
    return joined


def _small_groups(
    pairs: np.ndarray, columns: Sequence[_Column], keep: np.ndarray, limit: int
) -> list[tuple[int, str, int]]:
    """Return code, name and size of the groups that have kept cells, but fewer than the limit."""
    counts = np.bincount(pairs[keep], minlength=int(pairs.max(initial=-1)) + 1)
    _, first = np.unique(pairs, return_index=True)
    found = []
    for pair in np.flatnonzero((counts > 0) & (counts < limit)):
        *levels, condition = (column.levels[column.codes[first[pair]]] for column in columns)
        found.append((int(pair), group_name(levels, condition), int(counts[pair])))
    return found


def _sizes(small: Sequence[tuple[int, str, int]]) -> str:
    return ", ".join(f"{name} ({cells})" for _, name, cells in small[:8]) + (", ..." if len(small) > 8 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _coded(
    condition_key: str, control: str, batch_keys: tuple[str, ...], columns: Sequence[_Column], keep: np.ndarray
) -> tuple[Design, np.ndarray]:
    """Return the design of the kept cells, all numbered by appearance among them, and every cell's group."""
    *batch_columns, condition = (_restricted(column, keep) for column in columns)
    conditions = (control, *(name for name in condition.levels if name != control))
    code_of = {name: code for code, name in enumerate(conditions)}
    place = np.array([code_of[name] for name in condition.levels])
    condition_codes = place[condition.codes]
    batch = _combined([column.codes for column in batch_columns]) if batch_columns else np.zeros_like(condition_codes)
    _, first = np.unique(batch, return_index=True)
    level_codes = [tuple(int(column.codes[row]) for column in batch_columns) for row in first]
    level_names = [
        tuple(column.levels[c] for column, c in zip(batch_columns, codes, strict=True)) for codes in level_codes
    ]
    pairs, codes, counts = np.unique(batch * len(conditions) + condition_codes, return_inverse=True, return_counts=True)
    stops = np.cumsum(counts)
    groups = tuple(
        Group(
            code=code,
            name=group_name(level_names[pair // len(conditions)], conditions[pair % len(conditions)]),
            condition=int(pair % len(conditions)),
            batch=int(pair // len(conditions)),
            batch_codes=level_codes[pair // len(conditions)],
            start=int(stops[code] - counts[code]),
            stop=int(stops[code]),
        )
        for code, pair in enumerate(pairs)
    )
    all_codes = np.full(len(keep), -1, dtype=np.int32)
    all_codes[keep] = codes
    design = Design(
        condition_key=condition_key,
        batch_keys=batch_keys,
        conditions=conditions,
        batch_levels=tuple(column.levels for column in batch_columns),
        batches=tuple(batch_name(names) for names in level_names),
        groups=groups,
    )
    return design, all_codes


def _restricted(column: _Column, keep: np.ndarray) -> _Column:
    """Return a column of the kept cells only, its levels by appearance among them."""
    codes, levels = pd.factorize(column.codes[keep])
    return _Column(tuple(column.levels[level] for level in levels), codes.astype(np.int64))
