"""Open the finished run that cells are mapped onto: its groups, and the stores of their expression and coordinates.

The run is only read. A directory of cells that were mapped with `extend` can serve as the run too. Its groups follow
those of the original run, whose model and axes still place the cells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.effects.averages import near_distance
from ndreamer_dist.effects.onto import Onto
from ndreamer_dist.errors import RunError, suggest
from ndreamer_dist.mapping.likeness import likenesses, some
from ndreamer_dist.results.reader import ResultsReader, results_storage
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import open_array

FAR_QUANTILE = 0.99
"""Quantile of the run's own values that sets the limits for `Onto.far` and `Onto.unlike`."""


@dataclass(frozen=True)
class Reference:
    """A finished run in one of its matching spaces.

    Attributes
    ----------
    run
        Directory that the user named.
    home, space
        Directory of the original run, and of its matching space.
    settings
        Settings of the original run in this space.
    design
        Groups of all stored cells.
    parts, places
        Packed cohorts of the stored cells, and the directories of their coordinates, in row order.
    key
        Key of the results in `run`.
    """

    run: RunDirectory
    home: RunDirectory
    space: RunDirectory
    settings: Settings
    design: Design
    parts: tuple[Packed, ...]
    places: tuple[RunDirectory, ...]
    key: str

    @classmethod
    def open(cls, address: str | os.PathLike[str], embedding: str | None = None) -> Reference:
        """Open a finished run in its first matching space, or in another one that it has.

        Raises
        ------
        RunError
            There is no run, it is not finished, or it lacks the space; or it holds cells mapped without `extend`.
        """
        run = RunDirectory.at(address)
        if not run.storage.exists(keys.RUN_JSON):
            msg = f"{run.url} holds no run to map onto"
            raise RunError(msg)
        record = run.read_run()
        if keys.UNS_ONTO in record:
            return cls._extended(run, record[keys.UNS_ONTO], embedding)
        spaces = run.spaces()
        method = next(iter(spaces)) if embedding is None else embedding
        if method not in spaces:
            msg = f"{run.url} has no space {method!r}; it has {', '.join(spaces)}.{suggest(method, spaces)}"
            raise RunError(msg)
        _refuse_unfinished(spaces[method])
        settings = Settings.build(config=spaces[method].read_run()["settings"])
        packed = Packed.open(run, settings.pack.block_rows, settings.match.groups)
        key = str(ResultsReader(results_storage(spaces[method].storage)).uns["key"])
        return cls(run, run, spaces[method], settings, packed.design, (packed,), (spaces[method],), key)

    @classmethod
    def _extended(cls, run: RunDirectory, record: dict[str, Any], embedding: str | None) -> Reference:
        """Open a directory of mapped cells, so that later cells are matched with these and the original run."""
        onto = Onto(**{name: value for name, value in record.items() if name != "extend"})
        if not record["extend"]:
            msg = f"{run.url} was mapped without --extend; map it again with it, or map onto {record['url']}"
            raise RunError(msg)
        if embedding not in (None, record["space"]):
            msg = f"{run.url} was mapped in the space {record['space']!r}, not in {embedding!r}"
            raise RunError(msg)
        _refuse_unfinished(run)
        base = cls.open(onto.place(run.url), onto.space)
        design = Design.from_json(run.read_json(keys.DESIGN_JSON))
        packed = Packed(run, design, base.parts[0].genes, base.settings.pack.block_rows, before=base.parts)
        key = str(ResultsReader(results_storage(run.storage)).uns["key"])
        parts, places = (*base.parts, packed), (*base.places, run)
        return replace(base, run=run, design=design, parts=parts, places=places, key=key)

    @property
    def results(self) -> ResultsReader:
        """Results of the directory that the user named."""
        return ResultsReader(results_storage(self.run.storage, None if self.run != self.home else self.method))

    @property
    def cell_names(self) -> pd.Index:
        """Names of all stored cells."""
        found: list[pd.Index] = []
        results: ResultsReader | None = self.results
        while results is not None:
            found.append(results.packed_obs.index)
            results = results.stored
        return found[0].append(found[1:])

    @property
    def method(self) -> str:
        """Name of the matching space."""
        return self.settings.embed.method

    @property
    def genes(self) -> tuple[str, ...]:
        """The modelled genes."""
        return self.parts[0].genes

    def path_from(self, out: RunDirectory) -> str | None:
        """Return the relative path from another directory to the run; None if either is not local."""
        return os.path.relpath(self.run.url, out.url) if out.storage.is_local and self.run.storage.is_local else None

    def onto(self, out: RunDirectory, packed: Packed, runtime: Runtime) -> Onto:
        """Return the record of the run for the directory of the mapped cells, with their likeness to the run."""
        stored = some(self.parts[0].design.own_groups)
        own = likenesses(self.space, self.parts[0], stored, runtime, "map: likeness inside the run")
        new = likenesses(out, packed, packed.design.own_groups, runtime, "map: likeness")
        stored_values = np.concatenate([*own.values()])
        least = float(np.quantile(stored_values, 1 - FAR_QUANTILE)) if len(stored_values) else -1.0
        unlike = {name: float((values < least).mean()) for name, values in new.items() if len(values)}
        every = np.concatenate([*new.values()])
        return replace(
            self._distances(out), unlike=float((every < least).mean()) if len(every) else 0.0,
            unlike_by_group=dict(sorted(unlike.items())),
        )  # fmt: skip

    def _distances(self, out: RunDirectory) -> Onto:
        """Return the record of the run, with the limits that the distances of its own cells set."""
        first = ResultsReader(results_storage(self.home.storage, self.method))
        distances = first.packed_obs[keys.OBS_MATCH_DISTANCE].to_numpy(dtype=np.float64)
        finite = distances[np.isfinite(distances)]
        limit = float(np.quantile(finite, FAR_QUANTILE)) if len(finite) else float("inf")
        near = near_distance(own_distances(first), self.settings.effects.near_quantile)
        return Onto(self.run.url, self.path_from(out), self.method, self.key, near, limit)


def own_distances(results: ResultsReader) -> np.ndarray:
    """Return every cell's distance to the nearest other cell of its group: (cells,) float32, NaN in a group of one."""
    found = np.full(results.design.own_cells, np.nan, dtype=np.float32)
    step = int(open_array(results.storage, f"obsm/{results.embedding_key}").chunks[0])
    for group in results.design.own_groups:
        for start in range(group.start, group.stop, step):
            rows = np.arange(start, min(start + step, group.stop))
            pair = group.code, group.code
            edge = results.counterparts.edges(rows, [pair])[pair]
            found[rows - results.design.first_row] = edge[1][:, 0]
    return found


def _refuse_unfinished(run: RunDirectory) -> None:
    if not run.storage.exists(f"{keys.RESULTS}/zarr.json"):
        msg = f"{run.url} is not finished; the same command that began it goes on, and cells are mapped onto it then"
        raise RunError(msg)
