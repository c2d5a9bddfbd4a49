"""A GPU is tried before it is used, one process keeps it, and a failure is reported in one line."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ndreamer_dist.compute import engines
from ndreamer_dist.compute.engines import chosen_device, product_finding, require_faiss, torch_finding, tried_apart
from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.errors import ResourceError
from ndreamer_dist.settings import RunSettings
from tests.compute.trials import aborts, fit, hangs

SECONDS = 0.3


def at_work(_: int, shared: list[int]) -> tuple[int, str, int]:
    time.sleep(SECONDS)
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], id(shared)


def beside_another(_: int, folder: Path) -> str:
    """Return the GPU of this process as soon as another one is at work, too, or after a long wait."""
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    (folder / gpu).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return gpu


@pytest.fixture
def runtime(ray_token: None) -> Iterator[RayRuntime]:
    """A Ray that believes to have two GPUs, on a machine without any."""
    import ray

    ray.shutdown()
    ray.init(
        address="local", num_cpus=2, num_gpus=2, object_store_memory=128 * 2**20, include_dashboard=False,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield RayRuntime(RunSettings(progress=False))
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_on_ray_a_process_keeps_its_gpu_and_one_that_torch_cannot_use_is_one_line(
    runtime: RayRuntime, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    # Two items, as of a trial of each GPU, are dealt to both, not to the process that starts first.
    assert sorted(runtime.map(beside_another, range(2), tmp_path, title="trial", num_gpus=1)) == ["0", "1"]
    answers = list(runtime.map(at_work, range(12), [0], title="work", num_gpus=1))
    assert len(answers) == 12
    assert {device for _, device, _ in answers} == {"0", "1"}
    assert len(set(answers)) == 2  # one process per GPU, with one device and one copy of the shared values
    if torch.version.cuda is None:
        started = time.monotonic()
        with caplog.at_level(logging.WARNING):
            assert chosen_device("auto", "match.device", runtime, torch_finding) == "cpu"
        assert "match.device: processors are used instead of GPUs: torch" in caplog.text
        with pytest.raises(ResourceError, match=r"built for processors; .*--set train.device=cpu"):
            chosen_device("cuda", "train.device", runtime, torch_finding)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("finding", "answer"),
    [(fit, None), (aborts, "ended with code -6"), (hangs, "did not end within 3 s")],
    ids=["fit", "aborts", "hangs"],
)
def test_a_trial_survives_what_it_tries(finding: Any, answer: str | None) -> None:
    found = tried_apart(finding, 3 if finding is hangs else 60)
    assert found is None if answer is None else answer in str(found)


def test_coarse_products_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_finding("cpu") is None
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _: tensor.bfloat16().float())
    assert "rounded coarser" in str(product_finding("cpu"))


def test_where_no_faiss_is_installed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=r"no FAISS is installed; .*\[cpu\].*\[gpu\]"):
        require_faiss()


def test_the_driver_that_is_found_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    monkeypatch.setattr(engines, "DRIVER_FILE", file)
    monkeypatch.setattr(engines, "_version", lambda name: {"torch": "2.13.0"}.get(name))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = str(torch_finding())
    assert "CUDA 13.0, which needs NVIDIA driver 580 or later; found driver 550.54.15" in found
