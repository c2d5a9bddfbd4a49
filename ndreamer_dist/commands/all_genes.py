"""Effects of all genes of a cohort, selected or not, as a separate store (METHOD section 6).

Input: the results of a finished run and its cohort. Output: a directory whose results.zarr has the layout of the run's
own, with every gene. Nothing is trained or searched again: the matches of the run serve all genes. The cohort is read
once, in row order, and packed. Tasks then compute the effects of a row block, one span of genes after the other. An
interrupted command continues with the missing shards.
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

COHORT_FILES = (keys.DESIGN_JSON, keys.GENES_TABLE, keys.CELLS_TABLE, keys.COHORT_SUMMARY)
"""Files of the cohort stage that the later stages need."""


def all_genes(
    run: str | os.PathLike[str] | Results,
    cohort: Cohort,
    *,
    out: str | os.PathLike[str],
    layers: Sequence[str] = (keys.LAYER_ITE,),
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """Write the effects on every gene of a cohort, from the matches of a finished run (METHOD section 6).

    Parameters
    ----------
    run
        Results of the run, or the address of its directory or results.zarr. It is only read.
    cohort
        (cells, genes) input of the run: an AnnData, or the path or URL of an h5ad file or a zarr store.
    out
        Directory to write, local or on object storage; read it with `open_results`.
    layers
        Which of `denoised`, `batch_effect` and `ite` to store; the others are computed on demand.
    settings
        Dotted settings that do not affect the results, such as `{"run.cpus": 8}`.

    Raises
    ------
    CohortError
        The cohort is not that of the run.
    RunError
        The directory holds something else, another process is working on it, or a setting would change the results.
    ResourceError
        Memory or disk do not suffice.
    StoreError
        The results are damaged, or were packed by another version.
    """
    origin = run if isinstance(run, Results) else open_results(run)
    expression = given_expression(cohort, origin.uns, origin.packed_obs)
    resolved = _settings(origin, layers, settings or {})
    resolved = runtime_choice(resolved, origin.design.n_cells).applied(resolved)
    origin.refuse_damaged()
    directory, key = RunDirectory.at(out), _key(origin, resolved)
    _check_owner(directory, origin, key)
    if _is_finished(directory, key):
        return open_results(out)
    if not on_a_cluster(resolved.run):
        _check_machine(directory, resolved, expression)
    with directory.locked(), choose_runtime(resolved.run) as runtime:
        directory.write_json(keys.WIDE_JSON, {"of": origin.url, "key": key})
        _prepare_cohort(directory, origin, expression, key)
        packed = run_pack(directory, resolved, expression.source, runtime, key)
        if not np.array_equal(packed.input_row, expression.input_row):
            msg = f"{origin.url} was packed by another version; run it again to make effects of all genes from it"
            raise StoreError(msg)
        _write(StageRun(directory, keys.STAGE_EFFECTS, key), packed, origin, expression, resolved, runtime)
        directory.storage.delete(keys.PACKED)
    return open_results(out)


@dataclass(frozen=True)
class ResultsOrigin:
    """Source of matches and coordinates for the tasks of the effects stage: finished results. See `effects.Origin`.

    Attributes
    ----------
    storage
        The results.zarr.
    counterparts
        Matches of its cells.
    neighbours
        Number k of matches per group that the layers need; results.zarr itself holds one.
    stored
        Pairs of groups whose matches `obsm` needs; none, since `obsm` is copied.
    """

    storage: Storage
    counterparts: Counterparts
    neighbours: int
    stored: tuple[tuple[int, int], ...] = ()

    def edges(self, rows: np.ndarray, pairs: Iterable[tuple[int, int]]) -> Edges:
        """See `effects.Origin.edges`; a cell needs no match in its own group."""
        others = [(query, target) for query, target in pairs if query != target]
        return self.counterparts.edges(rows, others, distances=self.neighbours > 1, neighbours=self.neighbours)

    def obsm(self, name: str, rows: np.ndarray, edges: Edges) -> np.ndarray:
        """See `effects.Origin.obsm`."""
        del edges
        return read_array(self.storage, f"obsm/{name}", slice(int(rows[0]), int(rows[-1]) + 1))


def _settings(origin: Results, layers: Sequence[str], how: Mapping[str, Any]) -> Settings:
    """Return the settings of the run with other layers, and with changes that do not affect the results."""
    before = json.loads(origin.uns["settings"])
    overrides = {"seed": origin.uns["seed"], "effects.store": tuple(layers), **how}
    settings = Settings.build(config=before, overrides=overrides)
    changed = [] if settings.seed == int(origin.uns["seed"]) else ["seed"]
    changed += [
        f"{stage}.{name}"
        for stage, fields in before.items()
        for name, value in getattr(settings, stage).bearing().items()
        if value != fields.get(name, value) and (stage, name) != ("effects", "store")
    ]
    if changed:
        msg = f"{', '.join(changed)} would change the results; only settings that say how to work can be given here"
        raise RunError(msg)
    return settings


def _key(origin: Results, settings: Settings) -> str:
    content = {
        "format": keys.FORMAT_VERSION,
        "of": origin.uns["key"],
        "settings": {part: getattr(settings, part).bearing() for part in ("pack", "match", "denoise", "effects")},
        "shard_genes": tables.SHARD_GENES,
    }
    return digest(canonical_json(content).encode())


def _check_owner(directory: RunDirectory, origin: Results, key: str) -> None:
    """Refuse a directory that holds files of another command, run or selection of layers."""
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
    """Return whether the driver's last marker and all files that the markers list are there."""
    markers = directory.storage.list(f"{keys.DONE}/{keys.STAGE_EFFECTS}")
    shards = [Shard(PurePath(name).stem, tuple(directory.read_json(name)["files"])) for name in markers]
    closed = any(shard.name == tables.DRIVER_SHARD for shard in shards)
    return closed and not directory.pending(keys.STAGE_EFFECTS, key, shards)


def _check_machine(directory: RunDirectory, settings: Settings, expression: GivenExpression) -> None:
    """Raise `ResourceError` if memory or disk do not suffice."""
    run = settings.run
    needs = memory.all_genes_needs(
        len(expression.input_row), expression.source.n_genes, expression.density, settings,
        cpus=1 if run.serial else run.cpus or cpu_count(),
        object_store=0 if run.serial else object_store_bytes(run),
    )  # fmt: skip
    own = run.memory_gb
    allowed = Allowance(int(own * 1e9), "run.memory_gb") if own else memory_allowance()
    check_resources(needs, memory=allowed, disk=directory.free_disk(), where=directory.url)


def _prepare_cohort(directory: RunDirectory, origin: Results, expression: GivenExpression, key: str) -> None:
    """Write the output of the cohort stage with every gene selected."""
    design, source = origin.design, expression.source
    totals = np.zeros(len(expression.input_row)) if expression.totals is None else expression.totals
    order = np.argsort(expression.input_row, kind="stable")
    cells = frame_of_cells(expression.input_row[order], design.group_of(order), totals[order])
    genes = pd.DataFrame({"name": source.gene_names.to_numpy(dtype=object), "selected": True})
    directory.write_json(keys.DESIGN_JSON, design.to_json())
    digests = write_tables(directory, {keys.GENES_TABLE: genes, keys.CELLS_TABLE: cells})
    directory.write_json(keys.COHORT_SUMMARY, {"normalise": "none" if expression.totals is None else "counts"})
    directory.mark(keys.STAGE_COHORT, key, Shard("all", COHORT_FILES), digests)


def _write(
    stage: StageRun,
    packed: Packed,
    origin: Results,
    expression: GivenExpression,
    settings: Settings,
    runtime: Runtime,
) -> None:
    """Write the missing shards of results.zarr, and close it."""
    cells = CellTable(HeldCells(origin.packed_obs), np.arange(packed.n_rows), {})
    obsm = [name for name in keys.OBSM if origin.storage.exists(f"obsm/{name}/zarr.json")]
    layout = tables.layout_with(
        settings, packed, {name: int(open_array(origin.storage, f"obsm/{name}").shape[1]) for name in obsm}
    )
    todo = tables.begin(stage, layout)
    denoised = settings.denoise.counted(packed.design.fewest_groups)
    neighbours = [settings.match.neighbours if name == keys.LAYER_ITE else denoised for name in layout.layers]
    from_results = ResultsOrigin(origin.storage, origin.counterparts, max(neighbours, default=1))
    write_shards(stage, Target(stage.run, packed, layout, settings, from_results), runtime, todo)
    own = tables.facts(settings, packed, layout, stage.key, {})
    rest = {name: _plain(value) for name, value in origin.uns.items() if name not in own}
    genes = tables.gene_table(expression.source, packed)
    genes[keys.VAR_MODELLED] = genes.index.isin(origin.var_names)
    facts = tables.facts(settings, packed, layout, stage.key, rest)
    tables.finish_store(stage, packed, layout, cells.files(), genes, facts)


def _plain(value: Any) -> Any:
    """Return a value of `uns` with numpy types converted to Python's."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
