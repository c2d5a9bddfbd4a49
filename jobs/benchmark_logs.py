"""Measure the cost of logs and checkpoints in a long training: `python jobs/benchmark_logs.py [--steps 100000] [--groups 16]`.

The reporter of the job is called after each of many steps that are not computed, with a clock that advances by `--step-ms` per
step. This measures the reading of measures, the display, the sums of epochs, the logs, and the checkpoints of the paper
preset's network on a local disk, without Ray's calls and uploads. A row per tenth of the steps shows whether the cost of a
step grows with the number of steps.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.model.losses import Terms
from ndreamer_dist.rundir.directory import RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.training.checkpoints import Schedule, save_serial
from ndreamer_dist.training.loop import TrainState
from ndreamer_dist.training.progress import own_screen
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.trainer import Reporter

GENES, CELLS_OF_A_GROUP = 2000, 10_000


@dataclass
class Steps:
    """A training whose steps take no time, with a simulated clock."""

    state: TrainState
    seconds: float
    names: tuple[str, ...]
    codebooks: int

    def clock(self) -> float:
        """Return the seconds of the steps so far."""
        return self.state.step * self.seconds

    def take(self, random: np.random.Generator) -> None:
        """Record random measures for a step."""
        self.state.step += 1
        self.state.measures.append(
            {"step": self.state.step, **dict(zip(self.names, random.random(len(self.names)), strict=True))}
        )
        self.state.perplexities.append(random.random(self.codebooks).tolist())


def measured(count: int, groups: int, step_ms: float, folder: Path) -> list[float]:
    """Return the processor seconds of every tenth of the steps."""
    settings = Settings.build(preset="paper", overrides={"run.serial": True, "run.progress": False})
    starts = np.arange(groups + 1) * CELLS_OF_A_GROUP
    plan = SamplingPlan(tuple(starts.tolist()), settings.train.batch_size, 1, settings.seed)
    plan = replace(plan, epochs=-(-count // plan.steps_per_epoch))
    state = TrainState.fresh(settings, genes=GENES, conditions=2, batch_levels=(groups,))
    names = (
        "total",
        *(field.name for field in fields(Terms)),
        "learning_rate",
        "perplexity",
        "cells_per_second",
        "waiting",
        "seconds",
    )
    steps, run, random = (
        Steps(state, step_ms / 1000, names, settings.model.codebooks),
        RunDirectory.at(folder),
        np.random.default_rng(0),
    )
    spent = []
    with own_screen(plan, SerialRuntime(settings.run), lambda: False) as shown:
        schedule = Schedule(settings.train, Single(), clock=steps.clock)
        reporter = Reporter(
            run, settings, plan, state, schedule, shown, lambda s: save_serial(run.storage, s.step, s.to_bytes())
        )
        for _ in range(10):
            began = time.process_time()
            for _ in range(count // 10):
                steps.take(random)
                reporter.after_step()
            spent.append(time.process_time() - began)
    sizes = run.storage.list(keys.LOGS)
    print(", ".join(f"{name}: {size / 1e6:.1f} MB" for name, size in sizes.items()))
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=10.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spent = measured(given.steps, given.groups, given.step_ms, Path(folder))
    whole = given.steps * given.step_ms / 1000
    print("processor seconds of every tenth: " + ", ".join(f"{seconds:.2f}" for seconds in spent))
    print(f"in all {sum(spent):.1f} s of {whole:.0f} s of training: {sum(spent) / whole:.2%}")


if __name__ == "__main__":
    main()
