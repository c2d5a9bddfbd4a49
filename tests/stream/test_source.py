"""Streaming gives exactly the plan's rows, in order, through Ray Data as in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ndreamer_dist.settings import NOISE_ROWS
from ndreamer_dist.stream.plan import SamplingPlan
from ndreamer_dist.stream.source import (
    LONGEST_WINDOW,
    PlanSource,
    RowLabels,
    densify,
    from_arrow,
    read_window,
    to_arrow,
    windows,
)
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


def test_a_share_survives_arrow(tmp_path: Path) -> None:
    packed = packed_cohort(tmp_path, cells=(300, 200), genes=30, block_rows=128)
    plan = SamplingPlan((0, 300, 500), 64, epochs=2, seed=0)
    share = next(read_window(packed, plan, range(2), 0, 1))
    back = from_arrow(to_arrow(share), 30)
    assert back.step == share.step
    assert np.array_equal(back.rows, share.rows)
    assert (back.x != share.x).nnz == 0


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
def test_ray_data_delivers_the_steps_in_order_from_any_first_step(tmp_path: Path) -> None:
    import ray

    packed = packed_cohort(tmp_path, cells=(300, 90, 700), genes=40, block_rows=256)
    plan = SamplingPlan(tuple(packed.design.starts.tolist()), 128, epochs=8, seed=0)
    everything = packed.rows(0, packed.n_rows).toarray()
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    source = PlanSource(packed, plan, rank=0, world=2, first_step=5)
    dataset = ray.data.read_datasource(source, ray_remote_args={"num_cpus": 0.5})
    shares = [from_arrow(t, 40) for t in dataset.iter_batches(batch_size=1, batch_format="pyarrow")]
    assert [share.step for share in shares] == list(range(5, plan.steps))
    for share in shares:
        assert np.array_equal(share.rows, plan.share_rows(share.step, 0, 2))
        assert np.array_equal(share.x.toarray(), everything[share.rows])
