"""Run the training loop under Ray Train or in this process: workers, streaming, checkpoints and progress.

Each worker loads the last checkpoint and then builds its own Ray Data stream inside the train function, so a resumed
run starts at the step of the checkpoint. Checkpoints are in `DIR/train`. The first worker writes the trained model to
`DIR/model` and the measures to `DIR/logs`.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.compute.engines import chosen_device, torch_finding
from ndreamer_dist.compute.executor import WORKER_CPUS, Runtime, check_layout, own_cause
from ndreamer_dist.compute.signals import StopRequest, deferred_stop
from ndreamer_dist.errors import DamagedError, ResourceError
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.collectives import ByBooks, Collective, Distributed, Single
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.files import Storage
from ndreamer_dist.training.checkpoints import Checkpoint, Schedule, latest_serial, save_serial
from ndreamer_dist.training.densify import Resident, RowLabels, densify, prepared_ahead, resident_batches
from ndreamer_dist.training.graphs import GraphedSteps
from ndreamer_dist.training.health import concerns
from ndreamer_dist.training.loader import LATE, LATE_SECONDS, mini_batches, watched
from ndreamer_dist.training.log import Row, append_logs, epoch_row, logged_epochs
from ndreamer_dist.training.loop import Step, TrainingError, TrainingStopped, TrainState, add_in_order, train
from ndreamer_dist.training.model_file import save_model
from ndreamer_dist.training.progress import POLL_SECONDS, Display, own_screen, remote_screen
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import read_window, windows

KEY_FILE = "stage_key"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""File in which Ray Train lists its checkpoints."""
STOPPED = "stopped"
"""Return value of a worker that stopped on request."""
STOP_SECONDS = 60.0
"""How long training on Ray may take to finish its step and write a checkpoint after a stop request."""
HEALTH_LOOKS = 100
"""Number of health checks per training (`health.concerns`); each check goes over many epochs."""

logger = logging.getLogger(__name__)


def run_train(run: RunDirectory, settings: Settings, packed: Packed, runtime: Runtime, key: str) -> None:
    """Train and write model/; an interrupted training resumes from its last checkpoint."""
    stage, shard = StageRun(run, keys.STAGE_TRAIN, key), Shard("model", (keys.MODEL_WEIGHTS, keys.MODEL_JSON))
    if not stage.begin([shard]):
        return
    _keep_own_checkpoints(run, key)
    plan = SamplingPlan.for_cohort(packed.design.starts, settings.train, settings.seed)
    logger.info("training: %d epochs of %d steps", plan.epochs, plan.steps_per_epoch)
    train_on = _train_serially if runtime.serial else _train_on_ray
    with deferred_stop() as stop, _stopped_by_hand():
        train_on(run, settings, packed, plan, runtime, stop)
        stage.mark(shard)


def _keep_own_checkpoints(run: RunDirectory, key: str) -> None:
    """Delete the checkpoints, logs and model of another stage key, so that training resumes only from its own."""
    name = f"{keys.TRAIN_DIR}/{KEY_FILE}"
    if run.storage.read_if_there(name) == key.encode():
        return
    for stale in (keys.TRAIN_DIR, keys.MODEL_WEIGHTS, keys.MODEL_JSON, keys.METRICS, keys.EPOCHS):
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
    run: RunDirectory, settings: Settings, packed: Packed, plan: SamplingPlan, runtime: Runtime, stop: StopRequest
) -> None:
    """Train in this process."""

    def save(state: TrainState) -> None:
        save_serial(run.storage, state.step, state.to_bytes())

    threads = torch.get_num_threads()
    torch.set_num_threads(settings.train.threads)
    try:
        state, labels = _fresh(settings, packed, "cpu"), RowLabels.of(packed)
        checkpoint = latest_serial(run.storage)
        if checkpoint is not None:
            state.load_bytes(checkpoint.files, checkpoint.url)
        parts = windows(plan, state.step) if state.step < plan.steps else []
        shares = (share for steps in parts for share in read_window(packed, plan, steps, 0, 1))
        batches = (densify(share, labels, plan, (0, 1), "cpu") for share in shares)
        with own_screen(plan, runtime, stop) as shown:
            schedule = Schedule(settings.train, Single(), stop=stop)
            reporter = Reporter(run, settings, plan, state, schedule, shown, save)
            reporter.train(batches, packed, Single())
    finally:
        torch.set_num_threads(threads)


class Reporter:
    """Writes the checkpoints of a worker, and on the first worker progress, logs and the model.

    Parameters
    ----------
    display
        Where the first worker reports its progress; None on the others.
    save
        Writes a checkpoint; all workers call it at the same step.
    """

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        plan: SamplingPlan,
        state: TrainState,
        schedule: Schedule,
        display: Display | None,
        save: Callable[[TrainState], None],
    ) -> None:
        self._run, self._settings, self._plan = run, settings, plan
        self._state, self._schedule, self._display, self._save = state, schedule, display, save
        self._epochs = [] if display is None else logged_epochs(run.storage, state.logged)
        self._last: Row | None = None
        self._ended = state.logged.steps // plan.steps_per_epoch
        if display is not None:
            display.reached(state.step)

    def train(
        self, batches: Iterator[MiniBatch], packed: Packed, collective: Collective, take: Step | None = None
    ) -> None:
        """Train to the end of the plan; on the first worker write the model and the logs."""
        try:
            train(self._state, batches, self._settings, collective, lambda _: self.after_step(), take)
        except TrainingError:
            self._write_logs()  # of the steps before the failed one
            raise
        self._write_logs()
        if self._display is not None:
            save_model(self._run.storage, self._state.network, packed, self._settings)

    def after_step(self) -> None:
        """Report a finished step, and write a checkpoint if one is due.

        Raises
        ------
        TrainingStopped
            A stop was requested; the checkpoint is written.
        """
        if self._display is not None:
            self._show(self._display)
        step = self._state.step
        if step < self._plan.steps and self._schedule.due(step):
            with self._schedule.saving():
                self._state.catch_up()
                self._save(self._state)
                self._write_logs()
            if self._schedule.stopping:
                raise TrainingStopped

    def _show(self, display: Display) -> None:
        if self._state.measures:
            self._last = self._state.measures[-1]
        display.reached(self._state.step, self._last)
        self._add_epochs(display)

    def _add_epochs(self, display: Display) -> None:
        """Add the rows of newly finished epochs, and show warnings about the training."""
        state, length = self._state, self._plan.steps_per_epoch
        while state.measures and state.measures[-1]["step"] >= (self._ended + 1) * length:
            first = self._ended * length + 1 - int(state.measures[0]["step"])
            part = slice(first, first + length)
            self._epochs.append(epoch_row(state.measures[part], state.perplexities[part]))
            self._ended += 1
            if self._ended % -(-self._plan.epochs // HEALTH_LOOKS) == 0 or self._ended == self._plan.epochs:
                for kind, text in concerns(self._epochs, self._settings, self._plan.epochs).items():
                    display.warn(kind, text)

    def _write_logs(self) -> None:
        if self._display is not None:
            self._add_epochs(self._display)
            append_logs(
                self._run.storage, self._state.logged, self._state.measures, self._epochs, self._plan.steps_per_epoch
            )
        self._state.forget(self._plan.steps_per_epoch)


def _train_on_ray(
    run: RunDirectory, settings: Settings, packed: Packed, plan: SamplingPlan, runtime: Runtime, stop: StopRequest
) -> None:
    """Train under Ray Train."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from ndreamer_dist.training.process_group import NodeNetwork

    check_layout(settings.train, runtime.cpus, lambda: runtime.gpus)
    device = chosen_device(settings.train.device, "train.device", runtime, torch_finding, least=settings.train.workers)
    use_gpu = device == "cuda"
    if use_gpu and settings.train.workers > settings.model.codebooks:
        msg = (
            f"{settings.train.workers} training workers on GPUs cannot share {settings.model.codebooks} codebooks; "
            f"use at most --workers {settings.model.codebooks}"
        )
        raise ResourceError(msg)
    with remote_screen(plan, runtime, run.name, stop) as display, _failures_explained(run):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"run": run, "settings": settings, "packed": packed, "plan": plan, "display": display},
            torch_config=NodeNetwork(),
            scaling_config=ray.train.ScalingConfig(
                num_workers=settings.train.workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": WORKER_CPUS, **({"GPU": 1} if use_gpu else {})},
                # GPUs communicate fastest inside one machine; CPU workers do best on different machines.
                placement_strategy="PACK" if use_gpu else "SPREAD",
            ),
            run_config=ray.train.RunConfig(
                name=keys.TRAIN_DIR,
                failure_config=ray.train.FailureConfig(max_failures=settings.train.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
                # Idle OpenMP threads must not spin, since the readers need the processors (a step took 10 times as
                # long). cuBLAS adds in a fixed order only with a workspace of this configuration.
                worker_runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}},
                **_train_storage(run.storage),
            ),
        )
        outcome = _fitted(trainer.fit, stop).return_value
    if outcome == STOPPED:
        raise TrainingStopped
    if outcome:
        raise TrainingError(outcome)


def _fitted(fit: Callable[[], Any], stop: StopRequest) -> Any:
    """Call Ray Train's `fit` in a thread and return its result.

    In the main thread Ray Train would handle Ctrl-C itself and abort the workers without a checkpoint.

    Raises
    ------
    TrainingStopped
        Training has not ended `STOP_SECONDS` after a stop request.
    """
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(fit())
        except BaseException as error:  # noqa: BLE001 - `result` raises it again
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="ndreamer-fit").start()
    while not stop():
        if wait([outcome], timeout=POLL_SECONDS).done:
            return outcome.result()
    if not wait([outcome], timeout=STOP_SECONDS).done:
        raise TrainingStopped
    return outcome.result()


@contextmanager
def _stopped_by_hand() -> Iterator[None]:
    """Turn `TrainingStopped` into `KeyboardInterrupt`, so that no later stage runs."""
    try:
        yield
    except TrainingStopped:
        raise KeyboardInterrupt from None


@contextmanager
def _failures_explained(run: RunDirectory) -> Iterator[None]:
    """Raise the package's own error inside a Ray Train failure; `DamagedError` if Ray Train cannot read its files."""
    import ray.train

    try:
        yield
    except ray.train.WorkerGroupError as error:
        causes = filter(None, map(own_cause, error.worker_failures.values()))
        raise next(causes, error) from None
    except ray.train.ControllerError as error:
        cause = error.controller_failure
        if type(cause).__name__ != "CheckpointManagerInitializationError" or "same Ray version" in str(cause):
            raise
        url = f"{run.url}/{keys.TRAIN_DIR}/{SNAPSHOT}"
        raise DamagedError.of(url, cause) from error


def _train_storage(storage: Storage) -> dict[str, Any]:
    """Return Ray Train's storage settings: a local path, or a remote path with its fsspec file system."""
    if storage.is_local:
        return {"storage_path": storage.root}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": storage.root, "storage_filesystem": PyFileSystem(FSSpecHandler(storage.filesystem))}


def _worker(config: dict[str, Any]) -> str | None:
    """Train on one worker; Ray Train calls this on every worker.

    Returns
    -------
    The message of an error that a retry would meet again, `STOPPED` after a stop request, else None.
    """
    import ray.train
    import ray.train.torch

    run, settings, packed, plan, display = (config[name] for name in ("run", "settings", "packed", "plan", "display"))
    torch.set_num_threads(settings.train.threads)
    context = ray.train.get_context()
    place = (context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        add_in_order()
        torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs cannot be recorded on the default stream
    together, collective = collectives_of(place[1], device.type)
    state = _fresh(settings, packed, device)
    checkpoint = _ray_checkpoint(run) or latest_serial(run.storage)
    if checkpoint is not None:
        state.load_bytes(checkpoint.files, checkpoint.url)
    schedule = Schedule(settings.train, together, device, stop=display.stop_asked)
    reporter = Reporter(run, settings, plan, state, schedule, display if place[0] == 0 else None, _save_on_ray)
    resident = resident_matrix(settings, packed, device)
    if resident is None:
        batches = mini_batches(packed, plan, place, state.step, device)
        batches = watched(batches, lambda: display.warn("late", LATE), LATE_SECONDS)
    else:
        display.warn("resident", f"train: {resident.nbytes / 1e9:.1f} GB of expression stay on the GPU", logging.INFO)
        batches = prepared_ahead(resident_batches(resident, RowLabels.of(packed), plan, place, state.step))
    alone_on_gpu = device.type == "cuda" and place[1] == 1
    try:
        reporter.train(batches, packed, collective, GraphedSteps() if alone_on_gpu and settings.train.graphs else None)
    except TrainingError as error:
        # Every worker gets the same loss, and a retry would get it again, so Ray Train must not see a failure.
        return str(error)
    except TrainingStopped:
        return STOPPED
    except torch.OutOfMemoryError as error:  # a retry would run out of memory again
        return f"the GPU has too little memory ({str(error).splitlines()[0]}); use a smaller --set train.batch_size"
    return None


def collectives_of(workers: int, device: str) -> tuple[Collective, Collective]:
    """Return the collective for checkpoints, and that of a step: by cells, or on GPUs by codebooks."""
    together = Distributed() if workers > 1 else Single()
    return together, ByBooks() if workers > 1 and device == "cuda" else together


def resident_matrix(settings: Settings, packed: Packed, device: torch.device) -> Resident | None:
    """Copy the packed matrix to a GPU if half of the free memory holds it."""
    if device.type != "cuda" or not settings.train.resident:
        return None
    resident = Resident.of(packed, device, torch.cuda.mem_get_info(device)[0] // 2)
    torch.cuda.synchronize(device)  # another stream reads it
    return resident


def _ray_checkpoint(run: RunDirectory) -> Checkpoint | None:
    """Return Ray Train's last checkpoint, if any."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    url = f"{run.url}/{keys.TRAIN_DIR}/{PurePath(checkpoint.path).name}"
    with checkpoint.as_directory() as folder:
        return Checkpoint(url, {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def _save_on_ray(state: TrainState) -> None:
    """Write a checkpoint with the files of the first worker; `ray.train.report` waits for all workers."""
    import ray.train

    measures = {"step": state.step, "total": state.measures[-1]["total"]}
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(measures)
        return
    folder = tempfile.mkdtemp(prefix="ndreamer-checkpoint-")
    for name, data in state.to_bytes().items():
        (Path(folder) / name).write_bytes(data)
    ray.train.report(
        measures,
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
