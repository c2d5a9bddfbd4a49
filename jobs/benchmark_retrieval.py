"""Measure queries to a large results.zarr: seconds, bytes and requests, from disk, over HTTP and over S3.

    python jobs/benchmark_retrieval.py --folder /tmp/retrieval [--cells 200000] [--genes 2000] [--places local http s3]
        [--set effects.chunk_genes=16 --set effects.keep_bits=10]

The package's writers write a store to the folder once: donors crossed with two conditions, and layers that are averages of
sparse log-normalised cells. Every place then answers three queries: one gene of all cells, one donor over all genes, ten genes
of one cell type. The output holds seconds (wall; processor) with a newly opened store and with its tables already read, bytes and
requests counted at the store, and the ratio of the bytes to those of the touched chunks and shard indexes. HTTP is this
repository's server with byte ranges and Python's static server without them; S3 is moto. All servers are separate processes on
loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.cells import HeldCells
from ndreamer_dist.cohort.design import Design, Group, batch_name, group_name
from ndreamer_dist.cohort.packed import Packed, table_bytes, write_csr
from ndreamer_dist.effects import tables
from ndreamer_dist.effects.cells import cell_table
from ndreamer_dist.effects.rounding import rounded
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings, parse_assignments
from ndreamer_dist.stats.results import Results, open_results
from ndreamer_dist.storage.arrays import create_array, write_array
from ndreamer_dist.storage.shards import counting

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.servers import S3_ENVIRONMENT

DONORS = 8
CONDITIONS = ("control", "stimulated")
CELL_TYPES = 12
BASE_CELLS = 4096
KEY = "benchmark"


def main() -> None:
    """Write the store if it does not exist, and run the queries."""
    given = arguments()
    folder = given.folder.absolute()
    if not (folder / keys.RESULTS / tables.ROOT).exists():
        settings = Settings.build(overrides={"effects.store": "denoised,ite", **parse_assignments(given.set)})
        make(folder, given.cells, given.genes, settings)
    print(f"{given.cells} cells x {given.genes} genes; load {os.getloadavg()[0]:.1f}")
    for place in given.places:
        with PLACES[place](folder) as address:
            ask(place, address)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["local", "http", "s3"])
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.NAME=VALUE")
    return parser.parse_args()


# --- the questions ---------------------------------------------------------------------------------------------------


def questions(results: Results) -> dict[str, Callable[[], Any]]:
    """Return the three queries by name."""
    genes = list(results.var_names)
    ten = [genes[place] for place in np.linspace(0, len(genes) - 1, 10).astype(int)]
    return {
        "one gene, all cells": lambda: results.denoised(genes=[genes[len(genes) // 2]]),
        "one gene, effects": lambda: results.ite(genes=[genes[len(genes) // 2]]),
        "one donor, all genes": lambda: results.denoised(cells='donor == "donor-3"'),
        "ten genes, one type": lambda: results.denoised(cells='cell_type == "type-5"', genes=ten),
    }


def ask(place: str, address: str) -> None:
    """Run every query twice, on a newly opened store and with its tables read, and print both."""
    names = list(questions(open_results(address)))
    for name in names:
        opened = timed(lambda name=name: questions(open_results(address))[name]())
        results = open_results(address)
        _ = results.obs, results.var, results.design, results.layers
        asked = min((timed(questions(results)[name]) for _ in range(3)), key=lambda taken: taken.wall)
        reads = asked.reads
        print(
            f"{place:10} {name:22} {asked.shape[0]:>7} x {asked.shape[1]:<5}"
            f" {asked.wall:6.2f} s ({asked.cpu:5.2f} cpu) {reads.bytes / 1e6:8.1f} MB {reads.requests:5} requests"
            f" {reads.bytes / reads.touched:6.3f} x touched | opened and asked {opened.wall:6.2f} s"
            f" ({opened.cpu:5.2f} cpu) {opened.reads.bytes / 1e6:8.1f} MB {opened.reads.requests:5} requests",
            flush=True,
        )


def timed(question: Callable[[], Any]) -> SimpleNamespace:
    """Run one query; return its times, bytes and requests."""
    wall, cpu = time.perf_counter(), time.process_time()
    with counting() as reads:
        answer = question()
    return SimpleNamespace(
        wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, reads=reads, shape=answer.shape
    )


# --- the places ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def local(folder: Path) -> Iterator[str]:
    """Yield the folder itself."""
    yield str(folder)


@contextlib.contextmanager
def http(folder: Path, kind: str = "ranges") -> Iterator[str]:
    """Serve the folder by a web server with byte ranges."""
    with server(kind, str(folder)) as url:
        yield f"{url}/{keys.RESULTS}"


def plain_http(folder: Path) -> contextlib.AbstractContextManager[str]:
    """Serve the folder by Python's static server, which sends whole files."""
    return http(folder, "plain")


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """Serve the tables and one layer by moto's S3."""
    import s3fs

    with server("s3") as url:
        os.environ |= {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": url}
        remote = s3fs.S3FileSystem()
        remote.mkdir("benchmark")
        source = folder / keys.RESULTS
        for path in (source / tables.ROOT, *(source / part for part in ("obs", "var", "uns", "layers"))):
            remote.put(str(path), f"benchmark/{keys.RESULTS}/{path.name}", recursive=path.is_dir())
        yield f"s3://benchmark/{keys.RESULTS}"


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[str]:
    """Run a server as a separate process; yield its address."""
    program = Path(__file__).parent.parent / "tests" / "servers.py"
    command = [sys.executable, str(program), *arguments]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


PLACES: dict[str, Callable[[Path], contextlib.AbstractContextManager[str]]] = {
    "local": local, "http": http, "plain-http": plain_http, "s3": s3,
}  # fmt: skip


# --- the store -------------------------------------------------------------------------------------------------------


def make(folder: Path, cells: int, genes: int, settings: Settings) -> None:
    """Write a run directory's results.zarr, block by block, with values like those of a cohort with donors."""
    rng = np.random.default_rng(0)
    run, design = RunDirectory.at(folder), design_of(cells)
    names = [f"GENE{number:04d}" for number in range(genes)]
    run.write_json(keys.DESIGN_JSON, design.to_json())
    table = pd.DataFrame({"name": names, "selected": np.ones(genes, dtype=bool)})
    run.storage.write_atomic(keys.GENES_TABLE, table_bytes(table))
    packed = Packed.open(run, settings.pack.block_rows)
    base = expression(rng, BASE_CELLS, genes)
    write_packed(rng, packed, base)
    layout = tables.layout_of(run, settings, packed)
    stage = StageRun(run, keys.STAGE_EFFECTS, KEY)
    tables.begin(stage, layout)
    for shard in tables.expression_shards(layout):
        tables.write_expression(shard.task, run, packed, layout)
    for block in range(packed.n_blocks):
        write_block(rng, run, packed, layout, base, block)
        print(f"\rblock {block + 1} of {packed.n_blocks}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    source = source_of(rng, packed)
    table = cell_table(source, packed, {keys.OBS_MATCH_DISTANCE: rng.random(cells, dtype=np.float32)})
    told = tables.facts(settings, packed, layout, stage.key, {})
    tables.finish_store(stage, packed, layout, table.files(), tables.gene_table(source, packed), told)


def expression(rng: np.random.Generator, cells: int, genes: int) -> np.ndarray:
    """Return log-normalised expression of cells of several types, about a tenth of it not 0: (cells, genes) float32."""
    means = rng.gamma(0.3, 1.0, size=(CELL_TYPES, genes))
    share = means[rng.integers(CELL_TYPES, size=cells)] * rng.gamma(2.0, 0.5, size=(cells, genes))
    counts = rng.poisson(1200 * share / share.sum(axis=1, keepdims=True)).astype(np.float32)
    return np.log1p(counts * (1e4 / counts.sum(axis=1, keepdims=True)))


def write_packed(rng: np.random.Generator, packed: Packed, base: np.ndarray) -> None:
    """Write what `finish` and the layout read of packed.zarr and embedding.zarr."""
    rows, storage = packed.n_rows, packed.run.storage
    for block in range(packed.n_blocks):
        start, stop = packed.block_range(block)
        chosen = sparse.csr_matrix(base[rng.integers(len(base), size=stop - start)])
        write_csr(storage / keys.PACKED, f"{keys.PACKED_X}/{keys.block_name(block)}", chosen)
    write_array(storage / keys.PACKED, keys.PACKED_INPUT_ROW, rng.permutation(rows))
    for group in packed.design.groups:
        for level, count in ((keys.PACKED_LOW, 12), (keys.PACKED_HIGH, 60)):
            labels = rng.integers(count, size=group.cells).astype(np.int32)
            write_array(storage / keys.PACKED, f"{level}/{keys.block_name(group.code)}", labels)
    for name, width in ((keys.MU, 256), (keys.PCA, 50)):
        create_array(
            storage / keys.EMBEDDING, name, shape=(rows, width), dtype="float32", chunks=(packed.block_rows, width)
        )


def write_block(
    rng: np.random.Generator,
    run: RunDirectory,
    packed: Packed,
    layout: tables.Layout,
    base: np.ndarray,
    block: int,
) -> None:
    """Write one row block: embeddings and matches at random, layers as averages over donors."""
    start, stop = packed.block_range(block)
    for name, width in layout.obsm.items():
        if name == keys.OBSM_MATCH:
            values: np.ndarray = rng.integers(packed.n_rows, size=(stop - start, width)).astype(layout.row_dtype)
        else:
            values = rng.standard_normal((stop - start, width), dtype=np.float32)
        tables.write_obsm(run, name, start, values)
    own, control = (average(rng, base, stop - start) for _ in CONDITIONS)
    conditions = packed.design.group_conditions[packed.design.group_of(np.arange(start, stop))]
    effects = np.where((conditions == 0)[:, None], np.nan, own - control).astype(np.float32)
    for name, layer in ((keys.LAYER_DENOISED, own), (keys.LAYER_ITE, effects)):
        for span in tables.gene_spans(layout):
            here = layer[:, slice(*span)]
            part = tables.RowPart(block, span)
            tables.write_layer(
                run, name, part, layout, lambda genes, here=here: rounded(here[:, genes], layout.keep_bits)
            )


def average(rng: np.random.Generator, base: np.ndarray, cells: int) -> np.ndarray:
    """Return each cell's mean over one cell per donor: (cells, genes) float32."""
    total = np.zeros((cells, base.shape[1]), dtype=np.float32)
    for _ in range(DONORS):
        total += base[rng.integers(len(base), size=cells)]
    return total / np.float32(DONORS)


def design_of(cells: int) -> Design:
    """Return donors crossed with conditions, in groups of nearly one size."""
    levels = tuple(f"donor-{donor}" for donor in range(DONORS))
    bounds = np.linspace(0, cells, DONORS * len(CONDITIONS) + 1).astype(int).tolist()
    pairs = [(donor, condition) for donor in range(DONORS) for condition in range(len(CONDITIONS))]
    groups = tuple(
        Group(code, group_name([levels[donor]], CONDITIONS[condition]), condition, donor, (donor,), first, last)
        for code, ((donor, condition), first, last) in enumerate(zip(pairs, bounds, bounds[1:], strict=False))
    )
    return Design(
        "condition", ("donor",), CONDITIONS, (levels,), tuple(batch_name([level]) for level in levels), groups
    )


def source_of(rng: np.random.Generator, packed: Packed) -> SimpleNamespace:
    """Return the input cohort's tables: donors, conditions, cell types and the usual columns of an atlas."""
    cells, design, rows = packed.n_rows, packed.design, packed.input_row
    groups = np.empty(cells, dtype=int)
    groups[rows] = design.group_of(np.arange(cells))
    donors = np.array([group.batch for group in design.groups])[groups]
    columns: dict[str, Any] = {
        "condition": pd.Categorical.from_codes(design.group_conditions[groups], list(CONDITIONS)),
        "donor": pd.Categorical.from_codes(donors, list(design.batches)),
        "cell_type": pd.Categorical([f"type-{code}" for code in rng.integers(CELL_TYPES, size=cells)]),
        "n_counts": rng.poisson(4000, size=cells),
        "n_genes": rng.poisson(1500, size=cells),
        "percent_mito": rng.random(cells),
    }
    for number, levels in enumerate((2, 3, 5, 8, 20, 40)):  # sex, assay, site, age and the like, by donor
        by_donor = rng.integers(levels, size=DONORS)
        columns[f"annotation_{number}"] = pd.Categorical.from_codes(
            by_donor[donors], [f"level {level}" for level in range(levels)]
        )
    letters = np.array(list("ACGT"))[rng.integers(4, size=(cells, 16))]
    names = np.array([f"{''.join(word)}-{donor}" for word, donor in zip(letters, donors, strict=True)], dtype=object)
    genes = np.array(packed.genes, dtype=object)
    var = pd.DataFrame({"highly_variable": np.ones(len(genes), dtype=bool)}, index=pd.Index(genes))
    return SimpleNamespace(cells=HeldCells(pd.DataFrame(columns, index=pd.Index(names))), var=var, gene_names=genes)


if __name__ == "__main__":
    main()
