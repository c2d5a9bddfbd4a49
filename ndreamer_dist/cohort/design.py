"""The design of a cohort: names and codes of conditions, batches and groups, and the contrasts they allow.

Pure. Names come in (columns of obs) and names go out; integer codes are used only between. The control has code 0. The
other conditions follow in order of appearance. A *batch* is an observed combination of the batch covariates; a *group*
is an observed (batch, condition) pair. Groups are numbered batch by batch, and by condition inside a batch. Each group
owns contiguous rows of the packed store.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ndreamer_dist.errors import CohortError, QueryError, StoreError, listing, quoted, suggest
from ndreamer_dist.grouping.names import level_meant, odd_designs
from ndreamer_dist.grouping.sample import arc, takes
from ndreamer_dist.grouping.small_groups import (
    SCREEN_CONDITIONS,
    ColumnTable,
    NamedColumn,
    SmallGroupsReport,
    absent_levels,
    batch_name,
    cells_of_small_groups,
    columns_of,
    combined,
    group_name,
    named_column,
    named_conditions,
    resolved_rule,
    restricted,
    vanishing,
    why_left_out,
    with_merged_batches,
    would_vanish,
)
from ndreamer_dist.settings import CohortSettings

logger = logging.getLogger(__name__)

MOST_STORED_EDGES = 1_000_000
"""Pairs of groups that edges `all` may be: each is two files."""
EXCLUDED = "excluded condition"
"""Why a cell of an excluded condition is left out."""
MOST_EDGES = 20_000_000
"""Pairs of groups to match at most: every one is a piece of work of its own."""

NOTHING_ELSE = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Group:
    """One observed (batch, condition) pair and its rows `start:stop` in the packed store."""

    __pydantic_config__ = NOTHING_ELSE
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


UNUSED_IN_MOST = ("mappings", "sampled", "new_controls")
"""Fields of a design that are written where they say something."""


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
    mappings
        How many groups there were before each mapping onto a finished run; empty in a run. The cells of a group are matched
        with the groups that were there before it was mapped, and with itself.
    new_controls
        Of cohorts that were mapped with controls of their own first, how many groups there were with these: the cohort's other
        groups are matched with them as well.
    sampled
        How many groups of a condition, besides its own, a cell is matched in at most; 0 for all.
    """

    __pydantic_config__ = NOTHING_ELSE
    condition_key: str
    batch_keys: tuple[str, ...]
    conditions: tuple[str, ...]
    batch_levels: tuple[tuple[str, ...], ...]
    batches: tuple[str, ...]
    groups: tuple[Group, ...]
    mappings: tuple[int, ...] = ()
    sampled: int = 0
    new_controls: tuple[int, ...] = ()

    @property
    def onto(self) -> int:
        """How many groups, the first ones, are those that this cohort is mapped onto; 0 for a run."""
        return self.mappings[-1] if self.mappings else 0

    @property
    def n_cells(self) -> int:
        """Number of kept cells, those that others are mapped onto among them."""
        return self.groups[-1].stop

    @property
    def own_groups(self) -> tuple[Group, ...]:
        """The groups of this cohort itself: all, where it is not mapped onto others."""
        return self.groups[self.onto :]

    @property
    def first_row(self) -> int:
        """Row of the first cell of this cohort itself."""
        return self.own_groups[0].start

    @property
    def own_cells(self) -> int:
        """Number of cells of this cohort itself."""
        return self.n_cells - self.first_row

    @property
    def control(self) -> str:
        """Name of the control condition."""
        return self.conditions[0]

    @cached_property
    def starts(self) -> np.ndarray:
        """First packed row of every group, and the number of cells at the end: (groups + 1,) int64."""
        return np.array([group.start for group in self.groups] + [self.n_cells], dtype=np.int64)

    def stored_starts(self, code: int = -1) -> np.ndarray:
        """First packed row of every group that was there before a group was mapped, by default the last, and where these end."""
        return self.starts[: self._before(code % len(self.groups), self.mappings) + 1]

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
        """In how many groups of a condition a cell is matched at the least; onto a finished run, in those of that run."""
        run = self.group_conditions[: self.stored_for(0)]
        fewest = int(np.unique(run, return_counts=True)[1].min())
        return min(fewest, self.sampled or fewest)

    def counted(self, condition: int, group: Group) -> list[Group]:
        """Return the groups that the expected expression of a group's cells under a condition is read from, in order.

        They are those of the condition, or an arc of them (see `taking`); of cells that are mapped onto others, the group
        itself alone besides those that were there before.
        """
        if not self.sampled:
            return self._members(condition, group)
        own = [group] if group.condition == condition else []
        return sorted([*self._arc(condition, group), *own], key=lambda other: other.code)

    def number(self, condition: int, group: Group) -> int:
        """Return how many groups the expected expression of a group's cells under a condition is the mean over."""
        return len(self._members(condition, group))

    def _members(self, condition: int, group: Group) -> list[Group]:
        stored = self.stored_for(group.code)
        return [other for other in self.with_condition(condition) if other.code < stored or other == group]

    def stored(self, condition: int) -> list[Group]:
        """Return the groups of a condition that the cells of every group are matched with where they need them."""
        return [group for group in self.with_condition(condition) if group.code < self.stored_for(0)]

    def stored_for(self, code: int) -> int:
        """Return how many groups, the first ones, a group's cells are matched with, besides itself."""
        return self._before(code, (*self.mappings, *self.new_controls))

    def _before(self, code: int, counts: Sequence[int]) -> int:
        """Return the largest of some numbers of groups that a group comes after; the run's where it is one of the run."""
        return max((count for count in counts if count <= code), default=(*self.mappings, len(self.groups))[0])

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
        if edges == "all" and not self.sampled:
            return [group for group in self.groups if group.code < self.stored_for(query.code) or group == query]
        if self.onto or self.sampled:
            conditions = range(len(self.conditions)) if edges == "all" else (0, query.condition)
            targets = {target for condition in conditions for target in self.counted(condition, query)}
            return sorted({*targets, query}, key=lambda group: group.code)
        return self._of_conditions[query.condition]

    def sampling(self, groups: int | None) -> Design:
        """Return the same design with so many groups of a condition to match a group's cells with; none for all."""
        return replace(self, sampled=groups or 0)

    @cached_property
    def _arcs(self) -> dict[tuple[int, int], list[Group]]:
        """What `_arc` gave, by condition and group."""
        return {}

    def _arc(self, condition: int, group: Group) -> list[Group]:
        """Return the groups of a condition, besides its own, that a group's cells are matched with by turns; see `sample`."""
        if (condition, group.code) not in self._arcs:
            is_there = self.group_conditions[: self.stored_for(group.code)] == condition
            others, inside = np.flatnonzero(is_there), bool(is_there[group.code : group.code + 1].any())
            if group.code >= len(is_there):  # its sample is the same whatever is mapped with it
                place = zlib.crc32(group.name.encode())
            elif inside:
                place = int(is_there[: group.code].sum())
            else:  # those of all other conditions are spread round the circle together: one may have a single group
                place = int((~is_there[: group.code]).sum()) * len(others) // int((~is_there).sum())
            taken = arc(len(others), self.sampled, place, inside=inside) if len(others) else []
            self._arcs[condition, group.code] = [self.groups[others[number]] for number in taken]
        return self._arcs[condition, group.code]

    def taking(self, query: Group, target: Group, cells: np.ndarray) -> np.ndarray:
        """Return which cells of a group, by their number in it, are matched in another: (cells,) bool; all in a full match."""
        if not self.sampled or query == target:
            return np.ones(len(cells), dtype=bool)
        targets = self._arc(target.condition, query)
        if target not in targets:
            return np.zeros(len(cells), dtype=bool)
        return takes(targets.index(target), len(targets), self.sampled, cells)

    def takes_all(self, query: Group, target: Group) -> bool:
        """Return whether all cells of a group are matched in another where they need matches there."""
        if not self.sampled or query == target:
            return True
        targets = self._arc(target.condition, query)
        return len(targets) <= self.sampled and target in targets

    def stands_for(self, condition: int, group: Group) -> float:
        """Return how many groups each that a cell is matched in stands for, its own left out: 1 where all are taken."""
        others = len(self._members(condition, group)) - (group.condition == condition)
        return others / min(self.sampled or others, others) if others else 1.0

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

    def refuse_all_edges(self) -> None:
        """Refuse to match every group with every other where that is for later questions alone and takes the square.

        Raises
        ------
        QueryError
            There are more than a million pairs.
        """
        pairs = len(self.groups) ** 2
        if pairs > MOST_STORED_EDGES:
            msg = (
                f"edges 'all' are {pairs} pairs of {len(self.groups)} groups, more than {MOST_STORED_EDGES} to store; effects of "
                "any condition on any cell are searched when they are asked for, and `match DIR --edges NAME` adds those of one"
            )
            raise QueryError(msg)

    def queries(self, target: Group) -> list[Group]:
        """Return the groups whose cells need matches in a group, in order: the other way round of needed `targets`."""
        if self.onto or self.sampled:
            return self._queries.get(target.code, [])
        return list(self.groups) if target.condition == 0 else self.with_condition(target.condition)

    @cached_property
    def _queries(self) -> dict[int, list[Group]]:
        """By code of a target group, the groups whose cells need matches in it."""
        found: dict[int, list[Group]] = {}
        for query in self.own_groups:
            for target in self.targets(query, "needed"):
                found.setdefault(target.code, []).append(query)
        return found

    @property
    def is_screen(self) -> bool:
        """Whether there are so many conditions that they are looked at together and not one by one."""
        return len(self.conditions) >= SCREEN_CONDITIONS

    def needed_edges(self, edges: Literal["needed", "all"]) -> list[tuple[int, int]]:
        """Return the (query group, target group) pairs to search, by query group and then by target group.

        `needed`: every group to the groups of its own condition (itself among them: the nearest *other* cell) and of
        the control. `all`: every pair.
        """
        return [(query.code, target.code) for query in self.own_groups for target in self.targets(query, edges)]

    def to_json(self) -> dict[str, Any]:
        """Return the design as plain values."""
        return {name: value for name, value in asdict(self).items() if value or name not in UNUSED_IN_MOST}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Design:
        """Read what `to_json` gave; `StoreError` where it was anything else: it comes from a file."""
        try:
            design = _DESIGNS.validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            msg = f"the design is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})"
            raise StoreError(msg) from error
        if not design._fits():
            msg = "the design is damaged: its groups do not fit together"
            raise StoreError(msg)
        return design

    def _fits(self) -> bool:
        """Return whether the groups follow each other and name conditions and batches that are there."""
        stops = [0, *(group.stop for group in self.groups)]
        return (
            len(self.conditions) > 1
            and list(self.mappings) == sorted({*self.mappings} & {*range(1, len(self.groups))})
            and all(
                self.mappings and count in range(self.mappings[0] + 1, len(self.groups)) for count in self.new_controls
            )
            and bool(self.groups)
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


_DESIGNS = TypeAdapter(Design)


@dataclass(frozen=True)
class GroupedCells:
    """A design, and what became of every input cell by it.

    Attributes
    ----------
    groups
        (cells,) int32 group codes; -1 for cells left out.
    reasons
        (cells,) why a cell was left out, texts as categories, the first of them empty.
    """

    design: Design
    groups: np.ndarray
    reasons: pd.Categorical[Any]


def combined_conditions(obs: ColumnTable, factors: Sequence[str]) -> pd.Series[Any]:
    r"""Return a condition per cell: its values in several columns, joined by `:`; `\` and `:` inside values are escaped.

    Raises
    ------
    CohortError
        A column is missing, stands twice or has missing values; or one of the combinations' name says something else.
    """
    for name in factors:
        if name not in obs:
            msg = f"condition key {quoted(name)} is no column of obs; there are {columns_of(obs)}.{suggest(name, obs.columns)}"
            raise CohortError(msg)
    if len(set(factors)) < len(factors):
        msg = f"a condition key is given twice: {listing(factors)}"
        raise CohortError(msg)
    columns = [named_column(obs, name) for name in factors]
    levels = [[level.replace("\\", "\\\\").replace(":", "\\:") for level in column.levels] for column in columns]
    codes = combined([column.codes for column in columns])
    _, first = np.unique(codes, return_index=True)
    names = [
        ":".join(own[column.codes[row]] for own, column in zip(levels, columns, strict=True)) for row in first.tolist()
    ]
    order = np.argsort(names, kind="stable")
    levels_sorted = pd.Index(np.array(names, dtype=object)[order])
    found = pd.Series(pd.Categorical.from_codes(np.argsort(order)[codes].astype(np.int32), levels_sorted))
    key = ":".join(factors)
    if key in obs and not (obs[key].astype(str).to_numpy() == found.astype(str).to_numpy()).all():
        msg = f"obs has a column {quoted(key)} that is not {listing(factors)} joined by ':'; rename it"
        raise CohortError(msg)
    return found


def build_design(obs: ColumnTable, cohort: CohortSettings, keep: np.ndarray | None = None) -> GroupedCells:
    """Return the design of a cohort, the group of every input cell, and why a cell was left out here.

    Parameters
    ----------
    obs
        The cells' table; columns that are not text are named by `str()`.
    cohort
        Names the condition, the control, the batch covariates and the conditions to leave out. Of groups of fewer than
        `min_group_cells` cells, `small_groups` says what is done: `drop` leaves their cells out, `error` refuses,
        `merge` asks the number of a condition, and merges those of its batches that have fewer than a quarter of it;
        `auto` is `merge` in a screen, else `drop`. `rare_conditions` says it of conditions that would vanish by that.
    keep
        (cells,) bool, the cells to look at; none: all.

    Returns
    -------
    METHOD's notation: control first, the rest by appearance among the kept cells. Cells left out by `keep` have no reason.

    Raises
    ------
    CohortError
        A column is missing or has missing values; the control or a second condition is not there, or would vanish.
    """
    keep = np.ones(len(obs), dtype=bool) if keep is None else keep
    condition_key, control = _check_keys(obs, cohort)
    columns = [named_column(obs, name) for name in (*cohort.batch_key, condition_key)]
    control = level_meant(obs[condition_key], columns[-1].levels, control)
    left_out = excluded(obs, condition_key, cohort.exclude_conditions, control)
    _check_conditions(columns[-1], condition_key, control, keep, left_out)
    excluded_cells = keep & left_out
    keep = keep & ~left_out
    least, rule = cohort.min_group_cells, resolved_rule(cohort.small_groups, columns[-1], keep)
    columns, _ = with_merged_batches(columns, keep, least, rule)
    cut = cells_of_small_groups(columns, keep, least, rule)
    gone = vanishing(columns[-1], keep, cut)
    left = len(np.unique(columns[-1].codes[keep & ~cut]))
    if gone and (cohort.rare_conditions == "error" or control in gone or left < 2):
        raise CohortError(would_vanish(gone, control, least, rule))
    few = f"{'condition' if rule == 'merge' else 'group'} of fewer than {least} cells"
    reasons = why_left_out({EXCLUDED: excluded_cells, few: cut})
    keep = keep & ~cut
    design, codes = _coded(condition_key, control, cohort.batch_key, columns, keep)
    _check_edges(design)
    return GroupedCells(design, codes, reasons)


def report_design(design: Design, small: SmallGroupsReport) -> list[str]:
    """Log what is worth knowing about a design and return it as notes.

    They are of small groups, batches without controls, conditions that are confounded with batches, and odd names.
    """
    batches = {name: {group.batch for group in design.with_condition(c)} for c, name in enumerate(design.conditions)}
    names = [*design.conditions, *itertools.chain(*design.batch_levels)]
    notes = [*small.notes(), *odd_designs(batches, small.merged, names)]
    for note in notes:
        logger.warning(note)
    without = len(design.batches) - len(batches[design.control])
    if without:
        notes.append(
            f"{without} of {len(design.batches)} batches hold no control: their controls come from the other batches"
        )
        logger.info(notes[-1])
    return notes


def pair_codes(obs: ColumnTable, condition_key: str, batch_keys: Sequence[str]) -> np.ndarray:
    """Return a code of every cell's (batch, condition) pair, whatever its size: (cells,) int32."""
    return combined([named_column(obs, name).codes for name in (*batch_keys, condition_key)])


def _check_keys(obs: ColumnTable, cohort: CohortSettings) -> tuple[str, str]:
    """Refuse keys that are no columns, or are given twice; return the column of conditions and the control."""
    condition_key, batch_keys = cohort.condition_column, cohort.batch_key
    if condition_key is None:
        msg = (
            "no condition key was given; name the column of obs that holds the condition (--condition-key NAME; there "
            f"are {columns_of(obs)})"
        )
        raise CohortError(msg)
    for what, name in (("condition key", condition_key), *(("batch key", name) for name in batch_keys)):
        if name not in obs:
            msg = f"{what} {quoted(name)} is no column of obs; there are {columns_of(obs)}.{suggest(name, obs.columns)}"
            raise CohortError(msg)
    if condition_key in batch_keys:
        msg = f"column {condition_key!r} is both condition and batch; a batch effect needs a column of its own"
        raise CohortError(msg)
    if len(set(batch_keys)) < len(batch_keys):
        msg = f"a batch key is given twice: {listing(batch_keys)}"
        raise CohortError(msg)
    if cohort.control is None:
        levels = listing(named_column(obs, condition_key).levels)
        msg = f"no control was given; name one (--control NAME) of what {condition_key!r} holds: {levels}"
        raise CohortError(msg)
    return condition_key, cohort.control


def excluded(obs: ColumnTable, key: str, names: Sequence[str], control: str | None = None) -> np.ndarray:
    """Return which cells are of an excluded condition: (cells,) bool; `CohortError` where no cell is, or it is the control."""
    column = named_column(obs, key)
    levels = [level_meant(obs[key], column.levels, name) for name in names]
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


def _check_conditions(column: NamedColumn, key: str, control: str, keep: np.ndarray, left_out: np.ndarray) -> None:
    if control not in column.levels:
        msg = (
            f"no cell has the control {quoted(control)} in {key!r}; there are {listing(column.levels)}."
            f"{suggest(control, column.levels)}"
        )
        raise CohortError(msg)
    if len(np.unique(column.codes[~left_out])) < 2:
        msg = f"{key!r} holds one condition, {control!r}; effects need a second one"
        raise CohortError(msg)
    gone = set(absent_levels(column, keep & ~left_out)) - set(absent_levels(column, ~left_out))
    if gone:
        names = [name for name in column.levels if name in gone]
        msg = f"no cell is left of {named_conditions(names, control)}: all were left out for their counts (see min_genes, min_cells)"
        raise CohortError(msg)


def _check_edges(design: Design) -> None:
    edges = sum(len(design.targets(group, "needed")) for group in design.groups)
    if edges > MOST_EDGES:
        msg = (
            f"the {len(design.groups)} groups (batches x conditions) make {edges} pairs to match, more than "
            f"{MOST_EDGES}; is a batch key unique to each cell, or nearly? Choose a coarser one"
        )
        raise CohortError(msg)


def _coded(
    condition_key: str, control: str, batch_keys: tuple[str, ...], columns: Sequence[NamedColumn], keep: np.ndarray
) -> tuple[Design, np.ndarray]:
    """Return the design of the kept cells, all numbered by appearance among them, and every cell's group."""
    *batch_columns, condition = (restricted(column, keep) for column in columns)
    conditions = (control, *(name for name in condition.levels if name != control))
    code_of = {name: code for code, name in enumerate(conditions)}
    place = np.array([code_of[name] for name in condition.levels], dtype=np.int32)
    condition_codes = place[condition.codes]
    batch = combined([column.codes for column in batch_columns]) if batch_columns else np.zeros_like(condition_codes)
    _, first = np.unique(batch, return_index=True)
    level_codes = [tuple(int(column.codes[row]) for column in batch_columns) for row in first]
    level_names = [
        tuple(column.levels[c] for column, c in zip(batch_columns, codes, strict=True)) for codes in level_codes
    ]
    codes, pairs = pd.factorize(batch.astype(np.int64) * len(conditions) + condition_codes, sort=True)
    counts = np.bincount(codes)
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
        for code, pair in enumerate(pairs.tolist())
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
