"""Check that every file of a run is still what the run wrote: `ndreamer-dist check`.

The markers below `done/` list the files and their sizes. Every chunk of every array is read and compared with its
checksum, and so is every other file. The command names what is damaged or missing. With `--mend` it also removes the
damaged parts, and the run's own command then makes them again.
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
"""What one task reads at most, or one file."""
SERIAL_BYTES = 2**32
"""Files of fewer bytes are read in this process by default: starting Ray takes longer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MadeFile:
    """A file, its size, and its checksum where the file has none in itself."""

    name: str
    size: int
    digest: str | None = None


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes
    ----------
    files, bytes
        How much there should be.
    damage
        A line for each file that is damaged or missing.
    """

    url: str
    files: int
    bytes: int
    damage: tuple[str, ...]


def check(out: str | os.PathLike[str], *, mend: bool = False, settings: Mapping[str, Any] | None = None) -> Checked:
    """Read all that a run has made, and say what is damaged or missing.

    Parameters
    ----------
    out
        Run directory, local or on object storage.
    mend
        Remove what is damaged, so that the run's own command makes it again, and that alone.
    settings
        Dotted settings that say how to work: `{"run.address": "auto"}`; by default those of the run.

    Raises
    ------
    RunError
        There is no run, or, with `mend`, it is being worked on.
    """
    directory = RunDirectory.at(out)
    with directory.locked() if mend else nullcontext():
        found, before = _run_json(directory)
        made = Settings.build(config=before.get("settings"), overrides=settings)
        spaces = [directory.space(name) for name in before.get("spaces", ())]
        found += [error for space in spaces for error in _run_json(space)[0]]
        made = _settled(made, directory)
        files: list[MadeFile] = []
        with choose_runtime(made.run) as runtime:
            for place in (directory, *spaces):
                own, unread = _made_files(place, _markers(place))
                files += own
                found += [*unread, *_damage(place, own, runtime)]
        told = {error.url: error for error in found}
        for error in told.values() if mend else ():
            directory.remove_damaged(error.url.removeprefix(f"{directory.url}/"))
    return Checked(directory.url, len(files), sum(f.size for f in files), tuple(e.what for e in told.values()))


def _markers(directory: RunDirectory) -> list[str]:
    """Return the markers of what a run, or a space added to it, has made and keeps.

    Raises
    ------
    RunError
        It has made nothing.
    """
    # The cells packed for all genes are deleted once the results are there.
    deleted = (keys.STAGE_PACK,) if directory.storage.exists(keys.WIDE_JSON) else ()
    markers = [name for name in directory.storage.list(keys.DONE) if name.split("/")[1] not in deleted]
    if not markers:
        msg = f"{directory.url} holds nothing that a run has made"
        raise RunError(msg)
    return markers


def _settled(made: Settings, directory: RunDirectory) -> Settings:
    """Return the settings with the runtime chosen: little is read sooner in this process than Ray starts."""
    if made.run.serial is not None or on_a_cluster(made.run) or sum(directory.storage.list().values()) > SERIAL_BYTES:
        return made
    return RuntimeChoice(serial=True, why="little is to be read").applied(made)


def _run_json(directory: RunDirectory) -> tuple[list[DamagedError], dict[str, Any]]:
    """Return what is wrong with run.json, and what it says; a directory of all genes has none."""
    try:
        return [], directory.read_run() if directory.storage.exists(keys.RUN_JSON) else {}
    except DamagedError as error:
        return [DamagedError(f"{error.what}; `run` with --redo writes it anew", error.url)], {}


def _made_files(directory: RunDirectory, markers: Sequence[str]) -> tuple[list[MadeFile], list[DamagedError]]:
    """Return the files that the markers list, by name, and the markers that cannot be read."""
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
    """Find what is missing by listing, and what is damaged by reading."""
    sizes: dict[str, int] = {}
    for top in sorted({file.name.split("/")[0] for file in files}):
        sizes |= directory.storage.list(top)
    whole = []
    others = _written_by_others(directory, files, sizes)
    for file in files:
        found = sizes.get(file.name)
        if found == file.size or (others and file.name == f"{keys.RESULTS}/{ROOT}"):
            whole.append(file)
            continue
        if others and file.name.startswith(OBS):
            continue
        how = "is missing" if found is None else f"is damaged (it has {found} bytes in place of {file.size})"
        yield DamagedError(f"{directory.url}/{file.name} {how}", f"{directory.url}/{file.name}")
    for damage in runtime.map(check_files, list(_batches(whole)), directory, others, title="check"):
        yield from damage


def _written_by_others(directory: RunDirectory, files: Sequence[MadeFile], sizes: Mapping[str, int]) -> bool:
    """Return whether another program wrote into obs, a column say, and left it readable and of the run's cells."""
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
    """Cut files into what one task reads; those of an array follow each other."""
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
    """Read some files of a run and return what is wrong with them; a task.

    Parameters
    ----------
    others
        Another program wrote into obs, which the root then need not tell of.
    """
    found = []
    opened: dict[tuple[str, str], zarr.Array[Any]] = {}
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
            found.append(error)
    return found


def _metadata(data: bytes, url: str) -> dict[str, Any]:
    """Return the metadata of an array or a group, which makes sense to zarr."""
    try:
        told = dict(json.loads(data))
        if told["node_type"] == "array":
            opened_with(told, StorePath(MemoryStore()))
    except Exception as error:
        raise DamagedError.of(url, error) from error
    return told


def _check_file(directory: RunDirectory, file: MadeFile, *, others: bool) -> None:
    """Look at a file that belongs to no array."""
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
    """Compare what the root of the results says of every array and group with what each says of itself."""
    nodes = ConsolidatedStorage(storage.url).nodes
    if others:
        nodes = {name: node for name, node in nodes.items() if name != "obs" and not name.startswith("obs/")}
    for name, data in storage.read_all([f"{name}/{ROOT}" for name in nodes]).items():
        own, told = _metadata(data, f"{storage.url}/{name}"), dict(nodes[name.removesuffix(f"/{ROOT}")])
        own.pop("consolidated_metadata", None), told.pop("consolidated_metadata", None)
        if own != told:
            raise DamagedError.of(url, f"it and {name} differ")
