"""Compare chunk shapes and codecs for a layer: size, speed of writing and reading, and the error of rounding.

    python jobs/benchmark_layout.py [--results DIR] [--layer ite] [--blocks 4] [--repeats 3]

The values are the first blocks of a layer of some results, or by default averages of sparse log-normalised cells over donors, as
in `benchmark_retrieval.py`. Each row is one layout; a block is a shard of 4096 cells by all genes. The output holds bits per
value; MB written per second; milliseconds to read one gene, and ten genes, of a block; MB per second of reading a whole block;
the bytes read for one gene of 200 000 cells; and the largest and mean absolute error of rounding. Times are processor time over
all threads, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from benchmark_retrieval import BASE_CELLS, average, expression
from zarr.codecs import BloscCodec, Crc32cCodec

from ndreamer_dist.effects.rounding import rounded
from ndreamer_dist.results.read import read_dense
from ndreamer_dist.stats.results import open_results
from ndreamer_dist.storage.arrays import read_array
from ndreamer_dist.storage.files import open_storage

ROWS = 4096
CELLS = 200_000
CODECS = {
    "lz4 shuffle": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "lz4 bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "zstd1 shuffle": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"),
    "zstd1 bitshuffle": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "zstd3 shuffle": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


@dataclass(frozen=True)
class Way:
    """A layout of a layer."""

    rows: int = ROWS
    genes: int = 32
    codec: str = "lz4 shuffle"
    keep_bits: int | None = None

    def __str__(self) -> str:
        return f"{self.rows:>4} x {self.genes:<4} {self.codec:17} {self.keep_bits or 'all':>3} bits"


WAYS = (
    *(Way(genes=genes) for genes in (8, 16, 32, 64, 128)),
    *(Way(rows=rows, genes=genes) for rows, genes in ((1024, 32), (2048, 16), (2048, 32), (2048, 64))),
    *(Way(codec=codec) for codec in CODECS if codec != "lz4 shuffle"),
    *(Way(keep_bits=bits) for bits in (12, 10, 8, 6)),
    *(Way(keep_bits=bits, codec="zstd1 shuffle") for bits in (10, 8)),
)


def main() -> None:
    """Measure every layout on every block."""
    given = arguments()
    blocks = list(values(given))
    print(f"{len(blocks)} blocks of {blocks[0].shape}, {np.mean(blocks[0] == 0):.0%} of the values 0")
    print(f"{'':47}bits   write   1 gene  10 genes    read  200k cells  largest   mean error")
    for way in WAYS:
        print(measured(way, blocks, given.repeats), flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", help="run directory or results.zarr")
    parser.add_argument("--layer", default="denoised")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def values(given: argparse.Namespace) -> Iterator[np.ndarray]:
    """Yield the blocks to store: (4096, genes) float32 each."""
    if given.results:
        storage = open_results(given.results).storage
        for block in range(given.blocks):
            yield read_array(storage, f"layers/{given.layer}", slice(block * ROWS, (block + 1) * ROWS))
        return
    rng = np.random.default_rng(0)
    base = expression(rng, BASE_CELLS, 2000)
    for _ in range(given.blocks):
        own, control = average(rng, base, ROWS), average(rng, base, ROWS)
        yield own - control if given.layer == "ite" else own


def measured(way: Way, blocks: list[np.ndarray], repeats: int) -> str:
    """Write and read the blocks in one layout; return a row of the table."""
    rows, genes = sum(map(len, blocks)), blocks[0].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        array = zarr.create_array(
            storage.store("x"), shape=(rows, genes), dtype="float32", chunks=(way.rows, way.genes),
            shards=(ROWS, -(-genes // way.genes) * way.genes), compressors=(CODECS[way.codec], Crc32cCodec()),
        )  # fmt: skip
        began = time.process_time()
        for number, block in enumerate(blocks):
            array[number * ROWS : number * ROWS + len(block)] = rounded(block, way.keep_bits)
        written = time.process_time() - began
        size = sum(path.stat().st_size for path in Path(folder, "x/c").rglob("*") if path.is_file())
        every, some = np.arange(rows), np.linspace(0, genes - 1, 10).astype(int)
        one = best(lambda: read_dense(storage, "x", every, np.array([genes // 2])), repeats)
        ten = best(lambda: read_dense(storage, "x", every, some), repeats)
        whole = best(lambda: read_array(storage, "x"), repeats)
        errors = [np.abs(block - rounded(block, way.keep_bits)) for block in blocks]
    dense, count = rows * genes * 4 / 1e6, len(blocks)
    return (
        f"{way}  {size * 8 / (rows * genes):6.2f} {dense / written:5.0f}/s {one / count * 1e3:5.1f} ms"
        f" {ten / count * 1e3:6.1f} ms {dense / whole:6.0f}/s {size / rows / genes * way.genes * CELLS / 1e6:7.1f} MB"
        f"  {np.nanmax(errors):.1e}  {np.nanmean(errors):.1e}"
    )


def best(work: Callable[[], object], repeats: int) -> float:
    """Return the shortest of some processor times, in seconds."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    main()
