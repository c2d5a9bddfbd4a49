"""The two tiers of tests: slow ones are in the list, what files cost is measured whole, files that share stay together."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import budget, scheduling, slow

ROOT = Path(__file__).parent.parent
BURN = "import time; [None for _ in iter(lambda: time.process_time() > {}, True)]"
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
child.wait() if len(sys.argv) > 2 else sys.stdin.readline()
"""


def functions(file: str) -> set[str]:
    """Return the names of a file's functions."""
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_line_of_the_list_names_a_test_of_a_file_with_slow_ones() -> None:
    promises = slow.promises()
    assert len(promises) > 10
    assert len(promises) == len(re.findall(r"^\| (?!promise|-)", slow.LIST.read_text(), re.MULTILINE))
    for promise in promises:
        file, _, name = promise.test.partition("::")
        assert name in functions(file), promise.test
        assert "mark.slow" in (ROOT / file).read_text(), promise.test


def test_a_slow_test_that_is_not_in_the_list_is_named() -> None:
    def item(name: str, marker: object) -> SimpleNamespace:
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda _: marker)

    listed = slow.promises()[0].test
    known = [item(listed, "slow"), item(f"{listed}[0]", "slow"), item("tests/test_x.py::test_y", None)]
    assert slow.unlisted(known) == []
    assert slow.unlisted([*known, item("tests/test_x.py::test_y[1]", "slow")]) == ["tests/test_x.py::test_y"]


def test_every_slow_test_that_was_collected_is_in_the_list(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.stash[slow.UNLISTED] == [], f"add a line for each to {slow.LIST}"


@pytest.mark.parametrize("waits", [True, False], ids=["waited_for", "orphaned"])
def test_seconds_of_children_and_of_their_children_are_counted(waits: bool) -> None:
    meter = budget.Meter()
    before = meter.seconds()
    command = [sys.executable, "-c", PARENT, BURN.format(0.4), *(["wait"] if waits else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        child = parent.stdout.readline()
        meter.seconds()  # now the child is known, whatever becomes of its parent
        parent.stdin.close()
        while parent.poll() is None:
            meter.seconds()
    while not waits and Path(f"/proc/{int(child)}/stat").exists() and not is_zombie(int(child)):
        meter.seconds()
    assert meter.seconds() - before >= (0.4 if waits else 0.2)  # of an orphan, up to the last look at it


def is_zombie(pid: int) -> bool:
    """Return whether a process has ended, and nobody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("pace", [0.5, 1.0, 2.0])
def test_a_file_that_costs_too_much_is_named_on_a_slow_machine_as_well(pace: float) -> None:
    allowed = max(pace, 1.0)
    files = {"a": 14.0, "b": 16.0, "c": 29.0, "d": 31.0, "e": 89.0, "f": 91.0}
    costs = {name: {"processor": allowed * seconds, "wall": 0.0} for name, seconds in files.items()}
    costs |= {f"g{number}": {"processor": pace * 8.0, "wall": 0.0} for number in range(9)}
    known = {"c": 10.0, "d": 10.0, "e": 40.0, "f": 40.0} | {name: 8.0 for name in costs if name[0] == "g"}
    lines = budget.too_dear(costs, known)
    assert [line.partition(":")[0] for line in lines] == ["b", "d", "f"]
    most = f"{allowed * 90:.0f} in the gate"
    assert lines[-1] == f"f: {allowed * 91:.1f} processor seconds, at most {most}"


def test_budgets_are_of_files_that_there_are() -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert budget.budgets().keys() <= files
    assert set().union(*scheduling.TOGETHER.values()) <= files
    assert set(scheduling.LONGEST) <= files | scheduling.TOGETHER.keys()


def test_files_that_share_something_run_in_one_process_one_after_the_other() -> None:
    assert {"tests/matching/test_stage.py", "tests/cohort/test_pack.py"} <= scheduling.ON_RAY
    assert "tests/security/test_ports.py" not in scheduling.ON_RAY  # it speaks of the module of that name
    items = [SimpleNamespace(path=path) for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    groups = [scheduling.group(scheduling.file_of(item)) for item in scheduling.ordered(items)]  # type: ignore[arg-type]
    changes = [name for name, before in zip(groups, [None, *groups], strict=False) if name != before]
    assert len(changes) == len(set(groups))
    assert tuple(changes[: len(scheduling.LONGEST)]) == scheduling.LONGEST
