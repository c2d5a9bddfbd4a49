"""The design of a cohort: names and codes of conditions, batches and groups, and which groups are matched. Pure.

The functions take names (columns of obs) and return names; integer codes are internal. The control has code 0, and the
other conditions follow in order of appearance. A *batch* is an observed combination of the batch covariates; a *group*
is an observed (batch, condition) pair. Groups are numbered batch by batch, and by condition inside a batch. Each group
owns contiguous rows of the packed store.

Matching searches the nearest neighbours of the cells of a *query* group among the cells of a *target* group; such a
pair of groups is an *edge*. A *mapping* adds the cells of another cohort to a finished run, as further groups behind
those of the run.
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
"""Most edges that `edges='all'` may store: each edge is two files."""
EXCLUDED = "excluded condition"
"""Reason for which the cells of an excluded condition are left out."""
MOST_EDGES = 20_000_000
"""Most edges of a run: each edge is one search."""

NOTHING_ELSE = ConfigDict(extra="forbid")
"""Makes the JSON reader refuse unknown fields."""


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
"""Fields of a design that are omitted from its JSON if they are empty."""


@dataclass(frozen=True)
class Design:
    """Conditions, batch covariates and groups of the kept cells.

    Attributes
    ----------
    condition_key, batch_keys
        Columns of obs that the conditions and the batch covariates come from.
    conditions
        Names of the conditions, the control first.
    batch_levels
        Names of the levels of each batch covariate; empty without a batch key.
    batches
        Names of the observed combinations, levels joined by `+`; one empty name without a batch key.
    groups
        The groups in packed order: `groups[i].code == i`.
    mappings
        Number of groups before each mapping, ascending; empty in a run. The cells of a mapped group are matched with
        the groups that existed before its mapping, and with the group itself.
    sampled
        Most groups of a condition, not counting its own, that one cell is matched with; 0 for all.
    new_controls
        For each mapped cohort whose own controls were mapped first, the number of groups including these controls. The
        other groups of that cohort are matched with them as well.
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
        """Number of groups, the first ones, that this cohort is mapped onto; 0 in a run."""
        return self.mappings[-1] if self.mappings else 0

    @property
    def n_cells(self) -> int:
        """Number of kept cells, including those that this cohort is mapped onto."""
        return self.groups[-1].stop

    @property
    def own_groups(self) -> tuple[Group, ...]:
        """The groups of this cohort, without those that it is mapped onto."""
        return self.groups[self.onto :]

    @property
    def first_row(self) -> int:
        """Packed row of the first cell of `own_groups`."""
        return self.own_groups[0].start

    @property
    def own_cells(self) -> int:
        """Number of cells of `own_groups`."""
        return self.n_cells - self.first_row

    @property
    def control(self) -> str:
        """Name of the control condition."""
        return self.conditions[0]

    @cached_property
    def starts(self) -> np.ndarray:
        """First packed row of each group, and the number of cells at the end: (groups + 1,) int64."""
        return np.array([group.start for group in self.groups] + [self.n_cells], dtype=np.int64)

    def stored_starts(self, code: int = -1) -> np.ndarray:
        """Return the first packed row of each group that existed before group `code` was mapped, and their last stop.

        The default is the last group. In a run these are the starts of all groups.
        """
        return self.starts[: self._before(code % len(self.groups), self.mappings) + 1]

    def group_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the group code of packed rows: (rows,) int64."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    @cached_property
    def group_conditions(self) -> np.ndarray:
        """Condition code of each group: (groups,) int64."""
        return np.array([group.condition for group in self.groups], dtype=np.int64)

    @cached_property
    def group_batch_codes(self) -> np.ndarray:
        """Level code of each group in each batch covariate: (groups, covariates) int64."""
        codes = [group.batch_codes for group in self.groups]
        return np.array(codes, dtype=np.int64).reshape(len(self.groups), len(self.batch_levels))

    def with_condition(self, condition: int) -> list[Group]:
        """Return the groups of a condition."""
        return self._by_condition.get(condition, [])

    @property
    def fewest_groups(self) -> int:
        """Smallest number of groups of one condition that a cell is matched with, without mapped groups."""
        run = self.group_conditions[: self.stored_for(0)]
        fewest = int(np.unique(run, return_counts=True)[1].min())
        return min(fewest, self.sampled or fewest)

    def counted(self, condition: int, group: Group) -> list[Group]:
        """Return the groups whose matches give the expected expression F of a group's cells under a condition.

        In a full match they are all groups of the condition; with `sampled`, the group's arc of them (see `taking`) and
        the group itself if it has the condition. For a mapped group they are limited to the groups that existed before
        its mapping, and the group itself.
        """
        if not self.sampled:
            return self._members(condition, group)
        own = [group] if group.condition == condition else []
        return sorted([*self._arc(condition, group), *own], key=lambda other: other.code)

    def number(self, condition: int, group: Group) -> int:
        """Return the number of groups that F of a group's cells under a condition averages in a full match."""
        return len(self._members(condition, group))

    def _members(self, condition: int, group: Group) -> list[Group]:
        stored = self.stored_for(group.code)
        return [other for other in self.with_condition(condition) if other.code < stored or other == group]

    def stored(self, condition: int) -> list[Group]:
        """Return the groups of a condition that belong to the run, not to a mapped cohort."""
        return [group for group in self.with_condition(condition) if group.code < self.stored_for(0)]

    def stored_for(self, code: int) -> int:
        """Return n such that a group's cells may be matched with the first n groups, and the group itself."""
        return self._before(code, (*self.mappings, *self.new_controls))

    def _before(self, code: int, counts: Sequence[int]) -> int:
        """Return the largest of some group counts up to `code`; for a group of the run, the run's own count."""
        return max((count for count in counts if count <= code), default=(*self.mappings, len(self.groups))[0])

    def condition_code(self, name: str) -> int:
        """Return the code of a condition; the `QueryError` for an unknown name lists the conditions."""
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
        """Return the design with `sampled` set to `groups`; None matches with all groups."""
        return replace(self, sampled=groups or 0)

    @cached_property
    def _arcs(self) -> dict[tuple[int, int], list[Group]]:
        """Cache of `_arc`, by condition and group code."""
        return {}

    def _arc(self, condition: int, group: Group) -> list[Group]:
        """Return a group's arc: the groups of a condition, without itself, that its cells share (see `sample`)."""
        if (condition, group.code) not in self._arcs:
            has_condition = self.group_conditions[: self.stored_for(group.code)] == condition
            members, inside = np.flatnonzero(has_condition), bool(has_condition[group.code : group.code + 1].any())
            if group.code >= len(has_condition):  # a mapped group: its arc must not depend on others mapped with it
                place = zlib.crc32(group.name.encode())
            elif inside:
                place = int(has_condition[: group.code].sum())
            else:  # spread the groups of all other conditions together, since one condition may have a single group
                place = int((~has_condition[: group.code]).sum()) * len(members) // int((~has_condition).sum())
            numbers = arc(len(members), self.sampled, place, inside=inside) if len(members) else []
            self._arcs[condition, group.code] = [self.groups[members[number]] for number in numbers]
        return self._arcs[condition, group.code]

    def taking(self, query: Group, target: Group, cells: np.ndarray) -> np.ndarray:
        """Return which cells of a query group are matched with a target group: (cells,) bool; all in a full match.

        Parameters
        ----------
        cells
            (cells,) positions of the cells in the query group.
        """
        if not self.sampled or query == target:
            return np.ones(len(cells), dtype=bool)
        targets = self._arc(target.condition, query)
        if target not in targets:
            return np.zeros(len(cells), dtype=bool)
        return takes(targets.index(target), len(targets), self.sampled, cells)

    def takes_all(self, query: Group, target: Group) -> bool:
        """Return whether every cell of a query group is matched with a target group."""
        if not self.sampled or query == target:
            return True
        targets = self._arc(target.condition, query)
        return len(targets) <= self.sampled and target in targets

    def stands_for(self, condition: int, group: Group) -> float:
        """Return the weight of a sampled group: members of the condition per group that a cell is matched with.

        The cell's own group is not counted. The weight is 1 in a full match.
        """
        others = len(self._members(condition, group)) - (group.condition == condition)
        return others / min(self.sampled or others, others) if others else 1.0

    @cached_property
    def _by_condition(self) -> dict[int, list[Group]]:
        """The groups of each condition, in order."""
        members: dict[int, list[Group]] = {}
        for group in self.groups:
            members.setdefault(group.condition, []).append(group)
        return members

    @cached_property
    def _of_conditions(self) -> dict[int, list[Group]]:
        """The groups of each condition and of the control, in order."""
        control = self.with_condition(0)
        return {
            condition: sorted({*members, *control}, key=lambda group: group.code)
            for condition, members in self._by_condition.items()
        }

    def refuse_all_edges(self) -> None:
        """Refuse `edges='all'` if the number of edges, the square of the number of groups, is too large to store.

        Raises
        ------
        QueryError
            There are more than a million edges.
        """
        pairs = len(self.groups) ** 2
        if pairs > MOST_STORED_EDGES:
            msg = (
                f"edges 'all' are {pairs} pairs of {len(self.groups)} groups, more than {MOST_STORED_EDGES} to store; effects "
                "of any condition on any cell are computed on request, and `match DIR --edges NAME` adds those of one condition"
            )
            raise QueryError(msg)

    def queries(self, target: Group) -> list[Group]:
        """Return the groups whose cells are matched with a target group, in order: the inverse of `targets`."""
        if self.onto or self.sampled:
            return self._queries.get(target.code, [])
        return list(self.groups) if target.condition == 0 else self.with_condition(target.condition)

    @cached_property
    def _queries(self) -> dict[int, list[Group]]:
        """The query groups of each target group, by the target's code."""
        queries: dict[int, list[Group]] = {}
        for query in self.own_groups:
            for target in self.targets(query, "needed"):
                queries.setdefault(target.code, []).append(query)
        return queries

    @property
    def is_screen(self) -> bool:
        """Whether the cohort is a screen: it has so many conditions that the report shows them together."""
        return len(self.conditions) >= SCREEN_CONDITIONS

    def needed_edges(self, edges: Literal["needed", "all"]) -> list[tuple[int, int]]:
        """Return the edges to search as (query code, target code), ordered by query and then by target.

        `needed`: each group with the groups of its own condition and of the control; the edge to itself finds the
        nearest *other* cell. `all`: each pair of groups.
        """
        return [(query.code, target.code) for query in self.own_groups for target in self.targets(query, edges)]

    def to_json(self) -> dict[str, Any]:
        """Return the design as plain values for JSON."""
        return {name: value for name, value in asdict(self).items() if value or name not in UNUSED_IN_MOST}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Design:
        """Read the output of `to_json` from a file; `StoreError` if it is damaged."""
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
        """Return whether the groups are contiguous and all codes and counts are in range."""
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
    """A design, and the group of each input cell or the reason why the cell is left out.

    Attributes
    ----------
    groups
        (cells,) int32 group codes; -1 for cells left out.
    reasons
        (cells,) reasons; the first category is empty, for cells that `build_design` did not leave out.
    """

    design: Design
    groups: np.ndarray
    reasons: pd.Categorical[Any]


def combined_conditions(obs: ColumnTable, factors: Sequence[str]) -> pd.Series[Any]:
    r"""Combine several columns to one condition per cell: values joined by `:`, with `\` and `:` in values escaped.

    Returns
    -------
    (cells,) categorical; the categories are sorted by name.

    Raises
    ------
    CohortError
        A column does not exist, is named twice or has missing values; or obs already has a column with the combined
        name and other values.
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
    conditions = pd.Series(pd.Categorical.from_codes(np.argsort(order)[codes].astype(np.int32), levels_sorted))
    key = ":".join(factors)
    if key in obs and not (obs[key].astype(str).to_numpy() == conditions.astype(str).to_numpy()).all():
        msg = f"obs has a column {quoted(key)} that is not {listing(factors)} joined by ':'; rename it"
        raise CohortError(msg)
    return conditions


def build_design(obs: ColumnTable, cohort: CohortSettings, keep: np.ndarray | None = None) -> GroupedCells:
    """Build the design of a cohort from the names in its columns.

    Parameters
    ----------
    obs
        Table of the cells; values that are not text are named by `str()`.
    cohort
        Settings: the keys, the control, the conditions to exclude, and the treatment of groups with fewer than
        `min_group_cells` cells. `small_groups="drop"` leaves their cells out, `"keep"` keeps them, `"error"` refuses
        the cohort. `"merge"` requires the number of each condition instead, and merges those batches of a condition
        that have fewer than a quarter of it. `"auto"` is `"merge"` in a screen, else `"drop"`. `rare_conditions`
        decides whether a condition that loses all its cells in this way is an error or is dropped.
    keep
        (cells,) bool, cells to include; None for all.

    Returns
    -------
    The design, the group of each input cell, and why a cell is left out. Conditions are numbered as in METHOD: the
    control first, the others by appearance among the kept cells. Cells that `keep` leaves out have no reason.

    Raises
    ------
    CohortError
        A column does not exist or has missing values; the control or a second condition has no cells, or loses all.
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
    """Log the notes on a design and return them.

    They report small groups, batches without controls, conditions that are confounded with batches, and odd names.
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
    """Return a code per cell for its (batch, condition) pair, small groups included: (cells,) int32."""
    return combined([named_column(obs, name).codes for name in (*batch_keys, condition_key)])


def _check_keys(obs: ColumnTable, cohort: CohortSettings) -> tuple[str, str]:
    """Check that the keys are different columns of obs and are set; return the condition column and the control."""
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
    """Return which cells have an excluded condition: (cells,) bool.

    Raises
    ------
    CohortError
        An excluded condition has no cell, or is the control.
    """
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
    """Return the design of the kept cells, numbered by appearance among them, and each cell's group code (-1: none)."""
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
