"""Estimate the processor seconds of every stage from counts, before anything has run. Pure.

The constants were measured on common virtual processors without a GPU (`docs/benchmarks-log.md`, *What the plan says of
time*). The estimates are rough: another machine takes half or twice as long, and a busy one longer. A run logs the time
that its stages took, and `plan --out` shows that time instead.
"""

from __future__ import annotations

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.planning.sizes import CohortSize, parameter_count
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.sampling import SamplingPlan

MATCH_SECONDS = {"none": (1.5e-9, 3.5e-3), "csls": (3e-9, 10e-3)}
"""Seconds per pair of a query cell and a target cell, and per pair of groups, by hub correction (`match.hubs`)."""
SAMPLED_GROUPS, LONG_MATCHING = 8, 1800.0
"""A plan suggests to sample this many groups if matching with all groups takes longer than this many seconds."""
READ_SECONDS, PACK_SECONDS = 30e-9, 200e-9
"""Seconds to read and check a stored value, and to pack a stored value of a modelled gene."""
FLOP_SECONDS = 1e-11
"""Seconds per floating-point operation of a matrix product."""
CODE_SECONDS, PAIR_SECONDS = 15e-9, 2e-4
"""Seconds of a training step per cell and code, and per cell for the triplet and neighbourhood losses."""
GRAPH_SECONDS = {("leidenalg", True): 5e-3, ("leidenalg", False): 5e-4, ("igraph", True): 3e-4, ("igraph", False): 2e-4}
"""Seconds per clustered cell, by the implementation of Leiden and whether it runs until convergence."""
CELL_SECONDS = 10e-6
"""Seconds to read, compute and write the coordinates of a cell."""
HARMONY_SECONDS = 90e-6
"""Seconds of Harmony per cell."""
EFFECTS_SECONDS = 20e-9, 25e-9, 4e-3
"""Seconds to average a stored value, to write a value of a layer, and to read the matches of a pair of groups."""
START_SECONDS = 10.0
"""Seconds to start a local Ray and its first workers, and again to start the training workers."""


def start_seconds(stage: str, settings: Settings) -> float:
    """Return the seconds to start the processes of a stage."""
    return START_SECONDS if stage in (keys.STAGE_COHORT, keys.STAGE_TRAIN) and not settings.run.serial else 0.0


def cohort_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to read and check the matrix."""
    del design, settings
    return size.stored_values * READ_SECONDS


def pack_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to pack the modelled genes."""
    del design
    return size.stored_values * READ_SECONDS + size.cells * size.modelled_per_cell(settings) * PACK_SECONDS


def clusters_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to build the neighbour graphs and cluster them."""
    clusters = settings.clusters
    sketched = clustered_by(clusters, size.cells, len(design.groups)) == "sketch"
    cells = min(size.cells, clusters.sketch_cells) if sketched else size.cells
    return cells * GRAPH_SECONDS[clusters.flavor, clusters.iterations < 0] + sketched * size.cells * 10 * CELL_SECONDS


def train_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds of all optimiser steps."""
    plan, model = SamplingPlan.for_cohort(design.starts, settings.train, settings.seed), settings.model
    products = 6 * parameter_count(settings, size.modelled(settings)) * FLOP_SECONDS
    return plan.steps * plan.cells(0) * (products + model.codebooks * model.codes * CODE_SECONDS + PAIR_SECONDS)


def embed_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to encode all cells."""
    del design
    return size.cells * (2 * parameter_count(settings, size.modelled(settings)) * FLOP_SECONDS + CELL_SECONDS)


def pca_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds of the PCA of the trained embedding."""
    del design
    return size.cells * (settings.model.latent**2 * FLOP_SECONDS + CELL_SECONDS)


def space_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to compute a space without a network: the genes' covariance, its axes, and Harmony."""
    del design
    if settings.embed.method.startswith(keys.OBSM_PREFIX):
        return size.cells * CELL_SECONDS
    genes = size.modelled(settings)
    harmony = HARMONY_SECONDS if settings.embed.method == keys.HARMONY else 0.0
    return size.cells * (2 * genes**2 * FLOP_SECONDS + CELL_SECONDS + harmony) + 20 * genes**3 * FLOP_SECONDS


def _taken(design: Design, condition: int, group: Group) -> int:
    """Return the number of groups of a condition that a cell is matched with, its own group included."""
    every = len(design.with_condition(condition))
    return min(design.sampled + (group.condition == condition), every) if design.sampled else every


def match_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds of the nearest-neighbour searches."""
    pair, edge = MATCH_SECONDS[settings.match.hubs]
    cells = {c: sum(group.cells for group in design.with_condition(c)) for c in range(len(design.conditions))}
    pairs = 0.0
    for group in design.groups:
        conditions = cells if settings.match.edges == "all" else {0, group.condition}
        shares = {c: _taken(design, c, group) / max(len(design.with_condition(c)), 1) for c in conditions}
        pairs += group.cells * sum(share * cells[c] for c, share in shares.items())
    return pairs * pair + size.edges * edge


def sampled_match_seconds(design: Design, settings: Settings) -> float:
    """Return the seconds of the searches in a sample of the groups, if the plan should suggest one; else 0.

    A sample is suggested if matching with all groups takes long and the sample at most half of that, and if neither a
    sample nor all edges are set already.
    """
    if settings.match.groups or settings.match.edges == "all":
        return 0.0
    every = match_seconds(design, CohortSize.of(design, settings, genes=1, stored_values=0), settings)
    some = design.sampling(SAMPLED_GROUPS)
    sampled = match_seconds(some, CohortSize.of(some, settings, genes=1, stored_values=0), settings)
    return sampled if every > LONG_MATCHING and 2 * sampled < every else 0.0


def effects_seconds(design: Design, size: CohortSize, settings: Settings) -> float:
    """Return the seconds to average the matches and write the layers."""
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
