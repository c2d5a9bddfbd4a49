"""Write results.zarr, a plain AnnData zarr v3 store: shard by shard, the root last.

Rows are in packed order. Each task owns whole shards: ranges of entries of the sparse `X`, and row blocks of
embeddings, matches and layers. The driver writes the tables (`obs`, `var`, `uns`) and then the root `zarr.json`,
consolidated. Without the root no tool opens the store, so an unfinished store never looks finished. Every chunk ends in
a `crc32c`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr
from anndata.experimental import write_dispatched
from zarr.buffer import cpu
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from ndreamer_dist import keys
from ndreamer_dist.cohort.packed import Packed
from ndreamer_dist.errors import CohortError, DamagedError
from ndreamer_dist.matching.labels import Inside
from ndreamer_dist.matching.store import row_dtype
from ndreamer_dist.rundir.directory import RunDirectory, Shard
from ndreamer_dist.rundir.stage import StageRun
from ndreamer_dist.settings import Settings, canonical_json
from ndreamer_dist.storage.arrays import (
    COMPRESSORS,
    ensure_array,
    open_array,
    read_array,
    shard_files,
    write_part,
    write_shard,
)
from ndreamer_dist.storage.files import Storage

SHARD_GENES = 2048
"""Most genes of a shard of a layer; with more genes, a row block has several shards."""
ENTRY_BYTES = 8
"""Memory of a stored value of expression: float32 value and int32 gene."""
MOST_SHARED_BYTES = 2**30
"""Approximate limit on the expression that all tasks share. A larger cohort is read in spans of genes, each a shard."""
CHUNK_ROWS = 2**20
"""Most rows of a chunk of a table's column."""
CHUNK_ENTRIES = 131_072
"""Number of stored values per chunk of `X`."""
SHARD_ENTRIES = 32 * CHUNK_ENTRIES
"""Number of stored values per shard of `X`, which one task writes."""
MATCH_LIMIT = 2**30
"""Largest number of cells times groups for which `obsm` holds the matches; beyond, only matches.zarr does."""
SPARSE_LIMIT, SPARSE_SHARE = 2**26, 16
"""The smaller limit if less than one in `SPARSE_SHARE` pairs of groups is matched, as in a screen."""
ROOT = "zarr.json"
SIGN = "own condition minus control"
ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
DICT = {"encoding-type": "dict", "encoding-version": "0.1.0"}
GROUPS = {
    "layers": DICT, "obsm": DICT, "obsp": DICT, "varm": DICT, "varp": DICT,
}  # fmt: skip
DRIVER_SHARD = "annotations"
VERSIONED = ("ndreamer-dist", "anndata", "numpy", "scipy", "scanpy", "torch", "zarr")


@dataclass(frozen=True)
class RowPart:
    """A row block and a span of genes `first:last`; one shard of every layer."""

    block: int
    genes: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Shapes, chunks and shards of a results.zarr.

    Attributes
    ----------
    cells, genes
        Shape of `X` and of the layers.
    block_rows
        Rows of a chunk, and of a shard, of a layer.
    chunk_genes, shard_genes
        Genes of a chunk and of a shard of a layer; the latter is a multiple of the former.
    block_entries
        First entry of `X` of every row block, and the number of entries.
    obsm
        Width of each array in `obsm`, by name.
    layers
        Names of the stored layers.
    row_dtype
        Integer type of the matched rows in `obsm`.
    keep_bits
        Mantissa bits that layers keep; None for all.
    """

    cells: int
    genes: int
    block_rows: int
    chunk_genes: int
    shard_genes: int
    block_entries: tuple[int, ...]
    obsm: Mapping[str, int]
    layers: tuple[str, ...]
    row_dtype: str
    keep_bits: int | None = None

    @property
    def entries(self) -> int:
        """Number of stored values of `X`."""
        return self.block_entries[-1]

    @property
    def matches(self) -> bool:
        """Whether `obsm` holds the nearest neighbours."""
        return keys.OBSM_MATCH in self.obsm


def layout_of(run: RunDirectory, settings: Settings, packed: Packed) -> Layout:
    """Return the layout of a run's results."""
    method = settings.embed.method
    placed = keys.embedding_key(method)
    names = (keys.OBSM_MU, placed) if method == keys.NDREAMER else (placed,)
    obsm = {name: int(open_array(run.embedding(name), name).shape[1]) for name in names}
    groups = len(packed.design.groups)
    edges = sum(len(packed.design.targets(group, settings.match.edges)) for group in packed.design.groups)
    if keeps_matches(packed.n_rows, groups, edges):
        obsm |= {keys.OBSM_MATCH: groups, keys.OBSM_MATCH_DISTANCE: groups}
    return layout_with(settings, packed, obsm)


def keeps_matches(cells: int, groups: int, edges: int) -> bool:
    """Return whether `obsm` holds the nearest neighbour of every cell in every group, an array of cells x groups."""
    sparse = 0 < SPARSE_SHARE * edges < groups**2
    return cells * groups <= (SPARSE_LIMIT if sparse else MATCH_LIMIT)


def layout_with(settings: Settings, packed: Packed, obsm: Mapping[str, int]) -> Layout:
    """Return the layout of results with these arrays, by name and width, in `obsm`."""
    pointers = row_pointers(packed)
    chunk = min(settings.effects.chunk_genes, packed.n_genes)
    chunks, spans = -(-packed.n_genes // chunk), span_count(int(pointers[-1]))
    shard = min(-(-chunks // spans), max(1, SHARD_GENES // chunk)) * chunk
    return Layout(
        cells=packed.n_rows,
        genes=packed.n_genes,
        block_rows=packed.block_rows,
        chunk_genes=chunk,
        shard_genes=shard,
        block_entries=(*(int(pointers[packed.block_range(b)[0]]) for b in range(packed.n_blocks)), int(pointers[-1])),
        obsm=obsm,
        layers=settings.effects.store,
        row_dtype=row_dtype(packed.design.n_cells),
        keep_bits=settings.effects.keep_bits,
    )


def span_count(entries: int) -> int:
    """Return the number of spans of genes, such that the stored values of one span are few enough to share."""
    return max(1, -(-entries * ENTRY_BYTES // MOST_SHARED_BYTES))


def row_pointers(packed: Packed) -> np.ndarray:
    """Return the CSR row pointers of the whole of `X`: (cells + 1,) int64."""
    pointers = np.zeros(packed.n_rows + 1, dtype=np.int64)
    for block in range(packed.n_blocks):
        start, stop = packed.block_range(block)
        name = f"{keys.PACKED_X}/{keys.block_name(block)}/{keys.INDPTR}"
        pointers[start + 1 : stop + 1] = pointers[start] + read_array(packed.storage, name)[1:]
    return pointers


# --- shards ----------------------------------------------------------------------------------------------------------


def expression_shards(layout: Layout) -> list[Shard]:
    """Return the shards of `X`: ranges of entries."""
    return [
        Shard(
            f"entries-{number:05d}",
            tuple(f"{keys.RESULTS}/{shard_files(f'X/{part}', number)}" for part in (keys.DATA, keys.INDICES)),
            (number * SHARD_ENTRIES, min((number + 1) * SHARD_ENTRIES, layout.entries)),
        )
        for number in range(-(-layout.entries // SHARD_ENTRIES))
    ]


def gene_spans(layout: Layout) -> list[tuple[int, int]]:
    """Return the spans of genes `first:last` of the layers' shards; one span if there are no layers."""
    step = layout.shard_genes if layout.layers else layout.genes
    return [(first, min(first + step, layout.genes)) for first in range(0, layout.genes, step)]


def row_shards(layout: Layout) -> list[Shard]:
    """Return the shards of layers and `obsm`: row blocks by spans of genes, with `obsm` in the first span."""
    spans, shards = gene_spans(layout), []
    for place, genes in enumerate(spans):
        arrays = [(f"obsm/{name}", 0) for name in layout.obsm] if place == 0 else []
        arrays += [(f"layers/{name}", place) for name in layout.layers]
        suffix = f"-{place:05d}" if len(spans) > 1 else ""
        for block in range(-(-layout.cells // layout.block_rows)):
            files = tuple(f"{keys.RESULTS}/{shard_files(array, block, column)}" for array, column in arrays)
            shards.append(Shard(f"rows-{block:05d}{suffix}", files, RowPart(block, genes)))
    return shards


def annotation_shard(run: RunDirectory) -> Shard:
    """Return the driver's shard, tables and root, with the files that its marker lists; only the root without one."""
    marker = f"{keys.DONE}/{keys.STAGE_EFFECTS}/{DRIVER_SHARD}.json"
    files: tuple[str, ...] = ()
    if run.storage.exists(marker):
        with contextlib.suppress(DamagedError, ValueError, KeyError, TypeError):
            files = tuple(run.read_json(marker)["files"])
    return Shard(DRIVER_SHARD, files or (f"{keys.RESULTS}/{ROOT}",))


def begin(stage: StageRun, layout: Layout) -> list[Shard]:
    """Return the pending shards of a results.zarr; if there are any, delete its root and create its arrays."""
    run, root = stage.run, f"{keys.RESULTS}/{ROOT}"
    todo = stage.begin([*row_shards(layout), *expression_shards(layout), annotation_shard(run)], (root, keys.RESULTS))
    if todo:
        run.storage.delete(root)
        _make_arrays(run.storage / keys.RESULTS, layout)
    return todo


def _make_arrays(storage: Storage, layout: Layout) -> None:
    for part, dtype in ((keys.DATA, "float32"), (keys.INDICES, "int32")):
        ensure_array(
            storage, f"X/{part}", shape=(layout.entries,), dtype=dtype, attributes=ARRAY,
            chunks=(CHUNK_ENTRIES,), shards=(SHARD_ENTRIES,),
        )  # fmt: skip
    for name, width in layout.obsm.items():
        dtype, fill = (layout.row_dtype, -1) if name == keys.OBSM_MATCH else ("float32", np.nan)
        ensure_array(
            storage, f"obsm/{name}", shape=(layout.cells, width), dtype=dtype, fill_value=fill, attributes=ARRAY,
            chunks=(layout.block_rows, width),
        )  # fmt: skip
    for name in layout.layers:
        ensure_array(
            storage, f"layers/{name}", shape=(layout.cells, layout.genes), dtype="float32", fill_value=np.nan,
            attributes=ARRAY, chunks=(layout.block_rows, layout.chunk_genes),
            shards=(layout.block_rows, layout.shard_genes),
        )  # fmt: skip


def write_expression(span: tuple[int, int], run: RunDirectory, packed: Packed, layout: Layout) -> None:
    """Write one shard of `X`, a range of entries, from the packed blocks that hold them."""
    start, stop = span
    data, indices = np.empty(stop - start, dtype=np.float32), np.empty(stop - start, dtype=np.int32)
    for block, (first, last) in enumerate(itertools.pairwise(layout.block_entries)):
        low, high = max(start, first), min(stop, last)
        if low < high:
            values = packed.block(block)
            data[low - start : high - start] = values.data[low - first : high - first]
            indices[low - start : high - start] = values.indices[low - first : high - first]
    for name, values in ((keys.DATA, data), (keys.INDICES, indices)):
        chunks = (values[first : first + CHUNK_ENTRIES] for first in range(0, len(values), CHUNK_ENTRIES))
        write_shard(run.storage / keys.RESULTS, f"X/{name}", (start // SHARD_ENTRIES,), chunks)


def write_obsm(run: RunDirectory, name: str, start: int, values: np.ndarray) -> None:
    """Write one row block of an array of `obsm`."""
    part = (slice(start, start + len(values)), slice(None))
    write_part(run.storage / keys.RESULTS, f"obsm/{name}", part, values)


def write_layer(
    run: RunDirectory, name: str, part: RowPart, layout: Layout, values: Callable[[slice], np.ndarray]
) -> None:
    """Write one shard of a layer.

    Parameters
    ----------
    values
        Function that returns the layer for a slice of the part's genes, which is one chunk: (cells, genes) float32.
    """
    first, last = part.genes
    starts = range(0, last - first, layout.chunk_genes)
    cuts = (slice(start, min(start + layout.chunk_genes, last - first)) for start in starts)
    place = (part.block, first // layout.shard_genes)
    write_shard(run.storage / keys.RESULTS, f"layers/{name}", place, map(values, cuts))


# --- tables and root -------------------------------------------------------------------------------------------------


def finish_store(
    stage: StageRun,
    packed: Packed,
    layout: Layout,
    cells: Iterable[tuple[str, bytes]],
    genes: pd.DataFrame,
    uns: Mapping[str, Any],
) -> None:
    """Write the files of the driver: the tables `obs`, `var` and `uns`, the metadata of groups, and last the root.

    Parameters
    ----------
    cells
        The files of `obs`, by name (`cells.CellTable.files`).
    uns
        `uns["ndreamer"]`; see `facts`.
    """
    storage = stage.run.storage / keys.RESULTS
    tables = {"var": genes, "uns": {keys.UNS: uns}}
    for name in ("obs", *tables):
        storage.delete(name)
    sizes, metadata = {}, {}

    def write(name: str, data: bytes) -> None:
        storage.write_atomic(name, data)
        sizes[f"{keys.RESULTS}/{name}"] = len(data)
        if name.endswith(ROOT):
            metadata[name] = data

    for name, data in cells:
        write(name, data)
    for name, data in _encoded(tables, row_pointers(packed), layout).items():
        write(name, data)
    write(ROOT, _consolidated_root(storage, metadata))
    stage.mark(Shard(DRIVER_SHARD, tuple(sizes)), sizes=sizes)


def gene_table(source: Any, packed: Packed) -> pd.DataFrame:
    """Return `var`: the input's columns for the modelled genes."""
    places = pd.Index(np.asarray(source.gene_names, dtype=object)).get_indexer(list(packed.genes))
    table = source.var.iloc[places].copy()
    table.index = pd.Index(list(packed.genes), dtype=object, name=source.var.index.name)
    return table


def facts(settings: Settings, packed: Packed, layout: Layout, key: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return `uns["ndreamer"]`: plain scalars, string arrays, and JSON text for the rest."""
    design = packed.design
    bearing = {name: getattr(settings, name).bearing() for name in type(settings).model_fields if name != "seed"}
    bearing["denoise"]["neighbours"] = settings.denoise.counted(design.fewest_groups)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    inside = Inside.read(canonical_json(summary.get(keys.UNS_WITHIN)), "the matches")
    notes = [] if inside is None else [str(inside), *([inside.warning] if inside.uneven else [])]
    notes += (
        []
        if layout.matches
        else [f"obsm has no matches: cells x groups would be {layout.cells * len(design.groups)}; see matches.zarr"]
    )
    entries = {
        "format_version": keys.FORMAT_VERSION,
        "version": versions["ndreamer-dist"],
        "versions": versions,
        "seed": settings.seed,
        "settings": {name: fields for name, fields in bearing.items() if fields},
        "key": key,
        "condition_key": design.condition_key,
        "batch_keys": list(design.batch_keys),
        "conditions": list(design.conditions),
        "control": design.control,
        "groups": [group.name for group in design.groups],
        "design": design.to_json(),
        "sign": SIGN,
        "layers": list(layout.layers),
        keys.UNS_EMBEDDING: settings.embed.method,
        keys.UNS_EMBEDDING_KEY: keys.embedding_key(settings.embed.method),
        **summary,
        "notes": [*summary.get("notes", ()), *notes],
    }
    return {name: _plain(value) for name, value in entries.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return np.array(value, dtype=object)
    return canonical_json(value)


def writable(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return a table that anndata can write: columns of other types are converted to nullable or plain ones.

    An index loses its name if a column with other values has the same name. This happens if the table was indexed by an
    integer column (`cell_id`, Entrez ids): names are text, and the column keeps the integers.

    Raises
    ------
    CohortError
        A column holds values that no AnnData store can hold; the message names it.
    """
    changed = {}
    for name, column in table.items():
        if not isinstance(name, str) or "/" in name:
            msg = f"{where} column {name!r} cannot be stored: a name must be text without '/'; rename it in the input"
            raise CohortError(msg)
        if column.dtype == object and not column.map(lambda value: isinstance(value, str)).all():
            changed[name] = _nullable(column, where)
        elif _is_unwritable_number(column.dtype):
            changed[name] = _plain_numbers(column)
    written = table.assign(**changed) if changed else table
    name = written.index.name
    if name is not None and name in written and not written.index.equals(pd.Index(written[name])):
        written = written.rename_axis(index=None)
    return written


def _is_unwritable_number(dtype: Any) -> bool:
    """Return whether anndata cannot write this numeric type: nullable floats, pyarrow types and long doubles."""
    if isinstance(dtype, pd.ArrowDtype):
        return bool(pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype))
    return isinstance(dtype, pd.Float32Dtype | pd.Float64Dtype) or dtype == np.dtype(np.longdouble)


def _plain_numbers(column: pd.Series[Any]) -> pd.Series[Any]:
    """Convert numbers to types that anndata writes: integers and booleans nullable, others float64 with NaN."""
    better = column.convert_dtypes(dtype_backend="numpy_nullable") if column.dtype != np.longdouble else column
    if pd.api.types.is_float_dtype(better.dtype):
        return pd.Series(better.to_numpy(dtype=np.float64, na_value=np.nan), index=column.index, name=column.name)
    return better


def _nullable(column: pd.Series[Any], where: str) -> pd.Series[Any]:
    held = column.dropna()
    if held.map(lambda value: isinstance(value, str)).all():
        return column.astype("string")
    if held.map(lambda value: isinstance(value, Real | Decimal) and not isinstance(value, bool | np.bool_)).all():
        return _plain_numbers(pd.to_numeric(column.map(float, na_action="ignore") if _fractions(held) else column))
    better = column.convert_dtypes()
    if better.dtype == object:
        kinds = sorted({type(value).__name__ for value in held})
        what = f"mixes {', '.join(kinds)}" if len(kinds) > 1 else f"holds {kinds[0]}"
        msg = f"{where} column {column.name!r} {what} and cannot be stored; make it text, numbers or truth values"
        raise CohortError(msg)
    return better


def _fractions(values: pd.Series[Any]) -> bool:
    return not values.map(lambda value: isinstance(value, Integral)).all()


def check_tables(obs: pd.DataFrame, var: pd.DataFrame) -> None:
    """Refuse, before work starts, tables that could not be written at the end; try it with their first row.

    Raises
    ------
    CohortError
        A column, or the table's index, cannot be stored; the message names it.
    """
    for where, table in (("obs", obs), ("var", var)):
        plain = writable(table.set_axis(table.index.astype(str), axis=0), where)
        try:
            write_element(zarr.open_group(MemoryStore(), mode="w", zarr_format=3), where, plain.head(1))
        except Exception as error:
            raise _unwritable(where, plain, error) from error


def _unwritable(where: str, table: pd.DataFrame, error: Exception) -> CohortError:
    """Return an error that names the first column that cannot be written."""
    for name in table.columns:
        try:
            write_element(
                zarr.open_group(MemoryStore(), mode="w", zarr_format=3), where, table[[name]].head(1).rename_axis(None)
            )
        except Exception:  # noqa: BLE001 - whatever anndata says of this column, it cannot be stored
            msg = (
                f"{where} column {name!r} ({table[name].dtype}) cannot be stored; turn it into text or numbers, or "
                f"leave it out: adata.{where}[{name!r}] = adata.{where}[{name!r}].astype(str)"
            )
            return CohortError(msg)
    return CohortError(f"{where} cannot be stored as a whole ({type(error).__name__}: {error})")


def write_element(root: zarr.Group, name: str, value: Any, chunk_rows: int | None = None) -> None:
    """Write a table or a column. A column is one chunk if it has at most `CHUNK_ROWS` rows, so one request reads it.

    Parameters
    ----------
    chunk_rows
        Rows of a chunk, for a column that is written in several parts; by default all rows.
    """

    def write_long(write: Any, root: zarr.Group, name: str, value: Any, *, dataset_kwargs: Any, iospec: Any) -> None:
        if iospec.encoding_type in ("array", "string-array"):
            chunks = tuple(chunk_rows or min(max(n, 1), CHUNK_ROWS) for n in value.shape)
            dataset_kwargs = {**dataset_kwargs, "chunks": chunks}
        write(root, name, value, dataset_kwargs=dataset_kwargs)

    # Store chunks of only the fill value too. Then a missing chunk is always an error.
    with (
        anndata.settings.override(allow_write_nullable_strings=True, auto_shard_zarr_v3=False),
        zarr.config.set({"array.write_empty_chunks": True}),
    ):
        write_dispatched(root, name, value, write_long, dataset_kwargs={"compressors": COMPRESSORS})


def _encoded(tables: Mapping[str, Any], pointers: np.ndarray, layout: Layout) -> dict[str, bytes]:
    """Return all files of the driver but the root, by name: tables, metadata of groups and row pointers."""
    files: dict[str, Any] = {}
    root = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    for name, value in tables.items():
        write_element(root, name, writable(value, name) if isinstance(value, pd.DataFrame) else value)
    for name, attributes in GROUPS.items():
        root.create_group(name, attributes=attributes)
    matrix = {
        "encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [layout.cells, layout.genes],
    }  # fmt: skip
    write_element(root.create_group("X", attributes=matrix), keys.INDPTR, pointers)
    return {name: buffer.to_bytes() for name, buffer in sorted(files.items()) if name != ROOT}


def _consolidated_root(storage: Storage, known: Mapping[str, bytes]) -> bytes:
    """Return the consolidated metadata of the root; `known` are metadata files that need not be read."""
    names = [name for name in storage.list() if name.endswith(f"/{ROOT}")]
    found = {**storage.read_all([name for name in names if name not in known]), **known}
    files: dict[str, Any] = {name: cpu.Buffer.from_bytes(found[name]) for name in names}
    memory = MemoryStore(files)
    attributes = {"encoding-type": "anndata", "encoding-version": "0.1.0"}
    zarr.create_group(memory, zarr_format=3, attributes=attributes)
    with warnings.catch_warnings():  # consolidation is not in the zarr v3 specification yet, and zarr says so
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(memory)
    return bytes(files[ROOT].to_bytes())


def memory_store(files: Mapping[str, bytes]) -> MemoryStore:
    """Return an in-memory zarr store of files, given by name."""
    return MemoryStore({name: cpu.Buffer.from_bytes(data) for name, data in files.items()})
