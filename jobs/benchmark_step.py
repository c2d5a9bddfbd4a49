"""Measure the speed of a training step against a plain implementation, and what bounds it.

    python jobs/benchmark_step.py NAIVE_STEP.py [--preset paper --preset small] [--steps 10] [--warmup 3] [--threads 2] \
        [--genes 2000] [--batches 8] [--device cpu|cuda] [--precision float32|bf16] [--no-naive]

NAIVE_STEP.py is a file with `Model(genes, conditions, batches)` and `step(model, optimiser, x, condition, batch, low,
high)`: a plain implementation of the paper preset's step. Each contestant is a separate process on data of the same sizes, with
the same threads; they step in turn, so that other work on the machine affects all of them. The output holds, per contestant,
median seconds per step after the warm-up, the first step, peak memory, and the speed relative to the naive step. Then, for this
package, operations, their arithmetic and the bytes that they read and write, and what the device reaches in a matrix product
and a copy. The default run takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONDITIONS, LOW, HIGH = 2, 15, 60


@dataclass(frozen=True)
class Contestant:
    """An implementation of the step, its preset and its device."""

    name: str
    naive: str | None
    preset: str
    precision: str
    device: str
    threads: int
    genes: int
    batches: int


@dataclass
class Timing:
    """Measurements of a contestant."""

    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cells: int = 0
    peak: int = 0
    counted: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds per step."""
        return statistics.median(self.seconds)


def main() -> None:
    """Run the contestants of each preset in turns and print their table."""
    given = arguments()
    if given.serve:
        serve(Contestant(**json.loads(given.serve)))
        return
    for preset in given.preset or ["paper", "small"]:
        timings = take_turns(contestants(given, preset), given.warmup, given.steps)
        print(f"\n{preset}, {given.device}, {given.precision}, {given.threads} threads, median of {given.steps} steps")
        print(table(timings))
        print(bounds(timings))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("naive", type=Path, help="the plainly written step")
    parser.add_argument("--preset", action="append", choices=["paper", "small"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--no-naive", action="store_true", help="leave the naive step out")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def contestants(given: argparse.Namespace, preset: str) -> list[Contestant]:
    """Return the contestants; the naive step exists only with the paper preset's widths."""
    shared = {name: getattr(given, name) for name in ("device", "threads", "genes", "batches")}
    chosen = []
    if preset == "paper" and not given.no_naive:
        chosen.append(Contestant("naive", str(given.naive), preset, "float32", **shared))
    chosen.append(Contestant("ours", None, preset, given.precision, **shared))
    return chosen


def take_turns(entered: list[Contestant], warmup: int, steps: int) -> dict[str, Timing]:
    """Let the contestants step in turn; return the measurements of each."""
    timings = {contestant.name: Timing() for contestant in entered}
    with started(entered) as processes:
        for turn in range(warmup + steps):
            for name, process in processes.items():
                seconds = ask(process, "step")["seconds"]
                if turn == 0:
                    timings[name].first = seconds
                if turn >= warmup:
                    timings[name].seconds.append(seconds)
        for name, process in processes.items():
            seen = ask(process, "finish")
            timings[name].peak, timings[name].cells = int(seen["peak"]), int(seen["cells"])
            timings[name].counted = seen["counted"]
    return timings


@contextmanager
def started(entered: list[Contestant]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Run a process per contestant; all are stopped at the end."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # waiting contestants must not spin
    processes = {
        contestant.name: subprocess.Popen(
            [sys.executable, __file__, contestant.naive or "-", "--serve", json.dumps(asdict(contestant))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for contestant in entered
    }  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """Send a contestant a word and return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def serve(contestant: Contestant) -> None:
    """Be a contestant: one line in, one line out."""
    import torch

    torch.set_num_threads(contestant.threads)
    step, cells = naive_step(contestant) if contestant.naive else our_step(contestant)
    for line in sys.stdin:
        if line.strip() == "step":
            began = time.perf_counter()
            step()
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
            continue
        peak = peak_bytes(contestant.device)  # before the counting, which needs memory of its own
        counted = {} if contestant.naive else count(step, contestant.device)
        print(json.dumps({"peak": peak, "cells": cells, "counted": counted}), flush=True)


def peak_bytes(device: str) -> int:
    """Return the most memory held so far: of the GPU, or of this process."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def labelled_cells(cells: int, contestant: Contestant) -> list[Any]:
    """Return expression, condition, batch, low and high cluster of random cells."""
    import torch

    torch.manual_seed(0)
    with torch.device(contestant.device):
        x = torch.randn(cells, contestant.genes).relu()
        return [x, *(torch.randint(levels, (cells,)) for levels in (CONDITIONS, contestant.batches, LOW, HIGH))]


def naive_step(contestant: Contestant) -> tuple[Callable[[], object], int]:
    """Return the step of the given file."""
    import importlib.util

    import torch

    from ndreamer_dist.settings import Settings

    spec = importlib.util.spec_from_file_location("naive_step", str(contestant.naive))
    assert spec is not None
    assert spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    schedule = Settings.build(preset=contestant.preset).train
    data = labelled_cells(2 * schedule.batch_size, contestant)
    if contestant.device != "cpu":
        torch.set_default_device(contestant.device)  # it creates tensors without a device
    model = naive.Model(contestant.genes, CONDITIONS, contestant.batches)
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate)
    return lambda: naive.step(model, optimiser, *data), 2 * schedule.batch_size


def our_step(contestant: Contestant) -> tuple[Callable[[], object], int]:
    """Return the training loop's step, the reading of its losses included."""
    from itertools import count as numbers

    from ndreamer_dist.model.batch import MiniBatch
    from ndreamer_dist.model.collectives import Single
    from ndreamer_dist.settings import Settings
    from ndreamer_dist.training.loop import TrainState, training_step

    settings = Settings.build(
        preset=contestant.preset,
        overrides={"train.precision": contestant.precision},
    )
    cells = 2 * settings.train.batch_size
    x, condition, batch, low, high = labelled_cells(cells, contestant)
    codes = [part.cpu() for part in (condition, batch[:, None], batch * CONDITIONS + condition, low, high)]
    state = TrainState.fresh(
        settings, genes=contestant.genes, conditions=CONDITIONS, batch_levels=(contestant.batches,),
        device=contestant.device,
    )  # fmt: skip
    state.network.train()
    step = numbers(1)

    def take() -> object:
        mini_batch = MiniBatch(x, *codes, first_block=0, step=next(step), cells=cells)
        return training_step(state, mini_batch, settings, Single())[0].as_floats()

    return take, cells


def count(step: Callable[[], object], device: str) -> dict[str, float]:
    """Return the operations, arithmetic and traffic of a step, and what the device reaches on each."""
    from torch.utils.flop_counter import FlopCounterMode

    traffic = traffic_mode()
    with FlopCounterMode(display=False) as arithmetic, traffic:
        step()
    flops_rate, bytes_rate = reached(device)
    return {
        "operations": traffic.operations,
        "flops": arithmetic.get_total_flops(),
        "bytes": traffic.bytes,
        "flops_rate": flops_rate,
        "bytes_rate": bytes_rate,
    }


def traffic_mode() -> Any:
    """Return a dispatch mode that counts operations that do work, and the bytes of what they read and write."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Traffic(TorchDispatchMode):
        operations = 0
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            if not views and "empty" not in func.__name__:
                self.operations += 1
                tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
                self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
            return made

    return Traffic()


def reached(device: str) -> tuple[float, float]:
    """Return the operations per second of a large product, and the bytes per second of a large copy."""
    import torch

    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * size**3 / fastest(lambda: a @ b, device), 2 * source.nbytes / fastest(
        lambda: target.copy_(source), device
    )


def fastest(work: Callable[[], object], device: str) -> float:
    """Return the shortest of five times, in seconds."""
    import torch

    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def table(timings: dict[str, Timing]) -> str:
    """Return the timings as a Markdown table."""
    naive = timings.get("naive")
    lines = ["| step | s | cells/s | first step, s | peak, GB | times as fast | memory |", "|---" * 7 + "|"]
    for name, seen in timings.items():
        faster = f"{naive.median / seen.median:.1f}" if naive else ""
        memory = f"{seen.peak / naive.peak:.2f}" if naive else ""
        lines.append(
            f"| {name} | {seen.median:.4f} | {seen.cells / seen.median:.0f} | {seen.first:.2f} "
            f"| {seen.peak / 1e9:.2f} | {faster} | {memory} |"
        )
    return "\n".join(lines)


def bounds(timings: dict[str, Timing]) -> str:
    """Return the work of a step of this package, and the time that the device would need for each kind of work alone."""
    seen = timings["ours"]
    c = seen.counted
    return (
        f"a step: {c['operations']:.0f} operations, {c['flops'] / 1e9:.0f} GFLOP of matrix products, "
        f"{c['bytes'] / 1e9:.1f} GB read and written if nothing stayed in a cache\n"
        f"this device: {c['flops_rate'] / 1e9:.0f} GFLOP/s in a product, {c['bytes_rate'] / 1e9:.0f} GB/s in a copy; "
        f"so {c['flops'] / c['flops_rate']:.4f} s of arithmetic, {c['bytes'] / c['bytes_rate']:.4f} s of traffic, "
        f"{seen.median / c['operations'] * 1e6:.1f} us per operation, all told"
    )


if __name__ == "__main__":
    main()
