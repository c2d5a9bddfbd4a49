"""The comparison of matching spaces on one cohort: a row of measures per space, and the advice.

Input: results of one cohort in several spaces, and a population per cell. Output: a table. Measures on a sample use the
same cells in every space: the first of each group, which are a random sample. Other measures use all cells, streamed in
a fixed order.
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
from ndreamer_dist.stats.diagnostics import donor_layout
from ndreamer_dist.stats.results import Results
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.checksums import unseal
from ndreamer_dist.summaries.cells import match_quality, parts, population_count

logger = logging.getLogger(__name__)

SAMPLED_CELLS = 4000
"""Approximate size of the sample for mixing, separation, silhouette and state held."""
LEAST_ON_SIDES = 20
"""Cells that a population needs in the condition and in the control to enter `agreement` and `slope`."""


@dataclass(frozen=True)
class SpaceMeasures:
    """The measures of one space, documented in `advice.MEASURES`; NaN where one could not be computed."""

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
    """The comparison of several matching spaces on one cohort.

    Attributes
    ----------
    table
        A row per space, with the fields of `SpaceMeasures` as columns.
    populations
        Where the populations come from, in words.
    layout
        The design of donors and conditions, in words: `donors` of `Results.diagnostics`.
    missing
        The reason for every measure that no space has.
    advice
        Which space to use, and why.
    made_from
        Stage key of the effects of each space; it differs after a rerun.
    """

    table: pd.DataFrame
    populations: str
    layout: str
    missing: dict[str, str]
    advice: Advice
    made_from: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the table and the advice as text for a terminal."""
        shown = self.table.set_index("space").rename(columns={m.name: m.title for m in MEASURES})
        measured = [m for m in MEASURES if self.table[m.name].notna().any()]
        lines = [shown[[m.title for m in measured]].to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")]
        return "\n".join([*lines, "", f"populations: {self.populations}", f"donors: {self.layout}", *self.sentences()])

    def sentences(self) -> list[str]:
        """Return sentences: the advice, the measures in which its space is worse, and those that are missing."""
        names = {m.name: m.title for m in MEASURES}
        return [
            *self.advice.sentences(),
            *(f"{names[name]}: not measured, {why}" for name, why in self.missing.items()),
        ]

    def to_json(self) -> str:
        """Return the comparison as JSON text; missing measures are null."""
        return json.dumps(self.as_object(), indent=2)

    def as_object(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON; `words` holds the sentences."""
        rows = json.loads(self.table.to_json(orient="records", double_precision=15))
        return {**asdict(self), "table": rows, "words": self.sentences()}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison from the values of `as_object`."""
        rest = {name: value for name, value in values.items() if name != "words"}
        table = pd.DataFrame(rest.pop("table"), columns=[f.name for f in fields(SpaceMeasures)])
        table = table.astype({m.name: np.float64 for m in MEASURES})
        return cls(table=table, advice=Advice(**{k: _tuples(v) for k, v in rest.pop("advice").items()}), **rest)


def compare_spaces(
    run: RunDirectory, spaces: Mapping[str, Results], populations: CellPopulations, donor_key: str | None, cohort: Any
) -> Comparison:
    """Measure every space and advise which to use.

    Parameters
    ----------
    run
        The run directory, for the time and memory of its stages.
    spaces
        Results by name of the space, all of the same cohort.
    cohort
        The input cohort, which `state_held` needs; without it that measure is NaN.
    """
    first = next(iter(spaces.values()))
    inputs = _SharedInputs.of(first, populations, donor_key, cohort)
    costs = costs_of(run)
    rows = [inputs.measured(name, results, *costs.get(name, (np.nan, np.nan))) for name, results in spaces.items()]
    table = pd.DataFrame([asdict(row) for row in rows])
    missing = {name: why for name, why in inputs.missing.items() if table[name].isna().all()}
    effects_keys = _effects_keys(run)
    made_from = {name: effects_keys[name] for name in spaces}
    kind, layout = donor_layout(first._statistics_input(None, None), donor_key)
    advice = advise(table, nested=kind == "nested", clustered=populations.clustered)
    unlike = differing_settings({name: _match_settings(results) for name, results in spaces.items()})
    advice = replace(advice, losses=(*advice.losses, *unlike))
    return Comparison(table, populations.source, layout, missing, advice, made_from)


def _match_settings(results: Results) -> dict[str, Any]:
    """Return how the cells were matched, beside the space: the settings of `match` but which edges are kept."""
    values = json.loads(results.uns["settings"])["match"]
    return {f"match.{name}": value for name, value in values.items() if name != "edges"}


def kept_comparison(run: RunDirectory, results: Results) -> Comparison | None:
    """Return the comparison stored in a run directory; None without one, or if any compared space was rerun since."""
    data = run.storage.read_if_there(keys.COMPARISON)
    if data is None:
        return None
    try:
        comparison = Comparison.of(unseal(data, f"{run.url}/{keys.COMPARISON}"))
        effects_keys = _effects_keys(run)
    except DamagedError as error:
        logger.warning("%s; `compare` writes it anew", error.what)
        return None
    same = all(effects_keys.get(name) == key for name, key in comparison.made_from.items())
    return comparison if same and results.space in comparison.made_from else None


def _effects_keys(run: RunDirectory) -> dict[str, str]:
    """Return the stage key of the effects, by space."""
    return {name: str(place.read_run()["keys"].get(keys.STAGE_EFFECTS)) for name, place in run.spaces().items()}


def costs_of(run: RunDirectory) -> dict[str, tuple[float, float]]:
    """Return seconds and peak memory in GB from input to effects, by space; shared stages count in each space."""
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
    """Return the share of treated cells' control matches that are in the cell's own population.

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
    measured = np.isfinite(purity) & (cells > 0)
    return float(np.average(purity[measured], weights=cells[measured])) if measured.any() else float("nan")


@dataclass(frozen=True)
class TypeMeans:
    """Mean measured expression, (populations, conditions, genes), and number of cells, (populations, conditions)."""

    mean: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, source: StatisticsInput, codes: np.ndarray) -> TypeMeans:
        """Average the measured expression by population and condition."""
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
    """Return the correlation and slope, over genes, of mean effects on differences of population means.

    Both are means over the populations and conditions with at least 20 treated and 20 control cells.

    Parameters
    ----------
    codes
        (cells,) population of every packed row, -1 for none.
    means
        The means of the populations, if they were computed before.
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
class _SharedInputs:
    """The parts of the comparison that do not depend on the space."""

    populations: CellPopulations
    rows: np.ndarray
    means: TypeMeans
    halves: np.ndarray | None
    state: StateQuestion | None
    missing: dict[str, str]

    @classmethod
    def of(cls, results: Results, populations: CellPopulations, donor_key: str | None, cohort: Any) -> _SharedInputs:
        """Prepare samples, means and splits, and the reasons for measures that may be missing."""
        source, design = results._statistics_input(None, None), results.design
        missing = {"mixing": "the sample has a single group"}
        halves, missing["split_half"] = _halves_of(source, donor_key)
        state, missing["state_held"] = StateQuestion.of(results, populations, cohort, SAMPLED_CELLS)
        if len(populations.names) < 2:
            missing |= dict.fromkeys(("separation", "silhouette"), "there is a single population")
        rows = np.concatenate([np.arange(*span) for span in sketch_spans(design, SAMPLED_CELLS)])
        means = TypeMeans.of(source, populations.codes)
        few = f"no population has {LEAST_ON_SIDES} treated and {LEAST_ON_SIDES} control cells"
        missing |= dict.fromkeys(("agreement", "slope"), few)
        missing |= dict.fromkeys(("seconds", "peak_gb"), f"{keys.STAGES_LOG} does not record it")
        missing |= {"overlap": "no cell has a control match in another group"}
        return cls(populations, rows, means, halves, state, missing)

    def measured(self, name: str, results: Results, seconds: float, peak_gb: float) -> SpaceMeasures:
        """Measure one space."""
        source, codes = results._statistics_input(None, None), self.populations.codes
        r, slope = agreement_with_means(results, codes, self.means)
        array = f"obsm/{source.embedding}"
        points = read_dense(source.storage, array, self.rows, np.arange(open_array(source.storage, array).shape[1]))
        labelled = codes[self.rows] >= 0
        return SpaceMeasures(
            space=name,
            purity=match_purity(results, codes),
            overlap=_overlap(results),
            mixing=scaled_lisi(points, results.design.group_of(self.rows)),
            separation=1 - scaled_lisi(points[labelled], codes[self.rows][labelled]),
            silhouette=silhouette(points[labelled], codes[self.rows][labelled]),
            agreement=r,
            slope=slope,
            split_half=self._split_half(source),
            state_held=np.nan if self.state is None else self.state.held(results.counterparts),
            seconds=seconds,
            peak_gb=peak_gb,
        )

    def _split_half(self, source: StatisticsInput) -> float:
        """Return the correlation of effects between halves of donors, mean over populations, conditions and splits."""
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
        return None, "the donors are unknown; name their column with --donor-key"
    halves = donor_halves(replicates_of(source, donor_key), source.seed)
    if halves is None:
        return None, "a group holds cells of several donors, so their matches cannot be split into halves"
    return halves, "no population has enough cells in two halves of the donors, each with treated and control donors"


def _overlap(results: Results) -> float:
    """Return the share of treated cells with a near control match; NaN if no cell has a match."""
    cells = results.packed_obs
    treated = cells[(cells[keys.OBS_CONDITION] != results.control) & cells[keys.OBS_MATCH_DISTANCE].notna()]
    return float(column(treated, keys.OBS_OVERLAP).mean()) if len(treated) else float("nan")


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
