"""The design of a run with mapped cells: the groups of the run first, then the new ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ndreamer_dist.cohort.design import (
    EXCLUDED,
    Design,
    Group,
    GroupedCells,
    batch_name,
    group_name,
    named_column,
)
from ndreamer_dist.errors import CohortError, listing, quoted, suggest
from ndreamer_dist.grouping.names import nearly_same
from ndreamer_dist.grouping.small_groups import ColumnTable, columns_of, why_left_out
from ndreamer_dist.settings import CohortSettings


def mapped_design(
    obs: ColumnTable, stored: Design, cohort: CohortSettings, keep: np.ndarray, *, controls_first: bool = False
) -> GroupedCells:
    """Append the groups of new cells to the design of a run.

    New groups are sorted by name, so the result does not depend on the order of the cells. Their conditions and batches
    may be known or new. A (batch, condition) pair of the run is refused, since its cells are in the run already.

    Parameters
    ----------
    stored
        Design of the run, whose groups come first.
    keep
        (cells,) bool, the new cells to consider.
    controls_first
        Whether new control groups come before the other new groups, which are then matched with them too.

    Raises
    ------
    CohortError
        A column is missing or has missing values; a group is in the run; no group is large enough; or the name of a
        condition is nearly that of a condition of the run.
    """
    columns = {name: names_in(obs, name) for name in (*stored.batch_keys, stored.condition_key)}
    _refuse_nearly_known(columns[stored.condition_key], (*stored.conditions, *cohort.exclude_conditions))
    if not stored.batch_keys:  # the run has a single batch; the new cells are another one
        columns = {"": np.full(len(obs), f"mapped_{len(stored.batches)}", dtype=object), **columns}
    table = pd.DataFrame(dict(enumerate(columns.values())))
    condition = table.columns[-1]
    left_out = table[condition].isin(cohort.exclude_conditions).to_numpy()
    few = np.zeros(len(obs), dtype=bool)
    codes = np.full(len(obs), -1, dtype=np.int32)
    before = len(stored.groups)
    design = replace(stored, mappings=(*stored.mappings, before))
    small: dict[str, int] = {}
    grouped = table[keep & ~left_out].groupby(list(table.columns), observed=True).groups
    ordered: list[Any] = sorted(grouped, key=str)  # (levels of the batch keys, condition) of every group
    if controls_first:
        ordered.sort(key=lambda names: names[-1] != stored.control)
    for names in ordered:
        places = np.asarray(grouped[names], dtype=np.int64)
        if len(places) < cohort.min_group_cells and cohort.small_groups != "keep":
            small[group_name(names[:-1], names[-1])] = len(places)
            few[places] = True
            continue
        design = _with_group(design, names[:-1], names[-1], len(places))
        codes[places] = design.groups[-1].code
    if small and (cohort.small_groups == "error" or len(design.groups) == before):
        sizes = listing([f"{name} ({cells})" for name, cells in small.items()])
        msg = (
            f"groups of fewer than {cohort.min_group_cells} cells: {sizes}; lower cohort.min_group_cells, or keep them "
            "(--set cohort.small_groups=keep)"
        )
        raise CohortError(msg)
    if len(design.groups) == before:
        msg = "no cell is left to map"
        raise CohortError(msg)
    controls = sum(group.condition == 0 for group in design.own_groups)
    if controls_first and 0 < controls < len(design.own_groups):
        design = replace(design, new_controls=(*design.new_controls, before + controls))
    reasons = {EXCLUDED: keep & left_out, f"group of fewer than {cohort.min_group_cells} cells": few}
    return GroupedCells(design, codes, why_left_out(reasons))


def names_in(obs: ColumnTable, name: str) -> np.ndarray:
    """Return a column of names: (cells,) text; raise `CohortError` if it is missing or has missing values."""
    if name not in obs:
        msg = (
            f"the run's column {quoted(name)} is not in obs; there are {columns_of(obs)}.{suggest(name, obs.columns)} "
            "Name the column as the run's cohort does"
        )
        raise CohortError(msg)
    column = named_column(obs, name)
    return np.array(column.levels, dtype=object)[column.codes]


def _refuse_nearly_known(names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a condition that is new only by its spelling: its cells would find no cells of it in the run."""
    for name in dict.fromkeys(names):
        alike = [other for other in known if nearly_same(name, other)]
        if alike and name not in known:
            msg = (
                f"condition {quoted(name)} is not in the run, which has {quoted(alike[0])}; write it as the run's "
                "cohort does, or give it another name if it is another condition"
            )
            raise CohortError(msg)


def _with_group(design: Design, levels: Sequence[str], condition: str, cells: int) -> Design:
    """Return the design with one more group of `cells` cells; raise `CohortError` if it has the group already."""
    name = group_name(levels, condition)
    if name in {group.name for group in design.groups}:
        msg = (
            f"group {quoted(name)} is in the run already; cells of it that were measured anew are a batch of their "
            f"own: give them another name in {listing(design.batch_keys)}"
        )
        raise CohortError(msg)
    batch_levels = design.batch_levels
    if design.batch_keys:
        batch_levels = tuple(
            own if level in own else (*own, level) for own, level in zip(batch_levels, levels, strict=True)
        )
    batch = batch_name(levels)
    batches = design.batches if batch in design.batches else (*design.batches, batch)
    conditions = design.conditions if condition in design.conditions else (*design.conditions, condition)
    group = Group(
        code=len(design.groups), name=name, condition=conditions.index(condition), batch=batches.index(batch),
        batch_codes=tuple(own.index(level) for own, level in zip(batch_levels, levels, strict=False)),
        start=design.n_cells, stop=design.n_cells + cells,
    )  # fmt: skip
    return replace(
        design, conditions=conditions, batch_levels=batch_levels, batches=batches, groups=(*design.groups, group)
    )  # fmt: skip
