"""What the tests share: one local Ray for the whole session, and where the real cohorts are."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import PROMPT

ROOT = Path(__file__).parent.parent
LONGEST = (
    "test_several_nodes", "test_jobs_on_ray", "test_jobs_submission", "test_chaos", "test_real_cohorts", "test_pipeline",
    "test_object_storage",
    "test_docs", "test_bad_input",
)  # fmt: skip
"""Modules that take longest; begun first, so that the processes that share the tests end together."""
for name, value in PROMPT.items():
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def ray_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A token file of the tests' own for every Ray that they start."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


@pytest.fixture(scope="session")
def local_ray(ray_token: None) -> Iterator[None]:
    """A local Ray of two processors."""
    import ray

    ray.init(
        address="local", num_cpus=2, object_store_memory=256 * 2**20, include_dashboard=False, log_to_driver=False,
        logging_level="WARNING",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cohorts; the test is skipped where there is none."""
    folder = Path(os.environ.get("NDREAMER_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real cohorts here: set NDREAMER_TEST_DATA to a folder that holds them")
    return folder
