"""A sketch labels cells that are too many for one graph: its cells keep their labels, others take the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from ndreamer_dist import keys
from ndreamer_dist.cohort.clusters import run_clusters
from ndreamer_dist.cohort.packed import Packed, write_csr
from ndreamer_dist.cohort.sketch import Sketch, majority, project, sketch_labels, sketch_of, sketch_spans
from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.settings import ClustersSettings, Settings
from tests.cohort.inputs import SERIAL, settings_of
from tests.cohorts import design_of, packed_cohort

CELLS = (40, 90, 130, 60)
TYPES = 4


def typed_cohort(folder: Path) -> tuple[Packed, np.ndarray]:
    """Return a packed cohort of four cell types, each with ten marker genes, and the type of each cell."""
    packed = Packed.open(packed_cohort(folder, cells=CELLS, genes=40, block_rows=64).run, 64)
    rng = np.random.default_rng(5)
    types = rng.integers(TYPES, size=packed.n_rows)
    own = np.arange(40) // 10 == types[:, None]
    values = np.log1p(rng.poisson(np.where(own, 4.0, 0.3))).astype(np.float32)
    for block in range(packed.n_blocks):
        name = f"{keys.PACKED_X}/{keys.block_name(block)}"
        packed.storage.delete(name)
        write_csr(packed.storage, name, sparse.csr_matrix(values[slice(*packed.block_range(block))]))
    for level in (keys.PACKED_LOW, keys.PACKED_HIGH):
        packed.storage.delete(level)
    return packed, types


def clustered(packed: Packed, settings: Settings, runtime: object = SERIAL) -> np.ndarray:
    run_clusters(packed.run, settings, packed, runtime, stage_keys(settings, {})[keys.STAGE_CLUSTERS])  # type: ignore[arg-type]
    return packed.clusters(keys.PACKED_LOW)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        pytest.param(160, (20, 45, 65, 30), id="half_of_each_group"),
        pytest.param(1, (1, 1, 1, 1), id="at_least_one_of_each"),
        pytest.param(10**6, CELLS, id="all_where_there_are_no_more"),
    ],
)
def test_the_sketch_takes_the_same_share_of_every_group(cells: int, expected: tuple[int, ...]) -> None:
    spans = sketch_spans(design_of(CELLS), cells)
    assert tuple(stop - start for start, stop in spans) == expected
    assert [start for start, _ in spans] == [0, 40, 130, 260]


def test_labels_by_a_sketch_agree_with_those_of_all_cells_together(tmp_path: Path) -> None:
    packed, types = typed_cohort(tmp_path / "a")
    by_sketch = clustered(packed, settings_of(clusters__within="sketch", clusters__sketch_cells=120))
    together = clustered(typed_cohort(tmp_path / "b")[0], settings_of(clusters__within="all"))
    assert adjusted_rand_score(types, together) > 0.95
    assert adjusted_rand_score(together, by_sketch) > 0.95


def test_auto_takes_a_sketch_of_small_groups_with_too_many_cells_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ndreamer_dist")
    sketch = {"clusters__sketch_cells": 120}
    found = clustered(typed_cohort(tmp_path / "auto")[0], settings_of(clusters__max_cells=319, **sketch))
    (told,) = (message for message in caplog.messages if message.startswith("clusters:"))
    assert "320 cells in groups of 80 on average" in told
    assert "120 cells, the same share of every group, are clustered together" in told
    asked = clustered(typed_cohort(tmp_path / "asked")[0], settings_of(clusters__within="sketch", **sketch))
    np.testing.assert_array_equal(found, asked)


def test_a_group_too_large_for_one_graph_has_a_sketch_of_its_own_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ndreamer_dist")
    packed, types = typed_cohort(tmp_path / "auto")
    how = {"clusters__group_mean_cells": 80, "clusters__max_cells": 129, "clusters__sketch_cells": 100}
    found = clustered(packed, settings_of(**how))
    (told,) = (message for message in caplog.messages if message.startswith("clusters:"))
    large = packed.design.groups[2]
    assert told.startswith(
        f"clusters: '{large.name}': too large for one graph (clusters.max_cells), so 100 cells of each are clustered"
    )
    whole, _ = typed_cohort(tmp_path / "apart")
    clustered(whole, settings_of(clusters__within="group"))
    high, high_of_all = (one.clusters(keys.PACKED_HIGH) for one in (packed, whole))
    part = slice(large.start, large.stop)
    assert adjusted_rand_score(types[part], found[part]) > 0.9
    assert (high[part] != high_of_all[part]).any()
    others = np.r_[: large.start, large.stop : len(found)]
    np.testing.assert_array_equal(high[others], high_of_all[others])


def test_sketch_cells_keep_their_labels_and_others_have_the_majority_of_their_nearest(tmp_path: Path) -> None:
    packed, _ = typed_cohort(tmp_path)
    settings = ClustersSettings(within="sketch", sketch_cells=120, n_neighbors=7)
    sketch = sketch_of(packed, settings, 0)
    taken = 0
    for group, (start, stop) in zip(packed.design.groups, sketch_spans(packed.design, 120), strict=True):
        _, high = sketch_labels(group, packed, sketch, settings)
        own = stop - start
        np.testing.assert_array_equal(high[:own], sketch.high[taken : taken + own])
        taken += own
        points = project(packed.rows(stop, group.stop), sketch.mean, sketch.axes).astype(np.float64)
        distances = np.linalg.norm(points[:, None] - sketch.points, axis=2)
        for cell, near in enumerate(np.argsort(distances, axis=1, kind="stable")[:, :7]):
            labels = sketch.high[near].tolist()
            assert high[own + cell] == max(labels, key=labels.count)


def test_of_several_majorities_the_nearest_cells_label_wins() -> None:
    labels = np.array([[3, 1, 1, 3, 2], [5, 4, 6, 7, 8], [0, 2, 2, 2, 0]])
    assert majority(labels).tolist() == [3, 5, 2]


def test_projection_is_that_of_centred_cells(tmp_path: Path) -> None:
    packed, _ = typed_cohort(tmp_path)
    x, rng = packed.rows(0, 100), np.random.default_rng(0)
    mean, axes = rng.normal(size=40), rng.normal(size=(40, 5))
    np.testing.assert_allclose(project(x, mean, axes), (x.toarray() - mean) @ axes, rtol=1e-4, atol=1e-5)


def test_cells_that_do_not_differ_are_one_cluster_of_the_sketch(tmp_path: Path) -> None:
    packed, _ = typed_cohort(tmp_path)
    same = sparse.csr_matrix(np.ones((64, 40), dtype=np.float32))
    for block in range(packed.n_blocks):
        name, (start, stop) = f"{keys.PACKED_X}/{keys.block_name(block)}", packed.block_range(block)
        packed.storage.delete(name)
        write_csr(packed.storage, name, same[: stop - start])
    assert not clustered(packed, settings_of(clusters__within="sketch", clusters__sketch_cells=120)).any()
    assert Sketch.read(packed.storage).axes.shape == (40, 1)


@pytest.mark.ray
def test_ray_finds_the_same_labels(local_ray: None, tmp_path: Path) -> None:
    settings = settings_of(clusters__within="sketch", clusters__sketch_cells=120)
    a, b = (typed_cohort(tmp_path / name)[0] for name in ("serial", "ray"))
    np.testing.assert_array_equal(clustered(a, settings), clustered(b, settings, RayRuntime(settings.run)))
