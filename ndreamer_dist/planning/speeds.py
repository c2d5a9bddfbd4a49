"""Estimate the processor seconds of every stage from counts, before anything has run. Pure.

The constants were measured on virtual processors of a common kind, without a GPU (`docs/benchmarks-log.md`, *What the plan
says of time*). They are an order of magnitude: another machine takes half or twice as long, and a busy one longer. What stages of a run
really took stands in its own log, and `plan --out` shows that in their place.
"""

from __future__ import annotations

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.planning.sizes import CohortSize, parameter_count
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.sampling import SamplingPlan

MATCH_SECONDS = {"none": (1.5e-9, 3.5e-3), "csls": (3e-9, 10e-3)}
"""By the correction for hubs: of a pair of a cell and a target, and of a pair of groups."""
SAMPLED_GROUPS, LONG_MATCHING = 8, 1800.0
"""The sample of groups that is advised, and the seconds of matching with all of them from which it is."""
READ_SECONDS, PACK_SECONDS = 30e-9, 200e-9
"""Of a stored value that is read and checked, and of one of a modelled gene that is packed."""
FLOP_SECONDS = 1e-11
"""Of a floating-point operation of a matrix product."""
CODE_SECONDS, PAIR_SECONDS = 15e-9, 2e-4
"""Of a training step: of a cell and a code, and of a cell's part in the losses of pairs."""
GRAPH_SECONDS = {("leidenalg", True): 5e-3, ("leidenalg", False): 5e-4, ("igraph", True): 3e-4, ("igraph", False): 2e-4}
"""Of a cell that is clustered: by whose Leiden, and whether it goes on until nothing moves."""
CELL_SECONDS = 10e-6
"""Of a cell whose coordinates are read, computed and written."""
HARMONY_SECONDS = 90e-6
"""Of a cell in Harmony."""
EFFECTS_SECONDS = 20e-9, 25e-9, 4e-3
"""Of a stored value that is averaged, of a value of a layer that is written, and of a pair of groups whose matches are read."""
START_SECONDS = 10.0
"""Of a local Ray and its first workers, and of the workers of a training once more."""


def start_seconds(stage: str, settings: Settings) -> float:
    """Return what starting the processes of a stage takes."""
    return START_SECONDS if stage in (keys.STAGE_COHORT, keys.STAGE_TRAIN) and not settings.run.serial else 0.0


def cohort_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what reading and checking the values takes."""
    del design, settings
    return size.stored_values * READ_SECONDS


def pack_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what packing takes."""
    del design
    return size.stored_values * READ_SECONDS + size.cells * size.modelled_per_cell(settings) * PACK_SECONDS


def clusters_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what the graphs and their clusters take."""
    asked = settings.clusters
    sketched = clustered_by(asked, size.cells, len(design.groups)) == "sketch"
    cells = min(size.cells, asked.sketch_cells) if sketched else size.cells
    return cells * GRAPH_SECONDS[asked.flavor, asked.iterations < 0] + sketched * size.cells * 10 * CELL_SECONDS


def train_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what all optimiser steps take."""
    plan, model = SamplingPlan.for_cohort(design.starts, settings.train, settings.seed), settings.model
    products = 6 * parameter_count(settings, size.modelled(settings)) * FLOP_SECONDS
    return plan.steps * plan.cells(0) * (products + model.codebooks * model.codes * CODE_SECONDS + PAIR_SECONDS)


def embed_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what sending all cells through the encoder takes."""
    del design
    return size.cells * (2 * parameter_count(settings, size.modelled(settings)) * FLOP_SECONDS + CELL_SECONDS)


def pca_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what the components of the trained embedding take."""
    del design
    return size.cells * (settings.model.latent**2 * FLOP_SECONDS + CELL_SECONDS)


def space_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what placing cells without a network takes: the covariance of the genes, its axes, and Harmony."""
    del design
    if settings.embed.method.startswith(keys.OBSM_PREFIX):
        return size.cells * CELL_SECONDS
    genes = size.modelled(settings)
    harmony = HARMONY_SECONDS if settings.embed.method == keys.HARMONY else 0.0
    return size.cells * (2 * genes**2 * FLOP_SECONDS + CELL_SECONDS + harmony) + 20 * genes**3 * FLOP_SECONDS


def _taken(design: Design, condition: int, group: Group) -> int:
    """Return in how many groups of a condition a cell of a group is matched, its own counted."""
    every = len(design.with_condition(condition))
    return min(design.sampled + (group.condition == condition), every) if design.sampled else every


def match_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what the searches take."""
    pair, edge = MATCH_SECONDS[settings.match.hubs]
    cells = {c: sum(group.cells for group in design.with_condition(c)) for c in range(len(design.conditions))}
    pairs = 0.0
    for group in design.groups:
        asked = cells if settings.match.edges == "all" else {0, group.condition}
        shares = {c: _taken(design, c, group) / max(len(design.with_condition(c)), 1) for c in asked}
        pairs += group.cells * sum(share * cells[c] for c, share in shares.items())
    return pairs * pair + size.edges * edge


def sampled_match_seconds(design: Design, settings: Settings) -> float:
    """Return what the searches take in a sample of the groups; 0 where a sample is asked for, or all do not take long."""
    if settings.match.groups or settings.match.edges == "all":
        return 0.0
    every = match_seconds(design, CohortSize.of(design, settings, genes=1, stored_values=0), settings)
    some = design.sampling(SAMPLED_GROUPS)
    sampled = match_seconds(some, CohortSize.of(some, settings, genes=1, stored_values=0), settings)
    return sampled if every > LONG_MATCHING and 2 * sampled < every else 0.0


def effects_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return what averaging the matches and writing the layers takes."""
    average, write, edge = EFFECTS_SECONDS
    layers = settings.effects.store
    near = settings.denoise.counted(size.fewest_groups) if set(layers) - {keys.LAYER_ITE} else 0
    averaged = 0
    for group in design.groups:
        own = _taken(design, group.condition, group)
        other = _taken(design, 0, group) + own if group.condition and keys.LAYER_ITE in layers else 0
        averaged += group.cells * (near * own + settings.match.neighbours * other)
    values = size.cells * size.modelled(settings) * len(layers)
    return averaged * size.modelled_per_cell(settings) * average + values * write + size.edges * edge
