"""The resources that this process may use are the least of affinity, control groups and SLURM job, with its source."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ndreamer_dist.compute import machine
from ndreamer_dist.compute.local_ray import object_store_bytes
from ndreamer_dist.compute.machine import (
    MIB,
    Allowance,
    Needs,
    check_resources,
    cpu_allowance,
    cpu_count,
    memory_allowance,
    memory_limit,
)
from ndreamer_dist.errors import ResourceError
from ndreamer_dist.settings import RunSettings

UNLIMITED = str(2**63 - 4096)


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 8 processors and 64 GB without control groups and without SLURM."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * 10**9 // 4096}.__getitem__)


@pytest.mark.parametrize(
    ("files", "cpus", "memory"),
    [
        pytest.param({"cpu.max": "100000 100000", "memory.max": "1000000000"}, 1, 10**9, id="version_2"),
        pytest.param({"cpu.max": "150000 100000"}, 2, None, id="a_part_of_a_processor"),
        pytest.param({"memory/memory.limit_in_bytes": "2000000000"}, None, 2 * 10**9, id="version_1"),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": UNLIMITED},
            3, None, id="version_1_quota",
        ),
        pytest.param({"cpu.max": "max 100000", "memory.max": "max", "cpu/cpu.cfs_quota_us": "-1"}, None, None, id="no_limit"),
        pytest.param(
            {"self": "0::/slurmstepd.scope/job_7/step_0", "slurmstepd.scope/job_7/memory.max": "5000000000",
             "slurmstepd.scope/job_7/step_0/memory.max": "max"}, None, 5 * 10**9, id="version_2_of_a_slurm_job",
        ),
        pytest.param(
            {"self": "4:memory:/slurm/uid_1000/job_7/step_batch\n1:cpu,cpuacct:/\n",
             "memory/memory.limit_in_bytes": UNLIMITED, "memory/slurm/uid_1000/job_7/memory.limit_in_bytes": "6000000000"},
            None, 6 * 10**9, id="version_1_of_a_slurm_job",
        ),
        pytest.param({"self": "0::/gone/group", "memory.max": "3000000000"}, None, 3 * 10**9, id="a_group_that_is_not_seen"),
    ],
)  # fmt: skip
def test_limits_are_those_of_the_control_groups(
    tmp_path: Path, files: dict[str, str], cpus: int | None, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    assert cpu_allowance() == (Allowance(cpus, "cgroup") if cpus else Allowance(8, "affinity"))
    assert memory_allowance() == (
        Allowance(memory, "cgroup") if memory else Allowance(64 * 10**9 // 4096 * 4096, "machine")
    )
    assert (cpu_count(), memory_limit()) == (cpu_allowance().amount, memory_allowance().amount)
    assert object_store_bytes(RunSettings()) <= max(memory_limit() // 8, 128 * MIB)


@pytest.mark.parametrize(
    ("job", "cpus", "memory"),
    [
        pytest.param({"CPUS_PER_TASK": "4", "CPUS_ON_NODE": "6"}, (4, "SLURM_CPUS_PER_TASK"), None, id="a_task"),
        pytest.param({"CPUS_ON_NODE": "6"}, (6, "SLURM_CPUS_ON_NODE"), None, id="the_node"),
        pytest.param({"CPUS_PER_TASK": "32"}, (8, "affinity"), None, id="more_than_there_are"),
        pytest.param({"MEM_PER_NODE": "16000"}, None, (16000 * MIB, "SLURM_MEM_PER_NODE"), id="memory"),
        pytest.param({"MEM_PER_CPU": "2000", "CPUS_ON_NODE": "6"}, (6, "SLURM_CPUS_ON_NODE"),
                     (12000 * MIB, "SLURM_MEM_PER_CPU"), id="memory_of_a_processor"),
        pytest.param({"MEM_PER_NODE": "0"}, None, None, id="all_memory_of_the_node"),
        pytest.param({"CPUS_PER_TASK": "many", "MEM_PER_NODE": ""}, None, None, id="no_numbers"),
        pytest.param({"CPUS_PER_TASK": "4", "JOB_ID": None}, None, None, id="no_job"),
    ],
)  # fmt: skip
def test_limits_are_those_of_the_slurm_job(
    monkeypatch: pytest.MonkeyPatch,
    job: dict[str, str | None],
    cpus: tuple[int, str] | None,
    memory: tuple[int, str] | None,
) -> None:
    for name, text in {"JOB_ID": "7", **job}.items():
        if text is not None:
            monkeypatch.setenv(f"SLURM_{name}", text)
    assert cpu_allowance() == Allowance(*(cpus or (8, "affinity")))
    assert memory_allowance() == Allowance(*(memory or (64 * 10**9 // 4096 * 4096, "machine")))


@pytest.mark.parametrize(
    ("memory", "disk", "message"), [(5, 100, r"GB of memory and may use 5.0 GB \(cgroup\)"), (50, 10, "GB of disk")]
)
def test_a_plan_that_does_not_fit_is_refused_with_what_to_change(memory: int, disk: int, message: str) -> None:
    needs = Needs(memory=10 * 10**9, disk=20 * 10**9, savings=("less (--set less=1)",))
    check_resources(needs, memory=Allowance(10 * 10**9, "cgroup"), disk=20 * 10**9, where="here")
    with pytest.raises(ResourceError, match=f"{message}.*--"):
        check_resources(needs, memory=Allowance(memory * 10**9, "cgroup"), disk=disk * 10**9, where="here")
