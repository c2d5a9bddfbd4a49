"""Effects of all genes of a cohort, selected or not, as a separate store (METHOD section 6).

Input: the results of a finished run and the cohort of that run. Output: a directory whose results.zarr has the layout of
the run's own, with every gene. Nothing is trained or searched again: the matches of the run serve all genes. The cohort
is read once, in row order, and packed. Effects follow by row block, and inside a block by span of genes. An interrupted
command continues shard by shard.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

from ndreamer_dist import keys
from ndreamer_dist.cohort.cells import HeldCells
from ndreamer_dist.cohort.pack import run_pack
from ndreamer_dist.cohort.packed import Packed, write_tables
from ndreamer_dist.cohort.statistics import frame_of_cells
from ndreamer_dist.compute.executor import Runtime, choose_runtime, runtime_choice
from ndreamer_dist.compute.local_ray import object_store_bytes, on_a_cluster
from ndreamer_dist.compute.machine import Allowance, check_resources, cpu_count, memory_allowance
from ndreamer_dist.effects import tables
from ndreamer_dist.effects.averages import Edges
from ndreamer_dist.effects.cells import CellTable
from ndreamer_dist.effects.stage import Target, write_shards
from ndreamer_dist.errors import RunError, StoreError
from ndreamer_dist.planning import memory
from ndreamer_dist.results.cohort import Cohort, GivenExpression, given_expression
from ndreamer_dist.results.on_demand import Counterparts
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings, canonical_json
from ndreamer_dist.stats.results import Results, open_results
from ndreamer_dist.storage.arrays import open_array, read_array
from ndreamer_dist.storage.checksums import digest
from ndreamer_dist.storage.files import Storage

logger = logging.getLogger(__name__)

CARRIED_FILES = (keys.DESIGN_JSON, keys.GENES_TABLE, keys.CELLS_TABLE, keys.COHORT_SUMMARY)


def all_genes(
    run: str | os.PathLike[str] | Results,
    cohort: Cohort,
    *,
    out: str | os.PathLike[str],
    layers: Sequence[str] = (keys.LAYER_ITE,),
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """Write the effects of every gene of a cohort, through the matches of a finished run (METHOD section 6).

    Parameters
    ----------
    run
        Results of the run, or the address of its directory or results.zarr. Nothing in it is changed.
    cohort
        (cells, genes) what the run was given: an AnnData, or the path or URL of an h5ad file or a zarr store.
    out
        Directory to write, local or on object storage; read it with `open_results`.
    layers
        Which of `denoised`, `batch_effect` and `ite` to store; the others are computed when they are asked for.
    settings
        Dotted settings that say how to work: `{"run.cpus": 8}`.

    Raises
    ------
    CohortError
        The cohort is not the one of the run.
    RunError
        The directory holds something else, or is being worked on.
    ResourceError
        Memory or disk will not do.
    """
    origin = run if isinstance(run, Results) else open_results(run)
    given = given_expression(cohort, origin.uns, origin.packed_obs)
    made = _settings(origin, layers, settings or {})
    made = runtime_choice(made, origin.design.n_cells).applied(made)
    origin.refuse_damaged()
    directory, key = RunDirectory.at(out), _key(origin, made)
    _check_owner(directory, origin, key)
    if _is_finished(directory, key):
        return open_results(out)
    if not on_a_cluster(made.run):
        _check_machine(directory, made, given)
    with directory.locked(), choose_runtime(made.run) as runtime:
        directory.write_json(keys.WIDE_JSON, {"of": origin.url, "key": key})
        _prepare_cohort(directory, origin, given, key)
        packed = run_pack(directory, made, given.source, runtime, key)
        if not np.array_equal(packed.input_row, given.input_row):
            msg = f"{origin.url} was packed by another version; run it again to make effects of all genes from it"
            raise StoreError(msg)
        _write(StageRun(directory, keys.STAGE_EFFECTS, key), packed, origin, given, made, runtime)
        directory.storage.delete(keys.PACKED)
    return open_results(out)


@dataclass(frozen=True)
class ResultsOrigin:
    """Where the tasks find matches and coordinates: in finished results. See `effects.Origin`.

    Attributes
    ----------
    neighbours
        Matches of a cell in a group that the layers need; one is in results.zarr itself.
    """

    storage: Storage
    counterparts: Counterparts
    neighbours: int
    stored: tuple[tuple[int, int], ...] = ()

    def edges(self, rows: np.ndarray, pairs: Iterable[tuple[int, int]]) -> Edges:
        """See `effects.Origin.edges`; in its own group a cell needs no match."""
        others = [(query, target) for query, target in pairs if query != target]
        return self.counterparts.edges(rows, others, distances=self.neighbours > 1, neighbours=self.neighbours)

    def obsm(self, name: str, rows: np.ndarray, edges: Edges) -> np.ndarray:
        """See `effects.Origin.obsm`."""
        del edges
        return read_array(self.storage, f"obsm/{name}", slice(int(rows[0]), int(rows[-1]) + 1))


def _settings(origin: Results, layers: Sequence[str], how: Mapping[str, Any]) -> Settings:
    """Return the run's settings with the layers asked for, and what says how to work."""
    told = json.loads(origin.uns["settings"])
    overrides = {"seed": origin.uns["seed"], "effects.store": tuple(layers), **how}
    made = Settings.build(config=told, overrides=overrides)
    changed = [
        f"{stage}.{name}"
        for stage, fields in told.items()
        for name, value in getattr(made, stage).bearing().items()
        if value != fields.get(name, value) and (stage, name) != ("effects", "store")
    ]
    if changed:
        msg = f"{', '.join(changed)} bears on the run's results and stays as it was; only how to work can be set here"
        raise RunError(msg)
    return made


def _key(origin: Results, made: Settings) -> str:
    content = {
        "format": keys.FORMAT_VERSION,
        "of": origin.uns["key"],
        "settings": {part: getattr(made, part).bearing() for part in ("pack", "match", "denoise", "effects")},
        "shard_genes": tables.SHARD_GENES,
    }
    return digest(canonical_json(content).encode())


def _check_owner(directory: RunDirectory, origin: Results, key: str) -> None:
    """Refuse a directory that holds anything else."""
    if not directory.storage.exists() or all(name.startswith(keys.LOCK) for name in directory.storage.list()):
        return
    if not directory.storage.exists(keys.WIDE_JSON):
        msg = f"{directory.url} holds files that are not effects of all genes; choose another --out"
        raise RunError(msg)
    if directory.read_json(keys.WIDE_JSON)["key"] != key:
        msg = (
            f"{directory.url} holds effects of all genes of another run than {origin.url}, or other layers of them; "
            "choose another --out, or delete it"
        )
        raise RunError(msg)


def _is_finished(directory: RunDirectory, key: str) -> bool:
    """Return whether every shard is there; which files these are, the markers say."""
    markers = directory.storage.list(f"{keys.DONE}/{keys.STAGE_EFFECTS}")
    shards = [Shard(PurePath(name).stem, tuple(directory.read_json(name)["files"])) for name in markers]
    closed = any(shard.name == tables.DRIVER_SHARD for shard in shards)
    return closed and not directory.pending(keys.STAGE_EFFECTS, key, shards)


def _check_machine(directory: RunDirectory, made: Settings, given: GivenExpression) -> None:
    """Refuse what memory or disk will not hold."""
    needs = memory.all_genes_needs(
        len(given.input_row), given.source.n_genes, given.density, made,
        cpus=1 if made.run.serial else made.run.cpus or cpu_count(),
        object_store=0 if made.run.serial else object_store_bytes(made.run),
    )  # fmt: skip
    own = made.run.memory_gb
    allowed = Allowance(int(own * 1e9), "run.memory_gb") if own else memory_allowance()
    check_resources(needs, memory=allowed, disk=directory.free_disk(), where=directory.url)


def _prepare_cohort(directory: RunDirectory, origin: Results, given: GivenExpression, key: str) -> None:
    """Write what the cohort stage would have written, with every gene selected."""
    design, source = origin.design, given.source
    totals = np.zeros(len(given.input_row)) if given.totals is None else given.totals
    order = np.argsort(given.input_row, kind="stable")
    cells = frame_of_cells(given.input_row[order], design.group_of(order), totals[order])
    genes = pd.DataFrame({"name": source.gene_names.to_numpy(dtype=object), "selected": True})
    directory.write_json(keys.DESIGN_JSON, design.to_json())
    digests = write_tables(directory, {keys.GENES_TABLE: genes, keys.CELLS_TABLE: cells})
    directory.write_json(keys.COHORT_SUMMARY, {"normalise": "none" if given.totals is None else "counts"})
    directory.mark(keys.STAGE_COHORT, key, Shard("all", CARRIED_FILES), digests)


def _write(
    stage: StageRun,
    packed: Packed,
    origin: Results,
    given: GivenExpression,
    made: Settings,
    runtime: Runtime,
) -> None:
    """Write results.zarr, or what is missing of it."""
    cells = CellTable(HeldCells(origin.packed_obs), np.arange(packed.n_rows), {})
    obsm = [name for name in keys.OBSM if origin.storage.exists(f"obsm/{name}/zarr.json")]
    layout = tables.layout_with(
        made, packed, {name: int(open_array(origin.storage, f"obsm/{name}").shape[1]) for name in obsm}
    )
    todo = tables.begin(stage, layout)
    denoised = made.denoise.counted(packed.design.fewest_groups)
    counted = [made.match.neighbours if name == keys.LAYER_ITE else denoised for name in layout.layers]
    from_results = ResultsOrigin(origin.storage, origin.counterparts, max(counted, default=1))
    write_shards(stage, Target(stage.run, packed, layout, made, from_results), runtime, todo)
    ours = tables.facts(made, packed, layout, stage.key, {})
    rest = {name: _plain(value) for name, value in origin.uns.items() if name not in ours}
    genes = tables.gene_table(given.source, packed)
    genes[keys.VAR_MODELLED] = genes.index.isin(origin.var_names)
    told = tables.facts(made, packed, layout, stage.key, rest)
    tables.finish_store(stage, packed, layout, cells.files(), genes, told)


def _plain(value: Any) -> Any:
    """Return a value of `uns` as `finish` takes it: numpy's as Python's own."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
