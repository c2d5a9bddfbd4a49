"""A GPU finds the bits of the CPU; tested here with the code for GPUs on FAISS's CPU kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.errors import ResourceError
from ndreamer_dist.matching import gpu, stage
from ndreamer_dist.matching.exact import nearest
from ndreamer_dist.matching.gpu import ENGINES, GpuIndex, faiss_finding, search_finding, summed_as_numpy
from ndreamer_dist.matching.hubs import nearest_corrected, remoteness
from tests.matching.test_labels import matched as matched_by_label
from tests.matching.test_stage import assert_same, matched, stored

SIZES = {(0, 0): 130, (0, 1): 70, (1, 0): 40, (1, 2): 50}


class OneGpu(SerialRuntime):
    """A serial runtime that claims to have a GPU and records the requests for it."""

    gpus = 1

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.asked: dict[str, float] = {}

    def map(self, *words: Any, title: str, num_gpus: float = 0) -> Any:
        self.asked[title] = num_gpus
        return super().map(*words, title=title, num_gpus=num_gpus)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the GPU by the CPU engine, and skip the checks of the GPU."""
    monkeypatch.setitem(ENGINES, "cuda", ENGINES["cpu"])
    monkeypatch.setattr("ndreamer_dist.compute.engines.tried_apart", lambda _: None)


@pytest.mark.parametrize("dims", [1, 7, 8, 50, 128, 129, 300])
def test_sums_have_the_bits_of_numpy(dims: int) -> None:
    values = np.random.default_rng(dims).normal(size=(200, dims)) ** 2
    np.testing.assert_array_equal(summed_as_numpy(torch.tensor(values)).numpy(), values.sum(axis=1))


@pytest.mark.parametrize(
    "asked",
    [
        {"match.hubs": "none", "match.edges": "all"},
        {"match.hubs": "none", "match.edges": "all", "match.neighbours": 3},
        {"match.edges": "all"},
        {"match.neighbours": 3},
        {"match.groups": 1},
    ],
    ids=lambda asked: "-".join(f"{name.partition('.')[2]}_{value}" for name, value in asked.items()),
)
def test_the_stage_on_a_gpu_writes_the_bits_of_the_processor(
    tmp_path: Path, double: None, asked: dict[str, Any]
) -> None:
    on_processor, _ = matched(tmp_path / "a", asked, sizes=SIZES)
    runtime = OneGpu(on_processor.settings.run)
    on_gpu, _ = matched(tmp_path / "b", asked, sizes=SIZES, runtime=runtime)
    assert_same(stored(on_processor), stored(on_gpu))
    assert runtime.asked["match"] == 1  # whatever this machine has


@pytest.mark.parametrize("distance", ["none", "csls"])
def test_a_gpu_matches_inside_labels_as_the_processor_does(tmp_path: Path, double: None, distance: str) -> None:
    on_processor, _ = matched_by_label(tmp_path / "a", **{"match.hubs": distance})
    on_gpu, _ = matched_by_label(tmp_path / "b", OneGpu(on_processor.settings.run), **{"match.hubs": distance})
    assert_same(*(stored(made) for made in (on_processor, on_gpu)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [1, 15])
def test_a_gpu_finds_what_the_processor_finds(k: int) -> None:
    rng = np.random.default_rng(k)
    points = rng.normal(size=(9000, 50)).astype(np.float32)
    targets, queries, groups = points[:5000], points[5000:], np.repeat([0, 1], 2000)
    index, sent = GpuIndex(torch.tensor(targets, device="cuda"), ENGINES["cuda"]), torch.tensor(queries, device="cuda")
    remote = np.stack([remoteness(targets, queries[groups == group]) for group in range(2)])
    for found, expected in (
        (index.nearest(sent, k), nearest(queries, targets, k)),
        (
            index.nearest(sent, k, remote=remote, groups=groups),
            nearest_corrected(queries, targets, remote, k, groups=groups),
        ),
    ):
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.distances, expected.distances)
        assert not found.widened.any()


def test_copies_and_near_copies_are_settled_without_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 50))[rng.integers(20, size=900)]
    targets = (centres + rng.choice([0, 1e-6], size=(900, 1)) * rng.normal(size=(900, 50))).astype(np.float32)
    monkeypatch.setattr(gpu, "Tile", None)  # what is left open would go there
    group = GpuIndex(torch.tensor(targets), ENGINES["cpu"])
    found = group.nearest(torch.tensor(targets), 3, exclude=np.arange(900))
    exact = ((targets[:, None].astype(np.float64) - targets) ** 2).sum(axis=2)
    np.fill_diagonal(exact, np.inf)
    np.testing.assert_array_equal(found.rows, exact.argsort(axis=1, kind="stable")[:, :3])
    assert found.widened.any()


CORRECTED = {
    "spread": lambda points: points,
    "ties": lambda points: points.round(),
    "near_copies": lambda points: points[[0]] + 1e-7 * points,
    "far": lambda points: 1e16 * points,
}
"""What becomes of normally distributed points. The far ones overflow float32 products, and go to the CPU at last."""


@pytest.mark.parametrize("shape", CORRECTED)
@pytest.mark.parametrize("k", [1, 4])
def test_corrected_distances_have_the_bits_of_the_processor(shape: str, k: int) -> None:
    rng = np.random.default_rng(k)
    points = CORRECTED[shape](rng.normal(size=(700, 6))).astype(np.float32)
    targets, queries, groups = points[:400], points[400:], rng.integers(2, size=300)
    index = GpuIndex(torch.tensor(targets), ENGINES["cpu"])
    remote = np.stack([remoteness(targets, queries[groups == group]) for group in range(2)])
    for group in range(2):
        asking = GpuIndex(torch.tensor(queries[groups == group]), ENGINES["cpu"])
        np.testing.assert_array_equal(asking.mean_distances(torch.tensor(targets), 10), remote[group])
    found = index.nearest(torch.tensor(queries), k, remote=remote, groups=groups)
    expected = nearest_corrected(queries, targets, remote, k, groups=groups)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.distances, expected.distances)
    assert found.widened.any() or shape != "far"


def test_an_error_of_a_writer_ends_the_search() -> None:
    def refuse() -> None:
        raise OSError("no space left")

    def write_many() -> None:
        with stage._written_by(2) as write:
            for _ in range(30):
                write(refuse)

    with pytest.raises(OSError, match="no space left"):
        write_many()


def test_a_search_that_rounds_coarser_than_float32_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Coarse(faiss.IndexFlatL2):
        def search(self, queries: torch.Tensor, count: int) -> Any:
            squared, rows = super().search(queries.bfloat16().float(), count)
            return squared, rows

    assert search_finding("cpu") is None
    monkeypatch.setitem(ENGINES, "cpu", replace(ENGINES["cpu"], flat=Coarse))
    assert "err by more than IEEE's" in search_finding("cpu")


def test_faiss_for_processors_says_that_it_cannot_use_a_gpu() -> None:
    if not hasattr(faiss, "GpuIndexFlatL2"):
        assert faiss_finding().startswith("faiss-cpu")
        assert "install faiss-gpu" in faiss_finding()


def test_a_gpu_that_is_asked_for_and_missing_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"1 GPU is needed and Ray has 0; .*--set match.device=cpu"):
        matched(tmp_path, {"match.hubs": "none", "match.device": "cuda"}, sizes=SIZES)
