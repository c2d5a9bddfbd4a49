"""Read columns of text as Arrow arrays, which need no Python object per row.

Input: a one-dimensional array of text in a zarr store or an HDF5 file. Output: its text, block by block. anndata writes
such a column of a zarr store as one chunk, however many rows it has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import VLenUTF8Codec

from ndreamer_dist.storage.shards import read_files, uncompressed

TEXT_BLOCK = 16_384
"""Rows that are read at a time; larger chunks are read whole."""
VLEN = "vlen-utf8"
LENGTH = struct.Struct("<I")


def joined(blocks: list[pa.Array]) -> pa.LargeStringArray:
    """Concatenate blocks of text; the list is emptied to free them."""
    made = pa.concat_arrays(blocks) if len(blocks) > 1 else (*blocks, pa.array([], pa.large_string()))[0]
    blocks.clear()
    return made


def text_blocks(element: Any) -> Iterator[pa.LargeStringArray]:
    """Yield the text of an array, block by block."""
    (rows,) = element.shape
    if not isinstance(element, zarr.Array):
        texts = element.asstr()
        for start in range(0, rows, TEXT_BLOCK):
            yield as_texts(texts[start : start + TEXT_BLOCK])
        return
    size = element.chunks[0]
    step = max(1, TEXT_BLOCK // size) * size
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        files = _files(element, start, stop) if _is_plain(element) else []
        if not files:  # sharded, encoded otherwise, or a chunk was not written: zarr reads it
            yield as_texts(element[start:stop])
            continue
        left = stop - start
        while files:
            for block in parse_texts(uncompressed(element, files.pop(0))):
                yield block[:left]
                left -= len(block[:left])


def as_texts(values: Any) -> pa.LargeStringArray:
    """Convert an array of text to Arrow."""
    return pa.array(np.asarray(values).astype(object), pa.large_string())


def _files(array: zarr.Array[Any], start: int, stop: int) -> list[bytes]:
    """Return the files of the chunks that hold the rows `start:stop`; an empty list if one of them does not exist."""
    size = array.chunks[0]
    keys = [array.metadata.encode_chunk_key((number,)) for number in range(start // size, -(-stop // size))]
    files = read_files(array.store, str(array.store), [f"{array.path}/{key}".lstrip("/") for key in keys])
    found = [file for file in files if file is not None]
    return found if len(found) == len(files) else []


def _is_plain(array: zarr.Array[Any]) -> bool:
    """Return whether every chunk is a file of its own that holds text in zarr's vlen-utf8 encoding."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        return [codec.codec_id for codec in metadata.filters or ()] == [VLEN]
    return isinstance(metadata.codecs[0], VLenUTF8Codec)


def parse_texts(data: np.ndarray) -> Iterator[pa.LargeStringArray]:
    """Yield the texts of a vlen-utf8 chunk in blocks: the chunk holds their number, then length and bytes of each.

    Raises
    ------
    ValueError, struct.error
        The lengths do not fit the chunk, or the bytes are not UTF-8.
    """
    memory: Any = data
    (count,), place = LENGTH.unpack_from(memory, 0), LENGTH.size
    for start in range(0, count, TEXT_BLOCK):
        lengths = np.empty(min(TEXT_BLOCK, count - start), dtype=np.int64)
        first = place
        for number in range(len(lengths)):
            (length,) = LENGTH.unpack_from(memory, place)
            lengths[number] = length
            place += LENGTH.size + length
        yield _block(data[first:place], lengths)
    if place != len(data):
        msg = f"the texts of a chunk end at byte {place} of {len(data)}"
        raise ValueError(msg)


def _block(data: np.ndarray, lengths: np.ndarray) -> pa.LargeStringArray:
    """Return the texts of a block as Arrow.

    Parameters
    ----------
    data
        (bytes,) uint8, the block's part of the chunk: every text follows its length.
    lengths
        (texts,) int64 lengths in bytes.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.ones(len(data), dtype=bool)
    for byte in range(LENGTH.size):
        inside[offsets[:-1] + LENGTH.size * np.arange(len(lengths)) + byte] = False
    made = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(offsets), pa.py_buffer(data[inside]))
    made.validate(full=True)
    return made
