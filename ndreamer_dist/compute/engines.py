"""Choose between processors and GPUs, and try a GPU in a child process before it is used.

A GPU that Ray counts may not work: the driver may be too old for torch, or a wheel may hold no code for this GPU, in
which case FAISS aborts its process without an exception. The child process reports what is wrong in one line. With
`auto` the work then runs on processors; with `cuda` the run ends with that line.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

from ndreamer_dist.compute.events import stage_now
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.compute.machine import gpu_is_shown
from ndreamer_dist.errors import ResourceError

Device = Literal["cpu", "cuda"]
Finding = Callable[[], str | None]
"""Returns why a GPU cannot be used, or None; called in a child process."""

TRIAL_SECONDS = 90
"""Timeout of a trial of a GPU, which loads torch or FAISS and creates a CUDA context (seconds each)."""
LEAST_GPU_BYTES = 3 * 2**30
"""Free memory that a GPU must have: twice what a training step of the `paper` preset takes."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Oldest NVIDIA driver for each major version of CUDA."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
FAISS_BUILDS = ("faiss-cpu", "faiss-gpu")
MARK = "finding: "
"""Prefix of a trial's answer on its standard output."""

logger = logging.getLogger(__name__)


def faiss_builds() -> list[str]:
    """Return the installed builds of FAISS with their versions."""
    return [f"{name} {number}" for name in FAISS_BUILDS if (number := _version(name))]


def require_faiss() -> None:
    """Raise an error if FAISS is not installed.

    Raises
    ------
    ResourceError
        The message says which build to install.
    """
    if find_spec("faiss") is None:
        msg = (
            'no FAISS is installed; run pip install "ndreamer-dist[cpu]", or on a machine with an NVIDIA GPU '
            'pip install "ndreamer-dist[gpu]"'
        )
        raise ResourceError(msg)


def engines_here() -> str:
    """Describe torch, FAISS and GPU of this machine in one line, without importing them."""
    faiss = " and ".join(faiss_builds()) or "FAISS of another package"
    gpu = f"an NVIDIA GPU, driver {_driver() or 'unknown'}" if gpu_is_shown() else "no GPU"
    return f"torch {_version('torch')}, {faiss}; {gpu}"


def chosen_device(wanted: str, setting: str, runtime: Runtime, finding: Finding, *, least: int = 1) -> Device:
    """Choose the device of a stage, and log it if there is a choice.

    Parameters
    ----------
    wanted
        `cpu`, `cuda`, or `auto`, which means GPUs if enough of them work.
    setting
        Name of the setting with the value `wanted`.
    finding
        Tries a GPU.
    least
        Number of GPUs needed.

    Raises
    ------
    ResourceError
        `wanted` is `cuda`, and there are too few GPUs or they do not work.
    """
    device: Device = "cpu"
    why = f"{setting} is cpu"
    if wanted != "cpu":
        why = _what_is_wrong(runtime, finding, least)
        device = "cpu" if why else "cuda"
    if wanted == "cuda" and why:
        msg = f"{why}; processors do the same work: --set {setting}=cpu"
        raise ResourceError(msg)
    if wanted == "auto" and why and runtime.gpus:
        logger.warning("%s: processors are used instead of GPUs: %s", setting, why)
    engine = f"{runtime.gpus} GPU{'s' if runtime.gpus > 1 else ''}" if device == "cuda" else "processors"
    if (stage := stage_now()) is not None:
        stage.engine = engine  # logged in stages.jsonl
        level = logging.INFO if runtime.gpus else logging.DEBUG  # without a GPU there is nothing to choose
        logger.log(level, "%s: works on %s", stage.name, engine)
    return device


def _what_is_wrong(runtime: Runtime, finding: Finding, least: int) -> str:
    """Return why GPUs cannot be used; empty if they can."""
    if runtime.gpus < least:
        return f"{least} GPU{'s are' if least > 1 else ' is'} needed and Ray has {runtime.gpus}"
    return "; ".join(_tried(cast("Hashable", runtime), finding))


@lru_cache(maxsize=8)
def _tried(runtime: Any, finding: Finding) -> tuple[str, ...]:
    """Try every GPU once and return what is wrong with them; the stages of a run share the answer."""
    answers = set(runtime.map(tried_apart, [finding] * runtime.gpus, title="trial of GPUs", num_gpus=1))
    return tuple(sorted(answer for answer in answers if answer))


def tried_apart(finding: Finding, seconds: float = TRIAL_SECONDS) -> str | None:
    """Call a finding in a child process; return its answer, or a description of how the process failed."""
    module, name = finding.__module__, finding.__qualname__
    program = f"from {module} import {name}; print({MARK!r} + ({name}() or ''))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the trial of the GPU did not end within {seconds:.0f} s"
    answers = [line.removeprefix(MARK) for line in child.stdout.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and answers:
        return answers[-1] or None
    last_line = (child.stderr.strip().splitlines() or ["no output"])[-1]
    return f"the trial of the GPU ended with code {child.returncode} ({last_line[:300]})"


# --- trials, each in a process of its own ----------------------------------------------------------------------------


def torch_finding() -> str | None:
    """Return why torch cannot use this process's GPU (build, driver, GPU code, memory, rounding); None if it can."""
    if (_version("torch") or "").endswith("+cpu"):
        return f"torch {_version('torch')} is built for processors; install the build for CUDA (pip install torch)"
    import torch

    if not torch.cuda.is_available():
        needed = OLDEST_DRIVER.get(int((torch.version.cuda or "0").split(".")[0]))
        requirement = f", which needs NVIDIA driver {needed} or later" if needed else ""
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}{requirement}; found driver {_driver() or 'none'}"
    try:
        free, _ = torch.cuda.mem_get_info()
        if free < LEAST_GPU_BYTES:
            return f"the GPU has {free / 1e9:.1f} GB of memory free, and {LEAST_GPU_BYTES / 1e9:.1f} GB are needed"
        return product_finding("cuda")
    except RuntimeError as error:  # such as no code for this GPU, or a lost device
        name = torch.cuda.get_device_name()
        return f"torch {torch.__version__} does not run on {name}: {str(error).splitlines()[0]}"


def product_finding(device: str) -> str | None:
    """Return a message if float32 products on a device are rounded more coarsely than IEEE allows, as with TF32."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, 512, generator=generator)
    exact, sizes = a.double() @ b.double().T, a.abs().double() @ b.abs().double().T
    error = ((a.to(device) @ b.to(device).T).cpu().double() - exact).abs()
    if bool((error <= 512 * 2.0**-24 * sizes).all()):
        return None
    return "float32 products are rounded coarser than IEEE's; unset NVIDIA_TF32_OVERRIDE and what emulates products"


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, if the system shows one."""
    try:
        match = re.search(r"\s(\d{3}\.[\d.]+)\s", DRIVER_FILE.read_text())
    except OSError:
        return None
    return match and match.group(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- FAISS's indexes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A torch device, and the function that makes FAISS's flat index there, given the number of dimensions."""

    device: str
    flat: Callable[[int], Any]


def _flat_on_gpu(width: int) -> Any:
    import faiss

    return faiss.GpuIndexFlatL2(_resources(), width)


def _flat_on_host(width: int) -> Any:
    import faiss

    return faiss.IndexFlatL2(width)


@lru_cache(maxsize=1)
def _resources() -> Any:
    """Return FAISS's GPU resources, made once per process because they are costly."""
    import faiss

    return faiss.StandardGpuResources()


ENGINES = {"cuda": Engine("cuda", _flat_on_gpu), "cpu": Engine("cpu", _flat_on_host)}
"""Engines by device. The CPU engine lets tests run everything but FAISS's GPU kernel."""
