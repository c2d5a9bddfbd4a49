"""Write a small run directory as the stages before matching would leave it, without running them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.cells import HeldCells
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.cohort.pack import run_pack
from ndreamer_dist.cohort.packed import Packed, table_bytes
from ndreamer_dist.cohort.source import fingerprint, open_source
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.grouping.small_groups import batch_name, group_name
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import create_array, open_array, write_array

CONDITIONS = ("ctrl", "stim", "sick")


def design_of(sizes, levels):
    """Return the design of groups {(batch level or None, condition): cells}."""
    groups, start = [], 0
    for (batch, condition), cells in sizes.items():
        names = [] if batch is None else [levels[batch]]
        groups.append(
            Group(
                len(groups), group_name(names, CONDITIONS[condition]), condition, batch or 0,
                () if batch is None else (batch,), start, start + cells,
            )
        )  # fmt: skip
        start += cells
    conditions = CONDITIONS[: 1 + max(condition for _, condition in sizes)]
    return Design(
        "condition",
        ("donor",) if levels else (),
        conditions,
        (tuple(levels),) if levels else (),
        tuple(batch_name([level]) for level in levels) if levels else ("",),
        tuple(groups),
    )


def fabricate(folder, sizes, *, levels=("a", "b+c"), genes=37, latent=6, dims=4, seed=0, crowds=0, overrides=None):
    """Write the stores that matching reads; return the arguments of stages: run, settings, packed, source."""
    rng = np.random.default_rng(seed)
    settings = Settings.build(
        overrides={"run.serial": True, "pack.block_rows": 64, "embed.tile_rows": 64, **(overrides or {})}
    )
    design, run, block_rows = design_of(sizes, levels), RunDirectory.at(folder), settings.pack.block_rows
    cells, storage = design.n_cells, run.storage / keys.PACKED
    dense = np.where(rng.random((cells, genes)) < 0.3, rng.gamma(2, size=(cells, genes)), 0).astype(np.float32)
    for block in range(-(-cells // block_rows)):
        part = sparse.csr_matrix(dense[block * block_rows : (block + 1) * block_rows])
        name = f"{keys.PACKED_X}/{keys.block_name(block)}"
        write_array(storage, f"{name}/{keys.DATA}", part.data)
        write_array(storage, f"{name}/{keys.INDICES}", part.indices.astype(np.int32))
        write_array(storage, f"{name}/{keys.INDPTR}", part.indptr.astype(np.int64))
    dropped = 3
    input_rows = rng.permutation(cells + dropped)[:cells]
    write_array(storage, keys.PACKED_INPUT_ROW, input_rows.astype(np.int64))
    _clusters(storage, rng, design)
    gene_names = [f"G{number}" for number in range(genes + 5)]
    selected = np.ones(genes + 5, dtype=bool)
    selected[rng.permutation(genes + 5)[:5]] = False
    run.write_json(keys.DESIGN_JSON, design.to_json())
    table = pd.DataFrame({"name": gene_names, "selected": selected})
    run.storage.write_atomic(keys.GENES_TABLE, table_bytes(table))
    _embedding(run, rng, cells, latent, dims, block_rows, crowds)
    source = _source(rng, design, input_rows, dropped, gene_names)
    return SimpleNamespace(
        run=run, settings=settings, design=design, packed=Packed.open(run, block_rows), source=source, dense=dense,
        summary={"dropped": {"empty": 3}, "stage": "fabricated"},
    )  # fmt: skip


def from_cohort(folder, adata, settings, *, latent=6, dims=4, seed=0):
    """Run the stages that read a cohort and fabricate the embedding; return the arguments of stages."""
    rng = np.random.default_rng(seed)
    source, runtime = open_source(adata, layer=settings.cohort.layer), SerialRuntime(settings.run)
    told = fingerprint(source, settings.cohort.condition_key, settings.cohort.batch_key)
    run, key = RunDirectory.at(folder), stage_keys(settings, told)
    run_cohort(run, settings, source, runtime, key[keys.STAGE_COHORT])
    packed = run_pack(run, settings, source, runtime, key[keys.STAGE_PACK])
    _clusters(packed.storage, rng, packed.design)
    _embedding(run, rng, packed.n_rows, latent, dims, packed.block_rows, 0)
    summary = {**run.read_json(keys.COHORT_SUMMARY), "input": told}
    return SimpleNamespace(
        run=run, settings=settings, design=packed.design, packed=packed, source=source, summary=summary
    )


def _clusters(storage, rng, design):
    for group in design.groups:
        for level, count in ((keys.PACKED_LOW, 3), (keys.PACKED_HIGH, 9)):
            labels = rng.integers(count, size=group.cells).astype(np.int32)
            write_array(storage, f"{level}/{keys.block_name(group.code)}", labels)


def _embedding(run, rng, cells, latent, dims, block_rows, crowds):
    storage = run.storage / keys.EMBEDDING
    points = rng.normal(size=(cells, dims)).astype(np.float32)
    if crowds:
        centres = points[:crowds]
        points = centres[rng.integers(crowds, size=cells)] + rng.choice([0, 1e-6], size=(cells, 1)).astype(np.float32)
    for name, values in ((keys.MU, rng.normal(size=(cells, latent))), (keys.PCA, points)):
        create_array(storage, name, shape=values.shape, dtype="float32", chunks=(block_rows, values.shape[1]))
        open_array(storage, name, mode="r+")[...] = values.astype(np.float32)


def _source(rng, design, input_rows, dropped, gene_names):
    cells = design.n_cells
    total = cells + dropped
    names = np.array([f"cell-{number}" for number in range(total)], dtype=object)
    condition = np.full(total, "other", dtype=object)
    condition[input_rows] = np.array(design.conditions, dtype=object)[
        design.group_conditions[design.group_of(np.arange(cells))]
    ]
    flags = rng.random(total) < 0.5
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(condition),
            "kind": pd.Categorical(rng.choice(["B cell", "T cell", "NK"], size=total)),
            "maybe": pd.Categorical(np.where(flags, "yes", None)),
            "ordered": pd.Categorical(rng.integers(3, size=total), ordered=True),
            "text": rng.choice(["x", "y/z", ""], size=total).astype(object),
            "missing": pd.array(np.where(flags, "word", None), dtype="string"),
            "age": pd.array(np.where(flags, 7, 3), dtype="Int64"),
            "flag": flags,
            "never": np.zeros(total, dtype=bool),
            "perhaps": pd.array(np.where(flags, True, None), dtype="boolean"),
            "count": rng.integers(9, size=total),
            "score": np.where(flags, rng.normal(size=total), np.nan),
        },
        index=pd.Index(names, name="barcode"),
    )
    obs.loc[obs.index[:2], "age"] = pd.NA
    var = pd.DataFrame({"length": np.arange(len(gene_names))}, index=pd.Index(gene_names))
    return SimpleNamespace(
        obs=obs, cells=HeldCells(obs), var=var, cell_names=names, gene_names=np.array(gene_names, dtype=object)
    )
