"""A cluster that may grow is given work for what it may become, or it never would."""

from __future__ import annotations

import pytest

from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.settings import RunSettings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def test_the_cluster_counts_with_what_it_may_grow_to() -> None:
    runtime = RayRuntime(RunSettings(cpus=32, gpus=4))
    assert (runtime.cpus, runtime.gpus) == (32, 4)


def test_a_cluster_is_never_counted_with_less_than_it_has() -> None:
    runtime = RayRuntime(RunSettings(cpus=1))
    assert runtime.cpus == 2
    assert RayRuntime(RunSettings()).cpus == 2
