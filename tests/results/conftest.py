"""A finished run directory, shared by all tests of a session; tests that change it use a copy."""

import shutil
from types import SimpleNamespace

import pytest

from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.effects.stage import run_effects
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.rundir.directory import RunDirectory

from .fabricate import fabricate

SIZES = {(0, 0): 90, (0, 1): 70, (1, 0): 1, (1, 1): 50, (1, 2): 33}
"""Cells per (batch, condition): three conditions, a missing combination, a group of one cell; blocks have 64 rows."""


def finish(made, runtime=None):
    """Run matching and effects on the stores that `fabricate` wrote."""
    runtime = runtime or SerialRuntime(made.settings.run)
    run_match(made.run, made.settings, made.design, runtime, "key of match")
    run_effects(made.run, made.settings, made.packed, made.source, runtime, "key of effects", made.summary)
    return made


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run; tests must not change it."""
    return finish(fabricate(tmp_path_factory.mktemp("finished"), SIZES))


WAYS = {
    "one_neighbour": {"match.neighbours": 1, "denoise.neighbours": 1, "match.hubs": "none"},
    "kernel": {"match.neighbours": 5, "denoise.neighbours": 5, "match.hubs": "none"},
    "hubs_and_two_numbers": {"match.neighbours": 1, "denoise.neighbours": 4, "match.hubs": "csls"},
    "more_for_effects": {"match.neighbours": 3, "denoise.neighbours": 2, "match.hubs": "csls"},
}
"""Ways to match."""


@pytest.fixture(scope="session", params=WAYS.values(), ids=WAYS)
def every_edge(request, tmp_path_factory):
    """A run with the matches of all edges; tests must not change it."""
    overrides = {"match.edges": "all", "match.bandwidth": 0.5, **request.param}
    return finish(fabricate(tmp_path_factory.mktemp("every_edge"), SIZES, overrides=overrides))


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run to be damaged."""
    folder = tmp_path / "run"
    shutil.copytree(finished.run.url, folder)
    run = RunDirectory.at(folder)
    packed = type(finished.packed)(run, finished.design, finished.packed.genes, finished.packed.block_rows)
    return SimpleNamespace(**{**vars(finished), "run": run, "packed": packed, "folder": folder})
