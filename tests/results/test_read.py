"""Any rows and columns equal numpy's selection, and every chunk that holds some is read once."""

from enum import Enum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ndreamer_dist.errors import StoreError
from ndreamer_dist.results.read import read_dense, read_element, read_sparse
from ndreamer_dist.stats.results import open_results
from ndreamer_dist.storage.arrays import open_array, write_array
from ndreamer_dist.storage.files import open_storage
from ndreamer_dist.storage.shards import Place, counting, read_chunks

VALUES = np.random.default_rng(0).normal(size=(50, 42)).astype(np.float32)
SPARSE = sparse.csr_matrix(np.where(np.random.default_rng(1).random((60, 30)) < 0.8, 0, 1 + np.arange(30.0)))
SPARSE = sparse.vstack([SPARSE[:20], sparse.csr_matrix((8, 30)), SPARSE[28:]], format="csr").astype(np.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    storage = open_storage(tmp_path_factory.mktemp("pieces"))
    write_array(storage, "x", VALUES, chunks=(7, 5), shards=(14, 45))
    for name in ("data", "indices"):
        write_array(storage, f"X/{name}", getattr(SPARSE, name), chunks=(16,), shards=(64,))
    return storage


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 49), max_size=20), st.lists(st.integers(0, 41), max_size=20))
def test_any_rows_and_columns_in_any_order(stored, rows, columns):
    rows, columns = np.array(rows, dtype=int), np.array(columns, dtype=int)
    with counting() as reads:
        found = read_dense(stored, "x", rows, columns)
    np.testing.assert_array_equal(found, VALUES[np.ix_(rows, columns)])
    assert reads.chunks == len(set((rows // 7).tolist())) * len(set((columns // 5).tolist()))
    assert reads.bytes <= 1.1 * reads.touched + 4 * 300  # the metadata file


@pytest.mark.parametrize("rows", [np.arange(50), np.arange(10, 30), np.array([3, 3, 0])], ids=["all", "run", "twice"])
def test_values_go_where_they_are_wanted(stored, rows):
    out = np.full((len(rows), 42), -1, dtype=np.float32)
    assert read_dense(stored, "x", rows, np.arange(42), out=out) is out
    np.testing.assert_array_equal(out, VALUES[rows])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 59), min_size=1, max_size=30))
def test_any_rows_of_a_sparse_matrix(stored, rows):
    with counting() as reads:
        found = read_sparse(stored, np.array(rows), SPARSE.indptr.astype(np.int64), 30)
    np.testing.assert_array_equal(found.toarray(), SPARSE[rows].toarray())
    held = {entry // 16 for row in rows for entry in range(SPARSE.indptr[row], SPARSE.indptr[row + 1])}
    assert reads.chunks == 2 * len(held)


def test_a_part_of_uns_is_read_alone(finished):
    results = open_results(finished.run.url)
    with counting() as reads:
        assert read_element(results.storage, "uns/ndreamer/control") == "ctrl"
    assert reads.requests == reads.chunks == 1
    with pytest.raises(StoreError, match="has no 'uns/ndreamer/nothing'"):
        read_element(results.storage, "uns/ndreamer/nothing")


@pytest.mark.parametrize("order", ["little", Enum("Endian", {"little": "little"}).little], ids=["zarr 3.4", "zarr 3.1"])
def test_the_order_of_bytes_is_a_string_or_a_member_of_an_enum(stored, order):
    array = open_array(stored, "x")
    object.__setattr__(array.metadata.codecs[0].codecs[0], "endian", order)
    read = {}
    read_chunks(array, Place(stored.url, "x"), [(0, 0)], lambda position, chunk: read.update({position: chunk.copy()}))
    np.testing.assert_array_equal(read[0, 0], VALUES[:7, :5])
