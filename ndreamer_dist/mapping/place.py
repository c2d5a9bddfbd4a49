"""Place mapped cells in the matching space of a finished run, by the run's frozen model or axes.

Input: packed.zarr of the new cells, and the model or axes of the run. Output: coordinates in embedding.zarr. They
depend on a cell's expression and, in spaces that correct for batches (Harmony, state), on its group. Tiles of cells are
counted from the start of their group, so the bits do not depend on the other groups that are mapped at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Group
from ndreamer_dist.cohort.pack import stable_number
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.effects.averages import segments
from ndreamer_dist.embedding.harmony import FrozenClusters
from ndreamer_dist.embedding.state import Doubt, shrunk
from ndreamer_dist.errors import RunError
from ndreamer_dist.mapping.reference import Reference
from ndreamer_dist.rundir.directory import Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import ensure_array, open_array, read_array, shard_files, write_array, write_part
from ndreamer_dist.storage.files import Storage

GROUP_TERMS = "mapped"
"""Folder `mapped/<group>/<array>`: terms of a new group, computed before its cells are placed."""


@dataclass(frozen=True)
class GroupTile:
    """A tile of a group's cells.

    Attributes
    ----------
    group
        The group.
    number
        Number of the tile, counted from the start of the group.
    x
        (cells, genes) CSR, log-normalised expression of the modelled genes.
    """

    group: Group
    number: int
    x: sparse.csr_matrix


class Placer(Protocol):
    """Protocol of the placers, one per kind of matching space.

    `sums` are added over the tiles of a group, `terms` turns them into the group's terms, and `place` uses these.
    """

    def place(self, tile: GroupTile, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the coordinates of the tile's cells, (cells, d) each, by array name; the matching space comes last."""
        ...

    def sums(self, tile: GroupTile) -> dict[str, np.ndarray]:
        """Return the tile's float64 sums, by name."""
        ...

    def terms(self, sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the terms of a group, by name, from the sums over all its cells."""
        ...


class _Plain:
    """Base of placers whose coordinates do not depend on the group."""

    def sums(self, tile: GroupTile) -> dict[str, np.ndarray]:
        """See `Placer.sums`."""
        del tile
        return {}

    def terms(self, sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.terms`."""
        return sums


class TrainedPlacer(_Plain):
    """Place cells by the trained encoder and the axes of its PCA."""

    def __init__(self, reference: Reference) -> None:
        from ndreamer_dist.training.model_file import TrainedModel  # loads torch

        storage = reference.home.embedding(keys.PCA)
        self._model = TrainedModel.load(reference.home.storage)
        self._settings = reference.settings
        self._mean, self._axes = read_array(storage, keys.PCA_MEAN), read_array(storage, keys.PCA_COMPONENTS)

    def place(self, tile: GroupTile, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.place`."""
        del terms
        embed = self._settings.embed
        drawn = self._settings.seed, keys.STREAMS[keys.STAGE_EMBED], stable_number(tile.group.name), tile.number
        mu = self._model.embed(tile.x, embed.tile_rows, codes=embed.codes, key=drawn)
        return {keys.MU: mu, keys.PCA: (mu.astype(np.float64) - self._mean) @ self._axes}


class ComponentsPlacer(_Plain):
    """Place cells by principal components of expression."""

    def __init__(self, reference: Reference) -> None:
        storage = reference.space.embedding(keys.GENE_AXES)
        self.axes = read_array(storage, keys.GENE_AXES)
        self._centre = read_array(storage, keys.GENE_MEAN) @ self.axes

    def points(self, tile: GroupTile) -> np.ndarray:
        """Return the principal components as float64, rounded to float32 first, as they are in the run."""
        scores = np.asarray(tile.x.astype(np.float64) @ self.axes - self._centre)
        return scores.astype(np.float32).astype(np.float64)

    def place(self, tile: GroupTile, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.place`."""
        del terms
        return {keys.SPACES[keys.SPACE_PCA]: self.points(tile)}


class HarmonyPlacer(ComponentsPlacer):
    """Place cells by principal components, corrected by Harmony's clusters with the group as a new batch."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        storage = reference.space.embedding(keys.HARMONY_CELLS)
        self._clusters = FrozenClusters(*(_kept(storage, name) for name in (keys.HARMONY_CELLS, keys.HARMONY_SUMS)))

    def sums(self, tile: GroupTile) -> dict[str, np.ndarray]:
        """See `Placer.sums`."""
        points = self.points(tile)
        soft = self._clusters.assigned(points)
        return {"cells": soft.sum(axis=0), "sums": soft.T @ points}

    def terms(self, sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.terms`."""
        return {"batch": self._clusters.batch_effects(sums["cells"], sums["sums"])}

    def place(self, tile: GroupTile, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.place`."""
        points = self.points(tile)
        return {keys.SPACES[keys.HARMONY]: points - self._clusters.assigned(points) @ terms["batch"]}


class StatePlacer:
    """Place cells in the state space: axes and reliability of the run, mean and position of the group.

    In the space `ndreamer+state`, the trained coordinates come first.
    """

    def __init__(self, reference: Reference) -> None:
        storage = reference.space.embedding(keys.STATE_AXES)
        if open_array(storage, keys.STATE_MEAN).shape[0] > 1:
            msg = (
                f"{reference.run.url} has a state space for each of several populations (state.by), and the "
                "populations of new cells are not known; map onto another space"
            )
            raise RunError(msg)
        self._trained = TrainedPlacer(reference) if keys.is_trained(reference.method) else None
        self._array = keys.embedding_key(reference.method)
        k = int(read_array(storage, keys.STATE_DIMENSIONS)[0])
        self._mean, axes = read_array(storage, keys.STATE_MEAN)[0], read_array(storage, keys.STATE_AXES)[0]
        self._axes, self._share = axes[:, :k], read_array(storage, keys.STATE_RELIABILITY)[0, :k, :k]
        self._weight = float(read_array(storage, keys.STATE_WEIGHT)[0])
        between, variance = _kept(storage, keys.STATE_DOUBT)[0]
        self._doubt = Doubt(between, variance, float(_kept(storage, keys.STATE_LEAST_DOUBT)[0]))

    def _coordinates(self, tile: GroupTile) -> np.ndarray:
        return np.asarray(tile.x.astype(np.float64) @ self._axes - self._mean @ self._axes)

    def sums(self, tile: GroupTile) -> dict[str, np.ndarray]:
        """See `Placer.sums`."""
        genes = np.asarray(tile.x.astype(np.float64).sum(axis=0)).ravel()
        return {
            "cells": np.array([float(tile.x.shape[0])]),
            "genes": genes,
            "points": self._coordinates(tile).sum(axis=0),
        }

    def terms(self, sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.terms`."""
        cells = float(sums["cells"][0])
        mean = sums["points"] / cells
        if np.isnan(self._doubt.least):
            return {"mean": mean, "position": mean}
        return {"mean": mean, "position": self._doubt.position(sums["genes"] / cells - self._mean, self._axes, cells)}

    def place(self, tile: GroupTile, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Placer.place`."""
        own = shrunk(self._coordinates(tile), terms["mean"], terms["position"], self._share) * self._weight
        if self._trained is None:
            return {self._array: own}
        trained = self._trained.place(tile, terms)
        beside = trained[keys.PCA].astype(np.float32).astype(np.float64)
        return {**trained, self._array: np.column_stack([beside, own])}


def _kept(storage: Storage, name: str) -> np.ndarray:
    """Read an array that mapping needs; raise `RunError` if the run was made by a version that did not store it."""
    if not storage.exists(f"{name}/zarr.json"):
        msg = (
            f"{storage.url} holds no '{name}': the run was made by a version that did not keep what mapping needs; "
            "make it again (--fresh), or map onto another space of it (--embedding)"
        )
        raise RunError(msg)
    return read_array(storage, name)


def placer_of(reference: Reference) -> Placer:
    """Return the placer of the run's matching space; raise `RunError` if the run cannot place new cells."""
    kinds: dict[str, type[TrainedPlacer | ComponentsPlacer | StatePlacer]] = {
        keys.NDREAMER: TrainedPlacer, keys.SPACE_PCA: ComponentsPlacer, keys.HARMONY: HarmonyPlacer,
        keys.STATE: StatePlacer, keys.NDREAMER_STATE: StatePlacer,
    }  # fmt: skip
    if reference.method not in kinds:
        msg = (
            f"{reference.run.url} is matched in {reference.method!r}, coordinates that its own cohort brought: new "
            "cells have none"
        )
        raise RunError(msg)
    return kinds[reference.method](reference)


@lru_cache(maxsize=1)
def _placer(reference: Reference) -> Placer:
    """Return the placer, made once per process."""
    return placer_of(reference)


def run_place(stage: StageRun, settings: Settings, packed: Packed, reference: Reference, runtime: Runtime) -> None:
    """Write the coordinates of the new cells: one task per group for its terms, then one task per row block."""
    storage, design = stage.run.storage / keys.EMBEDDING, packed.design
    widths = _widths(reference)
    groups = [_group_shard(group, reference) for group in design.own_groups] if _is_grouped(reference) else []
    blocks = [
        Shard(keys.block_name(b), tuple(f"{keys.EMBEDDING}/{shard_files(name, b, 0)}" for name in widths), b)
        for b in range(packed.n_blocks)
    ]
    todo = stage.begin([*groups, *blocks], [keys.EMBEDDING])
    if not todo:
        return
    for name, width in widths.items():
        shape, chunks = (packed.n_rows, width), (packed.block_rows, width)
        ensure_array(storage, name, shape=shape, dtype="float32", chunks=chunks, fill_value=np.nan)
    shared = storage, packed, reference, settings.embed.tile_rows
    stage.map(runtime, _sum_group, [shard for shard in todo if shard in groups], *shared, title="map: groups")
    stage.map(runtime, _place_block, [shard for shard in todo if shard in blocks], *shared, title="map: cells placed")


def _widths(reference: Reference) -> dict[str, int]:
    """Return the names of the coordinate arrays and their numbers of dimensions, as in the run."""
    trained = (keys.MU, keys.PCA) if keys.is_trained(reference.method) else ()
    names = dict.fromkeys((*trained, keys.embedding_key(reference.method)))
    return {name: int(open_array(reference.space.embedding(name), name).shape[1]) for name in names}


def _is_grouped(reference: Reference) -> bool:
    return reference.method in (keys.HARMONY, keys.STATE, keys.NDREAMER_STATE)


def _group_shard(group: Group, reference: Reference) -> Shard:
    names = {keys.HARMONY: {"batch": 2}}.get(reference.method, {"mean": 1, "position": 1})
    folder = f"{GROUP_TERMS}/{keys.block_name(group.code)}"
    files = tuple(f"{keys.EMBEDDING}/{shard_files(f'{folder}/{name}', *[0] * axes)}" for name, axes in names.items())
    return Shard(f"group-{group.code:05d}", files, group)


def _tiles(packed: Packed, group: Group, first: int, last: int, tile_rows: int) -> Iterator[tuple[int, GroupTile]]:
    """Yield the tiles that hold a group's cells `first:last`, each with the number of its first cell in the group."""
    begin = group.start - packed.design.first_row
    for number in range(first // tile_rows, -(-last // tile_rows)):
        start, stop = number * tile_rows, min((number + 1) * tile_rows, group.cells)
        yield start, GroupTile(group, number, packed.rows(begin + start, begin + stop))


def _sum_group(group: Group, storage: Storage, packed: Packed, reference: Reference, tile_rows: int) -> None:
    placer, total = _placer(reference), dict[str, np.ndarray]()
    with threadpool_limits(1):
        for _, tile in _tiles(packed, group, 0, group.cells, tile_rows):
            for name, values in placer.sums(tile).items():
                total[name] = total[name] + values if name in total else values
        terms = placer.terms(total)
    for name, values in terms.items():
        write_array(storage, f"{GROUP_TERMS}/{keys.block_name(group.code)}/{name}", values)


def _terms(storage: Storage, group: Group, reference: Reference) -> dict[str, np.ndarray]:
    if not _is_grouped(reference):
        return {}
    names = ("batch",) if reference.method == keys.HARMONY else ("mean", "position")
    return {name: read_array(storage, f"{GROUP_TERMS}/{keys.block_name(group.code)}/{name}") for name in names}


def _place_block(block: int, storage: Storage, packed: Packed, reference: Reference, tile_rows: int) -> None:
    placer, rows = _placer(reference), packed.rows_of(block)
    out = {name: np.empty((len(rows), width), dtype=np.float32) for name, width in _widths(reference).items()}
    with threadpool_limits(1):
        for group, here in segments(packed.design, rows):
            first, terms = int(rows[here.start]) - group.start, _terms(storage, group, reference)
            last = first + here.stop - here.start
            for start, tile in _tiles(packed, group, first, last, tile_rows):
                a, b = max(start, first), min(start + tile.x.shape[0], last)
                for name, values in placer.place(tile, terms).items():
                    out[name][here.start + a - first : here.start + b - first] = values[a - start : b - start]
    for name, values in out.items():
        write_part(storage, name, slice(*packed.block_range(block)), values)
