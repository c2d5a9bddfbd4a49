"""Write the results of a run in the layout of the published package: a few h5ad files for each group.

Groups are written one by one, so memory holds the values of one group. `x` and `y` in `b-x--c-y__ITE.h5ad` are the codes
of batch and condition. `mappings.json` maps codes to names and lists the files; `condition2num_mapping.pth` and
`batch2num_mapping.pth`, named as published, map names to codes, as JSON. Rows of `adata.h5ad` and `preprocessed.h5ad` are
sorted by group. In every file, `obs["original_order"]` is the row of the cell in the input.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import sparse_dataset, write_elem

from ndreamer_dist import keys
from ndreamer_dist.cohort.design import Group
from ndreamer_dist.errors import QueryError, StoreError, listing, quoted, suggest
from ndreamer_dist.results.export import replaced, room_beside, save
from ndreamer_dist.stats.results import Results, open_results
from ndreamer_dist.storage.arrays import open_array
from ndreamer_dist.storage.checksums import read_model
from ndreamer_dist.storage.files import Storage

LayoutPart: TypeAlias = Literal["model", "space", "decomposition", "effects"]
PARTS: tuple[LayoutPart, ...] = get_args(LayoutPart)
LAYOUTS = ("ndreamer",)
WEIGHTS = {
    "weights": keys.PUBLISHED_WEIGHTS, "network": keys.PUBLISHED_MODEL, "read_with": "safetensors.torch.load_file",
}  # fmt: skip
"""Content of `ndreamer.pth`, as JSON: the files of weights and network, since nothing is pickled."""


def export(
    run: str | os.PathLike[str] | Results,
    *,
    out: str | os.PathLike[str],
    format: Literal["ndreamer"] = "ndreamer",  # noqa: A002 - the command line's word
    parts: Collection[LayoutPart] = PARTS,
) -> list[Path]:
    """Write a run's results in the published package's layout, group by group.

    Parameters
    ----------
    run
        Run directory, results.zarr, or the URL of either.
    out
        Local folder, created if it does not exist. Files of these names in it are replaced.
    parts
        `model`: `preprocessed.h5ad`, the mappings and, if the run directory has them, the network and its weights;
        `space`: `adata.h5ad` with the embedding; `decomposition`: denoised expression and batch effect; `effects`: own
        condition minus control, for the cells that are not control.

    Returns
    -------
    The files written.

    Raises
    ------
    QueryError
        The format or a part is unknown, or `out` is not a folder on this machine.
    StoreError
        There are no results, a chunk of them is damaged, or `space` is wanted of a space without effect modifiers.
    """
    for what, names, known in (("format", [format], LAYOUTS), ("part", parts, PARTS)):
        if unknown := [name for name in names if name not in known]:
            msg = f"there is no {what} {listing(unknown)}; there are {listing(known)}.{suggest(unknown[0], known)}"
            raise QueryError(msg)
    results = run if isinstance(run, Results) else open_results(run)
    results.refuse_damaged()
    if results.space != keys.NDREAMER and "space" in parts:
        msg = (
            f"{results.url} is matched in {quoted(results.space)}: it holds no effect modifiers; leave the part 'space' out "
            "(--parts model,decomposition,effects)"
        )
        raise StoreError(msg)
    folder = _folder(out)
    written: list[Path] = []
    for part in PARTS:
        if part in parts:
            written += PART_WRITERS[part](results, folder)
    return written


def _folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(out).expanduser().absolute()
    if "://" in os.fspath(out) or (folder.exists() and not folder.is_dir()):
        msg = f"{os.fspath(out)} is no folder on this machine: h5ad files are written to a local disk"
        raise QueryError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_name(pattern: str, group: Group) -> str:
    """Return the file name of a group, with its codes of batch and condition."""
    return pattern.format(batch=group.batch, condition=group.condition)


def _write_model(results: Results, folder: Path) -> list[Path]:
    mappings = _mappings(results)
    contents = {
        keys.PUBLISHED_MAPPINGS: mappings, keys.PUBLISHED_CONDITIONS: mappings["conditions"],
        keys.PUBLISHED_BATCHES: mappings["batches"], keys.PUBLISHED_POINTER: WEIGHTS,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    written, run = [folder / name for name in contents], Storage(results.url.rpartition("/")[0])
    if run.exists(keys.MODEL_JSON):
        read_model(run)  # raises if the files are damaged
        for source, name in ((keys.MODEL_JSON, keys.PUBLISHED_MODEL), (keys.MODEL_WEIGHTS, keys.PUBLISHED_WEIGHTS)):
            Storage(str(folder)).write_atomic(name, run.read(source))
            written.append(folder / name)
    return [*written, _stacked(results, folder / keys.PUBLISHED_PREPROCESSED, {})]


def _mappings(results: Results) -> dict[str, object]:
    """Return the codes of conditions and batches by name, and the files of each group."""
    design = results.design
    return {
        "condition_key": design.condition_key,
        "control": design.control,
        "conditions": {name: code for code, name in enumerate(design.conditions)},
        "batch_keys": list(design.batch_keys),
        "batches": {name: code for code, name in enumerate(design.batches)},
        "groups": [
            {
                "batch": design.batches[group.batch],
                "condition": design.conditions[group.condition],
                "cells": group.cells,
                "ITE": file_name(keys.PUBLISHED_ITE, group) if group.condition else None,
                "expression": file_name(keys.PUBLISHED_EXPRESSION, group),
                "batch_effect": file_name(keys.PUBLISHED_BATCH, group),
            }
            for group in design.groups
        ],
        "genes": list(results.var_names),
    }


def _write_space(results: Results, folder: Path) -> list[Path]:
    return [
        _stacked(results, folder / keys.PUBLISHED_ADATA, {keys.PUBLISHED_MU: False, keys.PUBLISHED_PCA: True}),
    ]


def _write_decomposition(results: Results, folder: Path) -> list[Path]:
    denoised = _grouped(results, folder, keys.LAYER_DENOISED, keys.PUBLISHED_EXPRESSION)
    return denoised + _grouped(results, folder, keys.LAYER_BATCH_EFFECT, keys.PUBLISHED_BATCH)


def _write_effects(results: Results, folder: Path) -> list[Path]:
    return _grouped(results, folder, keys.LAYER_ITE, keys.PUBLISHED_ITE)


PART_WRITERS: dict[LayoutPart, Callable[[Results, Path], list[Path]]] = {
    "model": _write_model, "space": _write_space, "decomposition": _write_decomposition, "effects": _write_effects,
}  # fmt: skip


def _grouped(results: Results, folder: Path, layer: str, pattern: str) -> list[Path]:
    """Write a layer as one file per group, and delete such files of groups that no longer exist."""
    written, cells = [], _cells(results)
    for group in results.design.groups:
        if layer == keys.LAYER_ITE and group.condition == 0:
            continue
        path, obs = folder / file_name(pattern, group), cells.iloc[group.start : group.stop]
        with room_beside(path) as room:
            part = results.layer(layer, list(obs.index), room=room)
            part.obs = obs
            save(part, path)
        written.append(path)
    for path in _matching(folder, pattern):
        if path not in written:
            path.unlink()
    return written


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files of a folder whose names match a pattern of `keys`."""
    name = re.compile(re.escape(pattern).replace(r"\{batch\}", r"\d+").replace(r"\{condition\}", r"\d+"))
    yield from (path for path in sorted(folder.iterdir()) if name.fullmatch(path.name))


def _cells(results: Results) -> pd.DataFrame:
    table = results.packed_obs
    table[keys.PUBLISHED_ORDER] = table[keys.OBS_INPUT_ROW]
    return table


def _stacked(results: Results, path: Path, embeddings: dict[str, bool]) -> Path:
    """Write an AnnData of all cells, group by group: expression, and embeddings.

    Parameters
    ----------
    embeddings
        Names in `obsm`; True for the principal components of the embedding, False for the embedding itself.
    """
    obs = _cells(results)
    entries = open_array(results.storage, f"X/{keys.DATA}").shape[0]
    with replaced(path) as part:
        save(anndata.AnnData(obs=obs, var=results.var), part)
        with h5py.File(part, "r+") as file:
            for group in results.design.groups:
                names = list(obs.index[group.start : group.stop])
                _append_rows(file, results.expression(names).X, entries, first=group.start == 0)
                for name, pca in embeddings.items():
                    values = results.embedding(names, pca=pca).to_numpy()
                    _place_rows(file, f"obsm/{name}", values, group.start, len(obs))
    return path


def _append_rows(file: h5py.File, values: Any, entries: int, *, first: bool) -> None:
    """Append rows to X; `entries`, the final number of stored values, decides the dtype of `indptr`."""
    if first:
        file.pop("X", None)
        indptr_dtype = np.int32 if entries <= np.iinfo(np.int32).max else np.int64
        write_elem(file, "X", values, dataset_kwargs={"compression": "gzip", "indptr_dtype": indptr_dtype})
    else:
        sparse_dataset(file["X"]).append(values)


def _place_rows(file: h5py.File, name: str, values: np.ndarray, start: int, rows: int) -> None:
    if name not in file:
        array = file.create_dataset(name, (rows, values.shape[1]), values.dtype, chunks=True, compression="gzip")
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    file[name][start : start + len(values)] = values
