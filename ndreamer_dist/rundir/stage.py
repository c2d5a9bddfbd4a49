"""Stages: what each reads, which settings its results depend on, and its key.

A stage key is the sha256 of the stage's result-bearing settings, the keys of the stages it reads and the format
version; the first one also takes the input's fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ndreamer_dist import keys
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.settings import Settings, canonical_json


@dataclass(frozen=True)
class Stage:
    """What a stage reads, and which settings bear on it: whole parts, less those that only later stages heed."""

    name: str
    settings: tuple[str, ...]
    reads: tuple[str, ...]
    seeded: bool = False
    unheeded: tuple[str, ...] = ()

    def bearing(self, settings: Settings) -> dict[str, dict[str, Any]]:
        """Return the settings that bear on this stage, by part."""
        return {
            part: {
                name: value
                for name, value in getattr(settings, part).bearing().items()
                if f"{part}.{name}" not in self.unheeded
            }
            for part in self.settings
        }


OTHER_SPACES = ("embed.method", "embed.harmony_keys", "embed.state_weight")
"""Settings of `embed` that say nothing to the trained embedding."""
SPACE_HEEDS: dict[str, tuple[str, ...]] = {
    keys.SPACE_PCA: ("embed.dimensions",),
    keys.HARMONY: ("embed.dimensions", "embed.harmony_keys"),
    keys.STATE: ("embed.dimensions", "state.by", "state.k", "state.shrink"),
    keys.NDREAMER_STATE: ("embed.dimensions", "embed.state_weight", "state.by", "state.k", "state.shrink"),
    keys.OBSM_PREFIX: (),
}
"""Settings that bear on the coordinates of a space, besides its name."""


def stages_of(settings: Settings) -> dict[str, Stage]:
    """Return the stages that a run with these settings has, in the order of the flow; its matching space says which."""
    method = settings.embed.method
    trained, clustered = keys.is_trained(method), is_clustered(settings)
    space = () if method == keys.NDREAMER else (_space_stage(settings),)
    placed = keys.STAGE_SPACE if space else keys.STAGE_PCA
    learned = (
        Stage(keys.STAGE_TRAIN, ("model", "loss", "train"), (keys.STAGE_CLUSTERS,), seeded=True),
        Stage(keys.STAGE_EMBED, ("embed",), (keys.STAGE_PACK, keys.STAGE_TRAIN), unheeded=OTHER_SPACES),
        Stage(keys.STAGE_PCA, ("embed",), (keys.STAGE_EMBED,), unheeded=OTHER_SPACES),
    )
    labels = keys.STAGE_CLUSTERS if clustered else keys.STAGE_PACK
    stages = (
        Stage(keys.STAGE_COHORT, ("cohort", "hvg"), ()),
        Stage(keys.STAGE_PACK, ("pack",), (keys.STAGE_COHORT,), seeded=True),
        *((Stage(keys.STAGE_CLUSTERS, ("clusters",), (keys.STAGE_PACK,), seeded=True),) if clustered else ()),
        *(learned if trained else ()),
        *space,
        Stage(keys.STAGE_MATCH, ("match", "denoise"), (placed,), unheeded=("match.edges", "match.bandwidth")),
        Stage(keys.STAGE_EFFECTS, ("effects", "match", "denoise"), (labels, keys.STAGE_MATCH)),
    )
    return {stage.name: stage for stage in stages}


def is_clustered(settings: Settings) -> bool:
    """Return whether a run needs the clusters: to train, or as the populations of the state space."""
    method = settings.embed.method
    by_cluster = settings.state.by == keys.OBS_LOW
    return keys.is_trained(method) or (method == keys.STATE and by_cluster)


def _space_stage(settings: Settings) -> Stage:
    """Return the stage that writes the coordinates of a space other than the trained one."""
    method = settings.embed.method
    name = keys.OBSM_PREFIX if method.startswith(keys.OBSM_PREFIX) else method
    heeded = ("embed.method", *SPACE_HEEDS[name])
    every = [f"{part}.{field}" for part in ("embed", "state") for field in getattr(settings, part).bearing()]
    clustered = (keys.STAGE_CLUSTERS,) if is_clustered(settings) else ()
    reads = (keys.STAGE_PACK, *clustered, *((keys.STAGE_PCA,) if keys.is_trained(method) else ()))
    unheeded = tuple(field for field in every if field not in heeded)
    seeded = name not in (keys.SPACE_PCA, keys.OBSM_PREFIX)
    return Stage(keys.STAGE_SPACE, ("embed", "state"), reads, seeded=seeded, unheeded=unheeded)


def stage_keys(
    settings: Settings, fingerprint: Mapping[str, Any], from_input: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the key of every stage, in the order of the flow.

    Parameters
    ----------
    from_input
        Checksums of what the space stage takes from the input: coordinates of `obsm`, columns of `obs`.
    """
    found: dict[str, str] = {}
    for name, stage in stages_of(settings).items():
        content: dict[str, Any] = {
            "format": keys.FORMAT_VERSION,
            "stage": name,
            "settings": stage.bearing(settings),
            "reads": {other: found[other] for other in stage.reads},
        }
        if stage.seeded:
            content["seed"] = settings.seed
        if name == keys.STAGE_COHORT:
            content["input"] = dict(fingerprint)
        if name == keys.STAGE_SPACE:
            content["from_input"] = dict(from_input or {})
        found[name] = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return found


def run_task(run: RunDirectory, stage: str, key: str, function: Callable[..., None], shard: Shard, *args: Any) -> str:
    """Do one shard and then mark it; this is what runs in a task. Returns the shard's name."""
    function(shard.task, *args)
    run.mark(stage, key, shard)
    return shard.name


def begin_stage(
    run: RunDirectory, stage: str, key: str, shards: Sequence[Shard], create: Callable[[bool], None]
) -> list[Shard]:
    """Return a stage's pending shards, after making its array metadata where there is anything to do.

    `create(fresh)` writes the metadata: over whatever is there where no shard is done under this key (fresh), otherwise
    without touching what finished shards wrote.
    """
    todo = run.pending(stage, key, shards)
    if todo:
        fresh = len(todo) == len(shards)
        if fresh:
            run.unmark(stage)
        create(fresh)
    return todo
