"""The promised memory grows with the sizes it depends on, and a million cells fit a small machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import ndreamer_dist as nd
from ndreamer_dist import keys
from ndreamer_dist.cohort.pack import partitions_of
from ndreamer_dist.cohort.statistics import spans_of
from ndreamer_dist.effects.tables import MATCH_LIMIT
from ndreamer_dist.planning.memory import (
    DRIVER_BYTES,
    DRIVER_BYTES_PER_CELL,
    FEWER,
    SMALLER_BLOCKS,
    SMALLER_MODEL,
    all_genes_needs,
    disk_bytes,
    needs,
    stage_memory,
    task_memory,
)
from ndreamer_dist.planning.sizes import BASE_BYTES, CohortSize
from ndreamer_dist.settings import Settings
from tests.cohorts import design_of
from tests.tiny import NAMES, SETTINGS, STORES, arrays

MILLION = CohortSize(
    cells=1_000_000,
    genes=20_000,
    stored_values=800_000_000,
    groups=80,
    largest_group=25_000,
    edges=4800,
    conditions=2,
    fewest_groups=40,
)
GIB = 2**30


@pytest.fixture
def small() -> Settings:
    return Settings.build(preset="small")


def test_sizes_are_those_of_the_design(small: Settings) -> None:
    size = CohortSize.of(design_of([300, 200, 150]), small, genes=50, stored_values=7000)
    assert (size.cells, size.groups, size.largest_group, size.conditions) == (650, 3, 300, 2)
    assert size.fewest_groups == 1
    assert size.edges == 2 + 3 + 2  # controls: both control groups; treated: itself and both control groups


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


def test_the_condition_with_the_fewest_groups_says_how_many_neighbours_are_stored(small: Settings) -> None:
    uneven = dataclasses.replace(MILLION, fewest_groups=9)  # 14 neighbours instead of 3
    assert disk_bytes(uneven, small) > disk_bytes(MILLION, small)


def test_matches_that_obsm_leaves_out_take_no_disk(small: Settings) -> None:
    most = dataclasses.replace(MILLION, groups=MATCH_LIMIT // 1_000_000, edges=0)
    beyond = dataclasses.replace(most, groups=most.groups + 1)
    assert disk_bytes(most, small) - disk_bytes(beyond, small) == most.cells * most.groups * 8


def before_tasks(size: CohortSize) -> int:
    """Return the promised memory without that of the tasks."""
    return int(DRIVER_BYTES + DRIVER_BYTES_PER_CELL * size.cells)


@pytest.mark.parametrize(
    ("within", "graph"),
    [
        pytest.param({"within": "group"}, 25_000, id="group"),
        pytest.param({"within": "all"}, 1_000_000, id="all"),
        pytest.param({"within": "sketch"}, 100_000, id="sketch"),
        pytest.param({"within": "auto"}, 200_000, id="auto"),
        pytest.param({"within": "auto", "max_cells": 50_000, "sketch_cells": 60_000}, 60_000, id="auto_by_sketch"),
    ],
)
def test_clusters_are_promised_the_largest_graph(within: dict[str, object], graph: int) -> None:
    made = Settings.build(preset="small", overrides={f"clusters.{name}": value for name, value in within.items()})
    told = task_memory(MILLION, made)[keys.STAGE_CLUSTERS] - int(BASE_BYTES)
    assert told == graph * (200 * 24 + 15 * 60 + 50 * 12)


def test_packing_is_promised_the_largest_partition(small: Settings) -> None:
    for cells in (5_000, 100_000, 1_000_000):
        size = dataclasses.replace(MILLION, cells=cells, stored_values=800 * cells)
        blocks = -(-cells // small.pack.block_rows)
        partitions = partitions_of(blocks, size.stored_values, len(spans_of(cells)))
        most = min(cells, max(len(part) for part in partitions) * small.pack.block_rows)
        assert most == size.partition_cells(small)


def test_the_disk_that_is_promised_is_what_a_run_writes(tiny: Path, tmp_path: Path) -> None:
    cohort, settings = tiny, SETTINGS | {"train.epochs": 1}
    nd.run(cohort, out=tmp_path / "run", preset="small", settings=settings, **NAMES)
    values = sum(
        array.nbytes for store in STORES for array in arrays(tmp_path / "run" / store).values() if array.dtype != object
    )
    weights = 3 * sum(file.stat().st_size for file in (tmp_path / "run" / keys.TRAIN_DIR).rglob("*.safetensors"))
    promised = nd.plan(cohort, out=tmp_path / "run", preset="small", settings=settings, **NAMES).disk
    assert values < promised < 1.5 * (values + weights)


def test_all_genes_need_memory_by_span_and_disk_by_gene(small: Settings) -> None:
    few, many = (all_genes_needs(10**6, genes, 0.1, small, cpus=2, object_store=0) for genes in (2000, 20_000))
    layers = len(small.effects.store) * 10**6 * 4 * 18_000
    assert many.disk - few.disk == layers + 2 * 10**6 * 1800 * 8
    assert few.memory < many.memory < 10 * few.memory  # only one span of genes of a dense shard is held at a time


@pytest.mark.parametrize(
    ("preset", "method", "cpus", "savings"),
    [
        ("paper", "ndreamer", 1, [SMALLER_MODEL]), ("small", "ndreamer", 1, []),
        ("small", "ndreamer", 4, [FEWER]), ("paper", "pca", 1, [SMALLER_BLOCKS]),
    ],
)  # fmt: skip
def test_what_is_proposed_takes_less_memory(preset: str, method: str, cpus: int, savings: list[str]) -> None:
    settings = Settings.build(preset=preset, overrides={"embed.method": method})
    size = dataclasses.replace(MILLION, cells=100_000, stored_values=80_000_000)
    proposed = needs(size, settings, cpus=cpus, object_store=0)
    assert list(proposed.savings) == savings
    less = {
        FEWER: needs(size, settings, cpus=1, object_store=0),
        SMALLER_BLOCKS: needs(
            size, Settings.build(preset=preset, overrides={"embed.method": method, "pack.block_rows": 1024}),
            cpus=cpus, object_store=0,
        ),
        SMALLER_MODEL: needs(size, Settings.build(preset="small"), cpus=cpus, object_store=0),
    }  # fmt: skip
    assert all(less[how].memory < proposed.memory for how in proposed.savings)
