"""Results are read alike from disk, a web server and S3, every needed chunk once, and exported to files."""

import itertools
import json
import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from ndreamer_dist import keys
from ndreamer_dist.cli import app
from ndreamer_dist.compute.executor import SerialRuntime
from ndreamer_dist.effects import tables
from ndreamer_dist.effects.rounding import rounded
from ndreamer_dist.effects.stage import run_effects
from ndreamer_dist.errors import StoreError
from ndreamer_dist.results import export
from ndreamer_dist.stats.results import open_results
from ndreamer_dist.storage.shards import counting
from tests.servers import S3_ENVIRONMENT, Plain, Ranges, s3, serving

from .conftest import finish
from .fabricate import fabricate

SIZES = {(0, 0): 100, (0, 1): 90, (1, 0): 60, (1, 1): 50}
BLOCK, WIDTH, GENES = 64, 8, 60


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A finished run whose layers have five row blocks, each a shard of eight chunks."""
    return finish(fabricate(tmp_path_factory.mktemp("wide"), SIZES, genes=GENES, overrides={"effects.chunk_genes": 8}))


@pytest.fixture(scope="module")
def local(wide):
    return open_results(wide.run.url)


@pytest.fixture(params=["disk", "ranges", "s3"])
def place(request, wide, monkeypatch):
    """An address of the results, and the counts of its server, if there is one."""
    folder = f"{wide.run.url}/{keys.RESULTS}"
    if request.param == "disk":
        yield folder, None
    elif request.param == "ranges":
        with serving(Ranges, folder) as server:
            yield server.url, server
    else:
        import s3fs

        with s3() as server:
            for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
                monkeypatch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            remote = s3fs.S3FileSystem()
            remote.mkdir("results")
            remote.put(folder, f"results/{keys.RESULTS}", recursive=True)
            yield f"s3://results/{keys.RESULTS}", server
        s3fs.S3FileSystem.clear_instance_cache()


def lengths(wide, layer, block):
    """Return the stored bytes of every chunk of a shard and of its index, read from the file."""
    shard = (wide.run.storage / keys.RESULTS).read(f"layers/{layer}/c/{block}/0")
    count = -(-GENES // WIDTH)
    return np.frombuffer(shard[-16 * count - 4 : -4], dtype="<u8").reshape(count, 2)[:, 1].astype(int), 16 * count + 4


@pytest.mark.parametrize(
    ("columns", "cells", "requests"),
    [
        pytest.param([17], None, 2, id="one_gene_of_all_cells"),
        pytest.param(range(GENES), 'ndreamer_batch == "a"', 1, id="one_donor_over_all_genes"),
        pytest.param([3, 8, 15, 40, 41, 59], 'kind == "NK"', 4, id="some_genes_of_one_type"),
    ],
)
def test_a_question_reads_each_chunk_it_touches_once_and_nothing_else(wide, local, place, columns, cells, requests):
    address, server = place
    genes = [local.var_names[column] for column in columns]
    results = open_results(address)
    _ = results.obs, results.var, results.design, results.layers
    before = (server.requests, server.sent) if server else (0, 0)
    part = results.denoised(cells, genes)
    expected = local.denoised(cells, genes)
    np.testing.assert_array_equal(part.X, expected.X)
    pd.testing.assert_frame_equal(part.obs, expected.obs)

    chosen = np.arange(wide.design.n_cells) if cells is None else np.flatnonzero(local.packed_obs.eval(cells))
    blocks, chunks = np.unique(chosen // BLOCK), np.unique(np.array(columns) // WIDTH)
    known = [lengths(wide, "denoised", block) for block in blocks]
    touched = sum(int(sizes[chunks].sum()) + index for sizes, index in known)
    reads = results.last_read
    assert reads.chunks == len(blocks) * len(chunks)
    assert reads.touched == touched
    assert reads.bytes <= 1.1 * touched
    assert reads.requests == requests * len(blocks)
    if server:
        assert (server.requests - before[0], server.sent - before[1]) == (reads.requests, reads.bytes)


def test_expression_and_embedding_come_from_any_place(local, place):
    remote = open_results(place[0])
    np.testing.assert_array_equal(
        remote.expression('kind == "NK"').X.toarray(), local.expression('kind == "NK"').X.toarray()
    )
    pd.testing.assert_frame_equal(remote.embedding(pca=True), local.embedding(pca=True))


def test_opening_reads_the_root_alone_and_a_column_is_one_request(place):
    address, server = place
    with counting() as reads:
        results = open_results(address)
    assert reads.requests == 1
    columns = [name for name, node in results.storage.nodes.items() if name.startswith("obs/") and "shape" in node]
    with counting() as reads:
        _ = results.obs
    assert reads.requests == reads.chunks == len(columns)
    assert reads.bytes == reads.touched
    if server:
        assert server.sent >= reads.bytes


def test_a_column_is_one_chunk_of_as_many_rows_as_a_cohort_has():
    root = zarr.open_group(zarr.storage.MemoryStore(), mode="w", zarr_format=3)
    table = pd.DataFrame({"score": np.arange(200_000.0), "kind": pd.Categorical(["a", "b"] * 100_000)})
    tables.write_element(root, "obs", table.set_index(table.index.astype(str)))
    index = "_index" if isinstance(root["obs/_index"], zarr.Array) else "_index/values"  # a group under pandas 3
    for name in ("score", "kind/codes", index):
        assert root[f"obs/{name}"].chunks == (200_000,)
    assert len(anndata.io.read_elem(root["obs"])) == 200_000


def test_a_server_that_ignores_ranges_sends_each_file_once(wide, local):
    folder = f"{wide.run.url}/{keys.RESULTS}"
    with serving(Plain, folder) as server:
        results = open_results(server.url)
        _ = results.obs, results.var, results.design, results.layers
        before = server.requests, server.sent
        genes = [local.var_names[column] for column in (2, 30, 59)]
        np.testing.assert_array_equal(results.ite(genes=genes).X, local.ite(genes=genes).X)
        reads = results.last_read
        assert (server.requests - before[0], server.sent - before[1]) == (reads.requests, reads.bytes)
    sizes = (wide.run.storage / keys.RESULTS).list("layers/ite/c")
    treated = {
        row // BLOCK for group in wide.design.groups if group.condition for row in range(group.start, group.stop)
    }
    assert reads.requests == len(treated)
    assert reads.bytes == sum(sizes[f"layers/ite/c/{block}/0"] for block in treated)


@pytest.mark.parametrize("handler", [Ranges, Plain])
def test_damage_is_named_over_http(copied, handler):
    path = copied.folder / keys.RESULTS / "layers/ite/c/1/0"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with serving(handler, copied.folder) as server:
        results = open_results(server.url)
        with pytest.raises(StoreError, match=r"array 'layers/ite', chunk \(1, 0\) is damaged"):
            results.ite(genes=[results.var_names[0]], drop_undefined=False)
        path.unlink()
        with pytest.raises(StoreError, match=r"array 'layers/ite', chunk \(1, 0\) is missing"):
            results.ite(drop_undefined=False)


def test_what_was_read_is_told_and_logged_where_it_is_asked_for(local, caplog):
    with caplog.at_level(logging.INFO, logger="ndreamer_dist"):
        local.ite(genes=[local.var_names[0]])
    assert not caplog.messages
    with caplog.at_level(logging.DEBUG, logger="ndreamer_dist"):
        local.ite(genes=[local.var_names[0]])
    assert f"layer: read {local.last_read}" in caplog.messages
    assert f"in {local.last_read.requests} requests ({local.last_read.chunks} chunks)" in str(local.last_read)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["h5ad", "zarr", "csv", "parquet"])
@pytest.mark.parametrize("size", ["small", "large"])
def test_get_writes_every_format_in_input_order(local, tmp_path, capsys, monkeypatch, suffix, size):
    if size == "large":
        monkeypatch.setattr(export, "LARGE_BYTES", 0)
        monkeypatch.setattr(export, "BLOCK_VALUES", 100 * GENES)
    out = tmp_path / f"part.{suffix}"
    app(["get", local.url, "--out", str(out), "--layer", "denoised"], standalone_mode=False)
    said = capsys.readouterr().out
    expected = local.denoised()
    assert f"wrote {out}: {expected.n_obs} cells x {GENES} genes of denoised; read " in said
    assert " requests (" in said
    if suffix in ("csv", "parquet"):
        read = pd.read_csv(out, index_col=0) if suffix == "csv" else pd.read_parquet(out)
        assert list(read.columns) == list(local.var_names)
        np.testing.assert_allclose(read, expected.X, rtol=1e-6)
        names = read.index
    else:
        found = (anndata.read_h5ad if suffix == "h5ad" else anndata.read_zarr)(out)
        np.testing.assert_array_equal(found.X, expected.X)
        np.testing.assert_array_equal(found.obsm[keys.OBSM_PCA], local.embedding(pca=True))
        pd.testing.assert_frame_equal(found.obs, expected.obs)
        names = found.obs_names
    assert list(names) == list(local.obs.index)
    assert np.all(np.diff(local.obs[keys.OBS_INPUT_ROW]) > 0)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # raised by scanpy's use of matplotlib
def test_scanpy_plots_what_get_wrote(local, tmp_path):
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    gene = local.var_names[5]
    export.export_part(local.url, tmp_path / "ite.h5ad", "ite", genes=[gene, local.var_names[6]])
    adata = sc.read_h5ad(tmp_path / "ite.h5ad")
    axes = sc.pl.embedding(adata, keys.OBSM_PCA, color=gene, show=False)
    drawn = axes.collections[0]
    shown = local.embedding(list(adata.obs_names), pca=True).to_numpy()[:, :2]
    np.testing.assert_allclose(np.sort(drawn.get_offsets(), axis=0), np.sort(shown, axis=0), rtol=1e-6)
    np.testing.assert_allclose(np.sort(drawn.get_array()), np.sort(local.ite(genes=[gene]).X[:, 0]), rtol=1e-6)
    violin = sc.pl.violin(adata, gene, groupby=keys.OBS_BATCH, show=False)
    assert [label.get_text() for label in violin.get_xticklabels()] == list(adata.obs[keys.OBS_BATCH].cat.categories)
    mpl.pyplot.close("all")


def test_anndata_reads_it_lazily(wide, local):
    pytest.importorskip("dask.array", reason="dask comes with the extra `test`")
    lazy = anndata.experimental.read_lazy(f"{wide.run.url}/{keys.RESULTS}")
    chosen = np.flatnonzero(np.asarray(lazy.obs["kind"].to_pandas() == "NK"))
    part = lazy[chosen].layers["denoised"].compute()
    expected = local.denoised('kind == "NK"', order="packed")
    np.testing.assert_array_equal(part, expected.X)
    assert list(lazy.obs_names[chosen]) == list(expected.obs_names)
    np.testing.assert_array_equal(lazy.X[:10].compute().toarray(), local.expression(order="packed").X[:10].toarray())


# --- rounding --------------------------------------------------------------------------------------------------------


def test_layers_are_kept_as_the_settings_say_and_add_up(wide, local, tmp_path):
    made = finish(fabricate(tmp_path, SIZES, genes=GENES, overrides={"effects.keep_bits": 7}))
    results, error = open_results(tmp_path), 2**-8
    for name in keys.LAYERS:
        stored = zarr.open_array(f"{tmp_path}/{keys.RESULTS}/layers/{name}", mode="r")
        assert stored.dtype == np.float32
        full, kept = local.layer(name).X, results.layer(name).X
        assert kept.dtype == np.float32
        slack = error * (np.abs(local.denoised().X) if name == keys.LAYER_BATCH_EFFECT else 0)
        np.testing.assert_array_less(
            np.abs(kept - full)[~np.isnan(full)], (1.01 * (error * np.abs(full) + slack) + 1e-7)[~np.isnan(full)]
        )
        np.testing.assert_array_equal(np.isnan(kept), np.isnan(full))
    added = results.denoised().X + results.batch_effect().X
    np.testing.assert_allclose(
        added, results.expression().X.toarray(), atol=error * np.abs(results.batch_effect().X).max()
    )
    assert json.loads(results.uns["settings"])["effects"]["keep_bits"] == 7

    settings = made.settings.model_copy(update={"effects": made.settings.effects.model_copy(update={"store": ()})})
    kept = {name: results.layer(name).X for name in keys.LAYERS}
    run_effects(made.run, settings, made.packed, made.source, SerialRuntime(settings.run), "another key")
    for name in keys.LAYERS:
        np.testing.assert_array_equal(open_results(tmp_path).layer(name).X, kept[name])


def test_mantissas_are_rounded_to_the_nearest_and_ties_to_even():
    values = np.array([1, 1 + 2**-3, 1 + 2**-4, 1 + 3 * 2**-4, -1 - 2**-3 - 2**-5, 0, np.nan, np.inf], dtype=np.float32)
    wanted = [1, 1 + 2**-3, 1, 1 + 2**-2, -1 - 2**-3, 0, np.nan, np.inf]
    np.testing.assert_array_equal(rounded(values, 3), np.array(wanted, dtype=np.float32))
    draws = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for bits in (1, 6, 22, 23):
        assert np.all(np.abs(rounded(draws, bits) - draws) <= 2.0 ** -(bits + 1) * np.abs(draws))
    assert all(
        len(np.unique(rounded(draws, more))) >= len(np.unique(rounded(draws, less)))
        for less, more in itertools.pairwise((1, 4, 9, 23))
    )
