"""Run tasks on Ray, or one after the other in this process.

Both runtimes have the same methods, so each stage is written once. `map` runs idempotent tasks and yields their answers
in order of completion. `put` shares a value. `submit` starts one task and leaves its answers on the node that computed
them; `fetch` gets them. The serial runtime serves small data, debugging and most tests.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from ndreamer_dist.compute import events
from ndreamer_dist.compute.local_ray import on_a_cluster, sigterm_kept, start_ray
from ndreamer_dist.compute.machine import cpu_count, has_gpu, use_writable_caches
from ndreamer_dist.errors import NDreamerError, ResourceError, RunError
from ndreamer_dist.settings import RunSettings, Settings, TrainSettings

WORKER_CPUS = 0.5
"""Processors that a training worker reserves; the rest stay free for the readers that feed it."""
READER_CPUS = 0.5
"""Processors that a reader reserves: two processors hold one training worker and three readers."""
CANCEL_SECONDS = 5
"""How long a cancelled task may take to end before its process is killed."""
LEAST_SHARED_CELLS = 30_000
"""Break-even number of cells processed in parallel outside training: they save as much time as a local Ray costs.

Measured in processor seconds on a busy machine (docs/benchmarks-log.md).
"""
LONGEST_LOSS = 400
"""Largest number of characters shown of an error of Ray."""
RETRIES = 3
"""Retries of a task whose process or node is lost."""
ITEMS_AT_ONCE = 2
"""Items queued at the process of a GPU, so that it does not wait for the driver."""
NO_GPU_SECONDS = 120.0
"""Seconds to wait for a GPU before a warning."""
Task = TypeVar("Task", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """Runs the tasks of a stage, and shares values among them."""

    progress: bool | None

    @property
    def serial(self) -> bool:
        """Whether everything runs in this process."""
        ...

    @property
    def cpus(self) -> int:
        """Processors of the cluster."""
        ...

    @property
    def gpus(self) -> int:
        """GPUs of the cluster."""
        ...

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, title: str, num_gpus: float = 0
    ) -> Iterator[Any]:
        """Call `function(item, *shared)` for every item; yield the answers in order of completion."""
        ...

    def put(self, value: Any) -> Any:
        """Share a value and return a handle, which `fetch` resolves in any task."""
        ...

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        """Start one task of `returns` answers and return a handle for each, without waiting."""
        ...


def fetch(handle: Any) -> Any:
    """Return the value behind a handle, in the driver or in a task, under either runtime.

    If the task failed with an error of this package or of the system, that error is raised, without Ray's traceback.
    """
    if isinstance(handle, Deferred):
        return handle.value()
    import ray

    try:
        return ray.get(handle)
    except ray.exceptions.RayTaskError as error:
        raise own_cause(error) or error from None


class Deferred:
    """The serial runtime's handle: an answer of a call that `value` runs."""

    def __init__(self, call: Callable[[], Any], index: int | None = None) -> None:
        self._call = call
        self._index = index

    def value(self) -> Any:
        """Run the call, and return its answer, or the one at `index`."""
        answer = self._call()
        return answer if self._index is None else answer[self._index]


class SerialRuntime:
    """Runs tasks in this process, one after the other."""

    serial = True
    cpus = 1
    gpus = 0

    def __init__(self, settings: RunSettings) -> None:
        self.progress = settings.bars
        self._threads = settings.task_threads

    def __enter__(self) -> SerialRuntime:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, title: str, num_gpus: float = 0
    ) -> Iterator[Any]:
        """See `Runtime.map`."""
        del num_gpus
        with progress_bar(items := list(items), title, self.progress) as advance:
            for item in items:
                yield with_threads(self._threads, function, item, *shared)
                advance(0)

    def put(self, value: Any) -> Any:
        """See `Runtime.put`."""
        return Deferred(lambda: value)

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        """See `Runtime.submit`; a single answer is not cached, which keeps memory to that of one task."""
        call = partial(function, *args)
        if returns == 1:
            return [Deferred(call)]
        once = cache(call)
        return [Deferred(once, index) for index in range(returns)]


class RayRuntime:
    """Runs tasks on a Ray cluster, or on a local Ray that ends with the run; connects when a stage first has work.

    An existing connection to Ray is used as it is. `RAY_ADDRESS` (set inside a submitted job) or `run.address` names a
    cluster. Otherwise a local Ray is started with the container's processors and a modest object store.
    """

    serial = False

    def __init__(self, settings: RunSettings, task: TaskNeed | None = None) -> None:
        self.progress = settings.bars
        self._settings = settings
        self._task = task
        self._started = self._clustered = False

    @cached_property
    def _resources(self) -> dict[str, float]:
        """Resources of the cluster; the first access connects to it."""
        import ray

        self._clustered = on_a_cluster(self._settings)
        if not ray.is_initialized():
            with sigterm_kept():
                start_ray(self._settings)
            self._started = True
        if self._clustered and self._task is not None:
            check_nodes(self._task, cluster_nodes())
        return dict(ray.cluster_resources())

    @property
    def cpus(self) -> int:
        """Processors of the cluster, or `run.cpus` if larger: an autoscaled cluster grows on demand."""
        return max(1, int(self._resources.get("CPU", 1)), self._settings.cpus or 0)

    @property
    def gpus(self) -> int:
        """GPUs of the cluster, or `run.gpus` if larger."""
        return max(int(self._resources.get("GPU", 0)), self._settings.gpus or 0)

    def close(self) -> None:
        """Shut down a local Ray that this runtime started."""
        if self._started:
            import ray

            ray.shutdown()
        self._started = False
        self.__dict__.pop("_resources", None)

    def __enter__(self) -> RayRuntime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def map(
        self, function: Callable[..., Any], items: Iterable[Any], *shared: Any, title: str, num_gpus: float = 0
    ) -> Iterator[Any]:
        """See `Runtime.map`; without items Ray is not started.

        With `num_gpus`, one process per GPU works through the items (`GpuWorker`).
        """
        if not (waiting := list(items)):
            return
        import ray

        how = RoundOptions(title, self.cpus, _stage_name(), self._settings.task_threads)
        deal = self._by_gpus if num_gpus else self._by_tasks
        ends = deal(function, waiting, [ray.put(value) for value in shared], how)
        with progress_bar(waiting, title, self.progress) as advance, closing(ends):
            for done in ends:
                peak, answer = fetch(done)
                yield answer
                advance(peak)

    def _by_tasks(
        self, function: Callable[..., Any], items: list[Any], shared: list[Any], how: RoundOptions
    ) -> Generator[Any, None, None]:
        """Yield handles of finished tasks; two tasks per processor are submitted, so that none waits for the driver."""
        import ray

        remote = ray.remote(_with_peak).options(name=how.title, max_retries=RETRIES, **self._needs())
        queue = iter(items)
        running: set[Any] = set()
        try:
            while True:
                for item in itertools.islice(queue, 2 * how.cpus - len(running)):
                    running.add(remote.remote(how.stage, how.threads, function, item, *shared))
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1)
                running.difference_update(ready)
                yield from ready
        finally:
            _end(running)

    def _by_gpus(
        self, function: Callable[..., Any], items: list[Any], shared: list[Any], how: RoundOptions
    ) -> Generator[Any, None, None]:
        """Yield handles of finished items; the process of a GPU gets the next item when it has finished one.

        A process that still waits for its GPU, as on a growing cluster, gets no items.
        """
        import ray

        count = max(1, min(self.gpus, len(items)))
        retries = {"max_restarts": RETRIES, "max_task_retries": RETRIES}
        remote = ray.remote(GpuWorker).options(num_gpus=1, **retries, **self._needs())
        workers = [remote.remote(how.stage, how.threads) for _ in range(count)]
        share = min(ITEMS_AT_ONCE, -(-len(items) // count))  # no process takes the only item of another
        starting = {worker.ready.remote(): worker for worker in workers}
        running: dict[Any, Any] = {}
        queue = deque(items)
        try:
            while queue or running:
                done = _first_of([*starting, *running], late=not running)
                is_new = done in starting
                worker = (starting if is_new else running).pop(done)
                for _ in range(min(share if is_new else 1, len(queue))):
                    running[worker.do.options(name=how.title).remote(function, queue.popleft(), shared)] = worker
                if is_new:
                    fetch(done)  # raises if the process could not start
                else:
                    yield done
        finally:
            _end_workers(workers, list(running))

    def _needs(self) -> dict[str, Any]:
        """Return what Ray reserves for a task: a processor, and on a cluster its memory, so that no node runs out."""
        memory = self._task.memory if self._task is not None and self._clustered else 0
        return {"num_cpus": 1, "memory": memory or None}

    def put(self, value: Any) -> Any:
        """See `Runtime.put`."""
        import ray

        self._resources  # noqa: B018 - connects
        return ray.put(value)

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        """See `Runtime.submit`."""
        import ray

        self._resources  # noqa: B018 - connects
        options = {"name": function.__name__.strip("_"), "num_returns": returns}
        remote = ray.remote(_counted).options(max_retries=RETRIES, **options, **self._needs())
        handles = remote.remote(_stage_name(), self._settings.task_threads, function, *args)
        return [handles] if returns == 1 else list(handles)


@dataclass(frozen=True)
class RoundOptions:
    """The options of a round of tasks: title, number of processors, stage, and threads per task."""

    title: str
    cpus: int
    stage: str
    threads: int


class GpuWorker:
    """Actor that holds one GPU, and the data it has sent there, for all items of a round that it receives.

    Tasks are no alternative: Ray may give a reused process another GPU, but CUDA stays on the first one.
    """

    def __init__(self, stage: str, threads: int) -> None:
        self._stage, self._threads = stage, threads
        self._shared: list[Any] | None = None

    def ready(self) -> None:
        """Do nothing: an answer means that the process has its GPU."""

    def do(self, function: Callable[..., Any], item: Any, shared: list[Any]) -> tuple[int, Any]:
        """Return the peak memory of this process in the stage, and the answer for an item.

        The values behind the handles `shared` are fetched once. Handles given to the actor's constructor would not
        outlive a restart of the actor.
        """
        if self._shared is None:
            self._shared = [fetch(handle) for handle in shared]
        return _with_peak(self._stage, self._threads, function, item, *self._shared)


def _first_of(handles: list[Any], *, late: bool) -> Any:
    """Wait for the first ready handle; with `late`, warn if none is ready after `NO_GPU_SECONDS`."""
    import ray

    ready, _ = ray.wait(handles, num_returns=1, timeout=NO_GPU_SECONDS if late else None)
    if not ready:
        logger.warning(
            "no GPU was free for %.0f s; to go on without one: --set STAGE.device=cpu (train, embed, match)",
            NO_GPU_SECONDS,
        )
        ready, _ = ray.wait(handles, num_returns=1)
    return ready[0]


def _end_workers(workers: list[Any], running: list[Any]) -> None:
    """Kill the processes of GPUs, and wait until none of their items is running."""
    import ray

    for worker in workers:
        ray.kill(worker)
    if running:
        ray.wait(running, num_returns=len(running), timeout=CANCEL_SECONDS)


def loads(*modules: str) -> Callable[[Task], Task]:
    """Declare modules that a worker imports before it limits the threads of the decorated task.

    threadpoolctl limits only libraries that are already loaded, and the task's own module does not import these.
    """

    def marked(task: Task) -> Task:
        task.loads = modules  # type: ignore[attr-defined]
        return task

    return marked


def with_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with BLAS, OpenMP and torch limited to `threads` threads, which fixes the order of sums."""
    use_writable_caches()
    for name in getattr(function, "loads", ()):
        importlib.import_module(name)
    torch = sys.modules.get("torch")  # import it only if a task has done so
    if torch is None:
        with threadpool_limits(threads):
            return function(*args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            return function(*args)
    finally:
        torch.set_num_threads(before)


def _stage_name() -> str:
    stage = events.stage_now()
    return stage.name if stage else ""


def _counted(stage: str, threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a worker (see `with_threads`), and measure the peak memory of the stage."""
    events.count_peak(stage)
    return with_threads(threads, function, *args)


def _with_peak(*call: Any) -> tuple[int, Any]:
    """Call `_counted`; return the peak memory of this process in the stage, and the answer."""
    answer = _counted(*call)
    return events.peak_bytes(), answer


def _end(running: set[Any]) -> None:
    """Cancel tasks and wait until all have ended: a task that outlives an error could write into the next run.

    A task that does not end in `CANCEL_SECONDS`, such as one in a library's loop, is killed with its process.
    """
    import ray

    for seconds, force in ((CANCEL_SECONDS, False), (60, True)):
        for handle in running:
            ray.cancel(handle, force=force)
        if running:
            _, left = ray.wait(list(running), num_returns=len(running), timeout=seconds)
            running = set(left)


def own_cause(error: BaseException) -> Exception | None:
    """Return the `NDreamerError` or `OSError` inside Ray's wrapping; None for any other error."""
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not error:
        error = error.cause
    return error if isinstance(error, NDreamerError | OSError) else None


@contextmanager
def ray_failures() -> Iterator[None]:
    """Turn an error of Ray itself into one line, such as a lost node or a task that failed all its retries.

    Raises
    ------
    RunError
        In place of Ray's error, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if not _is_rays(error):
            raise
        what = " ".join(str(error).split())[:LONGEST_LOSS]
        msg = f"Ray failed ({type(error).__name__}: {what}); the same command continues from what is done"
        raise RunError(msg) from error


def _is_rays(error: Exception) -> bool:
    """Return whether an error is Ray's own; errors raised by a task are not."""
    if "ray" not in sys.modules:
        return False
    import ray

    own: tuple[type[Exception], ...] = (ray.exceptions.RayError,)
    if "ray.train" in sys.modules:
        own += (ray.train.ControllerError, ray.train.WorkerGroupError)
    return isinstance(error, own) and not isinstance(error, ray.exceptions.RayTaskError)


@contextmanager
def progress_bar(items: list[Any], title: str, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar for a round of tasks, by default only on a terminal, and record its progress.

    Yields
    ------
    A function to call after every item with the peak memory of its worker (0 in this process).
    """
    stage = events.stage_now() or events.StageProgress("")
    stage.begin(title, len(items))
    with tqdm(
        total=len(items), desc=events.titled(title), disable=None if shown is None else not shown, leave=True
    ) as bar:

        def advance(peak: int) -> None:
            stage.note_peak(peak)
            stage.advance()
            bar.update()

        yield advance


@dataclass(frozen=True)
class RuntimeChoice:
    """Whether a run works in this process alone, and why."""

    serial: bool
    why: str

    def __str__(self) -> str:
        return f"{'this process, without Ray' if self.serial else 'Ray'}: {self.why}"

    def applied(self, settings: Settings) -> Settings:
        """Return a copy of the settings with `run.serial` set to the choice."""
        return settings.model_copy(update={"run": settings.run.model_copy(update={"serial": self.serial})})


def runtime_choice(settings: Settings, cells: int) -> RuntimeChoice:
    """Choose between Ray and this process: both give the same bits, and starting a local Ray takes time.

    Parameters
    ----------
    cells
        Number of cells of the run.
    """
    run, train = settings.run, settings.train
    if run.serial is not None:
        return RuntimeChoice(run.serial, f"run.serial is {str(run.serial).lower()}")
    for needed, why in (
        (on_a_cluster(run), "a cluster is named"),
        (run.object_store_gb is not None, "run.object_store_gb says how it starts"),
        (train.workers > 1, f"{train.workers} training workers"),
        (train.device != "cpu" and has_gpu(), "a GPU is there to train on"),
    ):
        if needed:
            return RuntimeChoice(serial=False, why=why)
    cpus = run.cpus or cpu_count()  # set explicitly by workflow managers for small data, too
    if cpus == 1:
        return RuntimeChoice(serial=True, why="there is one processor")
    least = math.ceil(LEAST_SHARED_CELLS * cpus / (cpus - 1))
    small = cells < least
    compared = "fewer than" if small else "at least"
    why = f"{cells:,} cells are {compared} the {least:,} from which a local Ray on {cpus} processors saves time"
    other = "--set run.serial=false starts Ray" if small else "--set run.serial=true does without"
    return RuntimeChoice(small, f"{why} ({other})")


def choose_runtime(settings: RunSettings, task: TaskNeed | None = None) -> SerialRuntime | RayRuntime:
    """Return the runtime of the settings; use it as a context manager, which shuts down a local Ray.

    Parameters
    ----------
    task
        The largest task of the run, which the nodes of a cluster must be able to hold.
    """
    return SerialRuntime(settings) if settings.serial else RayRuntime(settings, task)


@dataclass(frozen=True)
class TaskNeed:
    """The largest task of a run: its stage, and its memory in bytes, process included."""

    stage: str
    memory: int


@dataclass(frozen=True)
class Node:
    """A node of a Ray cluster: its address, its processors, and its memory for tasks in bytes."""

    address: str
    cpus: int
    memory: int


def cluster_nodes() -> list[Node]:
    """Return the nodes that currently accept tasks, as Ray reports them."""
    import ray

    taking = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return [Node(n["NodeManagerAddress"], int(n["Resources"]["CPU"]), int(n["Resources"]["memory"])) for n in taking]


def check_nodes(task: TaskNeed, nodes: Iterable[Node]) -> None:
    """Check that a node of the cluster can hold the largest task.

    Raises
    ------
    ResourceError
        No node can; the message names the largest node and says what to change.
    """
    node = max(nodes, key=lambda node: node.memory, default=None)
    if node is None or task.memory <= node.memory:
        return
    msg = (
        f"stage {task.stage!r} takes {task.memory / 1e9:.1f} GB a task, and the largest node, {node.address}, has "
        f"{node.memory / 1e9:.1f} GB for tasks; take smaller blocks (--set pack.block_rows=1024) or larger machines"
    )
    raise ResourceError(msg)


def check_layout(settings: TrainSettings, cpus: int, gpus: Callable[[], int]) -> None:
    """Check that training workers leave processors to their readers, without which training would wait for ever.

    Raises
    ------
    ResourceError
        Too many workers for the processors, or `train.device` is `cuda` and there are too few GPUs. `gpus` counts them,
        and is called for `cuda` only.
    """
    workers = settings.workers
    if workers * WORKER_CPUS + READER_CPUS > cpus:
        msg = (
            f"{workers} training workers on {cpus} processors leave none to the readers that feed them; "
            f"use at most --workers {max(1, int((cpus - READER_CPUS) / WORKER_CPUS))}"
        )
        raise ResourceError(msg)
    if settings.device == "cuda" and (present := gpus()) < workers:
        msg = f"{workers} training workers need {workers} GPUs and Ray has {present}; use --set train.device=cpu"
        raise ResourceError(msg)
