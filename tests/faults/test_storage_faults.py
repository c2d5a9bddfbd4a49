"""Storage that hangs, refuses for a while, or no longer permits: one line says so in bounded time, and it can be mended."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import SettingsError, StoreError
from ndreamer_dist.storage import retries
from ndreamer_dist.storage.files import open_storage
from tests.fuzz.helpers import command
from tests.servers import S3_ENVIRONMENT, Stall, s3
from tests.tiny import NAMES, SETTINGS, as_memory, assert_same_bits, run_words, undone

s3fs = pytest.importorskip("s3fs")
QUICK = SETTINGS | {"train.epochs": 2}
LIMIT, PATIENT = 1.0, 1.0
"""Seconds of silence after which these tests give a request up, and where the work is to succeed; five tries and their
pauses are below six of them."""
GIVEN_UP = f"no answer for {LIMIT:g} s; tried 5 times"
XML = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>%s</Message></Error>"


@pytest.fixture(scope="module")
def cohort(tiny: Path) -> Path:
    return tiny


@pytest.fixture(scope="module")
def reference(tiny_short_run: Path) -> Path:
    """A run that nothing happened to."""
    return tiny_short_run


# --- a server that hangs or refuses ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(cohort: Path) -> Iterator[SimpleNamespace]:
    """S3 with the cohort in it, and clients that give up soon."""
    with s3() as serving, pytest.MonkeyPatch.context() as patch:
        told = S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": serving.url, retries.VARIABLE: str(LIMIT)}
        for name, value in told.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        files.put(str(cohort), "bucket/cohort.zarr", recursive=True)
        yield serving
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait longer: a busy machine may be silent for LIMIT though nothing is wrong."""
    monkeypatch.setenv(retries.VARIABLE, str(PATIENT))


@pytest.fixture
def server(bucket: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The same, well again after the test."""
    well = bucket.answer
    yield bucket
    bucket.answer = well


def uploaded(run: Path, url: str) -> str:
    """Copy a run to S3."""
    s3fs.S3FileSystem().put(str(run), url.removeprefix("s3://"), recursive=True)
    return url


def fetched(url: str, folder: Path) -> Path:
    """Copy a run from S3."""
    s3fs.S3FileSystem().get(url.removeprefix("s3://"), str(folder), recursive=True)
    return folder


FAULTS = [
    pytest.param(("GET", "/packed.zarr/X/00001/data/c/0", Stall()), GIVEN_UP, id="chunk"),
    pytest.param(("GET", "/packed.zarr/X/00001/data/c/0", Stall(0.5)), GIVEN_UP, id="body", marks=pytest.mark.slow),
    pytest.param(("GET", "/cohort.zarr/X/data/c/0", Stall()), GIVEN_UP, id="input", marks=pytest.mark.slow),
    pytest.param(("PUT", "/embedding.zarr/X_ndreamer/c/1/0", Stall()), GIVEN_UP, id="shard", marks=pytest.mark.slow),
    pytest.param(("PUT", "/done/embed/", Stall()), GIVEN_UP, id="marker"),
    pytest.param(("PUT", "/embedding.zarr/", "503 Slow Down"), "tried 5 times", id="refusing"),
    pytest.param(
        ("PUT", "/embedding.zarr/X_ndreamer/c/1/0", ("403 Forbidden", XML % (b"ExpiredToken", b"The token has expired."))),
        "PermissionError: The token has expired.", id="expired_keys",
    ),
    pytest.param(("GET", "/done/pack/", "403 Forbidden"), "PermissionError: Forbidden", id="no_permission_to_read"),
]  # fmt: skip


@pytest.fixture(scope="module")
def half_done(bucket: SimpleNamespace, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on S3 that has been trained."""
    return uploaded(undone(reference, tmp_path_factory.mktemp("half") / "run", keys.STAGE_EMBED), "s3://bucket/run")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_server_that_fails_is_named_in_one_line_in_bounded_time(
    server: SimpleNamespace, half_done: str, fault: tuple[str, str, object], said: str
) -> None:
    method, part, what = fault
    server.answer = lambda asked, path: what if asked == method and part in path else None
    started = time.monotonic()
    line = command(run_words("s3://bucket/cohort.zarr", half_done, QUICK)).refusal  # type: ignore[arg-type]
    assert said in line
    assert f"s3://bucket{'/run' * ('cohort' not in part)}{part.rstrip('/')}" in line
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_after_all_that_the_same_command_ends_with_the_same_bits(
    server: SimpleNamespace, half_done: str, reference: Path, tmp_path: Path, patient: None
) -> None:
    nd.run("s3://bucket/cohort.zarr", out=half_done, preset="small", settings=QUICK, **NAMES)
    assert_same_bits(reference, fetched(half_done, tmp_path / "run"))


@pytest.mark.slow
def test_a_program_whose_server_answers_nothing_ends(server: SimpleNamespace, tmp_path: Path) -> None:
    server.answer = lambda method, path: Stall()
    words = run_words("s3://bucket/cohort.zarr", "s3://bucket/nothing", QUICK)  # type: ignore[arg-type]
    job = subprocess.run(
        [sys.executable, "-m", "ndreamer_dist.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    last = job.stderr.splitlines()[-1]
    assert last.startswith("error: s3://bucket/cohort.zarr")
    assert GIVEN_UP in last


@pytest.mark.slow
def test_a_server_that_refuses_or_hangs_for_a_moment_is_asked_again(
    server: SimpleNamespace, reference: Path, tmp_path: Path, patient: None, caplog: pytest.LogCaptureFixture
) -> None:
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    answers = [
        "503 Slow Down",
        ("500 Internal Server Error", XML % (b"InternalError", b"Try again.")),
        Stall(),
        Stall(0.3),
    ]

    def answer(method: str, path: str) -> object:
        draw = int(hashlib.sha256(f"{method} {path}".encode()).hexdigest(), 16)
        seen[method, path] += 1
        times, kind = seen[method, path], draw // 8 % 100
        if draw % 8 or times > 2:
            return None
        return answers[2 + kind % 2] if kind < 4 and times == 1 else answers[kind % 2]

    out = uploaded(undone(reference, tmp_path / "before", keys.STAGE_EMBED), "s3://bucket/moments")
    server.answer = answer
    with caplog.at_level(logging.WARNING):
        nd.run("s3://bucket/cohort.zarr", out=out, preset="small", settings=QUICK, **NAMES)
    server.answer = lambda method, path: None
    assert_same_bits(reference, fetched(out, tmp_path / "run"))
    assert sum(times > 1 for times in seen.values()) > 20
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("trying again in" in record.getMessage() and not record.exc_info for record in told)


def test_an_upload_that_the_server_does_not_take_ends(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "SLOWEST", 2**30)
    server.answer = lambda method, path: Stall() if method == "PUT" else None
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"s3://bucket/large cannot be written \({GIVEN_UP}\)"):
        open_storage("s3://bucket").write_atomic("large", bytes(48 * 2**20))  # more than the lines between hold
    assert time.monotonic() - started < 20


def test_files_that_may_not_be_deleted_are_not_taken_for_deleted(server: SimpleNamespace) -> None:
    storage = open_storage("s3://bucket/kept")
    storage.write_atomic("a/b", b"12")
    denied = XML.replace(b"<Error>", b"<DeleteResult><Error><Key>kept/a/b</Key>") + b"</DeleteResult>"
    server.answer = lambda method, path: ("200 OK", denied % (b"AccessDenied", b"no")) if method == "POST" else None
    with pytest.raises(StoreError, match="s3://bucket/kept/a/b cannot be deleted"):
        storage.delete("a")


def test_a_bucket_that_is_not_there_is_no_empty_one(server: SimpleNamespace) -> None:
    with pytest.raises(StoreError, match=r"s3://nowhere/x cannot be written .*bucket does not exist"):
        open_storage("s3://nowhere").write_atomic("x", b"1")


def test_a_server_that_was_never_there_is_given_up_soon(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "_heard_from", set())
    monkeypatch.setenv(retries.VARIABLE, "20")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/x cannot be read \(EndpointConnectionError.*; tried 3 times\)"):
        open_storage("s3://bucket").read("x")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_a_time_limit_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(retries.VARIABLE, value)
    with pytest.raises(SettingsError, match=f"{retries.VARIABLE} .* found '{value}'"):
        open_storage("s3://bucket").exists("x")


# --- permission lost on a disk ---------------------------------------------------------------------------------------

BOUND = """
import contextlib, ctypes, io, json, os, sys, threading, time
from pathlib import Path

if len(sys.argv) == 2:  # as root, be bound by permissions like anybody: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which the next program feels
    os.execv(sys.executable, [sys.executable, __file__, sys.argv[1], "bound"])

from ndreamer_dist import cli

told = []
for case in json.loads(Path(sys.argv[1]).read_text()):
    lost, when, modes = Path(case["lost"]), Path(case["when"]), []

    def lose():
        while not when.exists():
            time.sleep(0.005)
        modes.append(lost.stat().st_mode)
        lost.chmod(case["mode"])

    losing = threading.Thread(target=lose, daemon=True)
    losing.start()
    if when.exists():
        losing.join()
    err, code = io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            cli.main(case["words"])
        except SystemExit as ended:
            code = ended.code
    bound = not os.access(lost, os.R_OK | os.W_OK)
    lost.chmod(modes[0])
    told.append({"code": code, "err": err.getvalue(), "bound": bound})
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Loss:
    """A path whose permission is lost once another is there, what is said of it, and the job that hears it."""

    lost: str
    mode: int
    said: str
    when: str = "cohort.zarr"
    cohort: str = "cohort.zarr"
    out: str = "run"


LOSSES = {
    "a_marker": Loss("run/done/match", 0o555, "run/done/match/00000-00000-00000.json cannot be written"),
    "a_shard": Loss("run/results.zarr/layers/ite/c/1", 0o555, "run/results.zarr/layers/ite/c/1/0 cannot be written"),
    "a_block": Loss("run/packed.zarr/X/00001/data/c", 0o000, "run cannot be listed"),
    "markers": Loss("run/done/pack", 0o000, "run cannot be listed"),
    "input": Loss("cohort.zarr/X/data/c", 0o000, "cohort.zarr"),
    "h5ad_input": Loss("cohort.h5ad", 0o000, "cohort.h5ad may not be read", cohort="cohort.h5ad"),
    "middle": Loss("whole", 0o555, "whole/", when="whole/packed.zarr/X", out="whole"),
}


@pytest.fixture(scope="module")
def lost(cohort: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """A folder with runs that lost one permission after the other, and how each job ended."""
    folder = tmp_path_factory.mktemp("permissions")
    shutil.copytree(cohort, folder / "cohort.zarr")
    as_memory(cohort).write_h5ad(folder / "cohort.h5ad")
    run = shutil.copytree(reference, folder / "run")
    for stage, part in ((keys.STAGE_MATCH, "00000-00000-00000"), (keys.STAGE_EFFECTS, "layers/ite/c/1/0")):
        for marker in (run / keys.DONE / stage).iterdir():
            if part in marker.name + marker.read_text():
                marker.unlink()
    cases = [
        {"lost": str(folder / loss.lost), "mode": loss.mode, "when": str(folder / loss.when)}
        | {"words": run_words(folder / loss.cohort, folder / loss.out, QUICK)}
        for loss in LOSSES.values()
    ]
    (folder / "bound.py").write_text(BOUND)
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [sys.executable, str(folder / "bound.py"), str(folder / "cases.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return folder, dict(zip(LOSSES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", LOSSES)
def test_a_lost_permission_is_named_in_one_line(case: str, lost: tuple[Path, dict[str, dict]]) -> None:
    folder, told = lost
    ended = told[case]
    if not ended["bound"]:
        pytest.skip("permissions do not bind here, and CAP_DAC_OVERRIDE cannot be given up")
    lines = ended["err"].splitlines()
    assert ended["code"] == 2, ended["err"]
    assert "Traceback" not in ended["err"]
    assert lines[-1].startswith(f"error: {folder}/{LOSSES[case].said}")
    assert "PermissionError: [Errno 13]" in lines[-1]
    assert LOSSES[case].lost in lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("out", ["run", "whole"])
def test_with_permission_again_the_same_command_ends_with_the_same_bits(
    out: str, lost: tuple[Path, dict[str, dict]], reference: Path
) -> None:
    folder, _ = lost
    nd.run(folder / "cohort.zarr", out=folder / out, preset="small", settings=QUICK, **NAMES)
    assert_same_bits(reference, folder / out)
