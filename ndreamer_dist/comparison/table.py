"""The comparison of matching spaces on one cohort: a row of measures per space, and the advice.

Input: finished runs of one cohort in several spaces, and a population per cell. Output: a table. Measures on a sample use
the same cells in every space: the first cells of each group, which packing drew by the seed of the run. Sums go over
blocks of cells, in their order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.sketch import sketch_spans
from ndreamer_dist.comparison.advice import MEASURES, Advice, advise, differing_settings
from ndreamer_dist.comparison.halves import donor_halves, half_effects
from ndreamer_dist.comparison.labels import CellPopulations
from ndreamer_dist.comparison.measures import agreement, scaled_lisi, silhouette
from ndreamer_dist.comparison.state import StateQuestion
from ndreamer_dist.compute.monitors import stage_costs
from ndreamer_dist.errors import DamagedError
from ndreamer_dist.planning.stages import SHARED
from ndreamer_dist.results.read import read_dense
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.stats.cate_table import StatisticsInput, column, individual_effects, replicates_of
from ndreamer_dist.stats.diagnostics import told_of_donors
from ndreamer_dist.stats.results import Results
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.checksums import unseal
from ndreamer_dist.summaries.cells import match_quality, parts, population_count

logger = logging.getLogger(__name__)

SAMPLED_CELLS = 4000
"""Cells that mixing, separation and state are measured on, about."""
LEAST_ON_SIDES = 20
"""Cells of a population that each condition needs, for its effect to be compared with a difference of means."""


@dataclass(frozen=True)
class SpaceMeasures:
    """What was measured of one space; NaN where it cannot be had. `advice.MEASURES` says what each is."""

    space: str
    purity: float
    overlap: float
    mixing: float
    separation: float
    silhouette: float
    agreement: float
    slope: float
    split_half: float
    state_held: float
    seconds: float
    peak_gb: float


@dataclass(frozen=True)
class Comparison:
    """Several matching spaces on one cohort.

    Attributes
    ----------
    table
        A row per space; columns as of `SpaceMeasures`.
    populations
        What was called a population, in words.
    layout
        How donors and conditions go together, as `Results.diagnostics` says it.
    missing
        Columns that could not be had, and why.
    advice
        Which space to take, and why.
    made_from
        Keys of the results by space: a later run of a space has another one.
    """

    table: pd.DataFrame
    populations: str
    layout: str
    missing: dict[str, str]
    advice: Advice
    made_from: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the table and the advice for a terminal."""
        shown = self.table.set_index("space").rename(columns={m.name: m.title for m in MEASURES})
        known = [m for m in MEASURES if self.table[m.name].notna().any()]
        lines = [shown[[m.title for m in known]].to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")]
        return "\n".join([*lines, "", f"populations: {self.populations}", f"donors: {self.layout}", *self.sentences()])

    def sentences(self) -> list[str]:
        """Return the advice, what speaks against it, and what could not be measured."""
        names = {m.name: m.title for m in MEASURES}
        return [
            *self.advice.sentences(),
            *(f"{names[name]}: not measured, {why}" for name, why in self.missing.items()),
        ]

    def to_json(self) -> str:
        """Return all of it as a JSON object; a column that cannot be had is null."""
        return json.dumps(self.as_object(), indent=2)

    def as_object(self) -> dict[str, Any]:
        """Return all of it as an object of JSON."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        return {**asdict(self), "table": rows, "words": self.sentences()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `as_object` returned."""
        rest = {name: value for name, value in values.items() if name != "words"}
        table = pd.DataFrame(rest.pop("table"), columns=[f.name for f in fields(SpaceMeasures)])
        table = table.astype({m.name: np.float64 for m in MEASURES})
        return cls(table=table, advice=Advice(**{k: _tuples(v) for k, v in rest.pop("advice").items()}), **rest)


def compare_spaces(
    run: RunDirectory, spaces: Mapping[str, Results], populations: CellPopulations, donor_key: str | None, cohort: Any
) -> Comparison:
    """Measure every space and say what to take.

    Parameters
    ----------
    run
        The run's directory, for what its stages took.
    cohort
        The input cohort, for the state held; none, and there is no such column.
    """
    first = next(iter(spaces.values()))
    question = _Question.of(first, populations, donor_key, cohort)
    costs = costs_of(run)
    rows = [question.measured(name, results, *costs.get(name, (np.nan, np.nan))) for name, results in spaces.items()]
    table = pd.DataFrame([asdict(row) for row in rows])
    missing = {name: why for name, why in question.missing.items() if table[name].isna().all()}
    now = _effects_keys(run)
    made_from = {name: now[name] for name in spaces}
    kind, layout = told_of_donors(first._statistics_input(None, None), donor_key)
    advice = advise(table, nested=kind == "nested", clustered=populations.clustered)
    unlike = differing_settings({name: _match_settings(results) for name, results in spaces.items()})
    advice = replace(advice, losses=(*advice.losses, *unlike))
    return Comparison(table, populations.source, layout, missing, advice, made_from)


def _match_settings(results: Results) -> dict[str, Any]:
    """Return how the cells were matched, beside the space: the settings of `match` but which edges are kept."""
    values = json.loads(results.uns["settings"])["match"]
    return {f"match.{name}": value for name, value in values.items() if name != "edges"}


def kept_comparison(run: RunDirectory, results: Results) -> Comparison | None:
    """Return what `compare` kept in a run directory; none where these results, or others of it, were made since."""
    data = run.storage.read_if_there(keys.COMPARISON)
    if data is None:
        return None
    try:
        comparison = Comparison.of(unseal(data, f"{run.url}/{keys.COMPARISON}"))
        now = _effects_keys(run)
    except DamagedError as error:
        logger.warning("%s; `compare` writes it anew", error.what)
        return None
    same = all(now.get(name) == key for name, key in comparison.made_from.items())
    return comparison if same and results.space in comparison.made_from else None


def _effects_keys(run: RunDirectory) -> dict[str, str]:
    """Return the key of every space's effects."""
    return {name: str(place.read_run()["keys"].get(keys.STAGE_EFFECTS)) for name, place in run.spaces().items()}


def costs_of(run: RunDirectory) -> dict[str, tuple[float, float]]:
    """Return seconds and peak memory in GB from input to effects, by space; stages that spaces share count in each."""
    costs = {}
    for name, place in run.spaces().items():
        stages = place.read_run()["keys"]
        shared, own = (stage_costs(part.storage) for part in (run, place))
        lines = pd.concat([shared[shared["stage"].isin(SHARED)], own[~own["stage"].isin(SHARED)]])
        lines = lines[lines["stage"].isin(stages)]
        if len(lines) == len(stages):
            costs[name] = float(lines["seconds"].sum()), float(lines["peak_gb"].max())
    return costs


def match_purity(results: Results, populations: np.ndarray) -> float:
    """Return the share of control matches that are of the cell's own population, over cells that are no controls.

    Parameters
    ----------
    populations
        (cells,) code of every packed row, -1 for none.
    """
    design = results.design
    near = np.ones(len(populations), dtype=bool)
    conditions = range(1, len(design.conditions))
    purity = match_quality(populations, near, results.counterparts, conditions).purity
    codes = design.group_conditions[design.group_of(np.arange(design.n_cells))]
    inside = populations >= 0
    flat = populations[inside] * len(design.conditions) + codes[inside]
    cells = np.bincount(flat, minlength=purity.size).reshape(purity.shape)
    known = np.isfinite(purity) & (cells > 0)
    return float(np.average(purity[known], weights=cells[known])) if known.any() else float("nan")


@dataclass(frozen=True)
class TypeMeans:
    """Mean expression and cells of every population and condition: (populations, conditions, genes), (.., conditions)."""

    mean: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, source: StatisticsInput, codes: np.ndarray) -> TypeMeans:
        """Sum the cells as they were measured."""
        design, conditions, number = source.design, len(source.design.conditions), population_count(codes)
        place = codes * conditions + design.group_conditions[design.group_of(np.arange(design.n_cells))]
        inside = np.flatnonzero(codes >= 0)
        cells = np.bincount(place[inside], minlength=number * conditions)
        total = np.zeros((number * conditions, len(source.columns)))
        for rows in parts(inside, len(source.columns)):
            indicator = sparse.csr_matrix(
                (np.ones(len(rows)), (place[rows], np.arange(len(rows)))), shape=(len(total), len(rows))
            )
            total += (indicator @ source.expression.read(rows, source.columns).astype(np.float64)).toarray()
        mean = np.divide(total, cells[:, None], out=np.full_like(total, np.nan), where=cells[:, None] > 0)
        return cls(mean.reshape(number, conditions, -1), cells.reshape(number, conditions))


def agreement_with_means(results: Results, codes: np.ndarray, means: TypeMeans | None = None) -> tuple[float, float]:
    """Return how mean effects agree with differences of population means: correlation and slope over genes.

    They are means over the populations and conditions that have 20 cells on both sides.

    Parameters
    ----------
    codes
        (cells,) population of every packed row, -1 for none.
    means
        Those of the populations, where they are there already.
    """
    source = results._statistics_input(None, None)
    means = means or TypeMeans.of(source, codes)
    conditions = means.cells.shape[1]
    total, cells = np.zeros_like(means.mean), np.zeros(means.cells.shape)
    for rows, values in individual_effects(source, codes, list(range(1, conditions))):
        condition = source.design.group_conditions[source.design.group_of(rows)]
        for pair in np.unique(codes[rows] * conditions + condition):
            place = np.unravel_index(pair, cells.shape)
            chosen = (codes[rows] == place[0]) & (condition == place[1])
            total[place] += values[chosen].sum(axis=0, dtype=np.float64)
            cells[place] += chosen.sum()
    enough = np.argwhere((cells >= LEAST_ON_SIDES) & (means.cells[:, :1] >= LEAST_ON_SIDES))
    effects = [total[p, c] / cells[p, c] for p, c in enough]
    return agreement(np.array(effects), np.array([means.mean[p, c] - means.mean[p, 0] for p, c in enough]))


@dataclass(frozen=True)
class _Question:
    """What is asked of every space of a cohort alike."""

    populations: CellPopulations
    rows: np.ndarray
    means: TypeMeans
    halves: np.ndarray | None
    state: StateQuestion | None
    missing: dict[str, str]

    @classmethod
    def of(cls, results: Results, populations: CellPopulations, donor_key: str | None, cohort: Any) -> _Question:
        """Prepare what does not depend on the space."""
        source, design = results._statistics_input(None, None), results.design
        missing = {"mixing": "the sample has one group alone"}
        halves, missing["split_half"] = _halves_of(source, donor_key)
        state, missing["state_held"] = StateQuestion.of(results, populations, cohort, SAMPLED_CELLS)
        if len(populations.names) < 2:
            missing |= dict.fromkeys(("separation", "silhouette"), "there is one population alone")
        rows = np.concatenate([np.arange(*span) for span in sketch_spans(design, SAMPLED_CELLS)])
        means = TypeMeans.of(source, populations.codes)
        few = f"no population has {LEAST_ON_SIDES} cells on both sides"
        missing |= dict.fromkeys(("agreement", "slope"), few)
        missing |= dict.fromkeys(("seconds", "peak_gb"), "logs/stages.jsonl does not say it")
        missing |= {"overlap": "no cell has a control match in another group"}
        return cls(populations, rows, means, halves, state, missing)

    def measured(self, name: str, results: Results, seconds: float, peak_gb: float) -> SpaceMeasures:
        """Measure one space."""
        source, codes = results._statistics_input(None, None), self.populations.codes
        r, slope = agreement_with_means(results, codes, self.means)
        array = f"obsm/{source.embedding}"
        points = read_dense(source.storage, array, self.rows, np.arange(open_array(source.storage, array).shape[1]))
        known = codes[self.rows] >= 0
        return SpaceMeasures(
            space=name,
            purity=match_purity(results, codes),
            overlap=_overlap(results),
            mixing=scaled_lisi(points, results.design.group_of(self.rows)),
            separation=1 - scaled_lisi(points[known], codes[self.rows][known]),
            silhouette=silhouette(points[known], codes[self.rows][known]),
            agreement=r,
            slope=slope,
            split_half=self._split_half(source),
            state_held=np.nan if self.state is None else self.state.held(results.counterparts),
            seconds=seconds,
            peak_gb=peak_gb,
        )

    def _split_half(self, source: StatisticsInput) -> float:
        """Return the correlation of the effects of two halves of donors, mean over populations, conditions and splits."""
        if self.halves is None:
            return float("nan")
        pairs = [
            half_effects(source, self.populations.codes, self.halves, condition)
            for condition in range(1, len(source.design.conditions))
        ]
        first, second = (
            np.concatenate([pair[:, half].reshape(-1, pair.shape[-1]) for pair in pairs]) for half in (0, 1)
        )
        return agreement(first, second)[0]


def _halves_of(source: StatisticsInput, donor_key: str | None) -> tuple[np.ndarray | None, str]:
    if donor_key is None and not source.design.batch_keys:
        return None, "nothing says who the donors are; name their column with --donor-key"
    halves = donor_halves(replicates_of(source, donor_key), source.seed)
    if halves is None:
        return None, "a group holds cells of several donors, so that no half of them is apart from the other"
    return halves, "no population has enough cells in two halves of the donors, each with treated and control donors"


def _overlap(results: Results) -> float:
    """Return the share of treated cells with a near control match; NaN where none has a match."""
    cells = results.packed_obs
    treated = cells[(cells[keys.OBS_CONDITION] != results.control) & cells[keys.OBS_MATCH_DISTANCE].notna()]
    return float(column(treated, keys.OBS_OVERLAP).mean()) if len(treated) else float("nan")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
