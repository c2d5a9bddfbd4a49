"""A job starts in a container of another user and with a long TMPDIR, or reports at once why it cannot start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ndreamer_dist.compute import local_ray, machine
from ndreamer_dist.errors import ResourceError, RunError

NOWHERE = "/proc/nobody"
COMPILES = """
import os, sys
from numba.core import caching
def refuse(self, *args): raise OSError("site-packages cannot be written")
caching.InTreeCacheLocator.ensure_cache_path = refuse
sys.path.insert(0, sys.argv[1])
if len(sys.argv) > 2:
    from ndreamer_dist.compute.machine import use_writable_caches
    use_writable_caches()
import compiled
print(compiled.one_more(1), os.environ.get("NUMBA_CACHE_DIR"))
"""
COMPILED = """
import numba

@numba.njit(cache=True)
def one_more(x):
    return x + 1
"""


def in_a_container(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in machine.CACHES}
    environment |= {"HOME": NOWHERE, "XDG_CACHE_HOME": f"{NOWHERE}/cache"}
    command = [sys.executable, "-c", COMPILES, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)


def test_what_numba_compiles_is_kept_where_neither_home_nor_site_packages_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILED)
    assert "no locator available" in in_a_container(str(tmp_path)).stderr
    mended = in_a_container(str(tmp_path), "mended")
    assert mended.returncode == 0, mended.stderr[-2000:]
    answer, folder = mended.stdout.split()
    assert answer == "2"
    assert not Path(folder).exists(), "the folder is deleted when the process ends"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in machine.CACHES:
        monkeypatch.delenv(name, raising=False)
    machine.use_writable_caches.cache_clear()
    yield monkeypatch
    machine.use_writable_caches.cache_clear()


def test_caches_get_a_folder_of_their_own_where_home_is_none(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("HOME", NOWHERE)
    fresh.setattr(machine.atexit, "register", lambda *_: None)
    machine.use_writable_caches()
    folder = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0, "what is loaded from there is nobody else's"
    machine._remove(str(folder), os.getpid())
    assert not folder.exists()


def test_a_home_that_can_be_written_and_a_users_own_choice_are_left_alone(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh.setenv("HOME", str(tmp_path))
    machine.use_writable_caches()
    assert "NUMBA_CACHE_DIR" not in os.environ
    machine.use_writable_caches.cache_clear()
    fresh.setenv("HOME", NOWHERE)
    for name in machine.CACHES:
        fresh.setenv(name, "/mine")
    machine.use_writable_caches()
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine"


def test_nowhere_to_write_is_one_line(fresh: pytest.MonkeyPatch) -> None:
    def no_room(**_: object) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    fresh.setenv("HOME", NOWHERE)
    fresh.setattr(machine.tempfile, "mkdtemp", no_room)
    with pytest.raises(ResourceError, match=r"neither the home folder nor a folder for temporary files.*set TMPDIR"):
        machine.use_writable_caches()


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_a_cluster_that_is_gone_is_one_line_at_once(form: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = form.format(f"127.0.0.1:{closed.getsockname()[1]}")
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"no Ray answers at {address} .*refused.*unset RAY_ADDRESS"):
        local_ray.check_reachable(address)
    assert time.monotonic() - started < 15


def test_a_cluster_that_was_started_here_and_is_gone_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(RunError, match="no Ray answers at auto"):
        local_ray.check_reachable("auto")


def test_one_that_listens_is_not_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        local_ray.check_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    local_ray.check_reachable("local")


@pytest.mark.parametrize("folder", ["/proc", "/tmp/" + "x" * 60], ids=["not_writable", "long"])
def test_ray_gets_a_short_folder_that_can_be_written(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(local_ray.atexit, "register", lambda *_: None)
    made = Path(local_ray._ray_folder() or "")
    assert made.is_dir()
    assert len(str(made)) <= local_ray.LONGEST_FOLDER
    made.rmdir()
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(RunError, match=f"in RAY_TMPDIR={folder}.*set RAY_TMPDIR to another folder"):
        local_ray._ray_folder()


def test_a_folder_that_will_do_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    if local_ray._is_fit(Path("/tmp/ray")):
        assert local_ray._ray_folder() is None


def test_ray_gets_a_token_where_home_cannot_hold_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in local_ray.TOKEN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", NOWHERE)
    with local_ray._token():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path))
    with local_ray._token():
        assert "RAY_AUTH_TOKEN" not in os.environ
