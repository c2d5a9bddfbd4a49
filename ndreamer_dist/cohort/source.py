"""Open the input cohort, check it, and read it by ranges of rows.

Input: an AnnData in memory, backed or lazy; an AnnData stored as h5ad or zarr (a path or a URL); or a MuData, whose
modality `rna` is read. Output: a `Source`, which holds the tables of cells and genes and a `Matrix`. A `Matrix` returns
ranges of rows as CSR float32 and is cheap to send to a task. The matrix is never read whole, and the caller's object is
never changed. Errors that names and shapes reveal are raised here, before the values are read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from ndreamer_dist.cohort.cells import HeldCells, ObsTable, stored_cells
from ndreamer_dist.cohort.design import combined_conditions
from ndreamer_dist.cohort.matrix import Matrix, MemoryMatrix, csr_rows, memory_matrix
from ndreamer_dist.cohort.stored import (
    MATRIX,
    RAW,
    RAW_NAMES,
    Container,
    StoredMatrix,
    holds_x,
    layer_names,
    no_layer,
    one_line,
    open_root,
    place_of,
    raw_place,
    refusing_damage,
    stored_matrix,
)
from ndreamer_dist.cohort.tables import check_columns, check_names, in_memory, named_genes, read_frame
from ndreamer_dist.compute.executor import Runtime
from ndreamer_dist.errors import CohortError, NDreamerError, listing
from ndreamer_dist.settings import CohortSettings
from ndreamer_dist.storage.files import Storage, open_storage
from ndreamer_dist.storage.formats import MODALITY, recognised_format
from ndreamer_dist.storage.texts import TEXT_BLOCK

SAMPLES = 64
"""Number of evenly spaced runs of rows in the sample."""
SAMPLE_ROWS = 16
"""Rows of one run of the sample."""


@dataclass(frozen=True)
class Source:
    """An opened and checked cohort.

    Attributes
    ----------
    name
        Address of the cohort, or `the AnnData`, for messages.
    cells
        Table of the cells (`obs`); a stored one is read column by column.
    var
        Table of the genes of the matrix.
    matrix
        The values: `X`, `raw/X` or a layer.
    obsm
        `obsm` of an AnnData in memory; None for a stored one, where `obsm.coordinates_of` reads it from the store.
    notes
        Decisions made on opening, as sentences for the user.
    log_base
        Base of the logarithms that `uns["log1p"]` names, if it is not e; else None.
    raw
        Whether the cohort has a `.raw` that is not read.
    layers
        Names of the layers that are not read.
    """

    name: str
    cells: ObsTable
    var: pd.DataFrame
    matrix: StoredMatrix | MemoryMatrix
    obsm: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    log_base: float | None = None
    raw: bool = False
    layers: tuple[str, ...] = ()

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.matrix.shape[1]

    @property
    def nnz(self) -> int:
        """Number of stored values; of a dense matrix, all values."""
        return self.matrix.nnz

    @property
    def obs(self) -> pd.DataFrame:
        """The whole table of the cells, a copy."""
        return self.cells.frame()

    @property
    def cell_names(self) -> pd.Index:
        """Names of all cells, as text."""
        return self.cells.index

    def cell_name(self, row: int) -> str:
        """Return the name of one cell."""
        return str(self.names_of(np.array([row]))[0])

    def names_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the names of the cells in these input rows, which must ascend: (rows,) text."""
        parts, start = [np.empty(0, dtype=object)], 0
        for block in self.cells.names():
            first, last = np.searchsorted(rows, (start, start + len(block)))
            parts.append(block[rows[first:last] - start])
            start += len(block)
        return np.concatenate(parts)

    @property
    def gene_names(self) -> pd.Index:
        """Names of the genes, as text."""
        return self.var.index.astype(str)

    def read_rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Return the rows `start:stop`: (rows, genes) CSR float32 with sorted indices."""
        return csr_rows(self.matrix, start, stop)

    def task_matrix(self, runtime: Runtime) -> Matrix:
        """Return the matrix to send to tasks; one in memory is put into the runtime's object store first."""
        return self.matrix.share(runtime) if isinstance(self.matrix, MemoryMatrix) else self.matrix

    def in_natural_logs(self, base: float | None) -> Source:
        """Return the cohort with logarithms to `base` turned into natural ones; with None, unchanged."""
        if base is None:
            return self
        return replace(self, matrix=replace(self.matrix, factor=float(np.log(base))))

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached sample, and without obsm, which may be large and which no task reads.
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"obsm": None}

    @cached_property
    def sample_rows(self) -> np.ndarray:
        """Input rows of the sample, ascending."""
        starts = np.linspace(0, max(0, self.n_cells - SAMPLE_ROWS), SAMPLES).astype(np.int64)
        rows = np.unique((starts[:, None] + np.arange(SAMPLE_ROWS)).ravel())
        return rows[rows < self.n_cells]

    @cached_property
    def sample(self) -> sparse.csr_matrix:
        """The rows `sample_rows`: 64 evenly spaced runs of 16 rows, or all rows of a small cohort.

        Read once and cached; do not modify it.
        """
        rows = self.sample_rows
        runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        return sparse.vstack([self.read_rows(int(run[0]), int(run[-1]) + 1) for run in runs], format="csr")

    @cached_property
    def looks_like_counts(self) -> bool:
        """Whether all values of the sample are whole numbers, finite and not negative."""
        values = self.sample.data
        return bool(
            values.size and np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all()
        )


def open_source(
    source: str | os.PathLike[str] | ad.AnnData | Source,
    *,
    layer: str | None = None,
    gene_names: str | None = None,
    prefer_counts: bool = False,
) -> Source:
    """Open a cohort and check its names and shapes.

    Parameters
    ----------
    source
        Path or URL of an h5ad file or a zarr store (format 2 or 3), or an AnnData, in memory, backed or lazy. Of a
        MuData, stored or in memory, the modality `rna` is read.
    layer
        Layer to read instead of `X`; `raw` reads `.raw`, which has its own genes.
    gene_names
        Column of `var` that names the genes, for example their symbols.
    prefer_counts
        Whether to read `.raw` if `layer` is None, `X` does not hold counts and `.raw` does.

    Raises
    ------
    CohortError
        The store is missing, truncated or not AnnData; there is no such layer; names of cells or genes repeat; column
        names start with our prefix or cannot be written.
    """
    if isinstance(source, Source):
        return source
    in_hand = isinstance(source, ad.AnnData) or hasattr(source, "mod")
    opened = (_open_memory if in_hand else _open_stored)(source, layer, prefer_counts)
    check_columns(opened.cells.columns, opened.var.columns)
    var, note = named_genes(opened.var, gene_names)
    check_names(opened.name, opened.cells, var)
    return replace(opened, var=var, notes=(*opened.notes, *([note] if note else [])))


def open_cohort(source: str | os.PathLike[str] | ad.AnnData | Source, cohort: CohortSettings) -> Source:
    """Open a cohort by its settings; several condition keys add a column of their combinations to `obs`."""
    opened = open_source(
        source, layer=cohort.layer, gene_names=cohort.gene_names, prefer_counts=cohort.normalise == "auto"
    )  # fmt: skip
    if not cohort.factors:
        return opened
    conditions = {str(cohort.condition_column): combined_conditions(opened.cells, cohort.factors)}
    return replace(opened, cells=opened.cells.assign(**conditions))


def fingerprint(source: Source, condition_key: str | None, batch_keys: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain values that identify the data of a cohort, for the key of the first stage.

    Equal data have equal fingerprints, as h5ad and as zarr: paths, dates and the layout on disk are not included.
    """
    rows = source.sample
    wanted = [name for name in (condition_key, *batch_keys) if name is not None and name in source.cells]
    parts = (rows.indptr.astype("<i8"), rows.indices.astype("<i8"), rows.data.astype("<f4"))
    return {
        "cells": source.n_cells,
        "genes": source.n_genes,
        "dtype": np.dtype(source.matrix.dtype).name,
        "nonzeros": source.nnz,
        "cell_names": _digest(source.cells.names()),
        "gene_names": _digest([source.gene_names]),
        "columns": {str(name): _digest(_texts(source.cells[name])) for name in wanted},
        "rows": hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest(),
    }


def _digest(blocks: Iterable[Iterable[object]]) -> str:
    """Return the sha256 of the names in some blocks, joined by zero bytes."""
    digest, between = hashlib.sha256(), ""
    for block in blocks:
        digest.update((between + "\0".join(map(str, block))).encode())
        between = "\0"
    return digest.hexdigest()


def _texts(values: pd.Series[Any]) -> Iterator[pd.Series[Any]]:
    """Yield a column as text, block by block."""
    for start in range(0, len(values), TEXT_BLOCK):
        yield values.iloc[start : start + TEXT_BLOCK].astype(str)


def _chosen(
    read: Callable[[str | None], Source], layer: str | None, *, prefer_counts: bool, has_x: bool, has_raw: bool
) -> Source:
    """Read `layer` if it is set; else `X`, or `.raw` if counts are preferred and only `.raw` holds them."""
    if layer is not None or not prefer_counts:
        return read(layer)
    plain = read(MATRIX) if has_x else None
    if not has_raw or (plain is not None and plain.looks_like_counts):
        return plain or read(None)
    raw = read(RAW)
    if not raw.looks_like_counts:
        return plain or read(None)
    why = "there is no X" if plain is None else "X does not hold counts, .raw does"
    note = f"{why}: the counts of {raw.n_genes} genes in .raw are read (--layer X reads X)"
    return replace(raw, notes=(note,))


# --- in memory ---------------------------------------------------------------------------------------------------


def _open_memory(adata: Any, layer: str | None, prefer_counts: bool) -> Source:
    adata = _modality(adata)
    if adata.isbacked and (layer in (None, MATRIX, *RAW_NAMES)):
        return _open_backed(adata, layer, prefer_counts)
    present = {"has_x": adata.X is not None, "has_raw": adata.raw is not None}
    return _chosen(partial(_read_memory, adata), layer, prefer_counts=prefer_counts, **present)


def _read_memory(adata: ad.AnnData, layer: str | None) -> Source:
    raw = layer in RAW_NAMES and layer not in adata.layers and adata.raw is not None
    if layer is not None and layer not in adata.layers and not raw and layer != MATRIX:
        names = [name for name in adata.layers if name is not None]  # anndata 0.13 lists X as the layer None
        raise CohortError(no_layer("the AnnData", layer, names, raw=adata.raw is not None))
    if raw:
        values, var = adata.raw.X, adata.raw.var
    else:
        values = adata.layers[layer] if layer is not None and layer in adata.layers else adata.X
        var = adata.var
    base = None if raw else _base_of(lambda: adata.uns["log1p"]["base"])
    others = tuple(str(name) for name in adata.layers if name not in (None, layer))
    cells, matrix = HeldCells(in_memory(adata.obs)), memory_matrix(values)
    has_raw = adata.raw is not None and not raw
    return Source("the AnnData", cells, in_memory(var), matrix, adata.obsm, log_base=base, raw=has_raw, layers=others)


def _open_backed(adata: ad.AnnData, layer: str | None, prefer_counts: bool) -> Source:
    """Open the file of a backed AnnData, but take the tables from memory, where the user may have changed them."""
    if adata.is_view:
        msg = "the AnnData is a view of a backed one; pass its .to_memory(), or write it to a file of its own"
        raise CohortError(msg)
    if getattr(adata.file, "_filemode", "r") != "r":
        msg = (
            f"the AnnData is backed by {adata.filename} in mode 'r+', which keeps every other process out of the file; "
            "close it (adata.file.close()) and give the path, or open it with backed='r'"
        )
        raise CohortError(msg)
    stored = _open_stored(str(adata.filename), layer, prefer_counts)
    own = isinstance(stored.matrix, StoredMatrix) and stored.matrix.name == MATRIX
    return replace(
        stored, cells=HeldCells(adata.obs.copy()), var=adata.var.copy() if own else stored.var, obsm=adata.obsm
    )


def _modality(adata: Any) -> ad.AnnData:
    """Return an AnnData unchanged, and the modality `rna` of a MuData."""
    if isinstance(adata, ad.AnnData):
        return adata
    if MODALITY not in adata.mod:
        msg = (
            f"the MuData has no modality {MODALITY!r}; there are {listing(adata.mod)}; give the one you mean: "
            "mdata.mod['NAME']"
        )
        raise CohortError(msg)
    return adata.mod[MODALITY]


def _base_of(read: Callable[[], Any]) -> float | None:
    """Return the base of the logarithms that `uns` names; None if it names none, no valid one, or e."""
    try:
        base = float(np.asarray(read()).item())
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    natural = float(np.exp(1.0))
    return base if np.isfinite(base) and base > 1 and abs(base - natural) > 1e-6 else None


# --- stored ------------------------------------------------------------------------------------------------------


def _open_stored(address: str | os.PathLike[str], layer: str | None, prefer_counts: bool) -> Source:
    storage = open_storage(address)
    container = container_of(storage)
    group = open_group(storage, container)
    inside = f"mod/{MODALITY}/" if group.name.endswith(f"mod/{MODALITY}") else ""
    present = {"has_x": holds_x(group), "has_raw": raw_place(group) is not None}
    read = partial(_read_stored, group, storage.url, container, inside)
    return _chosen(read, layer, prefer_counts=prefer_counts, **present)


def open_group(storage: Storage, container: Container) -> Any:
    """Open the group of an AnnData, or of the modality `rna` of a MuData; `CohortError` if the store is neither."""
    root = _opened(storage, container)
    group = root.get(f"mod/{MODALITY}", root)
    missing = [name for name in ("obs", "var") if name not in group]
    if missing or "mod" in group:  # a MuData without `rna` has obs and var, but is no AnnData
        what = recognised_format(storage, root)
        msg = f"{storage.url} is {what}" if what else (
            f"{storage.url} is not an AnnData store: it holds no {' and no '.join(missing)}; it holds {listing(root)}"
        )  # fmt: skip
        raise CohortError(msg)
    return group


def _read_stored(group: Any, url: str, container: Container, inside: str, layer: str | None) -> Source:
    raw = raw_place(group)
    with refusing_damage(f"{url}: the matrix"):
        place = place_of(group, url, layer)
        matrix = replace(stored_matrix(group, url, container, place), name=f"{inside}{place}")
    if matrix.kind == "csc":
        msg = (
            f"{url}: {matrix.name} is stored by columns (CSC), which cannot be read a few cells at a time; convert it "
            f"once: ndreamer-dist convert {url} OUT.zarr"
        )
        raise CohortError(msg)
    from_raw = raw is not None and place == raw[0]
    cells = stored_cells(group, matrix)
    var = read_frame(group, raw[1] if raw is not None and from_raw else "var", url)
    if (len(cells), len(var)) != matrix.shape:
        msg = f"{url}: {matrix.name} is {matrix.shape}, but obs and var have {len(cells)} and {len(var)} rows"
        raise CohortError(msg)
    base = None if from_raw else _base_of(lambda: group["uns/log1p/base"][()])
    others = tuple(name for name in layer_names(group) if place != f"layers/{name}")
    return Source(url, cells, var, matrix, log_base=base, raw=raw is not None and not from_raw, layers=others)


def _opened(storage: Storage, container: Container) -> Any:
    """Open the root group; if that fails, the error names the file format that was recognised instead."""
    url = storage.url
    try:
        root = open_root(url, container)
        list(root)
    except NDreamerError:
        raise
    except PermissionError as error:
        msg = f"{url} may not be read ({one_line(error)})"
        raise CohortError(msg) from error
    except Exception as error:
        what = recognised_format(storage)
        kind = "an h5ad file" if container == "h5ad" else "a zarr store"
        msg = f"{url} is {what}" if what else (
            f"{url} cannot be opened as {kind}: it is truncated, or something else ({one_line(error)})"
        )  # fmt: skip
        raise CohortError(msg) from error
    return root


def container_of(storage: Storage) -> Container:
    """Return whether an address is an h5ad file or a zarr store; `CohortError` if it does not exist."""
    url = storage.url.split("?")[0]
    if not storage.is_local and url.endswith((".h5ad", ".h5", ".h5mu", ".zarr")):
        return "zarr" if url.endswith(".zarr") else "h5ad"
    if not storage.exists():
        msg = f"{storage.url} does not exist"
        raise CohortError(msg)
    return "h5ad" if storage.is_file() else "zarr"
