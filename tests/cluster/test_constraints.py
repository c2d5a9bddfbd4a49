"""constraints.txt names every package that an installation brings, at the version that the tests ran with."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.cluster.manifests import ROOT

TOLD = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = TOLD["project"]["optional-dependencies"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
IN_EVERY_TEST = ("cpu", "s3", "cluster", "test", "dev")
"""What README's test command installs; `bench` is looked at as far as it is there."""
OF_CUDA = ("cuda-", "nvidia-", "triton")
"""How names of packages begin that a torch for GPUs brings; it pins each of them itself."""


def found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def closure(wanted: list[str]) -> tuple[dict[str, str], set[str]]:
    """Return name and version of what is installed of some requirements and all that they require, and what is not."""
    versions: dict[str, str] = {}
    absent, seen = set(), set()
    waiting = [(Requirement(each), "") for each in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        package = found(name)
        if package is None:
            absent.add(name)
            continue
        versions[name] = Version(package.version).public  # 2.13.0 of 2.13.0+cpu
        waiting += [(Requirement(each), extra) for each in package.requires or [] for extra in ("", *extras)]
    return versions, absent


def pins() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)}


def test_every_line_is_a_package_at_one_public_version() -> None:
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert len(pins()) == len(LINES)
    assert [line.lower() for line in LINES] == sorted(line.lower() for line in LINES)


@pytest.mark.parametrize("extra", [None, *IN_EVERY_TEST, "bench"])
def test_what_is_installed_is_what_is_pinned(extra: str | None) -> None:
    versions, absent = closure(EXTRAS[extra] if extra else TOLD["project"]["dependencies"])
    if extra != "bench":
        assert absent == set()
    ours = {name: version for name, version in versions.items() if not name.startswith(OF_CUDA)}
    differ = {name: (version, pins().get(name)) for name, version in ours.items() if pins().get(name) != version}
    assert differ == {}


def test_the_build_backend_is_pinned_with_what_it_needs() -> None:
    versions, absent = closure(TOLD["build-system"]["requires"])
    assert absent == set()
    assert len(versions) > 3
    assert versions.items() <= pins().items()
