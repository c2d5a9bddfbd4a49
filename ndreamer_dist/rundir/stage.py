"""Drive a stage: find its unfinished shards, do them and mark them.

If no shard is finished, what an earlier key left is deleted and the stage starts anew. Otherwise only the unfinished
shards are done. `planning/stages.py` lists the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.rundir.directory import RunDirectory, Shard


@dataclass(frozen=True)
class StageRun:
    """A stage of a run with its key; cheap to create and safe to send to a task."""

    run: RunDirectory
    name: str
    key: str

    def begin(self, shards: Sequence[Shard], stale: Sequence[str] = ()) -> list[Shard]:
        """Return the unfinished shards of the stage.

        Parameters
        ----------
        stale
            Files and folders in the stores of the shards, which are deleted if no shard is finished under this key.
        """
        todo, there = self.run.pending_and_there(self.name, self.key, shards)
        if todo and len(todo) == len(shards):
            self.run.unmark(self.name)
            for name in stale:
                if any(f"{file}/".startswith(f"{name}/") for file in there):  # a delete in vain costs requests
                    self.run.storage.delete(name)
        return todo

    def mark(
        self, shard: Shard, facts: Mapping[str, Any] | None = None, *, sizes: Mapping[str, int] | None = None
    ) -> None:
        """Mark a shard as done; its files must be complete (see `RunDirectory.mark`)."""
        self.run.mark(self.name, self.key, shard, facts, sizes=sizes)

    def do(self, function: Callable[..., object], shard: Shard, *args: Any) -> None:
        """Call `function(shard.task, *args)` and mark the shard."""
        function(shard.task, *args)
        self.mark(shard)

    def map(
        self,
        runtime: Runtime,
        function: Callable[..., object],
        shards: Sequence[Shard],
        *shared: Any,
        title: str = "",
        num_gpus: float = 0,
    ) -> None:
        """Call `function(shard.task, *shared)` for every shard, as tasks of a runtime; each task marks its shard.

        Parameters
        ----------
        title
            Title of the progress bar; by default the name of the stage.
        num_gpus
            GPUs that every task needs.
        """
        for _ in runtime.map(_Task(self, function), shards, *shared, title=title or self.name, num_gpus=num_gpus):
            pass


@dataclass(frozen=True)
class _Task:
    """The work of a task: do one shard and mark it. It imports what its function imports (see `executor.loads`)."""

    stage: StageRun
    function: Callable[..., object]

    @property
    def loads(self) -> tuple[str, ...]:
        return getattr(self.function, "loads", ())

    def __call__(self, shard: Shard, *shared: Any) -> None:
        self.stage.do(self.function, shard, *shared)
