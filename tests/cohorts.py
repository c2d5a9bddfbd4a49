"""Small packed cohorts for tests, written as the cohort stages would write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group
from ndreamer_dist.cohort.packed import Packed, table_bytes
from ndreamer_dist.grouping.small_groups import group_name
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.storage.arrays import write_array


def design_of(cells: Sequence[int], conditions: int = 2) -> Design:
    """Return a design with these group sizes: group i is batch i // conditions under condition i % conditions."""
    names = tuple(["control", "treated", "other"][:conditions])
    batches = tuple(f"donor{b}" for b in range(-(-len(cells) // conditions)))
    starts = np.concatenate([[0], np.cumsum(cells)])
    groups = tuple(
        Group(
            code=i,
            name=group_name([batches[i // conditions]], names[i % conditions]),
            condition=i % conditions,
            batch=i // conditions,
            batch_codes=(i // conditions,),
            start=int(starts[i]),
            stop=int(starts[i + 1]),
        )
        for i in range(len(cells))
    )
    return Design("condition", ("donor",), names, (batches,), batches, groups)


def packed_cohort(
    folder: Path, *, cells: Sequence[int], genes: int, block_rows: int, seed: int = 0, conditions: int = 2
) -> Packed:
    """Write packed.zarr and what it needs below `folder`, of random sparse values, and open it."""
    rng = np.random.default_rng(seed)
    run, design = RunDirectory.at(folder), design_of(cells, conditions)
    x = sparse.random(design.n_cells, genes, 0.3, format="csr", dtype=np.float32, random_state=seed)
    x.data = np.log1p(np.ceil(x.data * 5)).astype(np.float32)
    run.write_json(keys.DESIGN_JSON, design.to_json())
    table = pd.DataFrame({"name": [f"gene{g}" for g in range(genes)], "selected": True})
    run.storage.write_atomic(keys.GENES_TABLE, table_bytes(table))
    store = run.storage / keys.PACKED
    for block, start in enumerate(range(0, design.n_cells, block_rows)):
        part = x[start : start + block_rows]
        part.sort_indices()
        name = f"{keys.PACKED_X}/{keys.block_name(block)}"
        write_array(store, f"{name}/{keys.DATA}", part.data)
        write_array(store, f"{name}/{keys.INDICES}", part.indices.astype(np.int32))
        write_array(store, f"{name}/{keys.INDPTR}", part.indptr.astype(np.int64))
    write_array(store, keys.PACKED_INPUT_ROW, rng.permutation(design.n_cells))
    for group in design.groups:
        for level, kinds in ((keys.PACKED_LOW, 3), (keys.PACKED_HIGH, 9)):
            labels = rng.integers(kinds, size=group.cells, dtype=np.int32)
            write_array(store, f"{level}/{keys.block_name(group.code)}", labels)
    return Packed.open(run, block_rows)
