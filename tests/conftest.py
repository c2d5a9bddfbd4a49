"""What the tests share: one local Ray, small finished runs, and where the real cohorts are."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.budget import Budget
from tests.scheduling import ON_RAY, GroupScheduling, file_of, ordered
from tests.shared import shared_cohort, shared_run
from tests.slow import UNLISTED, unlisted
from tests.tiny import PROMPT, SETTINGS

ROOT = Path(__file__).parent.parent
for name, value in PROMPT.items():
    os.environ.setdefault(name, value)


def pytest_configure(config: pytest.Config) -> None:
    """Measure what the tests cost."""
    config.pluginmanager.register(Budget(config), "processor-seconds")


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest modules first; note slow tests that are not in the list, which fail a test of `test_tiers.py`."""
    config.stash[UNLISTED] = unlisted(items)
    items[:] = ordered(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    """Let one process run all files that share something expensive."""
    return GroupScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the Ray that tests share after the last file that uses it: without work it takes processor time too."""
    ray = sys.modules.get("ray")
    if ray and not (nextitem and file_of(nextitem) in ON_RAY) and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_token(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A token file of the tests' own for every Ray that they start."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


@pytest.fixture
def local_ray(ray_token: None) -> None:
    """A local Ray of two processors, one for all files that use it."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=2, object_store_memory=256 * 2**20, include_dashboard=False, log_to_driver=False,
            logging_level="WARNING",
        )  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cohort; no test may change it."""
    return shared_cohort(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished serial run of it with SETTINGS; no test may change it."""
    return shared_run(tmp_path_factory, SETTINGS["train.epochs"])


@pytest.fixture(scope="session")
def tiny_short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two epochs; no test may change it."""
    return shared_run(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cohorts; the test is skipped where there is none."""
    folder = Path(os.environ.get("NDREAMER_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real cohorts here: set NDREAMER_TEST_DATA to a folder that holds them")
    return folder
