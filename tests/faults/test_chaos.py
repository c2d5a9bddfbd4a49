"""Twenty rounds of harm, by a seed; `python jobs/chaos.py` plays more, and with Ray."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROUNDS, SEED = 20, 7


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "jobs"))
        module = __import__("chaos")
        yield module.Chaos(tmp_path_factory.mktemp("chaos"))
        sys.modules.pop("chaos")


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_round_of_harm_ends_with_the_bits_of_an_undisturbed_run(chaos: Any, number: int) -> None:
    chaos.play(number, random.Random(f"{SEED} {number}"))
