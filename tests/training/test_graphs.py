"""Replaying a recorded step, on the memory of its recording, gives the same bits as an ordinary step."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from ndreamer_dist.model import batch as batches
from ndreamer_dist.model import noise
from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.training import loop
from ndreamer_dist.training.densify import densify_for_gpu, sizes_ahead
from ndreamer_dist.training.graphs import GraphedSteps
from ndreamer_dist.training.windows import read_window, windows
from tests.training.helpers import SETTINGS, Cohort, fresh, weights

STEPS = 14


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort.write(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(autouse=True)
def as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pad mini-batches and draw their noise on the CPU as on a GPU."""
    for padded in (
        batches.ROW_MULTIPLE, batches.MEMBER_MULTIPLE, batches.GROUP_MULTIPLE, batches.LEAST_RELATIVE_SIZE,
        batches.PAIRS_AT_ONCE,
    ):  # fmt: skip
        monkeypatch.setitem(padded, "cpu", padded["cuda"])
    monkeypatch.setattr(noise, "draw", noise.draw_on_device)


def made(cohort: Cohort) -> Iterator[MiniBatch]:
    least = sizes_ahead(cohort.labels, cohort.plan)
    shares = (
        share for steps in windows(cohort.plan, 0) for share in read_window(cohort.packed, cohort.plan, steps, 0, 1)
    )
    for share in shares:
        yield densify_for_gpu(share, cohort.labels, cohort.plan, (0, 1), torch.device("cpu"), least)


@dataclass
class Recorder:
    """Test double of CUDA's recorder: a replay runs the recorded step again on its recorded mini-batch."""

    recorded: int = 0
    replayed: int = 0
    fails: bool = False

    def __call__(self, step: Callable[[], Any]) -> Callable[[], Any]:
        if self.fails:
            msg = "operation not permitted when stream is capturing\nand more"
            raise RuntimeError(msg)
        self.recorded += 1

        def replay() -> Any:
            self.replayed += 1
            return step()

        return replay


def trained(cohort: Cohort, take: Any = None, steps: int = STEPS) -> tuple[list[torch.Tensor], list[float]]:
    state = fresh()
    mini_batches = itertools.islice(made(cohort), steps)
    loop.train(state, mini_batches if take is None else map(spoilt, mini_batches), SETTINGS, Single(), take=take)
    return weights(state), [row["total"] for row in state.measures]


def spoilt(batch: MiniBatch) -> MiniBatch:
    """Overwrite what is not copied to the memory of a graph, which must not read it."""
    if batch.step <= 4:
        return batch
    nothing = torch.full_like(batch.condition, -1)
    return replace(batch, condition=nothing, group=nothing, low=nothing, high=nothing, batch=batch.batch * 0 - 1)


def test_recorded_steps_have_the_bits_of_plain_ones_and_read_nothing_but_what_is_copied_to_them(
    cohort: Cohort,
) -> None:
    recorder = Recorder()
    (ours, losses), (plain, known) = trained(cohort, GraphedSteps(recorder)), trained(cohort)
    assert losses == known
    assert all(map(torch.equal, ours, plain))
    # An epoch has two steps, the second with half as many cells. The first step of each size is ordinary, the second is
    # recorded; recording replays a step once, to compare it.
    assert (recorder.recorded, recorder.replayed) == (2, STEPS - 2 + 2)  # 2 ordinary steps, 2 comparisons


def test_a_recording_that_does_something_else_is_noticed_and_not_used(
    cohort: Cohort, caplog: pytest.LogCaptureFixture
) -> None:
    def twice(step: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (step(), step())[1]

    with caplog.at_level(logging.WARNING, "ndreamer_dist"):
        (ours, losses), (plain, known) = trained(cohort, GraphedSteps(twice), steps=4), trained(cohort, steps=4)
    assert losses == known
    assert all(map(torch.equal, ours, plain))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith("a recorded step differs from an ordinary one")


def test_what_cannot_be_recorded_is_said_once_and_steps_are_plain(
    cohort: Cohort, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ndreamer_dist"):
        _, losses = trained(cohort, GraphedSteps(Recorder(fails=True)), steps=4)
    assert len(losses) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "train: steps are taken without a CUDA graph: operation not permitted when stream is capturing"
    ]
