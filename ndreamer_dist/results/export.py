"""Write a part of the results to a file: h5ad or zarr for scverse, csv, tsv or parquet for other tools.

The suffix determines the format. A table has one row per cell: the column `cell` with its name, then one column per
gene. The AnnData formats also hold `obs` and `var`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse
from zarr.errors import ZarrUserWarning

from ndreamer_dist.errors import QueryError, listing
from ndreamer_dist.results.cohort import Cohort
from ndreamer_dist.results.reader import Cells, ResultsReader, results_storage
from ndreamer_dist.storage.shards import Reads, counting

CELL = "cell"
FORMATS = (".h5ad", ".zarr", ".csv", ".parquet", ".tsv")
TABLES = (".csv", ".parquet", ".tsv")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
CONDITIONAL = ("effect", "counterfactual")
LARGE_BYTES = 2**30
"""Values of more bytes than this are held in a temporary file and not in memory."""
BLOCK_VALUES = 2**24
"""Number of values of a table that are written at a time."""


def export_part(
    address: str | os.PathLike[str],
    path: str | os.PathLike[str],
    what: str,
    *,
    cells: Cells = None,
    genes: Sequence[str] | None = None,
    embedding: bool = True,
    cohort: Cohort | None = None,
    condition: str | None = None,
    baseline: str | None = None,
) -> tuple[tuple[int, int], Reads]:
    """Write a part of some results to a file.

    Values of more than `LARGE_BYTES` pass through a temporary file, so that memory holds only one block of them.

    Parameters
    ----------
    address
        A run directory, a results.zarr, or the URL of either.
    path
        The file; its suffix determines the format.
    what
        Name of a layer, or `expression`, `effect` or `counterfactual`.
    cells, genes
        Selection of cells and genes, as for the methods of `Results`.
    embedding
        Add the coordinates of the matching space to `obsm`, in the AnnData formats.
    cohort
        The input cohort, for genes that were not modelled.
    condition, baseline
        Condition of an `effect` or a `counterfactual`; baseline of an `effect`, by default the control.

    Returns
    -------
    The shape (cells, genes) of the part, and the counts of what was read.

    Raises
    ------
    QueryError
        The file cannot be written, a name is unknown, or a condition is missing or out of place.
    """
    target = checked(path)
    if (condition is not None) != (what in CONDITIONAL):
        msg = f"{what} {'needs a' if what in CONDITIONAL else 'takes no'} condition (--condition NAME)"
        raise QueryError(msg)
    with counting() as reads, room_beside(target) as room:
        results = ResultsReader(results_storage(address))
        if what == "expression":
            part = results.expression(cells, genes, cohort=cohort)
        elif what == "effect":
            part = results.effect(str(condition), cells, genes, baseline=baseline, cohort=cohort, room=room)
        elif what == "counterfactual":
            part = results.counterfactual(str(condition), cells, genes, cohort=cohort, room=room)
        else:
            part = results.layer(what, cells, genes, cohort=cohort, drop_undefined=True, room=room)
        if embedding and target.suffix.lower() in (".h5ad", ".zarr"):
            results.add_embedding(part)
        save(part, target)
        return part.shape, reads


@contextmanager
def room_beside(target: Path) -> Iterator[Callable[[tuple[int, int]], np.ndarray]]:
    """Provide a function that allocates a float32 array: in memory or, if large, in a temporary file near a target."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:

        def room(shape: tuple[int, int]) -> np.ndarray:
            if shape[0] * shape[1] * 4 <= LARGE_BYTES:
                return np.empty(shape, dtype=np.float32)
            # As a plain array, since anndata cannot write a memmap.
            return np.memmap(Path(folder) / "values", dtype=np.float32, mode="w+", shape=shape).view(np.ndarray)

        yield room


def save(adata: anndata.AnnData, path: str | os.PathLike[str]) -> None:
    """Write an AnnData to a `.h5ad`, `.zarr`, `.csv`, `.tsv` or `.parquet` file.

    The object is not changed. An existing file is replaced once the new one is complete.

    Raises
    ------
    QueryError
        The suffix is unknown, the parent folder does not exist, or the path is a folder.
    """
    target = checked(path)
    with replaced(target) as part:
        WRITERS[target.suffix.lower()](adata, part)


def save_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table without its index to a `.csv`, `.tsv` or `.parquet` file; raises what `save` raises."""
    target = checked(path, TABLES)
    with replaced(target) as part:
        if (separator := SEPARATORS.get(target.suffix.lower())) is not None:
            frame.to_csv(part, index=False, sep=separator)
        else:
            frame.to_parquet(part, index=False)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Provide a temporary path in the target's folder; at the end, the file written there replaces the target."""
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
    try:
        yield scratch / target.name
        (scratch / target.name).replace(target)
    finally:
        shutil.rmtree(scratch)


def checked(path: str | os.PathLike[str], suffixes: Collection[str] = FORMATS) -> Path:
    """Return the absolute path of a file to write; raise `QueryError` if it cannot be written."""
    target = Path(path).expanduser().absolute()
    if target.suffix.lower() not in suffixes:
        msg = f"{target.name}: unknown suffix {target.suffix!r}; expected one of {listing(suffixes)}"
        raise QueryError(msg)
    if not target.parent.is_dir():
        msg = f"{target.parent} is not a folder; create it, or choose another file"
        raise QueryError(msg)
    if target.is_dir():
        msg = f"{target} is an existing folder; delete it, or choose another name"
        raise QueryError(msg)
    return target


def table(adata: anndata.AnnData) -> pd.DataFrame:
    """Return `X` as a dense table (cells, genes), indexed by cell name."""
    values = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    return pd.DataFrame(values, index=pd.Index(adata.obs_names, name=CELL), columns=adata.var_names)


def _write_h5ad(adata: anndata.AnnData, path: Path) -> None:
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path, compression="gzip", convert_strings_to_categoricals=False)


@contextmanager
def plain_zarr() -> Iterator[None]:
    """Make anndata write zarr format 3 with nullable strings, without warnings about future defaults."""
    settings = {"allow_write_nullable_strings": True, "zarr_write_format": 3, "auto_shard_zarr_v3": False}
    with anndata.settings.override(**settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # consolidated metadata is not in the specification
        yield


def _write_zarr(adata: anndata.AnnData, path: Path) -> None:
    with plain_zarr():
        adata.write_zarr(path, convert_strings_to_categoricals=False)


def _write_csv(adata: anndata.AnnData, path: Path) -> None:
    for start, block in _blocks(adata):
        block.to_csv(path, header=start == 0, mode="a", sep=SEPARATORS[path.suffix.lower()])


def _write_parquet(adata: anndata.AnnData, path: Path) -> None:
    with ExitStack() as stack:
        writer = None
        for _, block in _blocks(adata):
            rows = pa.Table.from_pandas(block)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, rows.schema))
            writer.write_table(rows)


def _blocks(adata: anndata.AnnData) -> Iterator[tuple[int, pd.DataFrame]]:
    """Yield the table in blocks of cells, each with its first row number; one empty block if there are no cells."""
    step = max(1, BLOCK_VALUES // max(1, adata.n_vars))
    for start in range(0, max(1, adata.n_obs), step):
        yield start, table(adata[start : start + step])


WRITERS: dict[str, Callable[[anndata.AnnData, Path], None]] = {
    ".h5ad": _write_h5ad, ".zarr": _write_zarr, ".csv": _write_csv, ".parquet": _write_parquet,
    ".tsv": _write_csv,
}  # fmt: skip
