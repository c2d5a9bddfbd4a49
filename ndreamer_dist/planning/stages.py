"""Declare the stages of a run in one table: their order, keys, memory, work and durations follow from it.

A new stage is one more `Stage` in `ALL_STAGES`, and its name in `keys`. `rundir/stage.py` holds what all stages share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import clustered_by, run_clusters
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.cohort.obsm import CellLabels
from ndreamer_dist.cohort.pack import partitions_of, run_pack
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.cohort.source import Source
from ndreamer_dist.cohort.statistics import spans_of
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.effects.stage import run_effects, runs_of_groups
from ndreamer_dist.effects.tables import ENTRY_BYTES, MOST_SHARED_BYTES
from ndreamer_dist.embedding.harmony import BYTES_PER_CELL as HARMONY_BYTES
from ndreamer_dist.embedding.space import MOST_SPANS, SpaceInput, run_space
from ndreamer_dist.matching.stage import edge_shards, run_match, units
from ndreamer_dist.planning import speeds
from ndreamer_dist.planning.sizes import BASE_BYTES, GIVEN_DIMENSIONS, CohortSize, parameter_count
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import NOISE_ROWS, Settings, canonical_json
from ndreamer_dist.storage.checksums import digest
from ndreamer_dist.training.sampling import SamplingPlan

Work = tuple[tuple[int, str], ...]
"""Consecutive steps of a stage: for each, the number of tasks that can run concurrently, and the unit of a task."""


@dataclass(frozen=True)
class Job:
    """Arguments that all stages of a run share.

    Attributes
    ----------
    home
        The directory of the run. An added matching space has a directory of its own, below it.
    from_input
        Coordinates and columns of the input that the matching space uses.
    """

    home: RunDirectory
    settings: Settings
    source: Source
    runtime: Runtime
    from_input: SpaceInput = field(default_factory=SpaceInput)

    @cached_property
    def packed(self) -> Packed:
        """The packed cohort; the cohort stage must be finished."""
        return Packed.open(self.home, self.settings.pack.block_rows, self.settings.match.groups)


@dataclass(frozen=True)
class DesignedCohort:
    """A cohort and its settings, from which the work of stages is planned.

    Attributes
    ----------
    input_cells
        Number of cells of the input, dropped ones included.
    """

    design: Design
    size: CohortSize
    input_cells: int
    settings: Settings

    @property
    def blocks(self) -> int:
        """Number of row blocks."""
        return -(-self.design.n_cells // self.settings.pack.block_rows)

    @property
    def spans(self) -> int:
        """Number of spans of rows in which the input is read."""
        return len(spans_of(self.input_cells))


BytesOf = Callable[[CohortSize, Settings], float]
SecondsOf = Callable[[Design, CohortSize, Settings], float]


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes
    ----------
    settings
        Sections of the settings that can change its result; `heeds` excludes single fields.
    reads
        Names of the stages whose stores it reads, given the settings.
    run
        Does the unfinished shards in a directory, under a key.
    task_bytes
        Memory of one task in bytes, without the process itself; for training, of one read task.
    work
        Its steps and numbers of tasks.
    seconds
        Estimated seconds on one processor.
    needed
        Whether a run with these settings has the stage.
    heeds
        Whether a setting, given by its dotted name, can change its result.
    seeded
        Whether the seed can change its result.
    beside_bytes
        Memory in bytes that is held besides its tasks.
    takes
        Part of the input whose checksum belongs to its key: `input`, `from_input`, `labels` or none.
    shared
        Whether all matching spaces of a run share its result.
    """

    name: str
    settings: tuple[str, ...]
    reads: Callable[[Settings], tuple[str, ...]]
    run: Callable[[Job, RunDirectory, str], object]
    task_bytes: BytesOf
    work: Callable[[DesignedCohort], Work]
    seconds: SecondsOf = lambda *_: 0.0
    needed: Callable[[Settings], bool] = lambda _: True
    heeds: Callable[[str, Settings], bool] = lambda *_: True
    seeded: Callable[[Settings], bool] = lambda _: False
    beside_bytes: BytesOf = lambda *_: 0.0
    takes: str | None = None
    shared: bool = True

    def bearing(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """Return the settings that can change this stage's result, by section and name."""
        return {
            part: {
                name: value
                for name, value in getattr(settings, part).bearing().items()
                if self.heeds(f"{part}.{name}", settings)
            }
            for part in self.settings
        }


def _placed_by_clusters(settings: Settings) -> bool:
    """Return whether the coordinates depend on the clusters."""
    return keys.is_clustered(settings.embed.method, settings.state.by)


def _clustered(settings: Settings) -> bool:
    return _placed_by_clusters(settings) or settings.match.within == keys.OBS_LOW


def _trained(settings: Settings) -> bool:
    return keys.is_trained(settings.embed.method)


def _placed_apart(settings: Settings) -> bool:
    return settings.embed.method != keys.NDREAMER


# --- cohort, pack, clusters ------------------------------------------------------------------------------------------


def _chunk_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of a chunk of rows and of its temporary copies."""
    return settings.cohort.chunk_rows * size.stored_per_cell * 40


def _graph_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of the largest neighbour graph and of its cells."""
    clusters = settings.clusters
    most = {
        "auto": max(clusters.max_cells, clusters.sketch_cells), "group": size.largest_group, "all": size.cells,
        "sketch": clusters.sketch_cells,
    }[clusters.within]  # fmt: skip
    per_cell = size.modelled_per_cell(settings) * 24 + clusters.n_neighbors * 60 + 50 * 12
    return min(size.cells, most) * per_cell


def _reading(cohort: DesignedCohort) -> Work:
    return ((cohort.spans, "span(s) of rows"),)


def _packing(cohort: DesignedCohort) -> Work:
    partitions = partitions_of(cohort.blocks, cohort.size.stored_values, cohort.spans)
    return (*_reading(cohort), (len(partitions), "partition(s) of blocks"))


def _clustering(cohort: DesignedCohort) -> Work:
    groups = len(cohort.design.groups)
    way = clustered_by(cohort.settings.clusters, cohort.design.n_cells, groups)
    return {
        "group": ((groups, "graph(s)"),),
        "all": ((1, "graph"),),
        "sketch": ((1, "graph of a sketch"), (groups, "group(s)")),
    }[way]


# --- train, embed, pca -----------------------------------------------------------------------------------------------


def _block_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of a packed row block."""
    return settings.pack.block_rows * size.modelled_per_cell(settings) * 12


def _trainer_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of all training workers.

    Each holds weights, gradients and moments, the activations of a mini-batch, the row labels, and the mini-batches
    that are read ahead.
    """
    genes, model, cells = size.modelled(settings), settings.model, 2 * settings.train.batch_size
    activations = cells * (4 * genes + 8 * sum(model.encoder) + 40 * model.latent) * 4
    tables = 4 * model.codebooks * cells * model.codes * 4 + 12 * cells * cells * 4
    window = 3 * min(64, max(8, -(-size.groups // 2))) * cells * size.modelled_per_cell(settings) * 16
    own = parameter_count(settings, genes) * 16 + activations + tables + window + size.cells * 8
    return settings.train.workers * int(BASE_BYTES * 2 + own)


def _encoder_bytes(size: CohortSize, settings: Settings) -> float:
    rows = settings.pack.block_rows
    weights = parameter_count(settings, size.modelled(settings)) * 4
    return _block_bytes(size, settings) * 2 + rows * settings.model.latent * 12 + weights


def _training(cohort: DesignedCohort) -> Work:
    plan = SamplingPlan.for_cohort(cohort.design.starts, cohort.settings.train, cohort.settings.seed)
    return ((plan.cells(0) // NOISE_ROWS, f"share(s) of {NOISE_ROWS} cells of a step"),)


def _by_block(cohort: DesignedCohort) -> Work:
    return ((cohort.blocks, "row block(s)"),)


def _train(job: Job, run: RunDirectory, key: str) -> None:
    from ndreamer_dist.training.trainer import run_train  # loads torch

    run_train(run, job.settings, job.packed, job.runtime, key)


def _embed(job: Job, run: RunDirectory, key: str) -> None:
    from ndreamer_dist.embedding.stage import run_embed  # loads torch

    run_embed(run, job.settings, job.packed, job.runtime, key)


def _pca(job: Job, run: RunDirectory, key: str) -> None:
    from ndreamer_dist.embedding.stage import run_pca  # loads torch

    run_pca(run, job.settings, job.packed, job.runtime, key)


# --- space -----------------------------------------------------------------------------------------------------------

OTHER_SPACES = ("embed.method", "embed.harmony_keys", "embed.signal_share", "embed.state_weight")
"""Settings of `embed` that do not change the trained embedding."""
SPACE_HEEDS: dict[str, tuple[str, ...]] = {
    keys.SPACE_PCA: ("embed.dimensions",),
    keys.HARMONY: ("embed.dimensions", "embed.harmony_keys", "embed.signal_share"),
    keys.STATE: ("embed.dimensions", "state.by", "state.k", "state.shrink"),
    keys.NDREAMER_STATE: ("embed.dimensions", "embed.state_weight", "state.by", "state.k", "state.shrink"),
    keys.OBSM_PREFIX: (),
}
"""Settings that can change the coordinates of a space, besides its name."""


def _kind(settings: Settings) -> str:
    """Return the kind of the matching space: its name, or `obsm:` for any coordinates of the input."""
    method = settings.embed.method
    return keys.OBSM_PREFIX if method.startswith(keys.OBSM_PREFIX) else method


def _product_bytes(size: CohortSize, settings: Settings) -> float:
    return size.modelled(settings) ** 2 * 8


def _placing_bytes(size: CohortSize, settings: Settings) -> float:
    rows = settings.pack.block_rows * size.modelled(settings) * 24
    return rows + 3 * _product_bytes(size, settings) + _block_bytes(size, settings) * 6


def _space_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes that the driver holds to compute a space without a network, besides its tables.

    These are the covariance of the genes and its eigenvectors, the memory of Harmony, or the input's coordinates.
    """
    kind = _kind(settings)
    if kind == keys.OBSM_PREFIX:
        return size.cells * GIVEN_DIMENSIONS * 12
    return _product_bytes(size, settings) * 6 + (size.cells * HARMONY_BYTES if kind == keys.HARMONY else 0)


def _placing(cohort: DesignedCohort) -> Work:
    """Return the work of the space stage; the populations of a state space are processed one after another."""
    kind, by_block = _kind(cohort.settings), _by_block(cohort)
    if kind == keys.OBSM_PREFIX:
        return by_block
    sums: Work = ((min(cohort.blocks, MOST_SPANS), "span(s) of blocks"), *by_block)
    return {keys.SPACE_PCA: sums, keys.HARMONY: (*sums, (1, "run of Harmony"))}.get(kind, (*sums, *by_block))


# --- match, effects --------------------------------------------------------------------------------------------------


def _search_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of a target group's index and its temporary copies, a batch of queries, and a tile per thread."""
    queries = min(size.cells, settings.match.query_rows + 65_536)
    # Inside labels there is an index per label, and one of all cells for labels with too few.
    indexes = 1 if settings.match.within is None else 2
    return size.largest_group * 50 * 20 * indexes + queries * 50 * 8 + settings.run.task_threads * 80e6


def _coordinate_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of the coordinates, which one task reads and all tasks share."""
    from_input = settings.embed.method.startswith(keys.OBSM_PREFIX)
    return size.cells * (GIVEN_DIMENSIONS if from_input else settings.embed.dimensions) * 5


def _matching(cohort: DesignedCohort) -> Work:
    """Return the work of matching: the units of edges, with as many workers as tiles."""
    design, settings = cohort.design, cohort.settings
    tiles = edge_shards(settings, design, design.needed_edges(settings.match.edges))
    return ((len(units(tiles, settings, design, workers=len(tiles))), "unit(s) of edges"),)


def _packed_labels(settings: Settings, packed: Packed, from_input: SpaceInput) -> CellLabels | None:
    """Return the labels inside which cells are matched, in packed order; `None` if matching ignores labels."""
    if settings.match.within == keys.OBS_LOW:
        codes = packed.clusters(keys.PACKED_LOW)
        return CellLabels(codes, tuple(map(str, range(int(codes.max()) + 1))))
    labels = from_input.labels
    return None if labels is None else CellLabels(labels.codes[packed.input_row], labels.names)


def _match(job: Job, run: RunDirectory, key: str) -> None:
    labels = _packed_labels(job.settings, job.packed, job.from_input)
    run_match(run, job.settings, job.packed.design, job.runtime, key, labels)


def _heeds_labels(name: str, settings: Settings) -> bool:
    """Return whether a setting can change the matches; those of labels do only if cells are matched inside labels."""
    return settings.match.within is not None or name not in (keys.MATCH_WITHIN, "match.within_cells")


def _effects(job: Job, run: RunDirectory, key: str) -> None:
    summary = {**job.home.read_json(keys.COHORT_SUMMARY), "input": run.read_run()["input"]}
    if job.settings.match.within is not None:
        summary[keys.UNS_WITHIN] = run.read_json(keys.MATCH_SUMMARY)["within"]
    run_effects(run, job.settings, job.packed, job.source, job.runtime, key, summary)


def _kept_bytes(size: CohortSize, settings: Settings) -> float:
    """Return the bytes of the expression that a serial run keeps in its process; Ray keeps it in its object store."""
    return (
        min(size.cells * size.modelled_per_cell(settings) * ENTRY_BYTES, MOST_SHARED_BYTES)
        if settings.run.serial
        else 0
    )


def _writing(cohort: DesignedCohort) -> Work:
    return (*_by_block(cohort), (cohort.blocks + len(runs_of_groups(cohort.design.groups)), "count(s) of matches"))


# --- all of them -----------------------------------------------------------------------------------------------------

ALL_STAGES = (
    Stage(
        keys.STAGE_COHORT,
        settings=("cohort", "hvg"),
        reads=lambda _: (),
        takes="input",
        run=lambda job, run, key: run_cohort(run, job.settings, job.source, job.runtime, key),
        task_bytes=lambda size, settings: _chunk_bytes(size, settings) + size.groups * size.genes * 24,
        work=_reading,
        seconds=speeds.cohort_seconds,
    ),
    Stage(
        keys.STAGE_PACK,
        settings=("pack",),
        reads=lambda _: (keys.STAGE_COHORT,),
        seeded=lambda _: True,
        run=lambda job, run, key: run_pack(run, job.settings, job.source, job.runtime, key),
        task_bytes=lambda size, settings: (
            _chunk_bytes(size, settings) + size.partition_cells(settings) * size.modelled_per_cell(settings) * 24
        ),
        work=_packing,
        seconds=speeds.pack_seconds,
    ),
    Stage(
        keys.STAGE_CLUSTERS,
        settings=("clusters",),
        reads=lambda _: (keys.STAGE_PACK,),
        seeded=lambda _: True,
        needed=_clustered,
        run=lambda job, run, key: run_clusters(run, job.settings, job.packed, job.runtime, key),
        task_bytes=_graph_bytes,
        work=_clustering,
        seconds=speeds.clusters_seconds,
    ),
    Stage(
        keys.STAGE_TRAIN,
        settings=("model", "loss", "train"),
        reads=lambda _: (keys.STAGE_CLUSTERS,),
        seeded=lambda _: True,
        needed=_trained,
        run=_train,
        task_bytes=lambda size, settings: _block_bytes(size, settings) * 4,
        beside_bytes=_trainer_bytes,
        work=_training,
        seconds=speeds.train_seconds,
    ),
    Stage(
        keys.STAGE_EMBED,
        settings=("embed",),
        heeds=lambda name, _: name not in OTHER_SPACES,
        reads=lambda _: (keys.STAGE_PACK, keys.STAGE_TRAIN),
        needed=_trained,
        run=_embed,
        task_bytes=_encoder_bytes,
        work=_by_block,
        seconds=speeds.embed_seconds,
    ),
    Stage(
        keys.STAGE_PCA,
        settings=("embed",),
        heeds=lambda name, _: name not in OTHER_SPACES,
        reads=lambda _: (keys.STAGE_EMBED,),
        needed=_trained,
        run=_pca,
        task_bytes=lambda _, settings: settings.pack.block_rows * settings.model.latent * 24,
        work=_by_block,
        seconds=speeds.pca_seconds,
    ),
    Stage(
        keys.STAGE_SPACE,
        settings=("embed", "state"),
        heeds=lambda name, settings: name == "embed.method" or name in SPACE_HEEDS[_kind(settings)],
        reads=lambda settings: (
            keys.STAGE_PACK,
            *((keys.STAGE_CLUSTERS,) if _placed_by_clusters(settings) else ()),
            *((keys.STAGE_PCA,) if _trained(settings) else ()),
        ),
        seeded=lambda settings: _kind(settings) not in (keys.SPACE_PCA, keys.OBSM_PREFIX),
        takes="from_input",
        needed=_placed_apart,
        shared=False,
        run=lambda job, run, key: run_space(run, job.settings, job.packed, job.from_input, job.runtime, key),
        task_bytes=_placing_bytes,
        beside_bytes=_space_bytes,
        work=_placing,
        seconds=speeds.space_seconds,
    ),
    Stage(
        keys.STAGE_MATCH,
        settings=("match", "denoise"),
        heeds=lambda name, settings: name not in ("match.edges", "match.bandwidth") and _heeds_labels(name, settings),
        reads=lambda settings: (
            keys.STAGE_SPACE if _placed_apart(settings) else keys.STAGE_PCA,
            *((keys.STAGE_CLUSTERS,) if settings.match.within == keys.OBS_LOW else ()),
        ),
        takes="labels",
        shared=False,
        run=_match,
        task_bytes=_search_bytes,
        beside_bytes=_coordinate_bytes,
        work=_matching,
        seconds=speeds.match_seconds,
    ),
    Stage(
        keys.STAGE_EFFECTS,
        settings=("effects", "match", "denoise"),
        heeds=_heeds_labels,
        reads=lambda settings: (keys.STAGE_CLUSTERS if _clustered(settings) else keys.STAGE_PACK, keys.STAGE_MATCH),
        shared=False,
        run=_effects,
        task_bytes=lambda size, settings: (
            settings.pack.block_rows * size.modelled(settings) * 32 + _block_bytes(size, settings) * 3
        ),
        beside_bytes=_kept_bytes,
        work=_writing,
        seconds=speeds.effects_seconds,
    ),
)
"""All stages in the order of the flow; a run has those that its matching space needs."""
SHARED = tuple(stage.name for stage in ALL_STAGES if stage.shared)
"""Names of the stages whose results all matching spaces of a run share."""


def stages_of(settings: Settings) -> dict[str, Stage]:
    """Return the stages of a run with these settings by name, in the order of the flow."""
    return {stage.name: stage for stage in ALL_STAGES if stage.needed(settings)}


def stage_keys(
    settings: Settings, fingerprint: Mapping[str, Any], from_input: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the key of every stage, in the order of the flow.

    A key is the sha256 of everything that can change the stage's result: its settings, the keys of the stages that it
    reads, the format version, the seed, and the parts of the input that it uses.

    Parameters
    ----------
    fingerprint
        Fingerprint of the input cohort.
    from_input
        Checksums of other parts of the input: coordinates of `obsm` and columns of `obs` for the space stage, and the
        labels (`match.within`) for the match stage.
    """
    checksums = dict(from_input or {})
    taken = {"input": dict(fingerprint), "labels": checksums.pop(keys.MATCH_WITHIN, None), "from_input": checksums}
    by_stage: dict[str, str] = {}
    for name, stage in stages_of(settings).items():
        content: dict[str, Any] = {
            "format": keys.FORMAT_VERSION,
            "stage": name,
            "settings": stage.bearing(settings),
            "reads": {other: by_stage[other] for other in stage.reads(settings)},
        }
        if stage.seeded(settings):
            content["seed"] = settings.seed
        if stage.takes is not None and taken[stage.takes] is not None:
            content[stage.takes] = taken[stage.takes]
        by_stage[name] = digest(canonical_json(content).encode())
    return by_stage
