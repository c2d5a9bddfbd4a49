"""The CATE table: the effect in every population, tested with donors as replicates, and measures of its quality.

Input: the results of a run, a column of `obs` that names populations, and the donors. Output: one row per population,
condition and gene. Data are streamed, one condition after the other. Memory grows with the numbers of populations and
genes, and with the donors of one condition and the control. `p` never treats cells as replicates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.effects.expression import held
from ndreamer_dist.errors import QueryError, listing, suggest
from ndreamer_dist.grouping.covariates import as_numbers, constant_columns
from ndreamer_dist.grouping.small_groups import named_column
from ndreamer_dist.matching.between import StateNeighbours, StateSpace
from ndreamer_dist.matching.hubs import pool
from ndreamer_dist.results.on_demand import (
    Counterparts,
    Expression,
    compute,
    effect_question,
    layer_question,
)
from ndreamer_dist.stats.decomposition import Decomposition, Part, decomposition_columns
from ndreamer_dist.stats.donor_tests import (
    LEAST_DONORS,
    DonorTest,
    left_out_differences,
    left_out_effects,
    linear_test,
    paired_test,
    treated_queries_test,
    untested,
    welch_test,
)
from ndreamer_dist.stats.populations import (
    Nearest,
    PopulationMeans,
    Replicates,
    first_cells,
    population_means,
    query_means,
)
from ndreamer_dist.stats.sign_test import benjamini_hochberg, sign_test
from ndreamer_dist.stats.state_space import StateSource, state_space
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.summaries.cells import (
    EffectMoments,
    MatchQuality,
    PlainExpression,
    match_quality,
    parts,
    placebo_moments,
    plain_expression,
    rows_of_condition,
)

logger = logging.getLogger(__name__)

Whose = Literal["all", "treated"]
MIN_CELLS = 10
"""Cells that a donor needs in a population to enter its test."""
PURE = 0.7
"""Share of matches inside the population below which they are flagged as impure."""
ALL_CELLS = "all cells"
"""Name of the single population when no column names populations."""
HELD_EFFECTS = 2**24
"""Most values (cells times genes) of the conditions whose effects are read together."""
COUNT_FLOOR = 1e-9
"""Added to mean counts before the fold change, as in scanpy."""


@dataclass(frozen=True)
class StatisticsInput:
    """Input of the tables of statistics; methods of `Results` fill it in.

    Attributes
    ----------
    cells
        `obs` in packed order.
    columns, genes
        Columns of the expression, and the names of their genes.
    stored_ite
        Whether to read individual effects from the store instead of computing them.
    embedding
        Array of `obsm` with the coordinates of the matching space.
    state
        Input of the state coordinates, if any.
    spaces
        Cache of state coordinates, by column of populations, column of donors and least cells per donor.
    baseline
        Code of the condition to compare with; 0 is the control.
    """

    storage: Storage
    design: Design
    cells: pd.DataFrame
    counterparts: Counterparts
    expression: Expression
    columns: np.ndarray
    genes: pd.Index
    stored_ite: bool
    seed: int = 0
    embedding: str = keys.OBSM_PCA
    state: StateSource | None = None
    spaces: dict[tuple[str | None, str | None, int], StateSpace] = field(default_factory=dict)
    baseline: int = 0


@dataclass(frozen=True)
class CateQuestion:
    """Arguments of `Results.cate`, which documents them."""

    by: str | None = None
    condition: str | None = None
    donor_key: str | None = None
    min_cells: int = MIN_CELLS
    population: Whose = "all"
    covariates: Sequence[str] = ()


def cate_table(source: StatisticsInput, question: CateQuestion) -> pd.DataFrame:
    """Return the table, sorted by population and then by condition."""
    parts = sorted(cate_parts(source, question), key=lambda part: part[0])
    table = pd.concat([part for _, part in parts], ignore_index=True)
    table["p_adjusted_all"] = benjamini_hochberg(table["p"].to_numpy())
    return table


def cate_parts(source: StatisticsInput, question: CateQuestion) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yield the rows of each population, condition by condition, with the number of the population.

    Memory does not grow with the number of conditions, except for a few numbers per cell and, in the state space, the
    mean expression of every donor under every condition.
    """
    conditions = conditions_of(source.design, question.condition, source.baseline)
    names, codes = populations_of(source.cells, question.by)
    everyone = replicates_of(source, question.donor_key)
    space = space_of(source, question, codes, everyone)
    rows = rows_of_condition(source.design, source.baseline)
    source = replace(source, expression=held(source.expression, rows, source.columns))
    if source.baseline:
        search = source.counterparts.between(source.embedding)
        source = replace(source, counterparts=replace(source.counterparts, search=search))
    if not any((codes[rows_of_condition(source.design, code)] >= 0).any() for code in conditions):
        msg = f"no cell of {listing([source.design.conditions[code] for code in conditions])} is in a population"
        raise QueryError(msg)
    control = _control(source, codes)
    for code, effects in effects_by_condition(source, codes, conditions):
        replicates = everyone.against(source.baseline, code)
        means = means_of(source, codes, replicates, question.min_cells, space)
        compared = Compared(code, codes, replicates, means, space)
        described = _described(source, codes, code, effects, control)
        for number, name in enumerate(names):
            if described.effects.number[number]:
                tested = _tested(source, compared, number, question)
                yield number, _rows(source, name, number, code, described, tested)


def donor_means(source: StatisticsInput, question: CateQuestion) -> anndata.AnnData:
    """Return one row per population, donor and condition; see `Results.donor_means`."""
    conditions, by = conditions_of(source.design, question.condition, source.baseline), str(question.by)
    names, codes = populations_of(source.cells, question.by)
    everyone = replicates_of(source, question.donor_key)
    covariates = constant_columns(source.cells, everyone.of_cell)
    rows, matched, plain = [], [], []
    for code in conditions:
        replicates = everyone.against(source.baseline, code)
        own = covariates[np.isin(everyone.conditions, (source.baseline, code))]
        means = means_of(source, codes, replicates, question.min_cells)
        for number, r in np.argwhere(means.included):
            rows.append(
                {
                    by: names[number], "contrast": source.design.conditions[code], "donor": replicates.donors[r],
                    "condition": source.design.conditions[replicates.conditions[r]],
                    "cells": int(means.cells[number, r]), **own.iloc[r].to_dict(),
                }
            )  # fmt: skip
            matched.append(means.matched[number, r])
            plain.append(means.own[number, r])
    if not rows:
        msg = f"no donor has {question.min_cells} cells in a population; ask for fewer with min_cells"
        raise QueryError(msg)
    obs = pd.DataFrame(rows)
    obs.index = pd.Index([f"{row[by]}|{row['donor']}|{row['condition']}|{row['contrast']}" for row in rows])
    var = pd.DataFrame(index=source.genes)
    return anndata.AnnData(np.array(matched), obs=obs, var=var, layers={"pseudobulk": np.array(plain)})


def populations_of(cells: pd.DataFrame, by: str | None) -> tuple[list[str], np.ndarray]:
    """Return the names of the populations and a population code per cell, -1 for none.

    Parameters
    ----------
    by
        Column of `cells`; None makes all cells one population.

    Raises
    ------
    QueryError
        The column is missing, or all its values are.
    """
    if by is None:
        return [ALL_CELLS], np.zeros(len(cells), dtype=np.int64)
    codes, names = pd.factorize(column(cells, by).astype(object), sort=False)
    order = np.argsort([str(name) for name in names], kind="stable")
    place = np.empty(len(names) + 1, dtype=np.int64)
    place[order], place[-1] = np.arange(len(names)), -1
    if not len(names):
        msg = f"column {by!r} names no population"
        raise QueryError(msg)
    return [str(names[i]) for i in order], place[codes]


def column(cells: pd.DataFrame, name: str) -> pd.Series:
    """Return a column of obs; the `QueryError` for a missing one lists the columns."""
    if name not in cells:
        known = [str(column) for column in cells.columns]
        msg = f"obs has no column {name!r}; there are {listing(known, limit=30)}.{suggest(name, known)}"
        raise QueryError(msg)
    return cells[name]


def replicates_of(source: StatisticsInput, donor_key: str | None) -> Replicates:
    """Return the replicates: the donors named in a column, or by default the batches.

    Raises
    ------
    QueryError
        There is neither a donor column nor a batch key.
    CohortError
        The column has missing values.
    """
    if donor_key is None:
        if not source.design.batch_keys:
            msg = "the run has no batch key, so nothing says who the donors are; name their column with donor_key (--donor-key)"
            raise QueryError(msg)
        return Replicates.of(source.cells[keys.OBS_BATCH], source.design)
    donors = column(source.cells, donor_key)
    named_column(source.cells, donor_key)  # for its check: missing values are refused
    return Replicates.of(donors, source.design)


# --- parts of the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """Sums over the baseline's cells, per population; see `summaries.cells`."""

    plain: PlainExpression
    placebo: np.ndarray | None


@dataclass(frozen=True)
class Described:
    """Sums over the cells of one condition, per population; see `summaries.cells`."""

    effects: EffectMoments
    near_effects: EffectMoments
    plain: PlainExpression
    control: Control
    quality: MatchQuality


@dataclass(frozen=True)
class Compared:
    """A contrast: condition `code` against the baseline.

    Attributes
    ----------
    populations
        (cells,) population of every packed row of the run, -1 for none.
    replicates, means
        The replicates of both conditions, and their means in every population.
    space
        State coordinates, if any.
    """

    code: int
    populations: np.ndarray
    replicates: Replicates
    means: PopulationMeans
    space: StateSpace | None


@dataclass(frozen=True)
class Tested:
    """Donor-level tests of one population and condition.

    Attributes
    ----------
    treated, control
        Number of tested donors in the condition and in the baseline.
    left_out
        Names of donors with cells in the population that the test leaves out.
    matched, total
        The test on means through the matches, and on plain means.
    parts
        The decomposition, if the population has state coordinates.
    """

    treated: int
    control: int
    left_out: tuple[str, ...]
    matched: DonorTest
    total: Part
    parts: Decomposition | None


def conditions_of(design: Design, condition: str | None, baseline: int = 0) -> list[int]:
    """Return the codes of the conditions to compare with the baseline: the named one, or all others.

    Raises
    ------
    QueryError
        The condition is unknown, or it is the baseline itself.
    """
    if condition is None:
        return [code for code in range(len(design.conditions)) if code != baseline]
    code = design.condition_code(condition)
    if code == baseline:
        what = "the baseline" if baseline else "the control"
        msg = f"{condition!r} is {what}; name the condition to compare with it"
        raise QueryError(msg)
    return [code]


def means_of(
    source: StatisticsInput, codes: np.ndarray, replicates: Replicates, min_cells: int, space: StateSpace | None = None
) -> PopulationMeans:
    """Return the donors' means in every population, with those in state if there is a space; see `population_means`."""
    query_rows = np.sort(np.concatenate(first_cells(replicates.pieces, codes)))
    ways: list[Nearest] = [MatchedNeighbours(source, query_rows)]
    if space is not None:
        ways.append(StateNeighbours(space, query_rows))
    return population_means(codes, replicates, ways, source.expression, source.columns, min_cells)


def space_of(
    source: StatisticsInput, question: CateQuestion, codes: np.ndarray, replicates: Replicates
) -> StateSpace | None:
    """Return the state coordinates of tested donors' cells, computed once; None without two modelled genes."""
    if source.state is None or len(source.state.columns) < 2:
        return None
    key = question.by, question.donor_key, question.min_cells
    if key not in source.spaces:
        included = replicates.counts(codes) >= question.min_cells
        inside = np.where((codes >= 0) & included[codes, replicates.of_cell], codes, -1)
        source.spaces[key] = state_space(source.state, inside, len(included), replicates, typed=question.by is not None)
    return source.spaces[key]


@lru_cache
def _log_search(_results: str, *, kept: bool) -> None:
    """Log once per results address that matches are searched now: a report computes many tables of the same results."""
    remedy = "; `match DIR --edges all` would keep them" if kept else ""
    logger.info("some matches are not in the run and are searched now%s", remedy)


class MatchedNeighbours:
    """Nearest neighbours in the matching space: read from the store where they are there, else searched.

    Parameters
    ----------
    rows
        Packed rows of all possible queries, ascending, if known. Without hub correction, matches of a query do not
        depend on the other queries: all of `rows` are then searched in a target piece at once, and cached until the
        next piece.
    """

    def __init__(self, source: StatisticsInput, rows: np.ndarray | None = None) -> None:
        self._given = source
        self._rows = rows if source.design.sampled or not self._corrected else None
        self._targets = np.empty(0, dtype=np.int64)
        self._found = np.empty((2, 0), dtype=np.int64)

    def __call__(self, queries: np.ndarray, targets: np.ndarray, query_piece: np.ndarray) -> np.ndarray:
        """Return the nearest target of every query, the query itself excluded; see `stats.populations.Nearest`.

        The hub correction (METHOD section 9) measures how far a target is from all cells of the query piece. So matches
        depend on the two pieces alone, not on condition labels.
        """
        design = self._given.design
        (query, target) = (design.groups[int(design.group_of(rows[:1])[0])] for rows in (queries, targets))
        whole, together = len(targets) == target.cells, bool(design.sampled) or not self._corrected
        if whole and (query == target or together or len(query_piece) == query.cells) and self._is_kept(query, target):
            edges = self._given.counterparts.edges(queries, [(query.code, target.code)], distances=False)
            return edges[query.code, target.code][0][:, 0].astype(np.int64)
        _log_search(self._given.storage.url, kept=not (design.onto or design.is_screen))
        if self._rows is None:
            return self._searched(queries, targets, query_piece)
        if not np.array_equal(targets, self._targets):
            unkept = [group.code for group in design.groups if not (whole and self._is_kept(group, target))]
            rows = self._rows[np.isin(design.group_of(self._rows), unkept)]
            self._targets, self._found = targets, np.stack([rows, self._searched(rows, targets, query_piece)])
        return self._found[1, np.searchsorted(self._found[0], queries)]

    def _is_kept(self, query: Group, target: Group) -> bool:
        counterparts = self._given.counterparts
        return self._given.design.takes_all(query, target) and counterparts.keeps(query.code, target.code)

    @property
    def _corrected(self) -> bool:
        return self._given.counterparts.hubs == "csls"

    def _searched(self, queries: np.ndarray, targets: np.ndarray, query_piece: np.ndarray) -> np.ndarray:
        design = self._given.design
        if design.sampled:
            query_piece = pool(design.stored_starts(), int(design.group_of(targets[:1])[0]))
        return self._given.counterparts.between(self._given.embedding)(queries, targets, query_piece)[0][:, 0]


def _control(source: StatisticsInput, codes: np.ndarray) -> Control:
    placebo = placebo_moments(codes, source.counterparts, source.expression, source.columns, source.baseline)
    rows = rows_of_condition(source.design, source.baseline)
    plain = plain_expression(codes, rows, source.expression, source.columns)
    return Control(plain, None if placebo is None else placebo.spread)


def _described(
    source: StatisticsInput,
    codes: np.ndarray,
    code: int,
    cell_effects: Iterable[tuple[np.ndarray, np.ndarray]],
    control: Control,
) -> Described:
    number, near = len(control.plain.counts), column(source.cells, keys.OBS_OVERLAP).to_numpy()
    effects, near_effects = (EffectMoments.empty(number, len(source.genes)) for _ in range(2))
    for rows, values in cell_effects:
        effects.add(values, codes[rows])
        near_effects.add(values, np.where(near[rows], codes[rows], -1))
    rows = rows_of_condition(source.design, code)
    plain = plain_expression(codes, rows, source.expression, source.columns)
    quality = match_quality(codes, near, source.counterparts, [code], source.baseline)
    return Described(effects, near_effects, plain, control, quality)


def effects_by_condition(
    source: StatisticsInput, codes: np.ndarray, conditions: Sequence[int]
) -> Iterator[tuple[int, Iterable[tuple[np.ndarray, np.ndarray]]]]:
    """Yield each condition with the effects of its cells in parts: packed rows, and (rows, genes).

    Small conditions are read together, because a chunk of a stored layer holds cells of many of them.
    """
    cells = np.bincount(source.design.group_conditions, weights=np.diff(source.design.starts))[list(conditions)]
    number = np.cumsum(cells) * len(source.columns) // HELD_EFFECTS
    for run in np.split(np.asarray(conditions), np.flatnonzero(np.diff(number)) + 1):
        if len(run) == 1 or source.baseline:
            for code in run.tolist():
                yield code, individual_effects(source, codes, [code])
            continue
        rows = np.sort(np.concatenate([rows_of_condition(source.design, code) for code in run]))
        rows = rows[codes[rows] >= 0]
        values, of = _effects(source, rows, 0), source.design.group_conditions[source.design.group_of(rows)]
        for code in run.tolist():
            yield code, [(rows[of == code], values[of == code])]


def individual_effects(
    source: StatisticsInput, codes: np.ndarray, conditions: list[int]
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield packed rows of cells in a population, and their effects, (rows, genes), part by part."""
    for code in conditions:
        for group in source.design.with_condition(code):
            rows = np.arange(group.start, group.stop)
            for part in parts(rows[codes[rows] >= 0], len(source.columns)):
                yield part, _effects(source, part, code)


def _effects(source: StatisticsInput, rows: np.ndarray, condition: int) -> np.ndarray:
    """Return the individual effects of cells, (rows, genes), from the store or computed.

    With the control as baseline, each cell's effect is that of its own condition; with another baseline, that of
    `condition`.
    """
    if not source.baseline and source.stored_ite:
        return source.counterparts.dense(f"layers/{keys.LAYER_ITE}", rows, source.columns)
    against = effect_question(condition, source.baseline) if source.baseline else layer_question(keys.LAYER_ITE)
    return compute(against, source.counterparts, source.expression, rows, source.columns)


def _tested(source: StatisticsInput, compared: Compared, number: int, question: CateQuestion) -> Tested:
    """Test one population and condition: through the matches, on plain means, and through state neighbours."""
    code, means, space, replicates = compared.code, compared.means, compared.space, compared.replicates
    there = np.flatnonzero(np.isin(replicates.conditions, (source.baseline, code)) & (means.cells[number] > 0))
    kept, paired = kept_replicates(replicates, means.included[number], code, source.baseline)
    # dict.fromkeys: a donor seen in both conditions is named once.
    left_out = tuple(dict.fromkeys(replicates.donors[r] for r in there if r not in kept))
    if paired and (question.covariates or question.population == "treated"):
        msg = "donors seen in both conditions are paired: leave out the covariates, and use all donors' query cells"
        raise QueryError(msg)
    test, left_out_of = _tests_of(source, replicates, kept, question.covariates, paired=paired)
    own = means.own[number, kept]
    total = Part.of(test(own), left_out_of(own))
    if question.population == "treated" and len(kept):
        queries = _TreatedQueries(
            source, (compared.populations == number) & (replicates.of_cell >= 0), replicates, kept
        )
        matched = queries(MatchedNeighbours(source))
    else:
        queries, matched = None, test(means.matched[number, kept])
    parts = None
    if space is not None and space.dimensions[number] and len(kept):
        within = means.within[number, kept]
        summands = (Part.of(test(values), left_out_of(values)) for values in (within, own - within))
        inside, shift = summands if queries is None else queries.summands(space, own)
        size = float(np.median(means.cells[number, kept]))
        parts = Decomposition(total, inside, shift, size, float(space.reliability[number]))
    treated = int((replicates.conditions[kept] == code).sum())
    return Tested(treated, len(kept) - treated, left_out, matched, total, parts)


@dataclass(frozen=True)
class _TreatedQueries:
    """Tests in which only the treated donors' cells are queries (`population="treated"`)."""

    source: StatisticsInput
    population: np.ndarray
    replicates: Replicates
    kept: np.ndarray

    def __call__(self, nearest: Nearest) -> DonorTest:
        return self._test(self._means(nearest))

    def summands(self, space: StateSpace, own: np.ndarray) -> tuple[Part, Part]:
        """Return the within-state effect and the state shift; `own` holds the plain means, (donors, genes)."""
        means = self._means(StateNeighbours(space))
        treated = self.replicates.conditions[self.kept] != self.source.baseline
        inside = means[treated].mean(axis=0)
        within = Part.of(self._test(means), left_out_effects(inside, treated))
        shift = Part.of(self._test(own[None] - means), left_out_effects(own - inside, treated))
        return within, shift

    def _means(self, nearest: Nearest) -> np.ndarray:
        chosen = np.isin(np.arange(len(self.replicates)), self.kept)
        sample = self.source
        return query_means(self.population, chosen, self.replicates, nearest, sample.expression, sample.columns)

    def _test(self, means: np.ndarray) -> DonorTest:
        treated = self.replicates.conditions[self.kept] != self.source.baseline
        return treated_queries_test(means, treated, seed=self.source.seed)


def _tests_of(
    source: StatisticsInput, replicates: Replicates, kept: np.ndarray, covariates: Sequence[str], *, paired: bool
) -> tuple[Callable[[np.ndarray], DonorTest], Callable[[np.ndarray], np.ndarray]]:
    """Return the test that the replicates allow, and the function that gives the effects without each donor.

    The test is a linear model with covariates; without, a paired test if `paired`, else a permutation of Welch's t.
    """
    treated = replicates.conditions[kept] != source.baseline
    if not treated.any() or treated.all():
        nothing = np.full(len(source.genes), np.nan)
        return lambda _: untested(nothing), lambda _: nothing[None]
    if covariates:
        columns = _numbers(source.cells, replicates, covariates, kept)
        return (
            lambda values: linear_test(values, treated, columns),
            lambda values: left_out_effects(values, treated, columns),
        )
    if not paired:
        return lambda values: welch_test(values, treated, seed=source.seed), lambda v: left_out_effects(v, treated)
    ups, downs = pairs_of(replicates, kept, source.baseline)
    return (
        lambda values: paired_test(values[ups] - values[downs], seed=source.seed),
        lambda values: left_out_differences(values[ups] - values[downs]),
    )


def kept_replicates(
    replicates: Replicates, included: np.ndarray, code: int, baseline: int = 0
) -> tuple[np.ndarray, bool]:
    """Return the replicates to test, and whether they are pairs.

    With three or more donors seen in both conditions, these are tested as pairs. Fewer pairs allow no test: then the
    donors seen in one condition are tested, if there are three per condition. An unpaired test never holds a donor
    twice.
    """
    enough = np.flatnonzero(included & np.isin(replicates.conditions, (baseline, code)))
    twice = pd.Series([replicates.donors[r] for r in enough], dtype=object).duplicated(keep=False).to_numpy()
    pairs, others = enough[twice], enough[~twice]
    fewest = np.bincount(replicates.conditions[others] == code, minlength=2).min()
    paired = len(pairs) >= 2 * LEAST_DONORS or (len(pairs) > 0 and fewest < LEAST_DONORS)
    return (pairs, True) if paired else (others, False)


def pairs_of(replicates: Replicates, kept: np.ndarray, baseline: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in `kept` of the treated and of the control replicates, donor by donor in the same order."""
    treated = replicates.conditions[kept] != baseline
    order = np.argsort([replicates.donors[r] for r in kept], kind="stable")
    return order[treated[order]], order[~treated[order]]


def _numbers(cells: pd.DataFrame, replicates: Replicates, names: Sequence[str], kept: np.ndarray) -> np.ndarray:
    """Return the covariates of the tested donors, centred and scaled: (donors, columns); categories become indicators.

    Raises
    ------
    QueryError
        A covariate is no column of obs, is missing for a donor, or differs between the cells of a donor.
    """
    chosen = cells[[column(cells, name).name for name in names]]
    return as_numbers(chosen, replicates.of_cell, kept, replicates.donors)


def _rows(
    source: StatisticsInput, name: str, number: int, code: int, described: Described, tested: Tested
) -> pd.DataFrame:
    """Return the table's rows for one population and condition, one per gene."""
    effects, baseline, quality = described.effects, described.control, described.quality
    sign_z, sign_p = sign_test(effects.positive[number], effects.zero[number], effects.number[number])
    treated, control = described.plain.counts[number], baseline.plain.counts[number]
    nothing = np.full(len(source.genes), np.nan)
    values: dict[str, Any] = {
        "population": name,
        "condition": source.design.conditions[code],
        "baseline": source.design.conditions[source.baseline],
        "gene": source.genes.to_numpy(),
        "cells": int(effects.number[number]),
        "treated_donors": tested.treated,
        "control_donors": tested.control,
        "donors_left_out": ", ".join(tested.left_out),
        "mean_ite": effects.mean[number],
        "sd_ite": effects.spread[number],
        "sd_placebo": nothing if baseline.placebo is None else baseline.placebo[number],
        "log2_fold_change": np.log2((treated + COUNT_FLOOR) / (control + COUNT_FLOOR)),
        "mean_counts": (treated + control) / 2,
        "expressing": described.plain.expressing[number],
        "expressing_control": baseline.plain.expressing[number],
        "sign_z": sign_z,
        "sign_p": sign_p,
        **_columns_of(tested),
        **decomposition_columns(tested.parts, tested.total, len(source.genes)),
        "p_adjusted": benjamini_hochberg(tested.matched.p),
        "match_purity": quality.purity[number, code],
        "impure": bool(quality.purity[number, code] < PURE),
        "effective_control_cells": quality.effective_cells[number, code],
        # Overlap is defined only against the control.
        "without_overlap": np.nan if source.baseline else quality.without_overlap[number, code],
        "mean_ite_overlap": nothing if source.baseline else described.near_effects.mean[number],
    }
    return pd.DataFrame(values, index=range(len(source.genes)))


def _columns_of(tested: Tested) -> dict[str, Any]:
    return {
        "effect": tested.matched.effect,
        "statistic": tested.matched.statistic,
        "p": tested.matched.p,
        "p_method": tested.matched.method,
        "p_floor": tested.matched.p_floor,
        "p_permutation": tested.matched.p_permutation,
        "p_parametric": tested.matched.p_parametric,
        "few_donors": tested.matched.few_donors,
        "pseudobulk_effect": tested.total.test.effect,
        "pseudobulk_p": tested.total.test.p,
    }
