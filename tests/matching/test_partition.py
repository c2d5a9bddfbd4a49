"""An index holds every target once: each row has one point, and each point one cell."""

import numpy as np
import pytest

from ndreamer_dist.matching.partition import build_index, cell_count, distinct_rows


@pytest.fixture(params=[1, 7, 40])
def index(request):
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(200, 6)).astype(np.float32)[rng.integers(150, size=600)]
    return build_index(targets, cells=request.param)


def test_every_target_is_behind_one_point_with_its_coordinates(index):
    behind = [index.rows[first : first + many] for first, many in zip(index.first, index.copies, strict=True)]
    assert sorted(np.concatenate(behind)) == list(range(600))
    points = index.points[:-1].T / -2
    for point, rows in enumerate(behind):
        assert (np.diff(rows) > 0).all()
        assert (index.place[rows] == point).all()
        np.testing.assert_array_equal(
            index.local(index.targets[rows]), np.repeat(points[point : point + 1], len(rows), 0)
        )
    assert len(np.unique(points, axis=0)) == len(points)


def test_cells_are_whole_and_none_is_empty(index):
    assert index.starts[0] == 0
    assert index.starts[-1] == len(index.copies)
    assert (np.diff(index.starts) > 0).all()
    assert len(index.centroids) == index.cells


def test_coordinates_are_brought_into_range():
    for factor in (1e-30, 1.0, 1e30):
        points = (np.random.default_rng(0).normal(size=(50, 3)) * factor).astype(np.float32)
        index = build_index(points)
        assert 0.5 <= np.abs(index.local(points)).max() <= 1


def test_equal_rows_are_neighbours_in_order():
    points = np.float32([[1, 2], [0, 0], [1, 2], [3, 1], [-0.0, 0], [1, 2]])
    order, starts = distinct_rows(points)
    runs = sorted(tuple(run) for run in np.split(order, starts[1:]))
    assert runs == [(0, 2, 5), (1, 4), (3,)]


def test_without_equal_rows_the_order_is_kept():
    order, starts = distinct_rows(np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32))
    assert (order == np.arange(100)).all()
    assert (starts == np.arange(100)).all()


@pytest.mark.parametrize(("points", "cells"), [(1, 1), (100, 1), (2500, 18), (15_000, 45), (10**7, 256)])
def test_larger_groups_have_more_cells(points, cells):
    assert cell_count(points) == cells
