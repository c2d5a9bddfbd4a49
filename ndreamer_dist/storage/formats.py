"""Recognise files and folders that are not AnnData stores, and name the command that converts them.

Only the first bytes of a file, the file names of a folder and the top-level groups of a store are read. Output: part of
an error message, or `None`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from typing import Any

from ndreamer_dist.errors import StoreError, listing
from ndreamer_dist.storage.files import Storage

HEAD_BYTES = 2048
MODALITY = "rna"
"""The modality that is read from a MuData."""
WEB_PAGE = (b"<!doctype html", b"<html", b"<?xml")


def recognised_format(storage: Storage, root: Any = None) -> str | None:
    """Return what a file or folder that is no AnnData store is, and how to convert it; `None` if it is unknown.

    Parameters
    ----------
    root
        The root group, if the file or folder could be opened as HDF5 or zarr.
    """
    name = posixpath.basename(storage.url.split("?")[0].rstrip("/"))
    if root is not None:
        return of_groups(list(root), name, root)
    try:
        if not storage.is_local or storage.is_file():
            return of_bytes(_head(storage), name)
        return of_names(storage.list(), name)
    except (OSError, StoreError):
        return None


def _head(storage: Storage) -> bytes:
    file = storage.open_file(HEAD_BYTES, 1)
    return bytes(file.read(HEAD_BYTES))


def of_bytes(head: bytes, name: str) -> str | None:
    """Recognise a file by its first bytes and its name."""
    stem, text = name.split(".")[0] or "cohort", head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs and not the file itself; get it: git lfs pull"
    if text.startswith(WEB_PAGE):
        return "a web page, the answer of a server to a download that failed; download the file itself again"
    if name.lower().endswith((".rds", ".rda", ".rdata", ".qs", ".h5seurat")) or head.startswith((b"RDX", b"X\n")):
        return (
            f"an R object; write it from R: zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(x), '{stem}.h5ad'), "
            "or without as.SingleCellExperiment where it is one"
        )
    if head.startswith(b"%%MatrixMarket") or name.endswith(".mtx.gz"):
        return f"a MatrixMarket file; {_scanpy('read_10x_mtx', 'FOLDER', stem)} (FOLDER holds matrix, features and barcodes)"
    if head.startswith(b"\x1f\x8b"):
        return f"compressed by gzip; unpack it: gunzip -k {name}"
    if head.startswith(b"PK\x03\x04"):
        return f"a zip archive; unpack it: unzip {name} -d {stem}.zarr"
    if head.startswith((b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")):
        return "compressed (bzip2, xz or zstd); unpack it first"
    return None


def of_names(names: Iterable[str], name: str) -> str | None:
    """Recognise a folder by the paths of the files in it."""
    held = sorted(names)
    own = {posixpath.basename(path) for path in held if path.count("/") == 0}
    stem = name.split(".")[0] or "cohort"
    if any(part.startswith(("__tiledb", "__group")) for path in held for part in path.split("/")):
        return (
            f"a SOMA (TileDB) experiment; write one measurement of it: tiledbsoma.io.to_h5ad(tiledbsoma.open('{name}'), "
            f"'{stem}.h5ad', measurement_name='RNA')"
        )
    if any(part.startswith("matrix.mtx") for part in own):
        return f"a 10x matrix folder; {_scanpy('read_10x_mtx', name, stem)}"
    files = [part for part in sorted(own) if part.endswith((".h5ad", ".h5"))]
    if files:
        return (
            f"a folder of files ({listing(files, limit=3)}); give one of them, or make one of them all: "
            "anndata.experimental.concat_on_disk(files, 'cohort.h5ad', label='sample')"
        )
    return None


def of_groups(names: list[str], name: str, root: Any) -> str | None:
    """Recognise an HDF5 file or a zarr store by its top-level groups."""
    stem = name.split(".")[0] or "cohort"
    if "mod" in names:
        held = list(root["mod"])
        return (
            f"a MuData without a modality {MODALITY!r} (it has {listing(held)}); write the one you mean: "
            f"mudata.read('{name}').mod['{held[0] if held else 'NAME'}'].write_h5ad('{stem}.h5ad')"
        )
    if {"matrix", "row_attrs", "col_attrs"} <= set(names):
        return f"a loom file; {_scanpy('read_loom', name, stem)}"
    tenx = [part for part in names if hasattr(root[part], "keys") and {"barcodes", "indptr"} <= set(root[part])]
    if tenx:
        return f"a 10x HDF5 matrix; {_scanpy('read_10x_h5', name, stem)}"
    if {"assays", "cell.names"} <= set(names) or "meta.data" in names:
        return (
            f"an h5Seurat file; turn it from R: SeuratDisk::Convert('{name}', dest = 'h5ad'), "
            "or write the Seurat object by zellkonverter::writeH5AD"
        )
    return None


def _scanpy(reader: str, name: str, stem: str) -> str:
    """Return the shell command that converts a file to h5ad with a reader of scanpy."""
    needs, mended = {
        "read_loom": ("pip install loompy && ", ""),
        "read_10x_h5": ("", "; a.var_names_make_unique()"),
        "read_10x_mtx": ("", "; a.var_names_make_unique(); a.X = a.X.tocsr()"),  # scanpy returns CSC
    }[reader]
    return (
        f'turn it into an h5ad file: {needs}python -c "import scanpy as sc; a = sc.{reader}({name!r}){mended}; '
        f"a.write_h5ad('{stem}.h5ad')\""
    )
