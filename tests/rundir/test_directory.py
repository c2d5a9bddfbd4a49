"""A run directory has reliable markers, stage keys that cover all that results depend on, and one lock."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ndreamer_dist import keys
from ndreamer_dist.errors import RunError
from ndreamer_dist.planning.stages import stage_keys
from ndreamer_dist.rundir import lock
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.checksums import unseal
from ndreamer_dist.storage.files import open_storage


def write_shard(run: RunDirectory, name: str, data: bytes = b"12345") -> Shard:
    shard = Shard(name, (f"store/{name}",))
    StageRun(run, "stage", "key").do(lambda _: run.storage.write_atomic(f"store/{name}", data), shard)
    return shard


def test_a_marked_shard_is_done(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    shards = [write_shard(run, "a"), Shard("b", ("store/b",))]
    assert [shard.name for shard in run.pending("stage", "key", shards)] == ["b"]
    marker = unseal((tmp_path / "done/stage/a.json").read_bytes(), "a")
    assert marker == {"key": "key", "attempt": 0, "bytes": 5, "files": {"store/a": 5}}


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda folder: (folder / "store/a").unlink(), id="file_deleted"),
        pytest.param(lambda folder: (folder / "store/a").write_bytes(b"123"), id="file_cut_short"),
        pytest.param(lambda folder: (folder / "done/stage/a.json").unlink(), id="marker_deleted"),
        pytest.param(lambda folder: (folder / "done/stage/a.json").write_text("{"), id="marker_cut_short"),
    ],
)
def test_a_harmed_shard_counts_as_absent(tmp_path: Path, harm: object) -> None:
    run = RunDirectory.at(tmp_path)
    shards = [write_shard(run, "a"), write_shard(run, "b")]
    harm(tmp_path)
    assert [shard.name for shard in run.pending("stage", "key", shards)] == ["a"]


def test_a_marker_of_another_key_counts_as_absent(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    shard = write_shard(run, "a")
    assert run.pending("stage", "other", [shard]) == [shard]


def test_a_stage_begins_anew_once_and_is_repaired_without_touching_the_rest(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    shards = [write_shard(run, name) for name in "ab"]
    (tmp_path / "store/c").write_text("left by another key")
    stage = StageRun(run, "stage", "another key")
    assert stage.begin(shards, ["store"]) == shards
    assert not list(tmp_path.glob("store/*")) + list(tmp_path.glob("done/stage/*"))
    for shard in shards:
        stage.do(lambda _, name=shard.name: run.storage.write_atomic(f"store/{name}", b"1"), shard)
    (tmp_path / "store/b").unlink()
    assert stage.begin(shards, ["store"]) == [shards[1]]
    assert (tmp_path / "store/a").exists()


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        pytest.param({"train.workers": 4}, (), id="workers_bear_on_nothing"),
        pytest.param({"run.cpus": 3, "train.device": "cpu"}, (), id="machine_bears_on_nothing"),
        pytest.param({"match.neighbours": 3}, ("match", "effects"), id="neighbours_bear_on_matches"),
        pytest.param({"effects.store": ["ite"]}, ("effects",), id="layers_bear_on_results_alone"),
        pytest.param({"train.epochs": 7}, ("train", "embed", "pca", "match", "effects"), id="epochs_bear_on_weights"),
        pytest.param({"hvg.num_hvg": 7}, keys.STAGES, id="genes_bear_on_everything"),
        pytest.param({"seed": 7}, keys.STAGES[1:], id="seed_bears_on_all_but_the_cohort"),
    ],
)
def test_a_setting_changes_the_keys_of_its_stage_and_the_later_ones(change: dict, stages: tuple[str, ...]) -> None:
    before = stage_keys(Settings.build(), {"shape": [3, 4]})
    after = stage_keys(Settings.build(overrides=change), {"shape": [3, 4]})
    assert tuple(stage for stage in keys.STAGES if before[stage] != after[stage]) == tuple(stages)


def test_another_input_changes_every_key() -> None:
    before, after = (stage_keys(Settings(), {"shape": [rows, 4]}) for rows in (3, 5))
    assert all(before[stage] != after[stage] for stage in keys.STAGES)


HOLD = """
import sys, time
from ndreamer_dist.rundir.directory import RunDirectory
with RunDirectory.at(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    run = RunDirectory.at(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="is being worked on by another run"), run.locked():
            pass
        holder.kill()
    with run.locked():
        pass


def test_a_file_system_without_locks_is_locked_by_a_lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    run = RunDirectory.at(tmp_path)
    with run.locked(), pytest.raises(RunError, match="is being worked on by another run"), run.locked():
        pass
    with run.locked():
        pass
    assert not run.storage.list()


def test_a_remote_lock_is_held_while_its_holder_lives(tmp_path: Path) -> None:
    run = RunDirectory(open_storage(f"memory://{tmp_path.name}"))
    with run.locked(), pytest.raises(RunError, match="is being worked on"), run.locked():
        pass
    with run.locked():
        pass


@pytest.mark.parametrize("ahead", [0.0, 3600.0], ids="clock_{}_s_ahead".format)
def test_a_remote_lock_that_nobody_renews_is_waited_for_and_taken_over(
    ahead: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    run = RunDirectory(open_storage(f"memory://{tmp_path.name}"))
    run.write_json(keys.LOCK, {"host": "gone", "pid": 1, "space": "a", "time": time.time() + ahead})
    started = time.monotonic()
    with run.locked():
        assert 0.9 < time.monotonic() - started < 10
    assert caplog.messages == [f"{run.url} is locked by process 1 on gone; waiting 1 s for a sign of life"]
    with run.locked():  # the lock was released
        pass
    assert len(caplog.messages) == 1


def test_a_remote_lock_that_is_renewed_meanwhile_or_let_go_is_seen_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lock, "LEASE_SECONDS", 60.0)
    monkeypatch.setattr(lock, "LOOKS", 600)
    run = RunDirectory(open_storage(f"memory://{tmp_path.name}"))
    held = {"host": "elsewhere", "pid": 1, "space": "a", "time": time.time() - 20}
    run.write_json(keys.LOCK, held)
    renewal = threading.Timer(0.3, run.write_json, (keys.LOCK, held | {"time": time.time()}))
    renewal.start()
    with pytest.raises(RunError, match=r"is being worked on by another run .*elsewhere.*; wait for it"), run.locked():
        pass
    renewal.join()
    threading.Timer(0.3, run.storage.delete, (keys.LOCK,)).start()
    started = time.monotonic()
    with run.locked():
        assert time.monotonic() - started < 30


def test_of_two_runs_that_begin_at_once_never_do_both_hold_a_remote_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Both runs see that there is no lock before either writes one.
    seen = threading.Barrier(2)
    looked = lock._await_holder
    monkeypatch.setattr(lock, "_await_holder", lambda storage: (looked(storage), seen.wait(10))[0])
    run = RunDirectory(open_storage(f"memory://{tmp_path.name}"))
    holding, most = [0], [0]
    guard = threading.Lock()

    def hold() -> None:
        with contextlib.suppress(RunError), run.locked():
            with guard:
                holding[0] += 1
                most[0] = max(most[0], holding[0])
            time.sleep(0.2)
            with guard:
                holding[0] -= 1

    for _ in range(20):
        runs = [threading.Thread(target=hold) for _ in range(2)]
        for one in runs:
            one.start()
        for one in runs:
            one.join()
    assert most[0] <= 1
    assert not run.storage.list()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def test_a_run_whose_remote_lock_was_taken_over_stops(
    handler: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGINT, handler)  # background jobs of a shell ignore Ctrl-C
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.4)
    run = RunDirectory(open_storage(f"memory://{tmp_path.name}"))
    other = {"host": "elsewhere", "pid": 1, "space": "a", "time": time.time() + 60, "token": "other"}

    def work() -> None:
        with run.locked():
            run.write_json(keys.LOCK, other)
            for _ in range(100):
                time.sleep(0.1)

    try:
        with pytest.raises(RunError, match="was taken over by another run"):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.storage.exists(keys.LOCK)  # the lock of the other run is kept
