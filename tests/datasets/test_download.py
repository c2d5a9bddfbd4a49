"""A download ends with the bytes that were meant or with none: interrupted, resumed, tampered with, offline."""

from __future__ import annotations

import hashlib
import json
import socket

import numpy as np
import pytest

from ndreamer_dist import cli, fetch
from ndreamer_dist.datasets import download
from ndreamer_dist.datasets.download import load_registry
from ndreamer_dist.errors import CohortError
from tests.servers import Plain, Ranges, serving

DATA = np.random.default_rng(0).bytes(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Breaking(Ranges):
    """A server with ranges whose connection is lost in the middle of what it sends."""

    def do_GET(self):
        self.server.asked = [*getattr(self.server, "asked", []), self.headers.get("Range")]
        super().do_GET()

    def end_headers(self):
        super().end_headers()
        if len(self.server.asked) < 3:
            self.wfile = Half(self.wfile)


class Half:
    """A stream that takes half of what it is given, and no more."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, data):
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        raise ConnectionResetError

    def __getattr__(self, name):
        return getattr(self._stream, name)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "kang.h5ad").write_bytes(DATA)
    (tmp_path / "here").mkdir()
    return tmp_path


def files(folder):
    return sorted(path.name for path in (folder / "here").iterdir())


@pytest.mark.parametrize("server", [Ranges, Plain])
def test_a_registered_cohort_is_brought_and_checked(folder, server, capsys):
    with serving(server, folder / "served") as served:
        registry = folder / "registry.yaml"
        registry.write_text(f"kang: {{url: '{served.url}/kang.h5ad', sha256: {SHA}, what: PBMC, licence: none}}\n")
        out = folder / "here" / "k.h5ad"
        words = ["fetch", "kang", "--registry", str(registry), "--out", str(out)]
        for _ in range(2):  # the second time it is there
            with pytest.raises(SystemExit) as ended:
                cli.main(words)
            assert not ended.value.code
        assert served.requests == 1
    assert out.read_bytes() == DATA
    assert files(folder) == ["k.h5ad"]
    assert "is there, and its sha256 is the expected one" in capsys.readouterr().out


def test_an_interrupted_download_goes_on_where_it_stopped(folder, monkeypatch):
    monkeypatch.chdir(folder / "here")
    with serving(Breaking, folder / "served") as served:
        url = f"{served.url}/kang.h5ad?version=1"
        for _ in range(2):
            with pytest.raises(CohortError, match=r"(stopped after \d+ of 3000000|cannot be reached)"):
                fetch(url, sha256=SHA)
            assert [name[:1] for name in files(folder)] == ["."]
        assert fetch(url, sha256=SHA.upper()).name == "kang.h5ad"
    assert (folder / "here" / "kang.h5ad").read_bytes() == DATA
    starts = [0 if asked is None else int(asked[6:-1]) for asked in served.asked]
    assert starts == sorted(starts)
    assert starts[1] > 1_000_000
    assert len(set(starts)) == 3


def test_a_server_without_ranges_starts_over(folder):
    (folder / "here" / f".{SHA[:16]}.part").write_bytes(b"x" * 1000)
    with serving(Plain, folder / "served") as served:
        fetch(f"{served.url}/kang.h5ad", sha256=SHA, out=folder / "here" / "k")
    assert (folder / "here" / "k").read_bytes() == DATA


@pytest.mark.parametrize(
    "left",
    [pytest.param(DATA, id="all"), pytest.param(DATA + b"more", id="too_much"), pytest.param(b"bad", id="other")],
)
def test_what_lies_there_of_an_earlier_download_is_checked_too(folder, left):
    (folder / "here" / f".{SHA[:16]}.part").write_bytes(left)
    with serving(Ranges, folder / "served") as served:
        ask = lambda: fetch(f"{served.url}/kang.h5ad", sha256=SHA, out=folder / "here" / "k")  # noqa: E731
        if left != DATA:
            with pytest.raises(CohortError, match="nothing is kept"):
                ask()
            assert files(folder) == []
        ask()
    assert (folder / "here" / "k").read_bytes() == DATA


def test_other_bytes_are_refused(folder):
    wrong = "0" * 64
    out = folder / "here" / "k"
    with serving(Ranges, folder / "served") as served:
        with pytest.raises(CohortError, match=f"sha256 {SHA}, expected {wrong}"):
            fetch(f"{served.url}/kang.h5ad", sha256=wrong, out=out)
        assert files(folder) == []
        out.write_bytes(b"mine")
        with pytest.raises(CohortError, match="is there already and is another file"):
            fetch(f"{served.url}/kang.h5ad", sha256=SHA, out=out)
        assert out.read_bytes() == b"mine"
        with pytest.raises(CohortError, match="answers 404"):
            fetch(f"{served.url}/none.h5ad", sha256=SHA, out=folder / "here" / "n")


def test_without_a_network_the_message_says_what_helps(folder, monkeypatch):
    monkeypatch.setattr(download, "SECONDS", 2.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody answers
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/kang.h5ad"
        with pytest.raises(CohortError, match=r"cannot be reached .* bring the file here by other means"):
            fetch(url, sha256=SHA, out=folder / "here" / "k")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        pytest.param("kang", {}, "no cohort's checksum comes with this package", id="no_registry"),
        pytest.param("kan", {"registry": "r.json"}, "Did you mean 'kang'", id="name"),
        pytest.param("https://example.org/k.h5ad", {}, "give the file's sha256", id="no_checksum"),
        pytest.param("https://example.org/k.h5ad", {"sha256": "abc"}, "64 hexadecimal", id="short_checksum"),
        pytest.param("kang", {"registry": "none.yaml"}, "cannot be read", id="no_file"),
        pytest.param("kang", {"registry": "bad.yaml"}, "bad.yaml: sha256: ", id="bad_entry"),
        pytest.param("kang", {"registry": "list.yaml"}, "expected cohorts by name, found list", id="list"),
        pytest.param("kang", {"registry": "file.yaml"}, "file.yaml: url: ", id="other_protocol"),
    ],
)
def test_unclear_requests_are_refused(tmp_path, monkeypatch, name, arguments, message):
    monkeypatch.chdir(tmp_path)
    entry = {"url": "https://example.org/k.h5ad", "sha256": SHA}
    (tmp_path / "r.json").write_text(json.dumps({"kang": entry}))
    (tmp_path / "bad.yaml").write_text(json.dumps({"kang": {"url": entry["url"]}}))
    (tmp_path / "list.yaml").write_text("- kang\n")
    (tmp_path / "file.yaml").write_text(json.dumps({"kang": {**entry, "url": "file:///etc/passwd"}}))
    assert load_registry("r.json")["kang"].sha256 == SHA
    with pytest.raises(CohortError, match=message):
        fetch(name, **arguments)
    assert len(list(tmp_path.iterdir())) == 4
