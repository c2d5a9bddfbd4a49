"""A public bucket is read without credentials; credentials are used if there are any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ndreamer_dist.cohort.source import open_source
from ndreamer_dist.storage import retries
from tests.cohort.inputs import as_h5ad, as_zarr, counts
from tests.servers import S3_ENVIRONMENT, s3

pytest.importorskip("s3fs")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without credentials."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def server(nobody: pytest.MonkeyPatch) -> Iterator[str]:
    with s3() as serving:
        nobody.setenv("AWS_ENDPOINT_URL", serving.url)
        yield serving.url


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_a_public_bucket_is_read_without_credentials(store: str, server: str, tmp_path: Path) -> None:
    adata = counts(60, 20)
    path = as_h5ad(adata, tmp_path) if store == "h5ad" else as_zarr(3)(adata, tmp_path)
    given = fsspec.filesystem("s3", key="x", secret="y", endpoint_url=server, skip_instance_cache=True)
    given.mkdir("public-data", acl="public-read")
    given.put(path, f"public-data/in.{store}", recursive=True, ACL="public-read")
    source = open_source(f"s3://public-data/in.{store}")
    np.testing.assert_array_equal(source.read_rows(5, 25).toarray(), adata.X[5:25].toarray())


def test_credentials_that_are_there_are_used(nobody: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert retries.options("s3://bucket/x")["anon"] is True
    for name, value in S3_ENVIRONMENT.items():
        nobody.setenv(name, value)
    assert "anon" not in retries.options("s3://bucket/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        nobody.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    retries._found_credentials.cache_clear()
    assert "anon" not in retries.options("s3://bucket/x")
    retries._found_credentials.cache_clear()


def test_what_fsspec_is_told_wins(nobody: pytest.MonkeyPatch) -> None:
    nobody.setitem(fsspec.config.conf, "s3", {"profile": "mine"})
    assert "anon" not in retries.options("s3://bucket/x")
