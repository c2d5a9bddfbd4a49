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


GRAPH: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(keys.STAGE_COHORT, ("cohort", "hvg"), ()),
        Stage(keys.STAGE_PACK, ("pack",), (keys.STAGE_COHORT,), seeded=True),
        Stage(keys.STAGE_CLUSTERS, ("clusters",), (keys.STAGE_PACK,), seeded=True),
        Stage(keys.STAGE_TRAIN, ("model", "loss", "train"), (keys.STAGE_CLUSTERS,), seeded=True),
        Stage(keys.STAGE_EMBED, ("embed",), (keys.STAGE_PACK, keys.STAGE_TRAIN)),
        Stage(keys.STAGE_PCA, ("embed",), (keys.STAGE_EMBED,)),
        Stage(keys.STAGE_MATCH, ("match",), (keys.STAGE_PCA,), unheeded=("match.edges", "match.bandwidth")),
        Stage(keys.STAGE_EFFECTS, ("effects", "match"), (keys.STAGE_CLUSTERS, keys.STAGE_MATCH)),
    )
}


def stage_keys(settings: Settings, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of every stage, in the order of the flow."""
    found: dict[str, str] = {}
    for name in keys.STAGES:
        stage = GRAPH[name]
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
