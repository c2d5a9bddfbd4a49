"""Simulate a cohort: draw its parameters, draw chunks of cells in parallel, and write the chunks in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from ndreamer_dist.datasets.model import BLOCK_ROWS, Model
from ndreamer_dist.datasets.parameters import STATE_LIMIT, CohortShape, Names, StateLaw, draw_parameters
from ndreamer_dist.datasets.sampling import draw_chunk, generator
from ndreamer_dist.datasets.truth import Truth, truth_path
from ndreamer_dist.datasets.writing import Writer
from ndreamer_dist.errors import CohortError, suggest
from ndreamer_dist.storage.files import open_storage

Item = TypeVar("Item")
Value = TypeVar("Value")


def simulate(
    path: str | os.PathLike[str],
    *,
    cells: int = 20_000,
    genes: int = 2_000,
    batches: int = 4,
    conditions: int = 2,
    design: Literal["crossed", "nested"] = "crossed",
    cell_types: int = 6,
    state_effects: float = 0.0,
    state_shift: float = 0.0,
    pathways: int = 0,
    seed: int = 0,
    chunk_rows: int = 4096,
    threads: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> Truth:
    """Write a simulated cohort as an AnnData zarr v3 store, write its truth beside it, and return the truth.

    Parameters
    ----------
    path
        Address of the new cohort, with `X` (cells x genes, CSR counts, float32) and `obs` with `cell_type`, `condition`
        (`control`, `treated`, `treated_2`, ...) and `donor`. The truth is written to `truth_path(path)`.
    batches
        Number of donors.
    conditions
        Number of conditions, including the control.
    design
        `crossed`: each donor has cells of every condition. `nested`: each donor has one condition.
    cell_types
        Number of cell types. The last third, at least one of two or more, does not respond to any condition.
    state_effects
        Share of the effects, 0 to 1, that cells of the lowest states lack. With 0 a condition changes all cells of a
        type equally; with 1 cells of the lowest states do not respond.
    state_shift
        Difference of the mean cell state between the other conditions and the control, in standard deviations. It is a
        difference of composition, not an effect on any cell.
    pathways
        If positive, the cohort is a screen: the conditions other than the control are knock-outs, `P01_KO01` and so on,
        assigned to this many pathways in rotation. The knock-outs of a pathway change the same genes, each with its own
        strength, and a few genes of their own.
    seed
        The same seed and sizes give the same cohort for any `chunk_rows` and `threads`.
    chunk_rows, threads
        Cells per chunk, and chunks drawn at the same time; they bound the memory.
    progress
        Called after each chunk with the number of written cells and `cells`.

    Raises
    ------
    CohortError
        A size is impossible, or there is already a cohort at `path`.
    """
    law = _state_law(state_effects, state_shift)
    shape = CohortShape(genes, batches, conditions, cell_types, design == "nested", pathways)
    _check_sizes(shape, design, cells=cells, chunk_rows=chunk_rows, threads=threads)
    if not 0 <= pathways < conditions:
        msg = f"pathways is {pathways}; {conditions - 1} knock-outs can have 0 to {conditions - 1} pathways"
        raise CohortError(msg)
    cohort, truth = open_storage(path), open_storage(truth_path(path))
    if cohort.exists("zarr.json"):
        msg = f"{cohort.url} exists already; delete it or choose another path"
        raise CohortError(msg)
    truth.delete()
    parameters = draw_parameters(generator(seed, 0), shape)
    model, writer = Model(parameters, law), Writer(cohort, truth, Names.of(parameters))
    step = -(-chunk_rows // BLOCK_ROWS) * BLOCK_ROWS
    ranges = ((start, min(start + step, cells)) for start in range(0, cells, step))
    with ThreadPoolExecutor(threads) as pool:
        for chunk in _in_order(pool, lambda part: draw_chunk(model, seed, *part), ranges, ahead=threads + 1):
            writer.add(chunk)
            if progress is not None:
                progress(writer.cells, cells)
    writer.close(parameters, law)
    return Truth(truth, model, cells)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Value], items: Iterable[Item], *, ahead: int
) -> Iterator[Value]:
    """Yield the function's values in order of the items, with at most `ahead` calls started and not yet yielded."""
    started: deque[Any] = deque()
    for item in items:
        started.append(pool.submit(function, item))
        if len(started) >= ahead:
            yield started.popleft().result()
    while started:
        yield started.popleft().result()


def _state_law(effects: float, shift: float) -> StateLaw:
    if not 0 <= effects <= 1:
        msg = f"state_effects is {effects:g}; it is a share of the effects, from 0 to 1"
        raise CohortError(msg)
    if not abs(shift) <= STATE_LIMIT:
        msg = f"state_shift is {shift:g} standard deviations; at most {STATE_LIMIT:g} either way can be simulated"
        raise CohortError(msg)
    return StateLaw(effects, shift)


def _check_sizes(shape: CohortShape, design: str, *, cells: int, chunk_rows: int, threads: int) -> None:
    least = {"cells": (cells, 1), "genes": (shape.genes, 50), "batches": (shape.donors, 1), "conditions": (shape.conditions, 2),
             "cell_types": (shape.cell_types, 1), "chunk_rows": (chunk_rows, 1), "threads": (threads, 1)}  # fmt: skip
    for name, (size, smallest) in least.items():
        if size < smallest:
            msg = f"{name} is {size}; a simulated cohort needs at least {smallest}"
            raise CohortError(msg)
    if design not in ("crossed", "nested"):
        msg = f"design is {design!r}; it can be 'crossed' or 'nested'.{suggest(design, ('crossed', 'nested'))}"
        raise CohortError(msg)
    if shape.nested and shape.donors < shape.conditions:
        msg = f"a nested design of {shape.conditions} conditions needs at least as many batches, found {shape.donors}"
        raise CohortError(msg)
