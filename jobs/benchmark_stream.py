"""Measure rows per second from packed.zarr to dense tensors: through Ray Data, directly with zarr, and with scDataset.

    python jobs/benchmark_stream.py --out /tmp/stream [--rows 2000000] [--cells 409600] [--genes 2000] [--repeats 3]

Needs the extra `bench`; with other work on the machine the figures mean little (the load is printed). A cohort of random
log-normalised counts is written once to OUT, as packed.zarr and as an uncompressed h5ad. All methods then deliver `rows` rows
as dense float32 tensors of the same size, in turn, `repeats` times after a round that warms the page cache:

- `ray`: the reader of training (`training/loader.py`), Ray with `cpus` processors, its start-up timed separately;
- `zarr`: the same steps in one process with `cpus` threads, by zarr's API: every touched block is read whole;
- `zarrs`: the same with the codecs of the `zarrs` package instead of zarr's own;
- `own`: the same steps in one process with `cpus` threads, by this package's reader (`training/rows.py`);
- `scdataset`: quasi-random rows of the h5ad through its `DataLoader`, at the best of the settings that its
  documentation names (fetch of 16 mini-batches, one more prefetched) and their neighbours, found first on fewer rows.

The output holds medians, the ratios of `ray` to the others, and with `--memory-cells` the peak memory of the whole process tree
while two cohorts of different size are streamed through Ray.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Design, Group, group_name
from ndreamer_dist.cohort.packed import Packed, table_bytes, write_csr
from ndreamer_dist.compute.executor import choose_runtime
from ndreamer_dist.compute.monitors import PeakMemory
from ndreamer_dist.model.transfer import dense
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import RunSettings
from ndreamer_dist.storage.arrays import write_array
from ndreamer_dist.training.loader import mini_batches
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import read_window, windows

H5AD = "cohort.h5ad"
TRIAL_ROWS = 200_000
"""Rows by which scDataset's settings are compared."""
Batches = Iterable[torch.Tensor]


def main() -> None:
    """Write the cohort, run every method in turn, and print the figures."""
    given = arguments()
    torch.set_num_threads(1)  # the measured readers start their own threads
    packed = cohort(given.out / f"{given.cells}x{given.genes}", given.cells, given)
    plan = plan_of(packed, given.rows, given.batch_size)
    print(f"{packed.n_rows} cells x {packed.n_genes} genes in {packed.n_blocks} blocks; {plan.steps} steps", flush=True)
    with choose_runtime(RunSettings(cpus=given.cpus)) as runtime:
        print(f"Ray with {runtime.cpus} processors", flush=True)
        if given.memory_cells:
            compare_memory(given)
        ways = ways_of(packed, plan, given)
        found: dict[str, list[Speed]] = {name: [] for name in ways}
        for repeat in range(given.repeats + 1):
            for name, way in ways.items():
                speed = measure(way())
                print(f"{'warm' if repeat == 0 else repeat}  {name:10s} {speed}", flush=True)
                if repeat:
                    found[name].append(speed)
    print(summary(found))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the cohorts; kept for the next time")
    parser.add_argument("--rows", type=int, default=2_000_000, help="rows streamed each time, at least")
    parser.add_argument("--cells", type=int, default=409_600)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--density", type=float, default=0.07)
    parser.add_argument("--block-rows", type=int, default=4096)
    parser.add_argument(
        "--batch-size", type=int, default=1024, help="cells per group and epoch; a step has twice as many"
    )
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", default="ray,zarr,zarrs,own,scdataset")
    parser.add_argument(
        "--memory-cells", type=int, nargs=2, metavar=("FEW", "MANY"), help="cohorts to compare memory on"
    )
    return parser.parse_args()


def plan_of(packed: Packed, rows: int, batch_size: int) -> SamplingPlan:
    """Return the plan of as many epochs as give these rows."""
    starts = tuple(packed.design.starts.tolist())
    return SamplingPlan(starts, batch_size, epochs=-(-rows // ((len(starts) - 1) * batch_size)), seed=0)


@dataclass(frozen=True)
class Speed:
    """Times of one run of one method."""

    rows: int
    seconds: float
    first: float  # seconds to the first mini-batch
    load: float

    @property
    def per_second(self) -> float:
        """Rows per second, start-up included."""
        return self.rows / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.per_second:9.0f} rows/s   {self.rows} rows in {self.seconds:.1f} s, the first mini-batch after "
            f"{self.first:.1f} s; load {self.load:.1f}"
        )


def measure(batches: Batches) -> Speed:
    """Take all mini-batches and time them."""
    started, rows, first = time.perf_counter(), 0, 0.0
    for x in batches:
        rows += len(x)
        first = first or time.perf_counter() - started
    return Speed(rows, time.perf_counter() - started, first, os.getloadavg()[0])


def summary(found: dict[str, list[Speed]]) -> str:
    """Return the medians and the ratios of `ray` to the others."""
    median = {name: statistics.median(s.per_second for s in speeds) for name, speeds in found.items() if speeds}
    lines = [f"median {name:10s} {value:9.0f} rows/s" for name, value in median.items()]
    if "ray" in median:
        lines += [f"ray / {name}: {median['ray'] / value:.2f}" for name, value in median.items() if name != "ray"]
    return "\n".join(lines)


def ways_of(packed: Packed, plan: SamplingPlan, given: argparse.Namespace) -> dict[str, Callable[[], Batches]]:
    """Return the chosen methods by name."""
    ways: dict[str, Callable[[], Batches]] = {
        "ray": lambda: (batch.x for batch in mini_batches(packed, plan, (0, 1), 0, "cpu")),
        "zarr": lambda: threaded(lambda steps: zarr_window(packed, plan, steps), windows(plan, 0), given.cpus),
        "zarrs": lambda: with_zarrs(ways["zarr"], given.cpus),
        "own": lambda: threaded(lambda steps: own_window(packed, plan, steps), windows(plan, 0), given.cpus),
    }
    asked = given.ways.split(",")
    if "scdataset" in asked:
        h5ad = write_h5ad(packed)
        best = best_scdataset(h5ad, 2 * given.batch_size, given.cpus)
        ways["scdataset"] = lambda: scdataset(h5ad, best, plan.steps * 2 * given.batch_size)
    return {name: ways[name] for name in asked}


def threaded(read: Callable[[range], list[torch.Tensor]], work: list[range], threads: int) -> Iterator[torch.Tensor]:
    """Read windows in threads, in order, each thread one ahead at most."""
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(read, steps) for steps in work[:threads]]
        for later in [*work[threads:], *[None] * threads][: len(work)]:
            done = pending.pop(0).result()
            if later is not None:
                pending.append(pool.submit(read, later))
            yield from done


def with_zarrs(way: Callable[[], Batches], threads: int) -> Iterator[torch.Tensor]:
    """Take mini-batches while zarr decodes by `zarrs`."""
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": threads}):
        yield from way()


def own_window(packed: Packed, plan: SamplingPlan, steps: range) -> list[torch.Tensor]:
    """Return the steps of a window, dense, by our own reader."""
    return [dense(share.x, "cpu") for share in read_window(packed, plan, steps, 0, 1)]


def zarr_window(packed: Packed, plan: SamplingPlan, steps: range) -> list[torch.Tensor]:
    """Return the steps of a window, dense, by zarr's own calls."""
    rows = [plan.rows(step) for step in steps]
    unique = np.unique(np.concatenate(rows))
    blocks = unique // packed.block_rows
    parts = [zarr_block(packed, b)[unique[blocks == b] - b * packed.block_rows] for b in np.unique(blocks).tolist()]
    window = sparse.vstack(parts, format="csr")
    return [torch.from_numpy(window[np.searchsorted(unique, wanted)].toarray()) for wanted in rows]


def zarr_block(packed: Packed, block: int) -> sparse.csr_matrix:
    """Read one block with zarr alone."""
    folder = f"{packed.storage.path(keys.PACKED_X)}/{keys.block_name(block)}"
    data, indices, indptr = (
        np.asarray(zarr.open_array(f"{folder}/{name}", mode="r")[:]) for name in (keys.DATA, keys.INDICES, keys.INDPTR)
    )
    return sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, packed.n_genes), copy=False)


@dataclass(frozen=True)
class Fetching:
    """scDataset's settings."""

    rows: int  # of a mini-batch
    block: int  # rows that stay together
    factor: int  # mini-batches of a fetch
    workers: int

    def __str__(self) -> str:
        return f"block {self.block}, fetch factor {self.factor}, {self.workers} workers"


def scdataset(h5ad: Path, how: Fetching, rows: int) -> Iterator[torch.Tensor]:
    """Yield dense mini-batches of quasi-random rows, as scDataset's documentation does with AnnData."""
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    dataset = scDataset(
        anndata.read_h5ad(h5ad, backed="r"),
        BlockShuffling(block_size=how.block),
        batch_size=how.rows,
        fetch_factor=how.factor,
        fetch_callback=fetch,
        batch_transform=to_tensor,
        seed=0,
    )
    ahead = how.factor + 1 if how.workers else None
    loader = DataLoader(dataset, batch_size=None, num_workers=how.workers, prefetch_factor=ahead)
    given = 0
    for x in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield x
        given += len(x)
        if given >= rows:
            return


def fetch(cells: anndata.AnnData, rows: np.ndarray) -> sparse.csr_matrix:
    """Return rows of a backed AnnData, still sparse, which is less to cut than dense."""
    return sparse.csr_matrix(cells.X[rows])


def to_tensor(rows: sparse.csr_matrix) -> torch.Tensor:
    """Return a mini-batch, dense."""
    return torch.from_numpy(rows.toarray())


def best_scdataset(h5ad: Path, rows: int, cpus: int) -> Fetching:
    """Return the fastest settings of scDataset, and print the speed of each."""
    found: dict[Fetching, float] = {}
    for workers, block, factor in itertools.product(range(cpus + 1), (32, 1024), (4, 16)):
        how = Fetching(rows, block, factor, workers)
        found[how] = measure(scdataset(h5ad, how, TRIAL_ROWS)).per_second
        print(f"scdataset, {how}: {found[how]:.0f} rows/s", flush=True)
    return max(found, key=found.__getitem__)


def compare_memory(given: argparse.Namespace) -> None:
    """Print the peak memory of the process tree while a small and a large cohort are streamed."""
    few, many = given.memory_cells
    for cells in (few, few, many):  # the first time warms: readers start, and the object store's pages are touched
        packed = cohort(given.out / f"{cells}x{given.genes}", cells, given)
        plan = plan_of(packed, given.rows // 4, given.batch_size)
        readers, peak = ReaderMemory(), PeakMemory()
        speed = measure(batch.x for batch in mini_batches(packed, plan, (0, 1), 0, "cpu"))
        peak.close()
        readers.close()
        print(
            f"memory at {cells} cells: {peak.bytes / 1e9:.2f} GB over all processes, {readers.own / 1e9:.2f} GB of this "
            f"one's own, {readers.largest / 1e9:.2f} GB of the largest reader's own; {speed}",
            flush=True,
        )


class ReaderMemory:
    """Samples the private memory of this process and of the largest Ray worker, until closed."""

    def __init__(self) -> None:
        self.own = self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.2):
            self.own = max(self.own, private_bytes(os.getpid()))
            self.largest = max([self.largest, *(private_bytes(pid) for pid in reader_processes())])

    def close(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()


def private_bytes(pid: int) -> int:
    """Return the anonymous memory of a process; 0 if it has ended or the system does not report it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def reader_processes() -> list[int]:
    """Return the Ray workers that read now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::ReadPlanSource"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def cohort(folder: Path, cells: int, given: argparse.Namespace) -> Packed:
    """Write a packed cohort of random log-normalised counts, if it is not there, and open it."""
    run, design = RunDirectory.at(folder), design_of(cells, given.groups)
    if not run.storage.exists("written"):
        run.write_json(keys.DESIGN_JSON, design.to_json())
        genes = pd.DataFrame({"name": [f"gene{g}" for g in range(given.genes)], "selected": True})
        run.storage.write_atomic(keys.GENES_TABLE, table_bytes(genes))
        write_blocks(run, design, given)
        run.storage.write_atomic("written", b"")
    return Packed.open(run, given.block_rows)


def design_of(cells: int, groups: int) -> Design:
    """Return a design of donors crossed with two conditions, its groups of one size."""
    donors = tuple(f"donor{d}" for d in range(groups // 2))
    conditions = ("control", "treated")
    edges = np.linspace(0, cells, 2 * len(donors) + 1).astype(int).tolist()
    made = tuple(
        Group(g, group_name([donors[g // 2]], conditions[g % 2]), g % 2, g // 2, (g // 2,), start, stop)
        for g, (start, stop) in enumerate(itertools.pairwise(edges))
    )
    return Design("condition", ("donor",), conditions, (donors,), donors, made)


def write_blocks(run: RunDirectory, design: Design, given: argparse.Namespace) -> None:
    """Write the row blocks and the cluster labels."""
    rng, store = np.random.default_rng(0), run.storage / keys.PACKED
    share = rng.gamma(0.5, size=given.genes)
    share = np.minimum(share / share.mean() * given.density, 0.9).astype(np.float32)
    for block, start in enumerate(range(0, design.n_cells, given.block_rows)):
        rows = random_rows(rng, min(given.block_rows, design.n_cells - start), share)
        write_csr(store, f"{keys.PACKED_X}/{keys.block_name(block)}", rows)
    for group, (level, kinds) in itertools.product(design.groups, ((keys.PACKED_LOW, 10), (keys.PACKED_HIGH, 40))):
        labels = rng.integers(kinds, size=group.cells, dtype=np.int32)
        write_array(store, f"{level}/{keys.block_name(group.code)}", labels)


def random_rows(rng: np.random.Generator, cells: int, share: np.ndarray) -> sparse.csr_matrix:
    """Return cells that express each gene with its share's probability, counts log-normalised to 10 000."""
    rows = sparse.csr_matrix(rng.random((cells, len(share)), dtype=np.float32) < share, dtype=np.float32)
    totals = np.repeat(rng.lognormal(8.5, 0.4, cells), np.diff(rows.indptr))
    rows.data = np.log1p(rng.geometric(0.6, rows.nnz) * 1e4 / totals).astype(np.float32)
    return rows


def write_h5ad(packed: Packed) -> Path:
    """Write the cohort as an uncompressed h5ad beside packed.zarr, if it is not there."""
    path = Path(packed.run.storage.path(H5AD))
    if not path.exists():
        part = path.with_suffix(".part")
        obs = pd.DataFrame(index=pd.RangeIndex(packed.n_rows).astype(str))
        with h5py.File(part, "w") as file:
            anndata.io.write_elem(
                file, "/", anndata.AnnData(packed.block(0), var=pd.DataFrame(index=list(packed.genes)))
            )
            written: Any = anndata.io.sparse_dataset(file["X"])
            for block in range(1, packed.n_blocks):
                written.append(packed.block(block))
            anndata.io.write_elem(file, "obs", obs)
        part.rename(path)
    return path


if __name__ == "__main__":
    main()
