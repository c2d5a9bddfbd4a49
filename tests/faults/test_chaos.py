"""Twenty rounds of harm, by a seed; `python jobs/chaos.py` plays more, and with Ray."""

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
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "jobs"))
        module = __import__("chaos")
        played = module.Chaos(tmp_path_factory.mktemp("chaos"))
        played.rounds = list(itertools.islice(module.cases(SEED, ["job"], (), ()), ROUNDS))
        yield played
        sys.modules.pop("chaos")


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_round_of_harm_ends_with_the_bits_of_an_undisturbed_run(chaos: Any, number: int) -> None:
    chaos.play(number, *chaos.rounds[number], random.Random(f"{SEED} {number}"))


def test_the_rounds_meet_every_stage_and_every_harm(chaos: Any) -> None:
    assert {stage for stage, fault in chaos.rounds if fault == "job"} == set(keys.STAGES)
    assert {stage for stage, fault in chaos.rounds if fault != "job"} == {*keys.STAGES[1:], "finished"}
    assert {fault for _, fault in chaos.rounds} == {"job", "flip", "cut", "lose"}
