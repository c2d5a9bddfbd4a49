"""Check that every file of a run is as the run wrote it: `ndreamer-dist check`.

The markers in `done/` list the files and their sizes. The command reads every chunk of every array and every other file,
compares them with their checksums, and names the damaged and missing ones. With `--mend` it also deletes the damaged
files, and the run's own command then makes them again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import zarr
from zarr.storage import MemoryStore, StorePath

from ndreamer_dist import keys
from ndreamer_dist.compute.executor import Runtime, RuntimeChoice, choose_runtime
from ndreamer_dist.compute.local_ray import on_a_cluster
from ndreamer_dist.effects.tables import ROOT
from ndreamer_dist.errors import DamagedError, RunError
from ndreamer_dist.rundir.directory import ArrayFile, RunDirectory
from ndreamer_dist.settings import Settings
from ndreamer_dist.storage.arrays import open_array, opened_with, read_array
from ndreamer_dist.storage.checksums import check_digest, read_model, unseal
from ndreamer_dist.storage.files import ConsolidatedStorage, Storage
from ndreamer_dist.storage.shards import Place, chunks_in, read_chunks

OBS = f"{keys.RESULTS}/obs/"
BATCH_FILES, BATCH_BYTES = 256, 2**28
"""Maximum number of files and bytes of a task; a larger file is a task of its own."""
SERIAL_BYTES = 2**32
"""A run of at most this many bytes is read in this process by default, which takes less time than starting Ray."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeFile:
    """A file that a marker lists.

    Attributes
    ----------
    name
        Path below the run directory.
    size
        Size in bytes.
    digest
        sha256 of a file that holds no checksum itself.
    """

    name: str
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class Checked:
    """The outcome of a check.

    Attributes
    ----------
    url
        Address of the run directory.
    files, bytes
        Number and total size of the files that the markers list.
    damage
        One line per damaged or missing file.
    """

    url: str
    files: int
    bytes: int
    damage: tuple[str, ...]


def check(out: str | os.PathLike[str], *, mend: bool = False, settings: Mapping[str, Any] | None = None) -> Checked:
    """Read all files of a run, and return which are damaged or missing.

    Parameters
    ----------
    out
        Run directory, local or on object storage.
    mend
        Delete the damaged files, so that the run's own command makes them again, and only them.
    settings
        Dotted settings that say how to work, such as `{"run.address": "auto"}`; by default those of the run.

    Raises
    ------
    RunError
        There is no run, or, with `mend`, another process is working on it.
    """
    directory = RunDirectory.at(out)
    with directory.locked() if mend else nullcontext():
        errors, run_json = _run_json(directory)
        spaces = [directory.space(name) for name in run_json.get("spaces", ())]
        errors += [error for space in spaces for error in _run_json(space)[0]]
        resolved = _with_runtime(Settings.build(config=run_json.get("settings"), overrides=settings), directory)
        markers = [_markers(place) for place in (directory, *spaces)]
        if not markers[0]:
            msg = f"{directory.url} holds nothing that a run has made"
            raise RunError(msg)
        files: list[MadeFile] = []
        with choose_runtime(resolved.run) as runtime:
            for place, names in zip((directory, *spaces), markers, strict=True):
                own, unread = _made_files(place, names)
                files += own
                errors += [*unread, *_damage(place, own, runtime)]
        by_file = {error.url: error for error in errors}
        for error in by_file.values() if mend else ():
            directory.remove_damaged(error.url.removeprefix(f"{directory.url}/"))
    return Checked(directory.url, len(files), sum(f.size for f in files), tuple(e.what for e in by_file.values()))


def _markers(directory: RunDirectory) -> list[str]:
    """Return the markers of the files that a run, or a space added to it, has made and kept."""
    # `all-genes` deletes its packed cells once the results are complete.
    deleted = (keys.STAGE_PACK,) if directory.storage.exists(keys.WIDE_JSON) else ()
    return [name for name in directory.storage.list(keys.DONE) if name.split("/")[1] not in deleted]


def _with_runtime(settings: Settings, directory: RunDirectory) -> Settings:
    """Return the settings with `run.serial` set if nothing else is chosen and the run is small (`SERIAL_BYTES`)."""
    run = settings.run
    if run.serial is not None or on_a_cluster(run) or sum(directory.storage.list().values()) > SERIAL_BYTES:
        return settings
    return RuntimeChoice(serial=True, why="little is to be read").applied(settings)


def _run_json(directory: RunDirectory) -> tuple[list[DamagedError], dict[str, Any]]:
    """Return the damage of run.json, and its values; the output of `all-genes` has no run.json."""
    try:
        return [], directory.read_run() if directory.storage.exists(keys.RUN_JSON) else {}
    except DamagedError as error:
        return [DamagedError(f"{error.what}; `run` with --redo writes it anew", error.url)], {}


def _made_files(directory: RunDirectory, markers: Sequence[str]) -> tuple[list[MadeFile], list[DamagedError]]:
    """Return the files that the markers list, sorted by name, and the errors of markers that cannot be read."""
    files: dict[str, MadeFile] = {}
    unread = []
    for name, data in directory.storage.read_all(markers).items():
        try:
            marker = unseal(data, f"{directory.url}/{name}")
        except DamagedError as error:
            unread.append(error)
            continue
        facts = marker.get("facts", {})
        files |= {file: MadeFile(file, size, facts.get(file)) for file, size in marker["files"].items()}
    return [files[name] for name in sorted(files)], unread


def _damage(directory: RunDirectory, files: Sequence[MadeFile], runtime: Runtime) -> Iterator[DamagedError]:
    """Yield an error per missing file, from a listing, and per damaged file, from reading it."""
    sizes: dict[str, int] = {}
    for top in sorted({file.name.split("/")[0] for file in files}):
        sizes |= directory.storage.list(top)
    whole = []
    others = _written_by_others(directory, files, sizes)
    for file in files:
        size = sizes.get(file.name)
        if size == file.size or (others and file.name == f"{keys.RESULTS}/{ROOT}"):
            whole.append(file)
            continue
        if others and file.name.startswith(OBS):
            continue
        how = "is missing" if size is None else f"is damaged (it has {size} bytes in place of {file.size})"
        yield DamagedError(f"{directory.url}/{file.name} {how}", f"{directory.url}/{file.name}")
    for damage in runtime.map(check_files, list(_batches(whole)), directory, others, title="check"):
        yield from damage


def _written_by_others(directory: RunDirectory, files: Sequence[MadeFile], sizes: Mapping[str, int]) -> bool:
    """Return whether another program changed obs, e.g. added a column, and obs is readable and of the run's cells."""
    tables = {file.name: file.size for file in files if file.name in (f"{OBS}{ROOT}", f"{OBS}_index/{ROOT}")}
    if all(sizes.get(name) == size for name, size in tables.items()):
        return False
    try:
        store = (directory.storage / keys.RESULTS / "obs").store(read_only=True)
        obs = anndata.io.read_elem(zarr.open_group(store, mode="r", use_consolidated=False))
        rows = read_array(directory.storage / keys.PACKED, keys.PACKED_INPUT_ROW)
        same = np.array_equal(obs[keys.OBS_INPUT_ROW].to_numpy(), rows)
    except Exception:
        logger.debug("obs is not as the run wrote it, and cannot be read", exc_info=True)
        return False
    if same:
        logger.info("another program wrote into obs; what it wrote has no checksums of ours")
    return same


def _batches(files: Sequence[MadeFile]) -> Iterator[list[MadeFile]]:
    """Yield the files of one task after the other; the order of the files stays, so an array's are together."""
    batch: list[MadeFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) == BATCH_FILES or size + file.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch


def check_files(batch: Sequence[MadeFile], directory: RunDirectory, others: bool = False) -> list[DamagedError]:
    """Read some files of a run and return the errors of the damaged ones; runs as a task.

    Parameters
    ----------
    others
        Whether another program changed obs; the metadata in the root of results.zarr may then differ from that of obs.
    """
    errors = []
    opened: dict[tuple[str, str], zarr.Array[Any]] = {}  # the array of the last file: files are sorted by array
    for file in batch:
        part = ArrayFile.of(file.name)
        try:
            if part is None:
                _check_file(directory, file, others=others)
            elif part.chunk is None:
                _metadata(directory.storage.read(file.name), f"{directory.url}/{file.name}")
            else:
                name, storage = (part.store, part.array), directory.storage / part.store
                if name not in opened:
                    opened = {name: open_array(storage, part.array)}
                array = opened[name]
                read_chunks(array, Place(storage.url, part.array), chunks_in(array, part.chunk), lambda *_: None)
        except DamagedError as error:
            errors.append(error)
    return errors


def _metadata(data: bytes, url: str) -> dict[str, Any]:
    """Parse the metadata of an array or a group; `DamagedError` if zarr cannot use it."""
    try:
        metadata = dict(json.loads(data))
        if metadata["node_type"] == "array":
            opened_with(metadata, StorePath(MemoryStore()))
    except Exception as error:
        raise DamagedError.of(url, error) from error
    return metadata


def _check_file(directory: RunDirectory, file: MadeFile, *, others: bool) -> None:
    """Check a file that belongs to no array; `DamagedError` if it differs from its checksum."""
    url = f"{directory.url}/{file.name}"
    if file.name in (keys.MODEL_JSON, keys.MODEL_WEIGHTS):
        read_model(directory.storage)
    elif file.name == f"{keys.RESULTS}/{ROOT}":
        _check_root(directory.storage / keys.RESULTS, url, others=others)
    elif file.name.endswith(".json"):
        unseal(directory.storage.read(file.name), url)
    else:
        check_digest(directory.storage.read(file.name), file.digest, url)


def _check_root(storage: Storage, url: str, *, others: bool) -> None:
    """Compare the consolidated metadata in the root of results.zarr with the metadata of every array and group."""
    nodes = ConsolidatedStorage(storage.url).nodes
    if others:
        nodes = {name: node for name, node in nodes.items() if name != "obs" and not name.startswith("obs/")}
    for name, data in storage.read_all([f"{name}/{ROOT}" for name in nodes]).items():
        own, consolidated = _metadata(data, f"{storage.url}/{name}"), dict(nodes[name.removesuffix(f"/{ROOT}")])
        own.pop("consolidated_metadata", None), consolidated.pop("consolidated_metadata", None)
        if own != consolidated:
            raise DamagedError.of(url, f"it and {name} differ")
