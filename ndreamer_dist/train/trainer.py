"""The training loop under Ray Train: workers, streaming, checkpoints, progress.

Each worker builds its own Ray Data stream inside the train function, after looking for a checkpoint: that is how a
resumed run starts at its step. Ray Train keeps its own things under `DIR/train`; rank 0 writes the trained model to
`DIR/model` and the measures to `DIR/logs/metrics.csv`.
"""

from __future__ import annotations

import csv
import io
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.embed import save_model
from ndreamer_dist.errors import ResourceError
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.collectives import Distributed, Single
from ndreamer_dist.rundir import RunDirectory, Shard, begin_stage
from ndreamer_dist.runtime import Runtime
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage import Storage
from ndreamer_dist.stream.plan import SamplingPlan
from ndreamer_dist.stream.source import PlanSource, RowLabels, densify, from_arrow, read_window, windows
from ndreamer_dist.train.loop import TrainingError, TrainState, train

WORKER_CPUS = 0.5
"""Processors a training worker reserves: the rest stay free for the readers that feed it."""
READER_CPUS = 0.5
LOOP_PAUSE_SECONDS = 0.02
KEY_FILE = "stage_key"
PROGRESS_NAME = "ndreamer-progress"

logger = logging.getLogger(__name__)


def run_train(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Train and write model/; a run that was stopped goes on from its last checkpoint."""
    shard = Shard("model", (keys.MODEL_WEIGHTS, keys.MODEL_JSON))
    if not begin_stage(run, keys.STAGE_TRAIN, key, [shard], lambda _: _keep_own_checkpoints(run, key)):
        return
    plan = SamplingPlan.for_cohort(packed.design.starts, settings.train, settings.seed)
    logger.info("training: %d epochs of %d steps", plan.epochs, plan.steps_per_epoch)
    if runtime.serial:
        _train_serially(run, settings, packed, plan, runtime)
    else:
        _train_on_ray(run, settings, packed, plan, runtime)
    run.mark(keys.STAGE_TRAIN, key, shard)


def check_layout(settings: Settings, cpus: int, gpus: int) -> None:
    """Refuse a layout in which readers could never start: training would wait for ever.

    Raises
    ------
    ResourceError
        More workers than processors leave room for, or `cuda` asked for where there is none.
    """
    workers = settings.train.workers
    if workers * WORKER_CPUS + READER_CPUS > cpus:
        msg = (
            f"{workers} training workers on {cpus} processors leave none to the readers that feed them; "
            f"use at most --workers {max(1, int((cpus - READER_CPUS) / WORKER_CPUS))}"
        )
        raise ResourceError(msg)
    if settings.train.device == "cuda" and gpus < workers:
        msg = f"{workers} training workers need {workers} GPUs and Ray has {gpus}; use --set train.device=cpu"
        raise ResourceError(msg)


def _keep_own_checkpoints(run: RunDirectory, key: str) -> None:
    """Delete checkpoints that were made under another stage key; those of this key are what a resume is for."""
    name = f"{keys.TRAIN_DIR}/{KEY_FILE}"
    if run.storage.exists(name) and run.storage.read(name).decode() == key:
        return
    for stale in (keys.TRAIN_DIR, keys.MODEL_WEIGHTS, keys.MODEL_JSON, keys.METRICS):
        run.storage.delete(stale)
    run.storage.write_atomic(name, key.encode())


def _fresh(settings: Settings, packed: Packed, device: Any) -> TrainState:
    design = packed.design
    return TrainState.fresh(
        settings,
        genes=packed.n_genes,
        conditions=len(design.conditions),
        batch_levels=tuple(len(levels) for levels in design.batch_levels),
        device=device,
    )


def _train_serially(
    run: RunDirectory, settings: Settings, packed: Packed, plan: SamplingPlan, runtime: Runtime
) -> None:
    """Train in this process, without checkpoints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.train.threads)
    try:
        state, labels = _fresh(settings, packed, "cpu"), RowLabels.of(packed)
        shares = (share for steps in windows(plan, 0) for share in read_window(packed, plan, steps, 0, 1))
        with tqdm(total=plan.steps, desc="train", disable=_hidden(runtime)) as bar:
            batches = (densify(share, labels, plan, (0, 1), "cpu") for share in shares)
            train(state, batches, settings, Single(), after_step=lambda _: bar.update())
        _finish(run, settings, packed, plan, state)
    finally:
        torch.set_num_threads(threads)


def _hidden(runtime: Runtime) -> bool | None:
    return None if runtime.progress is None else not runtime.progress


def _finish(run: RunDirectory, settings: Settings, packed: Packed, plan: SamplingPlan, state: TrainState) -> None:
    save_model(run.storage, state.network, packed, settings)
    _write_measures(run.storage, plan, state)


def _write_measures(storage: Storage, plan: SamplingPlan, state: TrainState) -> None:
    """Write metrics.csv whole: one row per step done, each step once however often the run was resumed."""
    if not state.measures:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=["epoch", *state.measures[0]], lineterminator="\n")
    writer.writeheader()
    for row in state.measures:
        rounded = {name: f"{value:.6g}" for name, value in row.items()}
        writer.writerow({"epoch": (int(row["step"]) - 1) // plan.steps_per_epoch + 1, **rounded})
    storage.write_atomic(keys.METRICS, text.getvalue().encode())


def _train_on_ray(run: RunDirectory, settings: Settings, packed: Packed, plan: SamplingPlan, runtime: Runtime) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    check_layout(settings, runtime.cpus, runtime.gpus)
    use_gpu = settings.train.device == "cuda" or (
        settings.train.device == "auto" and runtime.gpus >= settings.train.workers
    )
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "settings": settings, "packed": packed, "plan": plan},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.train.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=keys.TRAIN_DIR,
            failure_config=ray.train.FailureConfig(max_failures=settings.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            # OpenMP threads that wait must not spin: the readers need the processor (10 times the time without).
            worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}},
            **_train_storage(run.storage),
        ),
    )
    with _progress(plan.steps, runtime):
        result = trainer.fit()
    if result.return_value:
        raise TrainingError(result.return_value)


def _train_storage(storage: Storage) -> dict[str, Any]:
    """Return Ray Train's storage settings: a local path as it is, anything else through its fsspec file system."""
    if storage.is_local:
        return {"storage_path": storage.root}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": storage.root, "storage_filesystem": PyFileSystem(FSSpecHandler(storage.filesystem))}


def _worker(config: dict[str, Any]) -> str | None:
    """Train one worker's share; this is what Ray Train runs on every worker. Returns what was found wrong, if anything."""
    import ray.train
    import ray.train.torch

    run, settings, packed, plan = (config[name] for name in ("run", "settings", "packed", "plan"))
    torch.set_num_threads(settings.train.threads)
    context = ray.train.get_context()
    place = (context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    state = _fresh(settings, packed, device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.load_bytes({path.name: path.read_bytes() for path in Path(folder).iterdir()})
    reporter = _Reporter(run, settings, plan, rank=place[0], started_at=state.step)
    batches = _stream(packed, plan, place, state.step, device)
    try:
        train(state, batches, settings, Distributed() if place[1] > 1 else Single(), after_step=reporter.after_step)
    except TrainingError as error:
        # Every worker sees the same loss; a retry would see it again, so this ends the job as a finding, not a failure.
        return str(error)
    if place[0] == 0:
        _finish(run, settings, packed, plan, state)
    return None


def _stream(
    packed: Packed, plan: SamplingPlan, place: tuple[int, int], first_step: int, device: Any
) -> Iterator[MiniBatch]:
    """Yield a worker's mini-batches from `first_step` on, read ahead by Ray Data."""
    import ray.data

    if first_step >= plan.steps:
        return
    data_context = ray.data.DataContext.get_current()
    data_context.execution_options.preserve_order = True
    data_context.enable_progress_bars = False
    data_context.custom_execution_callback_classes = [_rest_between_rounds()]
    source = PlanSource(packed, plan, rank=place[0], world=place[1], first_step=first_step)
    # As many blocks as there are windows: asked for more, Ray Data would cut each window's output again.
    dataset = ray.data.read_datasource(
        source, ray_remote_args={"num_cpus": READER_CPUS}, override_num_blocks=len(windows(plan, first_step))
    )
    labels = RowLabels.of(packed)
    for table in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        yield densify(from_arrow(table, packed.n_genes), labels, plan, place, device)


def _rest_between_rounds() -> type:
    """Return a callback that lets Ray Data's loop rest.

    The loop runs in a thread of the training process, and with nothing to start it goes round without a pause: it took
    more of the processor than the training did.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            del executor
            time.sleep(LOOP_PAUSE_SECONDS)

    return Rest


class _Reporter:
    """What happens between steps: checkpoints by all workers together, measures and progress by rank 0."""

    def __init__(
        self, run: RunDirectory, settings: Settings, plan: SamplingPlan, *, rank: int, started_at: int
    ) -> None:
        self._run, self._plan, self._rank = run, plan, rank
        self._every = settings.train.checkpoint_steps
        self._progress = _progress_actor() if rank == 0 else None
        if self._progress is not None:
            self._progress.reached.remote(started_at)

    def after_step(self, state: TrainState) -> None:
        """Note a finished step; every so many steps, write a checkpoint."""
        if self._progress is not None:
            self._progress.reached.remote(state.step)
        if state.step % self._every == 0 and state.step < self._plan.steps:
            self._checkpoint(state)

    def _checkpoint(self, state: TrainState) -> None:
        import ray.train

        measures = {"step": state.step, "total": state.measures[-1]["total"]}
        if self._rank != 0:
            ray.train.report(measures)
            return
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state.to_bytes().items():
                (Path(folder) / name).write_bytes(data)
            ray.train.report(measures, checkpoint=ray.train.Checkpoint.from_directory(folder))
        _write_measures(self._run.storage, self._plan, state)


class _Progress:
    """How far training is; lives in an actor, since workers and driver share no screen."""

    def __init__(self) -> None:
        self._step = 0

    def reached(self, step: int) -> None:
        self._step = step

    def step(self) -> int:
        return self._step


def _progress_actor() -> Any:
    import ray

    try:
        return ray.get_actor(PROGRESS_NAME, namespace=PROGRESS_NAME)
    except ValueError:
        return None


@contextmanager
def _progress(steps: int, runtime: Runtime) -> Iterator[None]:
    """Show a bar in the driver while workers train; it asks the actor once a second."""
    import ray

    actor = ray.remote(_Progress).options(
        name=PROGRESS_NAME, namespace=PROGRESS_NAME, num_cpus=0, get_if_exists=True
    ).remote()  # fmt: skip
    stop = threading.Event()
    with tqdm(total=steps, desc="train", disable=_hidden(runtime)) as bar:

        def watch() -> None:
            while not stop.wait(1.0):
                bar.update(ray.get(actor.step.remote()) - bar.n)

        watcher = threading.Thread(target=watch, daemon=True, name="ndreamer-progress")
        watcher.start()
        try:
            yield
            bar.update(steps - bar.n)
        finally:
            stop.set()
            watcher.join()
            ray.kill(actor)
