"""The file of an adapter's weights: safetensors, its header checked before anything is allocated.

It is read into memory rather than mapped: a process dies of a mapped file that shrinks.
"""

from __future__ import annotations

import math
import os
import struct
from io import BufferedReader
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.config import json_object
from fastlora.adapters.errors import Refusal, shown

_HEADER_BYTES, _HEADER_BYTES_PER_LINEAR = 1 << 20, 1 << 10  # two entries of about 150 each
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """A tensor as the header describes it; dtype is torch's word."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


def read_header(file: BufferedReader, linears: int) -> dict[str, Entry]:
    """Read which tensors a safetensors file has.

    https://huggingface.co/docs/safetensors: the length of the header in 8 bytes, the header in
    JSON, then the tensors without gaps.
    """
    size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
    if len(prefix) < 8:
        raise Refusal(f"it is cut off or not safetensors: it has {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    limit = _HEADER_BYTES + _HEADER_BYTES_PER_LINEAR * linears
    if length > min(size - 8, limit):
        raise Refusal(
            f"it is cut off or not safetensors: it has {size} bytes, and its header would have "
            f"{length}, of at most {limit} that are allowed"
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise Refusal(f"it is not safetensors: its header begins with {shown(text[:8])}")
    values = json_object(text)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refusal(f"its __metadata__ is {shown(metadata)}, not an object of strings")
    entries = {key: _entry(key, value) for key, value in values.items()}
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != end:
            raise Refusal(
                f"tensor {shown(key)} begins at byte {entry.begin} of the data, where the one "
                f"before it ends at {end}"
            )
        end = entry.end
    if end != size - 8 - length:
        raise Refusal(
            f"it is cut off or too long: its tensors take {end} bytes, and {size - 8 - length} "
            "follow the header"
        )
    return entries


def _entry(key: str, value: object) -> Entry:
    """Check what the header says of one tensor by itself."""
    said = f"tensor {shown(key)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"{said}: dtype, shape and data_offsets are needed, not {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        # A product of many large numbers takes minutes.
        few = isinstance(numbers, list) and len(numbers) <= 8
        if not few or not all(type(number) is int and number >= 0 for number in numbers):
            raise Refusal(f"{said}: {name} is {shown(numbers)}, not a short list of integers")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refusal(f"{said} is {shown(dtype)}, only {', '.join(DTYPES)} are supported")
    taken = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != taken:
        raise Refusal(
            f"{said}: {shown(shape)} in {dtype} takes {taken} bytes, but its data_offsets are "
            f"{shown(offsets)}"
        )
    return Entry(str(DTYPES[dtype]), tuple(shape), *offsets)


def read_data(file: BufferedReader, size: int) -> bytearray:
    """Read what follows the header: as much as the shapes, which were checked, take."""
    data = bytearray(size)
    read = file.readinto(data)
    if read != size:
        raise Refusal(f"it is cut off: {read} of {size} bytes of its tensors are there")
    return data


def view_of(data: bytearray, entry: Entry) -> Tensor:
    """Return a tensor of what was read, without a copy where it lies aligned."""
    dtype = next(each for each in DTYPES.values() if str(each) == entry.dtype)
    values = torch.frombuffer(data, dtype=torch.uint8)[entry.begin : entry.end]
    if entry.begin % dtype.itemsize:  # the format asks for no alignment
        values = values.clone()
    return values.view(dtype).view(entry.shape)
