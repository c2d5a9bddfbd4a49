"""The packed store holds each kept cell once, normalised, shuffled inside its group; blocks are repaired singly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from ndreamer_dist import keys
from ndreamer_dist.cohort.genes import run_cohort
from ndreamer_dist.cohort.pack import packed_order, partitions_of, run_pack
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.cohort.source import SAMPLE_ROWS, SAMPLES
from ndreamer_dist.cohort.statistics import chunks_of, spans_of
from ndreamer_dist.cohort.stored import StoredMatrix
from ndreamer_dist.compute.executor import RayRuntime
from ndreamer_dist.settings import Settings
from tests.cohort.inputs import PLACES, SERIAL, counts, files_below, opened, settings_of


def pack(folder: Path, cohort: Any, settings: Settings, runtime: Any = SERIAL) -> Packed:
    run, source, key = opened(folder, cohort, settings)
    run_cohort(run, settings, source, runtime, key["cohort"])
    return run_pack(run, settings, source, runtime, key["pack"])


def expected_rows(adata: ad.AnnData, packed: Packed) -> np.ndarray:
    made = adata.copy()
    made.X = sparse.csr_matrix(made.X).astype(np.float32)
    sc.pp.normalize_total(made, target_sum=1e4)
    sc.pp.log1p(made)
    return made[packed.input_row, list(packed.genes)].X.toarray()


CONVERT = {"csr": sparse.csr_matrix, "dense": lambda x: x.toarray()}


@pytest.mark.parametrize("place", ["h5ad", "zarr2", "zarr3"])
@pytest.mark.parametrize("kind", CONVERT)
def test_packed_rows_are_scanpys_values_to_the_bit(kind: str, place: str, tmp_path: Path) -> None:
    adata = counts()
    stored = ad.AnnData(CONVERT[kind](adata.X), obs=adata.obs, var=adata.var)
    packed = pack(tmp_path / "run", PLACES[place](stored, tmp_path), settings_of())
    np.testing.assert_array_equal(packed.rows(0, packed.n_rows).toarray(), expected_rows(adata, packed))
    assert all(packed.block(b).has_canonical_format for b in range(packed.n_blocks))


@pytest.mark.parametrize("place", ["h5ad", "zarr3"])
@pytest.mark.parametrize(("min_cells", "passes"), [(0, 2), (100, 3)])
def test_rows_are_read_in_order_once_a_pass(
    min_cells: int, passes: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort, seen = PLACES[place](counts(2000, 40), tmp_path), []
    read = StoredMatrix.raw_rows

    def watched(matrix: StoredMatrix, start: int, stop: int) -> object:
        seen.append((start, stop))
        return read(matrix, start, stop)

    monkeypatch.setattr(StoredMatrix, "raw_rows", watched)
    pack(tmp_path / "run", cohort, settings_of(cohort__min_cells=min_cells))
    sample, rest = seen[:SAMPLES], seen[SAMPLES:]
    assert all(stop - start == SAMPLE_ROWS for start, stop in sample)
    each = [part for span in spans_of(2000) for part in chunks_of(span, 32)]
    assert rest == each * passes


def test_rows_are_sorted_by_group_and_shuffled_inside(tmp_path: Path) -> None:
    adata = counts()
    packed = pack(tmp_path, adata, settings_of())
    assert sorted(packed.input_row) == list(range(400))
    for group in packed.design.groups:
        rows = packed.input_row[group.start : group.stop]
        own = adata.obs.iloc[rows]
        assert set(own["donor"].astype(str) + "|" + own["condition"]) == {group.name}
        assert sorted(rows) != list(rows)
    again = packed_order(packed.design, packed.design.group_of(np.arange(400)), 0)
    other = packed_order(packed.design, packed.design.group_of(np.arange(400)), 1)
    assert (again != other).any()


@pytest.mark.parametrize("names", [("a+b", "a", "+"), ("a|b", "|", "x|"), ("\\", "\\\\", "a\\+b")])
def test_several_batch_keys_with_odd_names(names: tuple[str, ...], tmp_path: Path) -> None:
    adata = counts(500)
    rng = np.random.default_rng(1)
    adata.obs["site"] = rng.choice(list(names), 500)
    packed = pack(tmp_path, adata, settings_of(cohort__batch_key=["site", "donor"], cohort__min_group_cells=1))
    assert len({group.name for group in packed.design.groups}) == len(packed.design.groups) == 12
    for group in packed.design.groups:
        own = adata.obs.iloc[packed.input_row[group.start : group.stop]]
        levels = [packed.design.batch_levels[k][c] for k, c in enumerate(group.batch_codes)]
        assert set(zip(own["site"], own["donor"].astype(str), own["condition"], strict=True)) == {
            (*levels, packed.design.conditions[group.condition])
        }


@pytest.mark.parametrize("lost", ["packed.zarr/X/00002/data/c/0", "done/pack/00002.json", "packed.zarr/input_row/c/0"])
def test_only_what_is_missing_is_written_again_with_the_same_bits(lost: str, tmp_path: Path) -> None:
    adata, settings = counts(), settings_of()
    pack(tmp_path, adata, settings)
    before = files_below(tmp_path)
    (tmp_path / lost).unlink()
    pack(tmp_path, adata, settings)
    after = files_below(tmp_path)
    assert {name: content for name, (_, content) in after.items()} == {n: content for n, (_, content) in before.items()}
    block = "input_row" if "input_row" in lost else "00002"
    assert all(before[name] == after[name] for name in before if block not in name)
    assert before[lost][0] != after[lost][0]


def test_another_key_starts_over(tmp_path: Path) -> None:
    adata = counts()
    first = pack(tmp_path, adata, settings_of())
    before = first.input_row.copy()
    second = pack(tmp_path, adata, settings_of(seed=5))
    assert (second.input_row != before).any()
    np.testing.assert_array_equal(second.rows(0, second.n_rows).toarray(), expected_rows(adata, second))


def test_a_block_without_any_value_can_be_read(tmp_path: Path) -> None:
    adata = counts(400, 30)
    x = adata.X.toarray()
    x[:, 1:] *= (np.arange(400) < 64)[:, None]
    x[:, 0] = 1
    adata.X, adata.obs["condition"] = sparse.csr_matrix(x), ["ctrl"] * 200 + ["stim"] * 200
    packed = pack(tmp_path, adata, settings_of(hvg__num_hvg=5, cohort__batch_key=None))
    np.testing.assert_array_equal(packed.rows(0, packed.n_rows).toarray(), expected_rows(adata, packed))


@pytest.mark.parametrize(("blocks", "nnz"), [(1, 10), (5, 10), (40, 10), (40, 10**9), (4000, 10**9), (4000, 2 * 10**9)])
def test_partitions_are_whole_blocks_and_cover_them(blocks: int, nnz: int) -> None:
    parts = partitions_of(blocks, nnz, 16)
    assert [block for part in parts for block in part] == list(range(blocks))
    assert all(len(part) for part in parts)
    assert min(blocks, 8) <= len(parts) <= blocks


@pytest.mark.ray
@pytest.mark.parametrize("place", ["memory", "h5ad"])
def test_ray_packs_the_same_bits(place: str, local_ray: None, tmp_path: Path) -> None:
    adata, settings = counts(), settings_of()
    adata.write_h5ad(tmp_path / "in.h5ad")
    cohort = adata if place == "memory" else str(tmp_path / "in.h5ad")
    pack(tmp_path / "serial", adata, settings)
    pack(tmp_path / "ray", cohort, settings, RayRuntime(settings.run))
    a, b = (files_below(tmp_path / name / keys.PACKED) for name in ("serial", "ray"))
    assert {name: content for name, (_, content) in a.items()} == {name: content for name, (_, content) in b.items()}
