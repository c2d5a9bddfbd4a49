"""results.zarr is a correct AnnData store with checksums, and is repaired without rewriting finished shards."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import Deferred, RayRuntime, SerialRuntime
from ndreamer_dist.effects import stage, tables
from ndreamer_dist.effects.stage import run_effects
from ndreamer_dist.errors import CohortError, StoreError
from ndreamer_dist.matching.stage import run_match
from ndreamer_dist.matching.store import Matches
from ndreamer_dist.results.read import read_element
from ndreamer_dist.stats.results import open_results
from ndreamer_dist.storage.arrays import read_array
from tests.tiny import layer_names

from .brute_force import check
from .conftest import SIZES, finish
from .fabricate import fabricate


def arrays_of(folder):
    """Return every array below a folder by its path."""
    names = sorted(
        str(path.parent.relative_to(folder))
        for path in Path(folder).rglob("zarr.json")
        if json.loads(path.read_text())["node_type"] == "array"
    )
    return {name: zarr.open_array(f"{folder}/{name}", mode="r") for name in names}


def assert_same_arrays(one, other):
    first, second = arrays_of(one), arrays_of(other)
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(np.asarray(array[...]), np.asarray(second[name][...]), err_msg=name)


def chunk_files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "zarr.json")


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param(SIZES, {}, id="three_conditions_one_neighbour"),
        pytest.param(SIZES, {"match.neighbours": 5, "match.bandwidth": 0.5, "match.query_rows": 32}, id="kernel"),
        pytest.param(SIZES, {"match.edges": "all", "effects.chunk_genes": 1000}, id="all_edges"),
        pytest.param({(None, 0): 90, (None, 1): 70, (None, 2): 9}, {"match.neighbours": 2}, id="no_batch"),
        pytest.param({(0, 0): 9, (1, 0): 11, (2, 1): 5, (3, 1): 3}, {"match.neighbours": 5}, id="nested_small_groups"),
    ],
)
def test_the_store_equals_its_recomputation_from_itself(tmp_path, sizes, changes):
    levels = () if (None, 0) in sizes else ("a", "b+c", "d", "e|f")
    made = finish(fabricate(tmp_path, sizes, levels=levels, overrides=changes))
    stored = check(tmp_path / keys.RESULTS)
    np.testing.assert_array_equal(stored.X.toarray(), made.dense)
    for name in (keys.MU, keys.PCA):
        np.testing.assert_array_equal(stored.obsm[name], read_array(made.run.storage / keys.EMBEDDING, name))
    if not levels:
        np.testing.assert_array_equal(stored.layers["denoised"], made.dense)
        np.testing.assert_array_equal(stored.layers["batch_effect"], 0)


def test_crowds_of_copies_are_recomputed_too(tmp_path):
    finish(fabricate(tmp_path, SIZES, crowds=3))
    check(tmp_path / keys.RESULTS)


def test_anndata_reads_it_with_nothing_of_ours_installed(finished):
    program = """
import sys, anndata, numpy as np
a = anndata.read_zarr(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("ndreamer")]
assert a.X.dtype == np.float32 and a.layers["ite"].dtype == np.float32 and a.obsm["ndreamer_match"].dtype == np.int32
print(*a.shape, *sorted(filter(None, a.layers)), *sorted(a.obsm), a.uns["ndreamer"]["sign"], sep=",")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, f"{finished.run.url}/{keys.RESULTS}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (
        "244,37,batch_effect,denoised,ite,X_ndreamer,X_ndreamer_pca,ndreamer_match,ndreamer_match_distance,"
        "own condition minus control"
    )


def test_obs_and_var_are_the_input_s_untouched_and_ours(finished):
    stored = anndata.read_zarr(f"{finished.run.url}/{keys.RESULTS}")
    rows = finished.packed.input_row
    theirs = [name for name in stored.obs.columns if not name.startswith(keys.OBS_PREFIX)]
    pd.testing.assert_frame_equal(stored.obs[theirs], finished.source.obs.iloc[rows])
    pd.testing.assert_frame_equal(stored.var, finished.source.var.loc[list(finished.packed.genes)])
    assert list(stored.obs_names) == list(finished.source.cell_names[rows])
    np.testing.assert_array_equal(stored.obs[keys.OBS_INPUT_ROW], rows)
    assert (stored.obs[keys.OBS_CONDITION].astype(str) == stored.obs["condition"].astype(str)).all()
    assert list(stored.obs[keys.OBS_CONDITION].cat.categories) == list(finished.design.conditions)
    assert list(stored.obs[keys.OBS_GROUP].cat.categories) == [group.name for group in finished.design.groups]
    assert set(stored.obs[keys.OBS_BATCH]) == {"a", r"b\+c"}
    np.testing.assert_array_equal(stored.obs[keys.OBS_LOW], finished.packed.clusters(keys.PACKED_LOW))
    np.testing.assert_array_equal(stored.obs[keys.OBS_HIGH], finished.packed.clusters(keys.PACKED_HIGH))


def test_uns_tells_the_run_in_plain_values(finished):
    told = anndata.read_zarr(f"{finished.run.url}/{keys.RESULTS}").uns[keys.UNS]
    assert told["sign"] == "own condition minus control"
    assert told["control"] == "ctrl"
    assert list(told["conditions"]) == ["ctrl", "stim", "sick"]
    assert json.loads(told["dropped"]) == {"empty": 3}
    assert json.loads(told["settings"])["match"]["neighbours"] == 1
    assert json.loads(told["versions"])["ndreamer-dist"]
    text = json.dumps({name: str(value) for name, value in told.items()})
    assert os.uname().nodename not in text
    assert "chunk_rows" not in text  # a setting that does not change results


def test_every_array_ends_in_a_checksum(finished):
    arrays = arrays_of(f"{finished.run.url}/{keys.RESULTS}") | arrays_of(f"{finished.run.url}/{keys.MATCHES}")
    assert len(arrays) > 60
    for name, array in arrays.items():
        metadata = json.loads(json.dumps(array.metadata.to_dict(), default=str))
        codecs = metadata["codecs"]
        if codecs[0]["name"] == "sharding_indexed":
            assert codecs[0]["configuration"]["index_codecs"][-1]["name"] == "crc32c", name
            codecs = codecs[0]["configuration"]["codecs"]
        assert codecs[-1]["name"] == "crc32c", name


def test_a_gene_over_all_cells_is_a_narrow_chunk(finished):
    ite = zarr.open_array(f"{finished.run.url}/{keys.RESULTS}/layers/ite", mode="r")
    assert ite.chunks == (64, 32)
    assert ite.shards == (64, 64)


# --- damage ----------------------------------------------------------------------------------------------------------


def read_everything(folder):
    """Read everything in a results.zarr with the reader."""
    results = open_results(folder)
    _ = results.obs, results.var, results.uns
    for name in results.layers:
        results.layer(name)
    results.expression()
    results.embedding()
    results.embedding(pca=True)
    for name in (keys.OBSM_MATCH, keys.OBSM_MATCH_DISTANCE):
        read_array(results.storage, f"obsm/{name}")


def test_one_flipped_bit_anywhere_is_an_error_that_names_the_chunk(copied):
    rng = np.random.default_rng(0)
    folder = copied.folder / keys.RESULTS
    files, storage = chunk_files(folder), open_results(folder).storage
    assert len(files) > 60
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        array, position = re.fullmatch(r"(.*)/c((?:/\d+)*)", str(path.relative_to(folder))).groups()
        place = ", ".join(position.strip("/").split("/"))
        top = array.partition("/")[0]
        with pytest.raises(StoreError) as caught:
            read_element(storage, top) if top in ("obs", "var", "uns") else read_array(storage, array)
        assert f"'{array}', chunk ({place}" in str(caught.value), path
        assert str(folder) in str(caught.value)
        path.write_bytes(whole)
    read_everything(folder)


def test_one_flipped_bit_in_the_matches_is_an_error_that_names_the_chunk(copied):
    rng = np.random.default_rng(0)
    folder = copied.folder / keys.MATCHES
    matches = Matches(copied.run.storage / keys.MATCHES)
    for path in chunk_files(folder):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        group, name, _, tile, target, _ = path.relative_to(folder).parts
        with pytest.raises(StoreError, match=rf"'{group}/{name}', chunk \({tile}, {target}, 0\)"):
            matches.edge(int(group), int(target))
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "lost",
    ["layers/ite/c/1/0", "X/data/c/0", "obsm/ndreamer_match/c/0/0", "obs/score/c/0", "obs/never/c/0", "var/_index/c/0"],
)
def test_a_missing_chunk_is_an_error_and_not_a_fill_value(copied, lost):
    (copied.folder / keys.RESULTS / lost).unlink()
    array, _, position = lost.partition("/c/")
    with pytest.raises(StoreError, match=rf"array '{array}', chunk \({position[0]}.* is missing"):
        read_everything(copied.folder)


def rerun(made):
    runtime = SerialRuntime(made.settings.run)
    run_match(made.run, made.settings, made.design, runtime, "key of match")
    summary = {"dropped": {"empty": 3}, "stage": "fabricated"}
    run_effects(made.run, made.settings, made.packed, made.source, runtime, "key of effects", summary)


@pytest.mark.parametrize(
    ("lost", "marker", "redone"),
    [
        pytest.param("layers/ite/c/1/0", "rows-00001", "/c/1/0", id="layer_and_marker"),
        pytest.param("obsm/X_ndreamer/c/2/0", None, "/c/2/0", id="embedding"),
        pytest.param("X/data/c/0", "entries-00000", "X/", id="expression"),
        pytest.param("obs/score/c/0", None, None, id="table"),
        pytest.param("zarr.json", None, None, id="root"),
    ],
)
def test_a_lost_shard_is_made_again_and_the_others_are_left_alone(finished, copied, lost, marker, redone):
    folder = copied.folder / keys.RESULTS
    before = {path: path.stat().st_mtime_ns for path in chunk_files(folder)}
    (folder / lost).unlink()
    if marker:
        (copied.folder / keys.DONE / keys.STAGE_EFFECTS / f"{marker}.json").unlink()
    rerun(copied)
    assert_same_arrays(f"{finished.run.url}/{keys.RESULTS}", folder)
    read_everything(folder)
    for path, time in before.items():
        name = str(path.relative_to(folder))
        driver = name.split("/")[0] in ("obs", "var", "uns") or name.startswith("X/indptr")
        if not driver and (redone is None or redone not in name):
            assert path.stat().st_mtime_ns == time, name


def test_a_cut_shard_is_made_again(finished, copied):
    path = copied.folder / keys.RESULTS / "layers/denoised/c/0/0"
    path.write_bytes(path.read_bytes()[:100])
    rerun(copied)
    assert_same_arrays(f"{finished.run.url}/{keys.RESULTS}", copied.folder / keys.RESULTS)


def test_a_finished_run_does_nothing(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*") if path.is_file()}
    rerun(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*") if path.is_file()} == before


def test_an_unfinished_store_opens_nowhere_and_the_message_says_how_to_go_on(copied, monkeypatch):
    (copied.folder / keys.RESULTS / "layers/ite/c/1/0").unlink()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "write_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        rerun(copied)
    for address in (copied.folder, copied.folder / keys.RESULTS):
        with pytest.raises(StoreError, match="has not finished; give the same `run` command again"):
            open_results(address)
    with pytest.raises(Exception, match=r"results\.zarr"):
        anndata.read_zarr(copied.folder / keys.RESULTS)


def test_another_key_begins_anew(copied):
    settings = copied.settings.model_copy(
        update={"effects": copied.settings.effects.model_copy(update={"store": ("ite",)})}
    )
    runtime = SerialRuntime(settings.run)
    run_effects(copied.run, settings, copied.packed, copied.source, runtime, "another key")
    stored = check(copied.folder / keys.RESULTS)
    assert layer_names(stored) == ["ite"]


def test_nothing_is_stored_where_no_layer_is_asked_for(copied):
    settings = copied.settings.model_copy(update={"effects": copied.settings.effects.model_copy(update={"store": ()})})
    run_effects(copied.run, settings, copied.packed, copied.source, SerialRuntime(settings.run), "another key")
    assert not layer_names(check(copied.folder / keys.RESULTS))


def test_shards_of_expression_span_blocks(copied, monkeypatch, finished):
    monkeypatch.setattr(tables, "CHUNK_ENTRIES", 50)
    monkeypatch.setattr(tables, "SHARD_ENTRIES", 500)
    rows = copied.settings
    run_effects(copied.run, rows, copied.packed, copied.source, SerialRuntime(rows.run), "another key")
    stored = check(copied.folder / keys.RESULTS)
    assert len(list((copied.folder / keys.RESULTS / "X/data/c").iterdir())) > 4
    np.testing.assert_array_equal(stored.X.toarray(), copied.dense)
    np.testing.assert_array_equal(open_results(copied.folder).expression(order="packed").X.toarray(), copied.dense)


def written_by_spans(copied, finished):
    """Write the results in spans of 16 genes, compare every bit, and return the settings."""
    effects = copied.settings.effects.model_copy(update={"chunk_genes": 8})
    settings = copied.settings.model_copy(update={"effects": effects})
    run_effects(copied.run, settings, copied.packed, copied.source, SerialRuntime(settings.run), "another key")
    stored, before = check(copied.folder / keys.RESULTS), anndata.read_zarr(f"{finished.run.url}/{keys.RESULTS}")
    assert zarr.open_array(copied.folder / keys.RESULTS / "layers/ite", mode="r").shards == (64, 16)
    for name in layer_names(stored):
        np.testing.assert_array_equal(stored.layers[name], before.layers[name])
    return settings


def test_spans_of_genes_are_shards_of_their_own_and_change_no_bit(copied, monkeypatch, finished):
    monkeypatch.setattr(tables, "SHARD_GENES", 20)
    settings = written_by_spans(copied, finished)
    lost = copied.folder / keys.RESULTS / "layers/ite/c/1/2"
    times = {path: path.stat().st_mtime_ns for path in lost.parents[1].rglob("*/*")}
    assert len(times) == 4 * 3
    lost.unlink()
    run_effects(copied.run, settings, copied.packed, copied.source, SerialRuntime(settings.run), "another key")
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [lost]


def test_much_expression_is_read_by_spans_of_genes_and_once_each(copied, monkeypatch, finished):
    entries = copied.dense.astype(bool).sum()
    monkeypatch.setattr(tables, "MOST_SHARED_BYTES", int(entries) * tables.ENTRY_BYTES // 2 - 1)
    read = []
    load = stage.load_block
    monkeypatch.setattr(stage, "load_block", lambda *asked: read.append(asked[1:]) or load(*asked))
    written_by_spans(copied, finished)
    assert len({genes for _, genes in read}) == 3
    assert max(Counter(read).values()) <= 2  # once as counterparts and once as the cells' own expression


def test_a_task_sums_where_the_last_one_of_its_process_did(copied, monkeypatch):
    write, average, sums = stage._write_part, stage.average_through, []

    def written(part, target, blocks):
        write(part, pickle.loads(pickle.dumps(target)), blocks)  # as it arrives in a worker

    def averaged(*asked):
        sums.append(average(*asked)[0])  # kept alive, so that new memory cannot reuse its address
        return sums[-1:] + list(asked[3][1:])

    monkeypatch.setattr(stage, "_write_part", written)
    monkeypatch.setattr(stage, "average_through", averaged)
    run_effects(copied.run, copied.settings, copied.packed, copied.source, SerialRuntime(copied.settings.run), "other")
    assert len(sums) == copied.packed.n_blocks > 2
    assert len({values.__array_interface__["data"] for values in sums}) == 1
    assert not stage._sums.cache_info().currsize
    one, other = (stage.SharedBlocks({}).name for _ in range(2))  # two stores that two threads write concurrently
    assert not np.shares_memory(stage._sums(one, 1, 2, 3), stage._sums(other, 1, 2, 3))
    stage._sums.cache_clear()


def test_a_process_drops_the_blocks_of_a_span_before_it_loads_those_of_the_next(copied):
    packed, genes = copied.packed, (0, copied.packed.n_genes)
    span = stage.SharedBlocks({0: Deferred(lambda: stage.load_block(packed, 0, genes))})
    block = weakref.ref(span[0])
    stage._load_shared(packed, 1, genes, span.name)
    assert span[0] is block()
    stage._load_shared(packed, 0, genes, "the next span")
    assert block() is None
    stage._fetched.cache_clear()


def test_matches_are_left_out_where_they_would_be_too_many(copied, monkeypatch):
    monkeypatch.setattr(tables, "MATCH_LIMIT", 100)
    run_effects(copied.run, copied.settings, copied.packed, copied.source, SerialRuntime(copied.settings.run), "other")
    stored = anndata.read_zarr(copied.folder / keys.RESULTS)
    assert set(stored.obsm) == {keys.OBSM_MU, keys.OBSM_PCA}
    assert "matches.zarr" in stored.uns[keys.UNS]["notes"][0]
    assert stored.obs[keys.OBS_MATCH_DISTANCE].notna().any()


def test_a_cohort_without_a_stored_value_is_written(tmp_path):
    made = fabricate(tmp_path, {(0, 0): 5, (0, 1): 5}, genes=3)
    for block in (tmp_path / keys.PACKED / keys.PACKED_X).iterdir():
        from ndreamer_dist.storage.arrays import write_array

        write_array(made.packed.storage, f"X/{block.name}/{keys.INDPTR}", np.zeros(11, dtype=np.int64))
    finish(made)
    assert check(tmp_path / keys.RESULTS).X.nnz == 0
    assert open_results(tmp_path).expression().X.nnz == 0


# --- tables ----------------------------------------------------------------------------------------------------------


def test_text_with_gaps_becomes_nullable_and_mixed_columns_are_refused():
    table = pd.DataFrame(
        {"gaps": pd.Series(["a", None, "b"], dtype=object), "flags": np.array([True, None, False], dtype=object)}
    )
    written = tables.writable(table, "obs")
    assert isinstance(written["gaps"].dtype, pd.StringDtype)
    assert written["flags"].dtype == "boolean"
    assert table["gaps"].dtype == object
    tables.check_tables(table, table)
    with pytest.raises(CohortError, match="obs column 'mixed' mixes int, str"):
        tables.check_tables(pd.DataFrame({"mixed": np.array([1, "a"], dtype=object)}), table)
    with pytest.raises(CohortError, match="without '/'"):
        tables.check_tables(pd.DataFrame({"a/b": [1]}), table)
    with pytest.raises(CohortError, match=r"'when'.*cannot be stored"):
        tables.check_tables(pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}), table)


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_ray_and_the_serial_way_write_the_same(finished, tmp_path, local_ray):
    made = fabricate(tmp_path, SIZES)
    finish(made, RayRuntime(made.settings.run))
    assert_same_arrays(f"{finished.run.url}/{keys.RESULTS}", tmp_path / keys.RESULTS)
    path = tmp_path / keys.RESULTS / "layers/ite/c/3/0"
    path.unlink()
    finish(made, RayRuntime(made.settings.run))
    assert_same_arrays(f"{finished.run.url}/{keys.RESULTS}", tmp_path / keys.RESULTS)
    shutil.rmtree(tmp_path / keys.RESULTS)
