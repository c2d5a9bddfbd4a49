"""Run tasks on Ray, or one after the other in this process.

Both runtimes have the same verbs, so each stage is written once. `map` runs idempotent tasks and yields their answers in
order of completion. `put` shares a value. `submit` starts one task and leaves its answers where they were made; `fetch`
gets them. The serial runtime serves small data, debugging and most tests.
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
"""Processors a training worker reserves: the rest stay free for the readers that feed it."""
READER_CPUS = 0.5
"""Processors a reader reserves: with a training worker's half, two processors hold three readers."""
CANCEL_SECONDS = 5
"""How long a cancelled task may take to end by itself."""
LEAST_SHARED_CELLS = 30_000
"""Cells whose work outside training, done on other processors, saves as much time as a local Ray costs.

Measured in processor seconds on a busy machine (docs/benchmarks-log.md).
"""
LONGEST_LOSS = 400
"""Most characters of one of Ray's errors that are shown."""
TRIES = 3
"""Retries of a task whose process or machine is lost."""
ITEMS_AT_ONCE = 2
"""Items that are queued at the process of a GPU, so that it does not wait for the driver."""
NO_GPU_SECONDS = 120.0
"""Seconds to wait for a GPU before a warning."""
Task = TypeVar("Task", bound=Callable[..., Any])
logger = logging.getLogger(__name__)


class Runtime(Protocol):
    """What a stage runs in: it runs tasks and shares values."""

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
        """Share a value; `fetch` gives it back in any task."""
        ...

    def submit(self, function: Callable[..., Any], *args: Any, returns: int = 1) -> list[Any]:
        """Start one task of `returns` answers and return a handle for each, without waiting."""
        ...


def fetch(handle: Any) -> Any:
    """Return the value behind a handle, in the driver or in a task, under either runtime."""
    if isinstance(handle, Deferred):
        return handle.value()
    import ray

    return _unwrapped(lambda: ray.get(handle))


class Deferred:
    """The serial runtime's handle: one answer of a call that runs when it is first wanted."""

    def __init__(self, call: Callable[[], Any], index: int | None = None) -> None:
        self._call = call
        self._index = index

    def value(self) -> Any:
        """Return the answer."""
        answer = self._call()
        return answer if self._index is None else answer[self._index]


class SerialRuntime:
    """Everything in this process, one after the other."""

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
        """See `Runtime.submit`; nothing is kept, so that memory is what one task needs."""
        call = partial(function, *args)
        if returns == 1:
            return [Deferred(call)]
        once = cache(call)
        return [Deferred(once, index) for index in range(returns)]


class RayRuntime:
    """Tasks on a Ray cluster, or on a local Ray that ends with the run; connected when a stage first has work.

    A Ray that is already connected is used as it is; `RAY_ADDRESS` (set inside a submitted job) and `run.address` name
    a cluster; otherwise a local Ray is started with the container's processors and a modest object store.
    """

    serial = False

    def __init__(self, settings: RunSettings, task: TaskNeed | None = None) -> None:
        self.progress = settings.bars
        self._settings = settings
        self._task = task
        self._started = self._clustered = False

    @cached_property
    def _resources(self) -> dict[str, float]:
        """Resources of the cluster; connects to it."""
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
        """Processors of the cluster; an autoscaled one grows as it is asked to, so of what it may become."""
        return max(1, int(self._resources.get("CPU", 1)), self._settings.cpus or 0)

    @property
    def gpus(self) -> int:
        """GPUs of the cluster, or of what it may become."""
        return max(int(self._resources.get("GPU", 0)), self._settings.gpus or 0)

    def close(self) -> None:
        """End a local Ray that was started here."""
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
        """See `Runtime.map`. Without items nothing is started.

        With `num_gpus` a process for each GPU does one item after the other (`GpuWorker`).
        """
        if not (waiting := list(items)):
            return
        import ray

        how = Way(title, self.cpus, _stage_name(), self._settings.task_threads)
        deal = self._by_gpus if num_gpus else self._by_tasks
        ends = deal(function, waiting, [ray.put(value) for value in shared], how)
        with progress_bar(waiting, title, self.progress) as advance, closing(ends):
            for done in ends:
                peak, answer = fetch(done)
                yield answer
                advance(peak)

    def _by_tasks(
        self, function: Callable[..., Any], items: list[Any], shared: list[Any], how: Way
    ) -> Generator[Any, None, None]:
        """Yield handles of finished tasks; twice as many as processors are under way, so that none waits for the driver."""
        import ray

        remote = ray.remote(_with_peak).options(name=how.title, max_retries=TRIES, **self._needs())
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
        self, function: Callable[..., Any], items: list[Any], shared: list[Any], how: Way
    ) -> Generator[Any, None, None]:
        """Yield handles of finished items; the process of a GPU gets the next item when one is done.

        A process that still waits for its GPU, as on a cluster that grows, gets none.
        """
        import ray

        count = max(1, min(self.gpus, len(items)))
        tries = {"max_restarts": TRIES, "max_task_retries": TRIES}
        remote = ray.remote(GpuWorker).options(num_gpus=1, **tries, **self._needs())
        workers = [remote.remote(how.stage, how.threads, shared) for _ in range(count)]
        starting = {worker.ready.remote(): worker for worker in workers}
        running: dict[Any, Any] = {}
        queue = deque(items)
        try:
            while queue or running:
                done = _first_of([*starting, *running], late=not running)
                worker, dealt = (starting.pop(done), ITEMS_AT_ONCE) if done in starting else (running.pop(done), 1)
                for item in [queue.popleft() for _ in range(min(dealt, len(queue)))]:
                    running[worker.do.options(name=how.title).remote(function, item)] = worker
                if dealt == 1:
                    yield done
                else:
                    fetch(done)
        finally:
            _end_workers(workers, list(running))

    def _needs(self) -> dict[str, Any]:
        """Return what Ray reserves for a task: on a cluster its memory too, so that no node takes more than it holds."""
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
        remote = ray.remote(_counted).options(max_retries=TRIES, **options, **self._needs())
        handles = remote.remote(_stage_name(), self._settings.task_threads, function, *args)
        return [handles] if returns == 1 else list(handles)


@dataclass(frozen=True)
class Way:
    """The options of a round of tasks: its title, processors, the stage, and threads of one task."""

    title: str
    cpus: int
    stage: str
    threads: int


class GpuWorker:
    """A process that keeps one GPU, and what it has put there, for all items of a round that are dealt to it.

    Tasks would not do: Ray lets a process that has worked on one GPU go on with another, which CUDA does not follow.
    """

    def __init__(self, stage: str, threads: int, shared: list[Any]) -> None:
        self._stage, self._threads = stage, threads
        self._shared = [fetch(handle) for handle in shared]  # once: the same objects for every item

    def ready(self) -> None:
        """Return once the process has its GPU."""

    def do(self, function: Callable[..., Any], item: Any) -> tuple[int, Any]:
        """Return the most memory that this process has held in the stage, and the answer."""
        return _with_peak(self._stage, self._threads, function, item, *self._shared)


def _first_of(handles: list[Any], *, late: bool) -> Any:
    """Return the first handle that is ready; with `late`, warn if no GPU comes for long."""
    import ray

    ready, _ = ray.wait(handles, num_returns=1, timeout=NO_GPU_SECONDS if late else None)
    if not ready:
        logger.warning(
            "no GPU has come for %.0f s; without one: --set STAGE.device=cpu (train, embed, match)", NO_GPU_SECONDS
        )
        ready, _ = ray.wait(handles, num_returns=1)
    return ready[0]


def _end_workers(workers: list[Any], running: list[Any]) -> None:
    """End the processes of GPUs, and wait until nothing of theirs is under way."""
    import ray

    for worker in workers:
        ray.kill(worker)
    if running:
        ray.wait(running, num_returns=len(running), timeout=CANCEL_SECONDS)


def loads(*modules: str) -> Callable[[Task], Task]:
    """Declare modules that a worker imports before it limits the threads of a task.

    threadpoolctl limits only libraries that are loaded already; the module of the task does not import them.
    """

    def marked(task: Task) -> Task:
        task.loads = modules  # type: ignore[attr-defined]
        return task

    return marked


def with_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with BLAS, OpenMP and torch held to `threads` threads: sums then have one order everywhere."""
    use_writable_caches()
    for name in getattr(function, "loads", ()):
        importlib.import_module(name)
    torch = sys.modules.get("torch")  # a task that needs none does not wait for it
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
    """Call a function in a worker (see `with_threads`), which counts its memory for this stage."""
    events.count_peak(stage)
    return with_threads(threads, function, *args)


def _with_peak(*call: Any) -> tuple[int, Any]:
    """Do what `_counted` does; return the most memory that this process has held in the stage, and the answer."""
    answer = _counted(*call)
    return events.peak_bytes(), answer


def _end(running: set[Any]) -> None:
    """Cancel tasks and wait until none is left: one that wrote on after an error could write into the next run.

    One that does not end, since it is inside a library's loop, loses its process.
    """
    import ray

    for seconds, force in ((CANCEL_SECONDS, False), (60, True)):
        for handle in running:
            ray.cancel(handle, force=force)
        if running:
            _, left = ray.wait(list(running), num_returns=len(running), timeout=seconds)
            running = set(left)


def _unwrapped(call: Callable[[], Any]) -> Any:
    """Run a Ray call and raise what the task raised, without Ray's own trace around it."""
    import ray

    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        raise own_cause(error) or error from None


def own_cause(error: BaseException) -> Exception | None:
    """Return the error of this package or of the system inside Ray's wrapping; none if it is another one."""
    import ray

    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not error:
        error = error.cause
    return error if isinstance(error, NDreamerError | OSError) else None


@contextmanager
def ray_failures() -> Iterator[None]:
    """Turn an error of Ray itself into one line: it lost its own node, or retries did not help.

    Raises
    ------
    RunError
        In place of Ray's error, which is behind it.
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
    """Return whether an error is Ray's own, and not that of a task or of the training."""
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

    Yields a function to call after every item with the peak memory of its worker (0 in this process).
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
        """Return the settings with the choice in the place of `auto`."""
        return settings.model_copy(update={"run": settings.run.model_copy(update={"serial": self.serial})})


def runtime_choice(settings: Settings, cells: int) -> RuntimeChoice:
    """Choose where a run works: both ways give the same bits, and a local Ray costs time before it saves any.

    Parameters
    ----------
    cells
        Cells of the run.
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
    cpus = run.cpus or cpu_count()  # workflow managers name them for small data, too
    if cpus == 1:
        return RuntimeChoice(serial=True, why="there is one processor")
    least = math.ceil(LEAST_SHARED_CELLS * cpus / (cpus - 1))
    small = cells < least
    compared = "fewer than" if small else "at least"
    why = f"{cells:,} cells are {compared} the {least:,} from which a local Ray on {cpus} processors saves time"
    other = "--set run.serial=false starts Ray" if small else "--set run.serial=true does without"
    return RuntimeChoice(small, f"{why} ({other})")


def choose_runtime(settings: RunSettings, task: TaskNeed | None = None) -> SerialRuntime | RayRuntime:
    """Return the runtime that the settings ask for; use it in a `with` block, which ends a local Ray started for it.

    Parameters
    ----------
    task
        The largest task of the run; the nodes of a cluster are compared with it once it is connected.
    """
    return SerialRuntime(settings) if settings.serial else RayRuntime(settings, task)


@dataclass(frozen=True)
class TaskNeed:
    """The largest of a run's tasks: its stage, and the bytes that it takes with its process."""

    stage: str
    memory: int


@dataclass(frozen=True)
class Node:
    """A machine of a Ray cluster: its address, its processors, and the bytes that its tasks may take."""

    address: str
    cpus: int
    memory: int


def cluster_nodes() -> list[Node]:
    """Return the nodes that take tasks now, as Ray reports them."""
    import ray

    taking = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    return [Node(n["NodeManagerAddress"], int(n["Resources"]["CPU"]), int(n["Resources"]["memory"])) for n in taking]


def check_nodes(task: TaskNeed, nodes: Iterable[Node]) -> None:
    """Refuse a cluster of which no node can hold the largest task; Ray runs as many of them on a node as it can hold.

    Raises
    ------
    ResourceError
        The message names the largest node, and says what to change.
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
    """Refuse a layout in which readers could never start: training would wait for ever.

    Raises
    ------
    ResourceError
        More workers than processors leave room for, or `cuda` asked for where there is none; only then GPUs are counted.
    """
    workers = settings.workers
    if workers * WORKER_CPUS + READER_CPUS > cpus:
        msg = (
            f"{workers} training workers on {cpus} processors leave none to the readers that feed them; "
            f"use at most --workers {max(1, int((cpus - READER_CPUS) / WORKER_CPUS))}"
        )
        raise ResourceError(msg)
    if settings.device == "cuda" and (found := gpus()) < workers:
        msg = f"{workers} training workers need {workers} GPUs and Ray has {found}; use --set train.device=cpu"
        raise ResourceError(msg)
