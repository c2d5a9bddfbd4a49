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
from ndreamer_dist.matching.gpu import ENGINES, GpuIndex, faiss_finding, search_finding, summed_as_numpy
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


@pytest.mark.parametrize("k", [1, 3])
def test_the_stage_on_a_gpu_writes_the_bits_of_the_processor(tmp_path: Path, double: None, k: int) -> None:
    asked = {"match.hubs": "none", "match.edges": "all", "match.neighbours": k}
    on_processor, _ = matched(tmp_path / "a", asked, sizes=SIZES)
    runtime = OneGpu(on_processor.settings.run)
    on_gpu, _ = matched(tmp_path / "b", asked, sizes=SIZES, runtime=runtime)
    assert_same(stored(on_processor), stored(on_gpu))
    assert runtime.asked["match"] == 1  # whatever this machine has


def test_what_is_corrected_for_hubs_is_left_to_processors(tmp_path: Path, double: None) -> None:
    made, _ = matched(tmp_path / "a", sizes=SIZES)
    runtime = OneGpu(made.settings.run)
    matched(tmp_path / "b", sizes=SIZES, runtime=runtime)
    assert runtime.asked == {"match": 0}


def test_copies_and_near_copies_are_settled_without_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 50))[rng.integers(20, size=900)]
    targets = (centres + rng.choice([0, 1e-6], size=(900, 1)) * rng.normal(size=(900, 50))).astype(np.float32)
    monkeypatch.setattr(gpu, "nearest_by_cells", None)  # what is left open would go there
    group = GpuIndex(torch.tensor(targets), ENGINES["cpu"])
    found = group.nearest(torch.tensor(targets), 3, exclude=np.arange(900))
    exact = ((targets[:, None].astype(np.float64) - targets) ** 2).sum(axis=2)
    np.fill_diagonal(exact, np.inf)
    np.testing.assert_array_equal(found.rows, exact.argsort(axis=1, kind="stable")[:, :3])
    assert found.widened.any()


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
