"""Both runtimes give the same answers, and raise a task's error unchanged."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ndreamer_dist.compute import executor
from ndreamer_dist.compute.executor import (
    LEAST_SHARED_CELLS,
    Node,
    Runtime,
    TaskNeed,
    check_nodes,
    choose_runtime,
    cluster_nodes,
    fetch,
    runtime_choice,
)
from ndreamer_dist.errors import CohortError, ResourceError
from ndreamer_dist.settings import RunSettings, Settings


@pytest.fixture(params=["serial", pytest.param("ray", marks=pytest.mark.ray)])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if request.param == "ray":
        request.getfixturevalue("local_ray")
    return choose_runtime(RunSettings(serial=request.param == "serial"))


def square(item: int, offset: np.ndarray) -> float:
    return float(item**2 + offset.sum())


def parts(count: int) -> list[int]:
    return list(range(count))


def refuse(item: int) -> None:
    msg = f"cell {item} is not a cell"
    raise CohortError(msg)


def threads(_: int) -> int:
    return torch.get_num_threads()


def test_map_answers_for_every_item(runtime: Runtime) -> None:
    answers = runtime.map(square, range(20), np.arange(3), title="square")
    assert sorted(answers) == [i**2 + 3.0 for i in range(20)]


def test_an_answer_stays_where_it_was_made_until_it_is_fetched(runtime: Runtime) -> None:
    handles = runtime.submit(parts, 3, returns=3)
    assert [fetch(handle) for handle in handles] == [0, 1, 2]
    assert fetch(runtime.put("shared")) == "shared"


def test_a_tasks_own_error_arrives_without_a_trace_around_it(runtime: Runtime) -> None:
    with pytest.raises(CohortError, match=r"^cell 7 is not a cell$"):
        list(runtime.map(refuse, [7], title="refuse"))


def test_tasks_keep_to_the_threads_of_the_settings(runtime: Runtime) -> None:
    before = torch.get_num_threads()
    assert list(runtime.map(threads, [0], title="threads")) == [1]
    assert torch.get_num_threads() == before


def test_nothing_is_started_for_no_work() -> None:
    with choose_runtime(RunSettings(address="nowhere:1")) as runtime:
        assert list(runtime.map(square, [], title="nothing")) == []


def test_a_cluster_is_refused_where_its_largest_node_cannot_hold_a_task() -> None:
    task, small, large = TaskNeed("clusters", 2 * 10**9), Node("a", 4, 10**9), Node("b", 2, 3 * 10**9)
    check_nodes(task, [small, large])
    check_nodes(task, [])  # an autoscaled cluster may have no nodes yet
    message = (
        "^stage 'clusters' takes 2.0 GB a task, and the largest node, a, has 1.0 GB for tasks; take smaller.*--set"
    )
    with pytest.raises(ResourceError, match=message):
        check_nodes(task, [small])


def at_once(_: int, folder: Path) -> int:
    """Return how many calls of this function run at the same time."""
    own = folder / uuid.uuid4().hex
    own.touch()
    time.sleep(0.5)
    count = len(list(folder.iterdir()))
    own.unlink()
    return count


@pytest.mark.ray
def test_a_node_of_a_cluster_runs_as_many_tasks_as_its_memory_holds(local_ray: None, tmp_path: Path) -> None:
    (node,) = cluster_nodes()
    assert (node.cpus, node.memory > 0) == (2, True)
    with pytest.raises(ResourceError, match=f"the largest node, {node.address}, has"):
        list(choose_runtime(RunSettings(), TaskNeed("pack", 2 * node.memory)).map(refuse, [1], title="refuse"))
    for share, most in ((0.6, 1), (0.4, 2)):
        runtime = choose_runtime(RunSettings(), TaskNeed("pack", int(share * node.memory)))
        assert max(runtime.map(at_once, range(4), tmp_path, title="at once")) <= most


def test_a_bar_is_hidden_away_from_a_terminal(capsys: pytest.CaptureFixture) -> None:
    list(choose_runtime(RunSettings(serial=True)).map(square, [1], np.arange(3), title="hidden"))
    assert capsys.readouterr().err == ""
    list(choose_runtime(RunSettings(serial=True, progress=True)).map(square, [1], np.arange(3), title="shown"))
    assert "shown: 100%" in capsys.readouterr().err


# --- where a run works
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "cells", "cpus", "serial"),
    [
        pytest.param({}, 3_850, 8, True, id="small"),
        pytest.param({}, 1_000_000, 2, False, id="large"),
        pytest.param({}, LEAST_SHARED_CELLS * 2 - 1, 2, True, id="just_too_small_for_two_processors"),
        pytest.param({}, LEAST_SHARED_CELLS * 2, 2, False, id="just_large_enough_for_two_processors"),
        pytest.param({}, LEAST_SHARED_CELLS * 3 // 2, 3, False, id="more_processors_pay_sooner"),
        pytest.param({}, 10**9, 1, True, id="one_processor"),
        pytest.param({"run.serial": False}, 900, 2, False, id="asked_for_ray"),
        pytest.param({"run.serial": True}, 10**9, 64, True, id="asked_for_none"),
        pytest.param({"run.serial": "auto"}, 900, 2, True, id="auto_by_name"),
        pytest.param({"run.address": "auto"}, 900, 2, False, id="a_cluster"),
        pytest.param({"run.cpus": 8}, 900, 64, True, id="processors_named_by_a_workflow"),
        pytest.param({"run.cpus": 3}, LEAST_SHARED_CELLS * 3 // 2, 64, False, id="processors_named_count"),
        pytest.param({"run.cpus": 1}, 10**9, 64, True, id="one_processor_named"),
        pytest.param({"run.object_store_gb": 0.1}, 900, 2, False, id="an_object_store_asked_for"),
        pytest.param({"train.workers": 2}, 900, 2, False, id="several_workers"),
    ],
)
def test_small_data_do_not_wait_for_ray_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], cells: int, cpus: int, serial: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(executor, "on_a_cluster", lambda run: bool(run.address))
    monkeypatch.setattr(executor, "cpu_count", lambda: cpus)
    monkeypatch.setattr(executor, "has_gpu", lambda: False)
    made = Settings.build(overrides=settings)
    choice = runtime_choice(made, cells)
    assert choice.serial is serial
    assert choice.applied(made).run.serial is serial
    assert len(choice.why) > 10


def test_a_gpu_is_trained_on_by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "on_a_cluster", lambda run: False)
    monkeypatch.setattr(executor, "has_gpu", lambda: True)
    assert not runtime_choice(Settings.build(), 900).serial
    assert runtime_choice(Settings.build(overrides={"train.device": "cpu"}), 900).serial
