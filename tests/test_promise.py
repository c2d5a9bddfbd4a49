"""The promise grows with what it should grow with, and a million cells fit a small machine."""

from __future__ import annotations

import dataclasses

import pytest

from ndreamer_dist import keys
from ndreamer_dist.promise import CohortSize, disk_bytes, needs, stage_memory
from ndreamer_dist.settings import Settings
from tests.cohorts import design_of

MILLION = CohortSize(
    cells=1_000_000, genes=20_000, stored_values=800_000_000, groups=80, largest_group=25_000, edges=4800, conditions=2
)
GIB = 2**30


@pytest.fixture
def small() -> Settings:
    return Settings.build(preset="small")


def test_sizes_are_those_of_the_design(small: Settings) -> None:
    size = CohortSize.of(design_of([300, 200, 150]), small, genes=50, stored_values=7000)
    assert (size.cells, size.groups, size.largest_group, size.conditions) == (650, 3, 300, 2)
    assert size.edges == 2 + 3 + 2  # controls meet the two controls, the treated group itself and both controls


def test_a_million_cells_are_promised_less_than_16_gb_on_two_processors(small: Settings) -> None:
    promised = stage_memory(MILLION, small, cpus=2, object_store=2 * GIB)
    assert tuple(promised) == keys.STAGES
    assert max(promised.values()) < 16e9
    assert min(promised.values()) > 2e9


@pytest.mark.parametrize(
    "larger",
    [
        pytest.param({"cpus": 8}, id="processors"),
        pytest.param({"object_store": 8 * GIB}, id="object_store"),
        pytest.param({"size": dataclasses.replace(MILLION, cells=4_000_000, stored_values=3_200_000_000)}, id="cells"),
    ],
)
def test_more_of_anything_is_never_promised_less(small: Settings, larger: dict) -> None:
    given = {"size": MILLION, "cpus": 2, "object_store": 2 * GIB}
    before, after = (stage_memory(**parts, settings=small) for parts in (given, {**given, **larger}))
    assert all(after[stage] > before[stage] for stage in keys.STAGES)


def test_a_wider_network_needs_more_to_train_and_fewer_layers_less_disk(small: Settings) -> None:
    paper = Settings.build()
    wide, narrow = (stage_memory(MILLION, s, cpus=2, object_store=0)[keys.STAGE_TRAIN] for s in (paper, small))
    assert wide > narrow
    fewer = Settings.build(preset="small", overrides={"effects.store": ["ite"]})
    assert disk_bytes(MILLION, small) - disk_bytes(MILLION, fewer) == 2 * 1_000_000 * 2000 * 4
    assert needs(MILLION, small, cpus=2, object_store=0).disk == disk_bytes(MILLION, small)
