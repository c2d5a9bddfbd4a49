"""Twenty rounds of harm, by a seed, and two on a Ray of several raylets; `python jobs/chaos.py` plays more.

Six of the twenty are played in the gate, all else in the slow tier.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ndreamer_dist import keys

ROUNDS, SEED = 20, 7
IN_THE_GATE = (2, 3, 5, 8, 11, 14)
"""Rounds that meet every harm; the others are slow."""


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "jobs"))
        module = __import__("chaos")
        played = module.Chaos(tmp_path_factory.mktemp("chaos"))
        played.rounds = list(itertools.islice(module.cases(SEED, ["job"], (), ()), ROUNDS))
        yield played
        sys.modules.pop("chaos")


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=() if number in IN_THE_GATE else pytest.mark.slow) for number in range(ROUNDS)],
)
def test_a_round_of_harm_ends_with_the_bits_of_an_undisturbed_run(chaos: Any, number: int) -> None:
    chaos.play(number, *chaos.rounds[number], random.Random(f"{SEED} {number}"))


def test_the_rounds_meet_every_stage_and_every_harm(chaos: Any) -> None:
    assert {stage for stage, fault in chaos.rounds if fault == "job"} == set(keys.STAGES)
    assert {stage for stage, fault in chaos.rounds if fault != "job"} == {*keys.STAGES[1:], "finished"}
    assert {fault for _, fault in chaos.rounds} == {"job", "flip", "cut", "lose"}
    assert {chaos.rounds[number][1] for number in IN_THE_GATE} == {"job", "flip", "cut", "lose"}


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_ray(chaos: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same cohort and run, and two raylets that the jobs share."""
    folder = tmp_path_factory.mktemp("nodes")
    chaos.nodes = sys.modules["chaos"].Nodes(2, folder, f"{folder}/nodes/")
    chaos.on_ray = True
    yield chaos
    chaos.nodes.close()
    chaos.nodes, chaos.on_ray = None, False


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "stage", "fault"),
    [
        pytest.param(ROUNDS, keys.STAGE_EFFECTS, "worker", id="worker"),
        pytest.param(ROUNDS + 1, keys.STAGE_EMBED, "raylet", id="raylet"),
    ],
)
def test_a_job_survives_the_loss_of_a_worker_and_of_a_raylet(
    shared_ray: Any, number: int, stage: str, fault: str
) -> None:
    outcome = shared_ray.play(number, stage, fault, random.Random(SEED))
    assert (outcome.code, outcome.struck != "") == (0, True), outcome
