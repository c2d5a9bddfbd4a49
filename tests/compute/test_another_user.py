"""The whole job as a user without a name and home folder who may write to one folder, as in a cluster's container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ndreamer_dist import keys
from tests.machines import CannotBe, Machine, machine
from tests.tiny import SETTINGS, assert_same_bits, run_words

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
USER = "12345"
# It may read folders that only root can read, such as that of the tests' Python, but not write there.
LOOKS = [
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
]
AS_ANOTHER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *LOOKS]


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Machine]:
    """A machine whose files are read-only except for one folder, which belongs to the user, and /dev/shm."""
    home = tmp_path / "work"
    home.mkdir()
    try:
        with machine("container", 2, home, {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}) as made:
            made.run("chown", "-R", USER, str(home))
            made.run("chmod", "1777", "/dev/shm")
            yield made
    except CannotBe as error:
        pytest.skip(f"machines of namespaces cannot be made here: {error}")


def as_another(container: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    """Run one of our commands as the user; `HOME` is empty, and no variable names a folder for files."""
    nowhere = ["env", "--unset=TMPDIR", "HOME=/nonexistent", f"PYTHONPATH={Path(__file__).parents[2]}"]
    program = [sys.executable, "-m", "ndreamer_dist.cli", *words]
    with container.start(*AS_ANOTHER, *nowhere, *program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        out, error = command.communicate(timeout=600)
    return subprocess.CompletedProcess(words, command.returncode, out.decode(), error.decode())


def test_a_user_without_a_home_runs_the_job_on_ray_and_serially_and_reports_it(
    container: Machine, tiny: Path, tiny_run: Path, tmp_path: Path
) -> None:
    refused = container.start(*AS_ANOTHER, "touch", str(Path(keys.__file__)), stderr=subprocess.DEVNULL)
    assert refused.wait(30), "site-packages can be written"
    runs = {serial: container.home / f"serial_{serial}" for serial in (True, False)}
    for serial, out in runs.items():
        done = as_another(container, *run_words(tiny, out, SETTINGS | {"run.serial": serial, "run.cpus": 2}))
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        shutil.copytree(container.disk() / out.name, tmp_path / out.name)
        assert_same_bits(tiny_run, tmp_path / out.name)
    told = as_another(container, "report", str(runs[False]), "--by", "cell_type")
    assert told.returncode == 0, told.stderr
    assert (container.disk() / runs[False].name / "report/report.html").stat().st_size > 10_000
