"""Streaming gives exactly the rows of the plan, in order, through Ray Data and in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from ndreamer_dist.model.batch import MiniBatch
from ndreamer_dist.settings import NOISE_ROWS
from ndreamer_dist.training.densify import RowLabels, densify
from ndreamer_dist.training.loader import mini_batches, watched
from ndreamer_dist.training.sampling import SamplingPlan
from ndreamer_dist.training.windows import LONGEST_WINDOW, from_arrow, load_window, read_window, to_arrow, windows
from tests.cohorts import packed_cohort


@pytest.mark.parametrize("first_step", [0, 1, 7, 8, 23, 29])
@pytest.mark.parametrize("groups", [1, 3, 40, 300])
def test_windows_cover_every_step_from_the_first_once(groups: int, first_step: int) -> None:
    plan = SamplingPlan(tuple(range(0, 100 * groups + 1, 100)), 64, epochs=30, seed=0)
    steps = [step for window in windows(plan, first_step) for step in window]
    assert steps == list(range(first_step, plan.steps))
    assert max(len(window) for window in windows(plan, first_step)) <= LONGEST_WINDOW


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_window_holds_the_rows_of_the_plan(tmp_path: Path, world: int) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 90, 700), genes=40, block_rows=256)
    everything = packed.rows(0, packed.n_rows).toarray()
    plan = SamplingPlan(tuple(packed.design.starts.tolist()), 128, epochs=5, seed=0)
    for rank in range(world):
        for steps in windows(plan, 3):
            for share in read_window(packed, plan, steps, rank, world):
                assert np.array_equal(share.rows, plan.share_rows(share.step, rank, world))
                assert np.array_equal(share.x.toarray(), everything[share.rows])


def test_a_window_survives_arrow_step_by_step(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 200), genes=30, block_rows=128)
    plan = SamplingPlan((0, 300, 500), 64, epochs=2, seed=0)
    window = load_window(packed, plan, range(3), 0, 1)
    table = to_arrow(window)
    for place, share in enumerate(window.shares()):
        back = from_arrow(table.slice(place, 1), 30)
        assert back.step == share.step
        assert np.array_equal(back.rows, share.rows)
        for part in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(back.x, part), getattr(share.x, part))


def test_a_mini_batch_is_dense_and_labelled_by_row(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 90, 700), genes=40, block_rows=256)
    plan = SamplingPlan(tuple(packed.design.starts.tolist()), 128, epochs=5, seed=0)
    share = next(read_window(packed, plan, range(3, 4), 1, 2))
    labels = RowLabels.of(packed)
    batch = densify(share, labels, plan, (1, 2), "cpu")
    assert torch.equal(batch.x, torch.from_numpy(share.x.toarray()))
    group = packed.design.group_of(share.rows)
    assert batch.group.tolist() == group.tolist()
    assert batch.condition.tolist() == [packed.design.groups[g].condition for g in group]
    assert batch.batch.tolist() == [list(packed.design.groups[g].batch_codes) for g in group]
    assert batch.low.tolist() == labels.low[share.rows].tolist()
    assert batch.first_block * NOISE_ROWS == plan.cells(3) // 2 // NOISE_ROWS * NOISE_ROWS
    assert (batch.step, batch.cells) == (4, plan.cells(3))


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_ray_data_delivers_what_this_process_would_read_from_any_first_step(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 90, 700), genes=40, block_rows=256)
    plan = SamplingPlan(tuple(packed.design.starts.tolist()), 128, epochs=8, seed=0)
    labels = RowLabels.of(packed)
    shares = (share for steps in windows(plan, 5) for share in read_window(packed, plan, steps, 0, 2))
    expected = [densify(share, labels, plan, (0, 2), "cpu") for share in shares]
    delivered = list(mini_batches(packed, plan, (0, 2), 5, "cpu"))
    assert [batch.step for batch in delivered] == list(range(6, plan.steps + 1))
    for batch, same in zip(delivered, expected, strict=True):
        for part in fields(MiniBatch):
            found, wanted = getattr(batch, part.name), getattr(same, part.name)
            assert torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else found == wanted, part.name


def test_it_is_said_where_the_first_mini_batch_does_not_come(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 200), genes=30, block_rows=128)
    plan = SamplingPlan((0, 300, 500), 64, epochs=2, seed=0)
    batches = [
        densify(share, RowLabels.of(packed), plan, (0, 1), "cpu") for share in read_window(packed, plan, range(2), 0, 1)
    ]
    said = threading.Event()

    def starved() -> Iterator[MiniBatch]:
        assert said.wait(30)
        yield from batches

    assert list(watched(starved(), said.set, 0.01)) == batches
    said.clear()
    for _ in watched(iter(batches), said.set, 0.2):
        time.sleep(0.3)  # only the first mini-batch is watched; later steps may take longer
    assert not said.is_set()
