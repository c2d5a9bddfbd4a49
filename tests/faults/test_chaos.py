"""Twenty rounds of harm, by a seed, and two on a Ray of several raylets; `python jobs/chaos.py` plays more.

All are in the slow tier.
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


@pytest.fixture(scope="module")
def job() -> Iterator[Any]:
    """The script that plays rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "jobs"))
        yield __import__("chaos")
        sys.modules.pop("chaos")


@pytest.fixture(scope="module")
def rounds(job: Any) -> list[tuple[str, str]]:
    """Stage and fault of every round."""
    return list(itertools.islice(job.cases(SEED, ["job"], (), ()), ROUNDS))


@pytest.fixture(scope="module")
def chaos(job: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cohort and its undisturbed run."""
    return job.Chaos(tmp_path_factory.mktemp("chaos"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_round_of_harm_ends_with_the_bits_of_an_undisturbed_run(
    chaos: Any, rounds: list[tuple[str, str]], number: int
) -> None:
    chaos.play(number, *rounds[number], random.Random(f"{SEED} {number}"))


def test_the_rounds_meet_every_stage_and_every_harm(rounds: list[tuple[str, str]]) -> None:
    assert {stage for stage, fault in rounds if fault == "job"} == set(keys.STAGES)
    assert {stage for stage, fault in rounds if fault != "job"} == {*keys.STAGES[1:], "finished"}
    assert {fault for _, fault in rounds} == {"job", "flip", "cut", "lose"}


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_ray(job: Any, chaos: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same cohort and run, and two raylets that the jobs share."""
    folder = tmp_path_factory.mktemp("nodes")
    chaos.nodes = job.Nodes(2, folder, f"{folder}/nodes/")
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
