"""Stream mini-batches through Ray Data: read on the cluster, in the order of the plan, dense on the training device.

Input: a packed cohort, the plan, the rank of a worker and the first step. Output: an iterator of `MiniBatch`, read
ahead. The scheduling loop of Ray Data runs in a thread of the training process, so its processor time slows training
down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.executor import READER_CPUS
from ndreamer_dist.model.batch import UNPADDED, MiniBatch
from ndreamer_dist.training.densify import RowLabels, densify, prepared_ahead, sizes_ahead
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import PlanSource, from_arrow, windows

LOOP_PAUSE_SECONDS = 0.02
READ_AHEAD = 2
"""Steps to fetch from the object store ahead."""
LATE_SECONDS = 120.0
LATE = (
    f"no mini-batch has come for {LATE_SECONDS:.0f} s: the readers may have no processor, as when a machine is lost and the "
    f"training workers hold what is left; training goes on when Ray has {READER_CPUS} processors for them"
)


def mini_batches(
    packed: Packed, plan: SamplingPlan, place: tuple[int, int], first_step: int, device: Any
) -> Iterator[MiniBatch]:
    """Yield the mini-batches of a worker from `first_step` on, read ahead by Ray Data.

    Parameters
    ----------
    place
        Rank of the worker, and number of workers. Every GPU worker reads all cells (`densify_for_gpu`).
    """
    batches = _read(packed, plan, place, first_step, device)
    return prepared_ahead(batches) if torch.device(device).type == "cuda" else batches


def _read(
    packed: Packed, plan: SamplingPlan, place: tuple[int, int], first_step: int, device: Any
) -> Iterator[MiniBatch]:
    import ray.data

    if first_step >= plan.steps:
        return
    data_context = ray.data.DataContext.get_current()
    data_context.execution_options.preserve_order = True
    data_context.enable_progress_bars = False
    data_context.custom_execution_callback_classes = [_rest_between_rounds()]
    on_gpu = torch.device(device).type == "cuda"
    rank, world = (0, 1) if on_gpu else place
    source = PlanSource(packed, plan, rank=rank, world=world, first_step=first_step)
    # One block per window: with more blocks Ray Data would split the output of each window.
    dataset = ray.data.read_datasource(source, num_cpus=READER_CPUS, override_num_blocks=len(windows(plan, first_step)))
    dataset.set_name(f"mini_batches_of_{packed.run.name}_worker_{place[0]}")
    labels = RowLabels.of(packed)
    least = sizes_ahead(labels, plan) if on_gpu else UNPADDED
    for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=READ_AHEAD):
        yield densify(from_arrow(table, packed.n_genes), labels, plan, place, device, least)


def watched(batches: Iterator[MiniBatch], late: Callable[[], object], seconds: float) -> Iterator[MiniBatch]:
    """Yield mini-batches; call `late` from another thread if the first takes longer than `seconds`."""
    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        for batch in batches:
            timer.cancel()
            yield batch
    finally:
        timer.cancel()


def _rest_between_rounds() -> type:
    """Return a callback class that makes Ray Data's scheduling loop sleep between rounds.

    The loop spins when it has nothing to start, and then used more processor time than the training itself.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            del executor
            time.sleep(LOOP_PAUSE_SECONDS)

    return Rest
