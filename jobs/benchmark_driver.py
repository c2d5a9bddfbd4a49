"""Measure the driver's memory per cell in every stage, without its tasks: `python jobs/benchmark_driver.py CELLS FOLDER`.

A cohort of few genes, with columns of text, categories and numbers, is written and run in one process. The memory that Python
traces is read between tasks, so that of a running task does not count, nor do objects of the object store, which are files
here. Arrow is counted separately; its peak is printed at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.genes import check_cohort
from ndreamer_dist.cohort.pack import DealtRows
from ndreamer_dist.cohort.source import Source, fingerprint, open_cohort
from ndreamer_dist.compute.executor import Deferred, SerialRuntime, with_threads
from ndreamer_dist.effects.tables import check_tables
from ndreamer_dist.embedding.space import SpaceInput
from ndreamer_dist.planning.stages import Job, stage_keys, stages_of
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings

GENES, PER_CELL = 200, 8
OPENING = "before the stages"
SETTINGS = {
    "run.serial": True, "run.progress": False, "embed.method": keys.SPACE_PCA, "embed.dimensions": 2, "match.hubs": "none",
    "effects.store": ["ite"], "cohort.condition_key": "condition", "cohort.control": "condition 0", "cohort.batch_key": "donor",
}  # fmt: skip
"""Few dimensions and layers, and small groups to match, since tasks are not measured."""


class TasksApart(SerialRuntime):
    """A serial runtime that measures the peak memory outside tasks."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        super().__init__(settings.run)
        self._folder, self._peak = folder, 0

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, title: str, num_gpus: float = 0
    ) -> Iterator[Any]:
        """See `Runtime.map`."""
        del title, num_gpus
        for item in list(items):
            self._look()
            answer = with_threads(1, function, item, *shared)
            tracemalloc.reset_peak()
            yield answer

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        """See `Runtime.submit`; several return values, which are shuffled rows, are stored in files."""
        if returns == 1:
            return super().submit(function, *args)
        files: list[Path] = []

        def answer(number: int) -> Any:
            if not files:
                for part in function(*args):
                    with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".npz", delete=False) as file:
                        values = part.values
                        np.savez(file, part.rows, values.data, values.indices, values.indptr, values.shape)
                    files.append(Path(file.name))
            with np.load(files[number]) as parts:
                rows, *values, shape = (parts[f"arr_{place}"] for place in range(5))
            return DealtRows(rows, sparse.csr_matrix(tuple(values), shape=shape))

        return [Deferred(lambda number=number: answer(number)) for number in range(returns)]

    def peak(self) -> int:
        """Return the peak memory outside tasks since the last call, in bytes."""
        self._look()
        peak, self._peak = self._peak, 0
        tracemalloc.reset_peak()
        return peak

    def _look(self) -> None:
        self._peak = max(self._peak, tracemalloc.get_traced_memory()[1])


def write_cohort(path: Path, cells: int) -> None:
    """Write a cohort of few genes whose table has a dozen columns."""
    rng = np.random.default_rng(0)
    genes = np.sort(rng.integers(0, GENES, (cells, PER_CELL), dtype=np.int32), axis=1)
    first = np.ones_like(genes, dtype=bool)
    first[:, 1:] = genes[:, 1:] != genes[:, :-1]
    counts = rng.integers(1, 4, genes.shape).astype(np.float32)[first]
    ends = np.concatenate([[0], np.cumsum(first.sum(axis=1))])
    numbers = np.char.mod("%07d", np.arange(cells))
    obs = pd.DataFrame(index=pd.Index(np.char.add("AAACCTGAGAAACCAT-", numbers).astype(object), name="barcode"))
    for name, levels in (("donor", 4), ("condition", 20), ("cell_type", 30), ("note", 1000)):
        names = [f"{name} {level}" for level in range(levels)]
        obs[name] = pd.Categorical.from_codes(rng.integers(0, levels, cells), names)
    obs["sample"] = np.char.add("sample-of-cell-", numbers).astype(object)
    obs["stage"] = pd.array(rng.integers(0, 5, cells), dtype="Int64")
    obs["phase"] = pd.Categorical.from_codes(rng.integers(-1, 3, cells), ["G1", "S", "G2M"], ordered=True)
    obs["doublet"], obs["age"] = rng.random(cells) < 0.05, rng.integers(20, 90, cells)
    for name in ("pct_mt", "score", "n_counts"):
        obs[name] = rng.random(cells)
    x = sparse.csr_matrix((counts, genes[first], ends), shape=(cells, GENES))
    adata = ad.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{gene}" for gene in range(GENES)]))
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        warnings.simplefilter("ignore")  # zarr warns that other implementations may not know consolidated metadata
        adata.write_zarr(path)


def opened(path: Path, settings: Settings) -> tuple[Source, dict[str, Any]]:
    """Open and check a cohort as `run` does, and return it with its fingerprint."""
    source = open_cohort(str(path), settings.cohort)
    check_cohort(source, settings.cohort)
    check_tables(source.cells.sample(), source.var)
    return source, fingerprint(source, settings.cohort.condition_column, settings.cohort.batch_key)


def measured(cohort: Path, folder: Path) -> dict[str, int]:
    """Run the job and return the driver's peak in bytes, by stage."""
    settings = Settings.build(preset="small", overrides=SETTINGS)
    runtime, run = TasksApart(settings, folder), RunDirectory.at(folder / "run")
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        source, told = opened(cohort, settings)
        peaks = {OPENING: runtime.peak() - before}
        key = stage_keys(settings, told)
        run.write_json(
            keys.RUN_JSON,
            {"format": keys.FORMAT_VERSION, "input": told, "settings": settings.model_dump(mode="json"), "keys": key},
        )
        job = Job(run, settings, source, runtime, SpaceInput.of(source, settings))
        for name, stage in stages_of(settings).items():
            started = time.perf_counter()
            stage.run(job, run, key[name])
            peaks[name] = runtime.peak() - before
            print(
                f"{name}: {time.perf_counter() - started:.0f} s, {peaks[name] / source.n_cells:.1f} bytes a cell",
                flush=True,
            )
    finally:
        tracemalloc.stop()
    return peaks


def main() -> None:
    """Measure, and print a line per stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", type=int)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    write_cohort(args.folder / "cohort.zarr", args.cells)
    for name, peak in measured(args.folder / "cohort.zarr", args.folder).items():
        print(f"{name:18} {peak / args.cells:6.1f} bytes a cell")
    print(f"Arrow, at the most {pa.default_memory_pool().max_memory() / args.cells:6.1f} bytes a cell")


if __name__ == "__main__":
    main()
