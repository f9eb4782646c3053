"""What a checkpoint's weight files hold, read from their headers alone. No torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from halyard.hal.errors import ModelError
from halyard.models.source import ModelSource

__all__ = ["Packed", "StoredTensor", "check_checkpoint", "find_packed", "read_header", "read_headers",
           "unpacked_shapes", "weight_files"]  # fmt: skip

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    start: int  # bytes from the start of the file
    end: int


class Packed(NamedTuple):
    """A weight in fewer bits, which is unpacked as it is read."""

    form: Literal["mxfp4", "fp8"]
    values: str  # names in the files
    scales: str
    shape: tuple[int, ...]  # unpacked


def find_packed(stored: Mapping[str, StoredTensor]) -> dict[str, Packed]:
    """Weights of all files of a checkpoint that are packed, by the name that each has unpacked.

    mxfp4 is gpt-oss': W_blocks [experts, out, groups, 16], two 4-bit floats a byte, and W_scales
    [experts, out, groups], powers of two, are W [experts, 32 * groups, out]. fp8 is a matrix of 8-bit
    floats, and W_scale_inv has a factor of each block of 128 x 128.
    """
    found: dict[str, Packed] = {}
    for name, item in stored.items():
        blocks, inverse = name.removesuffix("_blocks"), f"{name}_scale_inv"
        scales = f"{blocks}_scales"
        if blocks != name and scales in stored and item.dtype == "U8" and len(item.shape) == 4:
            experts, out, groups, half = item.shape
            shape = (experts, groups * 2 * half, out)
            found[blocks] = Packed("mxfp4", name, scales, shape)
        elif item.dtype == "F8_E4M3" and inverse in stored and len(item.shape) == 2:
            found[name] = Packed("fp8", name, inverse, item.shape)
    return found


def unpacked_shapes(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of a checkpoint, those that are packed as they are unpacked."""
    packed = find_packed(stored)
    parts = {part for one in packed.values() for part in (one.values, one.scales)}
    shapes = {name: item.shape for name, item in stored.items() if name not in parts}
    return shapes | {name: one.shape for name, one in packed.items()}


def read_headers(source: ModelSource) -> dict[str, StoredTensor]:
    """What all its files hold. Errors as check_checkpoint's."""
    return {name: item for file in weight_files(source) for name, item in read_header(file).items()}


def check_checkpoint(source: ModelSource) -> dict[Path, list[tuple[str, tuple[int, ...]]]]:
    """Check that all files are there and whole.

    Returns:
        The (name, shape) of every tensor of every file.
    """
    return {
        file: [(name, item.shape) for name, item in read_header(file).items()]
        for file in weight_files(source)
    }


def weight_files(source: ModelSource) -> list[Path]:
    """Its files.

    Raises:
        ModelError: one is missing, or there is none.
    """
    folder = source.path
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is corrupt ({error}): download it again") from error
        if missing:
            raise ModelError(
                f"{source.name} lacks {len(missing)} of {len(names)} weight files "
                f"({', '.join(missing[:3])}): download it again"
            )
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    others = sorted(folder.glob("*.safetensors"))
    if others:
        return others
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{source.name} has only .bin weights: convert them to safetensors "
            "(they can run code when loaded)"
        )
    raise ModelError(
        f"{source.name} has no *.safetensors weights (--load-format dummy makes random ones)"
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What the file holds by name, after checking that it is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ModelError(f"{file} is not a safetensors file or is cut short: download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            found = {
                name: StoredTensor(
                    tuple(item["shape"]),
                    str(item["dtype"]),
                    *(8 + length + offset for offset in item["data_offsets"]),
                )
                for name, item in header.items()
                if name != "__metadata__"
            }
            end = max((item.end for item in found.values()), default=8 + length)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} has a corrupt header: download it again") from error
    if size != end:
        raise ModelError(
            f"{file} has {size} bytes where its header asks for {end}: "
            "it is cut short or damaged, download it again"
        )
    return found
