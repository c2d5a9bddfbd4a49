"""A whole run of a hostile cohort: nothing outside its directory, nothing pickled in it, no secret in what it tells."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

import ndreamer_dist as nd
from tests.cohort.inputs import counts
from tests.fuzz.helpers import copied, files_of, planned, surveyed
from tests.security.looked_at import assert_no_pickle, assert_no_secret
from tests.servers import s3
from tests.tiny import SETTINGS, run_words, tiny_cohort

HOSTILE = (
    "../../escaped",
    "/tmp/escaped",
    "a\0b",
    "two\nlines",
    "-rf",
    "|",
    "+\\",
    "x" * 10_000,
    "<script>alert(1)</script>",
    "\u202egnp.exe",  # written from right to left
    "e\u0301 \u00e9",  # the same letter, composed and not
    "\uff0e\uff0e\uff0fescaped",  # two dots and a slash, in full width
    "\U0001f9ec\ufeff\u200d",  # a picture, and two signs without width
)
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA" + secrets.token_hex(8).upper(),
    "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
    "AWS_SESSION_TOKEN": secrets.token_hex(40),
    "AZURE_STORAGE_KEY": secrets.token_hex(20),
    "GOOGLE_API_KEY": secrets.token_hex(20),
}


def hostile_cohort() -> ad.AnnData:
    """Return a cohort whose cells, genes, donors, conditions and cell types have names that mean harm."""
    adata = counts(200, 60, donors=2, conditions=("stim", "ctrl"))
    donors = {f"D{i}": HOSTILE[i] for i in range(2)}
    obs = pd.DataFrame(
        {
            "condition": adata.obs["condition"].map({"ctrl": HOSTILE[2], "stim": HOSTILE[3]}).to_numpy(),
            "donor": adata.obs["donor"].astype(str).map(donors).to_numpy(),
            "cell_type": [HOSTILE[i % len(HOSTILE)] for i in range(200)],
        },
        index=[f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(200)],
    )
    var = pd.DataFrame(index=[f"{HOSTILE[i % len(HOSTILE)]}{i}" for i in range(60)])
    return ad.AnnData(adata.X, obs=obs, var=var)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run of a hostile cohort, below a folder of its own and in a process's working folder."""
    (place / "deep").mkdir()
    before = Path.cwd()
    os.chdir(place)
    try:
        nd.run(
            hostile_cohort(), out=place / "deep" / "run", condition_key="condition", control=HOSTILE[2],
            batch_key="donor", preset="small", settings=SETTINGS | {"cohort.min_group_cells": 5, "train.epochs": 1},
        )  # fmt: skip
    finally:
        os.chdir(before)
    return place / "deep" / "run"


def test_names_of_the_data_never_leave_the_run_directory(place: Path, run: Path) -> None:
    assert {name.split("/")[0] for name in files_of(place)} == {"deep"}
    assert [path.name for path in (place / "deep").iterdir()] == ["run"]
    assert not Path("/tmp/escaped").exists()
    names = files_of(run)
    assert not any(bad in name for name in names for bad in ("escaped", "script", "xxxx", "\n", "-rf"))
    assert not any((run / name).is_symlink() for name in names)


def test_hostile_names_come_back_as_they_were(run: Path) -> None:
    given, results = hostile_cohort(), nd.open_results(run)
    assert list(results.obs.index) == list(given.obs_names)
    assert list(results.obs["cell_type"].astype(str)) == list(given.obs["cell_type"])
    assert set(results.conditions) == {HOSTILE[2], HOSTILE[3]}
    assert set(results.var_names) == set(given.var_names)


def test_nothing_that_is_written_is_a_pickle(run: Path, tmp_path: Path) -> None:
    assert_no_pickle(run)
    (tmp_path / "weights").write_bytes(b"cposix\nsystem\n(S'ls'\ntR.")
    with pytest.raises(AssertionError):
        assert_no_pickle(tmp_path)


@pytest.mark.parametrize("where", ["filters", "compressor"])
@pytest.mark.parametrize("array", ["X/data", "obs/age", "obs/_index"])  # names, or from anndata 0.13 on a group of them
def test_a_store_whose_codec_is_pickle_is_refused_and_runs_nothing(array: str, where: str, tmp_path: Path) -> None:
    path = copied("zarr2", tmp_path)
    (path / ".zmetadata").unlink(missing_ok=True)
    metadata = next((path / array).rglob(".zarray"))
    told = json.loads(metadata.read_text())
    told[where] = [{"id": "pickle"}] if where == "filters" else {"id": "pickle"}
    metadata.write_text(json.dumps(told))
    harm = f"cposix\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode()
    for chunk in metadata.parent.iterdir():
        if not chunk.name.startswith("."):
            chunk.write_bytes(harm)
    planned(path)
    assert surveyed(path, tmp_path / "run").refusal
    assert not (tmp_path / "ran").exists()


SPEAKING = """
import json, sys
from ndreamer_dist import cli
codes = []
for words in json.loads(sys.argv[1]):
    try:
        cli.main(words)
    except SystemExit as ended:
        codes.append(ended.code or 0)
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_secrets_of_the_environment_are_in_no_file_and_no_line(tmp_path: Path) -> None:
    """Of a finished run, of a refusal, of an address that holds a password, and of object storage that refuses."""
    cohort, out, wrong = tiny_cohort(tmp_path), tmp_path / "run", tmp_path / "wrong"
    token, password = tmp_path / "token", secrets.token_hex(16)
    token.write_text(SECRETS["AWS_SESSION_TOKEN"][::-1])
    settings = SETTINGS | {"run.log_format": "json", "train.epochs": 1}
    asked = [
        run_words(cohort, out, settings),
        ["contrl" if word == "control" else word for word in run_words(cohort, wrong, settings)],
        run_words(cohort, f"s3://key:{password}@bucket/run", settings),  # type: ignore[arg-type]
        run_words(cohort, "s3://no-bucket/run", settings),  # type: ignore[arg-type]
    ]
    env = os.environ | SECRETS | {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": token.read_text()}
    with s3() as server:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-W", "ignore", "-c", SPEAKING, json.dumps(asked)],
            env=env | {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"},
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 2, 2]
    token.unlink()
    assert_no_secret(
        [*SECRETS.values(), SECRETS["AWS_SESSION_TOKEN"][::-1], password], tmp_path, done.stdout, done.stderr
    )
    told = done.stderr.decode().splitlines()
    lines = [json.loads(line) for line in told if line.startswith("{")]
    assert len(lines) > 5
    assert all(isinstance(line["message"], str) for line in lines)
    assert sum(line.startswith("error: ") for line in told) == 3
