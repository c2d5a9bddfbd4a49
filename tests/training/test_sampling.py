"""The sampling plan follows METHOD section 4, and any step is computed without the steps before it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ndreamer_dist.settings import NOISE_ROWS
from ndreamer_dist.training.sampling import SamplingPlan, scheduled_epochs


@pytest.mark.parametrize(
    ("asked", "cells", "groups", "epochs"),
    [
        pytest.param(10, 16_893, 2, 148, id="few_groups_end_long_after_a_reset"),
        pytest.param(10, 5_000, 10, 10, id="small_cohort_keeps_what_was_asked"),
        pytest.param(10, 1_378_211, 89, 227, id="alzheimer_cohort"),
        pytest.param(100, 3_850, 2, 100, id="kang_at_paper_preset"),
    ],
)
def test_epochs_are_those_of_the_method(asked: int, cells: int, groups: int, epochs: int) -> None:
    assert scheduled_epochs(asked=asked, cells=cells, groups=groups, batch_size=1024) == epochs


plans = st.builds(
    lambda sizes, blocks, seed: SamplingPlan(
        tuple(np.concatenate([[0], np.cumsum(sizes)]).tolist()), NOISE_ROWS * blocks, epochs=3, seed=seed
    ),
    st.lists(st.integers(1, 700), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@given(plans)
def test_an_epoch_draws_batch_size_cells_from_every_group_as_evenly_as_can_be(plan: SamplingPlan) -> None:
    rows = np.concatenate([plan.rows(step) for step in range(plan.steps_per_epoch)])
    starts = np.asarray(plan.starts)
    for start, stop in itertools.pairwise(starts):
        times = np.bincount(rows[(rows >= start) & (rows < stop)] - start, minlength=stop - start)
        assert times.sum() == plan.batch_size
        assert times.max() - times.min() <= 1  # as even as possible: without replacement, unless the group is too small


@settings(max_examples=20, deadline=None)
@given(plans, st.integers(1, 5))
def test_workers_shares_are_whole_blocks_and_make_the_global_mini_batch(plan: SamplingPlan, world: int) -> None:
    for step in range(plan.steps):
        shares = [plan.share_rows(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(shares), plan.rows(step))
        assert len(plan.rows(step)) == plan.cells(step)
        assert all(len(share) % NOISE_ROWS == 0 for share in shares)


def test_a_step_is_the_same_whether_or_not_others_were_asked_for_first() -> None:
    first, second = (SamplingPlan((0, 500, 3000), 128, epochs=40, seed=3) for _ in range(2))
    late = first.rows(37).copy()
    for step in range(second.steps):
        second.rows(step)
    assert np.array_equal(second.rows(37), late)


def test_epochs_and_seeds_draw_differently() -> None:
    plan, other = (SamplingPlan((0, 5000, 9000), 128, epochs=3, seed=seed) for seed in (0, 1))
    assert not np.array_equal(np.sort(plan.rows(0)), np.sort(plan.rows(1)))
    assert not np.array_equal(np.sort(plan.rows(0)), np.sort(other.rows(0)))


def test_all_cells_of_a_large_group_come_up_over_the_epochs() -> None:
    plan = SamplingPlan((0, 4000), 256, epochs=200, seed=0)
    seen = np.bincount(np.concatenate([plan.rows(step) for step in range(plan.steps)]), minlength=4000)
    assert seen.min() > 0
    assert abs(seen.mean() - 200 * 256 / 4000) < 1e-9
