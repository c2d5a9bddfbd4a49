"""Runs on gs:// and az:// equal local ones bit by bit; silent or refusing servers raise an error in bounded time.

The tests need packages and emulators that are not installed by default; without them they are skipped. To install all:
`pip install gcsfs adlfs gcp-storage-emulator` and `npm install -g azurite`.
"""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.errors import StoreError
from ndreamer_dist.storage import retries
from ndreamer_dist.storage.files import Storage, open_storage
from tests.tiny import NAMES, SETTINGS, assert_same_bits, tiny_cohort

# gcsfs and adlfs leave open connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore")
JOB = SETTINGS | {"train.epochs": 2}
PACKAGES = {"gs": "gcsfs", "az": "adlfs"}
LIMIT = 0.3
# Azurite's only account; its key is public, in Azurite's manual.
AZURITE = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6"
    "IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;BlobEndpoint={url}/devstoreaccount1;"
)


@pytest.fixture(params=PACKAGES)
def cloud(request: pytest.FixtureRequest) -> Iterator[str]:
    """A protocol whose package is installed."""
    pytest.importorskip(PACKAGES[request.param])
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    yield request.param
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


def told_of(url: str, patch: pytest.MonkeyPatch) -> None:
    """Point the clients of both clouds to a server."""
    patch.setenv("STORAGE_EMULATOR_HOST", url)
    patch.setenv("AZURE_STORAGE_CONNECTION_STRING", AZURITE.format(url=url))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def emulated(cloud: str) -> Iterator[str]:
    """Run an emulator with an empty bucket; skip the test if the emulator is missing."""
    port = free_port()
    if cloud == "gs":
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stop()
        return
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("no azurite-blob on PATH")
    words = ["--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", str(port), "--silent"]
    words += ["--disableTelemetry", "--skipApiVersionCheck"]
    with subprocess.Popen([azurite, *words], stdout=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def test_the_whole_job_gives_the_bits_of_a_local_one(
    cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = tiny_cohort(tmp_path)
    nd.run(cohort, out=tmp_path / "local", preset="small", settings=JOB, **NAMES)
    with emulated(cloud) as url:
        told_of(url, monkeypatch)
        with contextlib.suppress(Exception):  # one emulator starts with a bucket
            fsspec.filesystem(cloud).mkdir("bucket")
        there = open_storage(f"{cloud}://bucket/cohort.zarr")
        for path in cohort.rglob("*"):
            if path.is_file():
                there.write_atomic(str(path.relative_to(cohort)), path.read_bytes())
        nd.run(there.url, out=f"{cloud}://bucket/run", preset="small", settings=JOB, **NAMES)
        run = open_storage(f"{cloud}://bucket/run")
        for name, data in run.read_all(list(run.list())).items():
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).write_bytes(data)
        assert_same_bits(tmp_path / "local", tmp_path / "run")
        assert not run.exists(keys.LOCK)
        run.delete(keys.DONE)
        assert run.list(keys.DONE) == {}


class Unwell(http.server.BaseHTTPRequestHandler):
    """A server that answers with an error, or never."""

    silent = False

    def log_message(self, *args):
        pass

    def answer(self):
        self.server.asked += 1
        if self.silent:
            self.server.ended.wait(60)
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer


class Silent(Unwell):
    silent = True


@pytest.mark.parametrize("handler", [Unwell, Silent])
@pytest.mark.parametrize("verb", ["exists", "read", "list", "write", "delete"])
def test_a_server_that_is_unwell_is_asked_five_times_and_named(
    cloud: str, verb: str, handler: type[Unwell], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {
        "exists": lambda run: run.exists("a"), "read": lambda run: run.read("a"), "list": Storage.list,
        "write": lambda run: run.write_atomic("a", b"x"), "delete": lambda run: run.delete("a"),
    }[verb]  # fmt: skip
    monkeypatch.setenv(retries.VARIABLE, str(LIMIT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.ended = 0, threading.Event()
        told_of(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises(StoreError, match=rf"^{cloud}://bucket/run.* cannot be .*tried 5 times"):
                ask(open_storage(f"{cloud}://bucket/run"))
            assert time.monotonic() - started < 30 * LIMIT + 5
            assert server.asked in (5, 10)  # some methods make two requests
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("protocol", PACKAGES)
def test_a_protocol_whose_package_is_missing_says_which_extra_brings_it(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGES[protocol]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, PACKAGES[protocol], None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    with pytest.raises(StoreError, match=rf"pip install 'ndreamer-dist\[{protocol}\]'"):
        open_storage(f"{protocol}://bucket/run").exists()
