"""The loop learns, its random numbers depend on the step only, and it reports why it cannot go on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from ndreamer_dist.model.collectives import Single
from ndreamer_dist.training.loop import TrainingError, TrainState, train
from tests.training.helpers import SETTINGS, Cohort, fresh, weights

OTHER_SEED = SETTINGS.model_copy(update={"seed": 9})


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort.write(tmp_path)


def test_training_lowers_the_loss(cohort: Cohort) -> None:
    state = fresh()
    train(state, cohort.batches(), SETTINGS, Single())
    totals = [row["total"] for row in state.measures]
    assert len(totals) == cohort.plan.steps == state.step
    assert sum(totals[-4:]) < 0.9 * sum(totals[:4])


def test_stopping_and_going_on_changes_no_bit(cohort: Cohort) -> None:
    whole, first = fresh(), fresh()
    train(whole, cohort.batches(), SETTINGS, Single())
    train(first, cohort.batches(last=7), SETTINGS, Single())  # after one reset, before the next
    second = fresh(OTHER_SEED)
    second.load_bytes(first.to_bytes())
    assert second.step == 7
    train(second, cohort.batches(first=7), SETTINGS, Single())
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    assert [row["step"] for row in second.measures] == list(range(1, cohort.plan.steps + 1))
    assert [list(row) for row in second.measures] == [list(row) for row in whole.measures]  # the logs have this order
    assert second.perplexities == whole.perplexities


def test_going_on_on_another_device_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = fresh().to_bytes()
    monkeypatch.setattr(TrainState, "device", "cuda")
    with caplog.at_level(logging.WARNING):
        fresh().load_bytes(files, "run/train/5")
    assert "run/train/5 was written on cpu and training resumes on cuda" in caplog.text


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = fresh(), fresh(), fresh(OTHER_SEED)
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


def test_a_step_tells_what_it_cost_and_how_many_codes_of_each_codebook_it_used(cohort: Cohort) -> None:
    state = fresh()
    train(state, cohort.batches(), SETTINGS, Single())
    assert len(state.perplexities) == len(state.measures) == cohort.plan.steps
    for row, books in zip(state.measures, state.perplexities, strict=True):
        assert len(books) == 3
        assert all(1 <= used <= 8 for used in books)
        assert row["perplexity"] == pytest.approx(sum(books) / 3)
        assert row["learning_rate"] == SETTINGS.train.learning_rate
        cells = cohort.plan.cells(int(row["step"]) - 1)
        assert row["cells_per_second"] * row["seconds"] == pytest.approx(cells)
        assert 0 <= row["waiting"] < 1
