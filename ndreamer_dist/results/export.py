"""Writing a part of the results to a file, by its suffix: h5ad or zarr for scverse, csv or parquet for all else.

A table holds one row a cell: the column `cell` with its name, then one column a gene. What is known of cells and genes
besides is in the AnnData formats.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
from scipy import sparse
from zarr.errors import ZarrUserWarning

from ndreamer_dist.errors import QueryError, listing

CELL = "cell"


def save(adata: anndata.AnnData, path: str | os.PathLike[str]) -> None:
    """Write an AnnData to a file whose suffix says how: `.h5ad`, `.zarr`, `.csv` or `.parquet`.

    The object is not changed. A file of that name is replaced, once the new one is complete.

    Raises
    ------
    QueryError
        The suffix is another one, the folder does not exist, or the name is taken by a folder.
    """
    target = Path(path).expanduser().absolute()
    write = WRITERS.get(target.suffix.lower())
    if write is None:
        msg = f"{target.name}: the suffix {target.suffix!r} says no format; there are {listing(WRITERS)}"
        raise QueryError(msg)
    if not target.parent.is_dir():
        msg = f"{target.parent} is no folder; make it, or choose another file"
        raise QueryError(msg)
    if target.is_dir():
        msg = f"{target} is there already and is a folder; delete it, or choose another name"
        raise QueryError(msg)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
    try:
        part = scratch / target.name
        write(adata, part)
        part.replace(target)
    finally:
        shutil.rmtree(scratch)


def table(adata: anndata.AnnData) -> pd.DataFrame:
    """Return the values as a table: (cells, genes), with the cells' names as index."""
    values = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    return pd.DataFrame(values, index=pd.Index(adata.obs_names, name=CELL), columns=adata.var_names)


def _write_h5ad(adata: anndata.AnnData, path: Path) -> None:
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, compression="gzip", convert_strings_to_categoricals=False)


def _write_zarr(adata: anndata.AnnData, path: Path) -> None:
    settings = {"allow_write_nullable_strings": True, "zarr_write_format": 3, "auto_shard_zarr_v3": False}
    with anndata.settings.override(**settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # that consolidation is not in the specification yet
        adata.write_zarr(path, convert_strings_to_categoricals=False)


def _write_csv(adata: anndata.AnnData, path: Path) -> None:
    table(adata).to_csv(path)


def _write_parquet(adata: anndata.AnnData, path: Path) -> None:
    table(adata).to_parquet(path)


WRITERS: dict[str, Callable[[anndata.AnnData, Path], None]] = {
    ".h5ad": _write_h5ad, ".zarr": _write_zarr, ".csv": _write_csv, ".parquet": _write_parquet,
}  # fmt: skip
