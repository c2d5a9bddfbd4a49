"""The loop learns, is keyed by the step alone, and says when it cannot go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.model.collectives import Single
from ndreamer_dist.settings import Settings
from ndreamer_dist.stream.plan import SamplingPlan
from ndreamer_dist.stream.source import RowLabels, densify, read_window, windows
from ndreamer_dist.train.loop import TrainingError, TrainState, train
from tests.cohorts import packed_cohort

SETTINGS = Settings.build(
    preset="small",
    overrides={
        "model.encoder": [32, 16], "model.codebooks": 3, "model.codes": 8, "model.latent": 12, "model.decoder": [16],
        "train.batch_size": 64, "train.epochs": 12, "train.reset_every": 5,
    },
)  # fmt: skip


class Cohort:
    def __init__(self, folder: Path) -> None:
        self.packed = packed_cohort(folder, cells=(150, 101, 90), genes=40, block_rows=128)
        self.plan = SamplingPlan(tuple(self.packed.design.starts.tolist()), 64, epochs=12, seed=0)
        self.labels = RowLabels.of(self.packed)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[MiniBatch]:
        for steps in windows(self.plan, first):
            for share in read_window(self.packed, self.plan, steps, 0, 1):
                if last is not None and share.step >= last:
                    return
                yield densify(share, self.labels, self.plan, (0, 1), "cpu")


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


def fresh(seed: int = 0) -> TrainState:
    settings = SETTINGS.model_copy(update={"seed": seed})
    return TrainState.fresh(settings, genes=40, conditions=2, batch_levels=(2,))


def weights(state: TrainState) -> list[torch.Tensor]:
    return list(state.network.state_dict().values())


def test_training_lowers_the_loss(cohort: Cohort) -> None:
    state = fresh()
    train(state, cohort.batches(), SETTINGS, Single())
    totals = [row["total"] for row in state.measures]
    assert len(totals) == cohort.plan.steps == state.step
    assert sum(totals[-4:]) < 0.9 * sum(totals[:4])


def test_stopping_and_going_on_changes_no_bit(cohort: Cohort) -> None:
    whole, first = fresh(), fresh()
    train(whole, cohort.batches(), SETTINGS, Single())
    train(first, cohort.batches(last=7), SETTINGS, Single())  # past a reset, short of the next
    second = fresh(seed=9)
    second.load_bytes(first.to_bytes())
    assert second.step == 7
    train(second, cohort.batches(first=7), SETTINGS, Single())
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert [row["step"] for row in second.measures] == list(range(1, cohort.plan.steps + 1))


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = fresh(), fresh(), fresh(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))


def test_codes_are_reset_at_their_steps_and_only_then(cohort: Cohort) -> None:
    usage: list[float] = []
    state = fresh()
    train(
        state, cohort.batches(), SETTINGS, Single(),
        after_step=lambda s: usage.append(float(s.network.quantiser.usage.sum())),
    )  # fmt: skip
    grown = [after > before for before, after in zip([0.0, *usage], usage, strict=False)]
    fallen = [step for step, up in enumerate(grown, start=1) if not up]
    assert fallen
    assert all(step % 5 == 0 for step in fallen)


def test_a_loss_that_is_not_finite_ends_training_with_what_to_do(cohort: Cohort) -> None:
    state = fresh()
    with torch.no_grad():
        next(iter(state.network.parameters())).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite at step \d .*train\.learning_rate"):
        train(state, cohort.batches(), SETTINGS, Single())
