"""Weights by name, streamed from safetensors or made up. Never a second copy of all of them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import ModelError
from halyard.hal.types import DType, WeightInfo
from halyard.models.source import ModelSource
from halyard.models.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_checkpoint", "load_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


def load_weights(
    source: ModelSource | None,
    spec: ModelSpec,
    wanted: Mapping[str, WeightInfo],
    dtype: DType,
    *,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """All tensors of `wanted`, in its shapes and dtypes; they belong to the caller.

    Args:
        load_format: "auto" reads safetensors; "dummy" makes random weights, the same for a seed.

    Raises:
        ModelError: a file is missing, cut short or corrupt, or lacks a tensor; one line names it.
    """
    if load_format == "dummy" or source is None:
        return _random_weights(wanted, seed, progress)
    headers = check_checkpoint(source)
    shapes = {name: (file, shape) for file, header in headers.items() for name, shape in header}
    if all(name in shapes and shapes[name][1] == info.shape for name, info in wanted.items()):
        return _stream(wanted, {name: file for name, (file, _) in shapes.items()}, progress)
    return _convert(source, spec, wanted, dtype)


def check_checkpoint(source: ModelSource) -> dict[Path, list[tuple[str, tuple[int, ...]]]]:
    """Check that all files are there and whole, from their headers alone.

    Returns:
        The (name, shape) of every tensor of every file.
    """
    headers = {}
    for file in _files(source):
        headers[file] = _header(file)
    return headers


def _files(source: ModelSource) -> list[Path]:
    folder = source.path
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is corrupt ({error}): download it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
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


def _header(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, after checking that the file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ModelError(f"{file} is not a safetensors file or is cut short: download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            tensors = {name: item for name, item in header.items() if name != "__metadata__"}
            end = max((item["data_offsets"][1] for item in tensors.values()), default=0)
            found = [(name, tuple(item["shape"])) for name, item in tensors.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} has a corrupt header: download it again") from error
    if size != 8 + length + end:
        raise ModelError(
            f"{file} has {size} bytes where its header asks for {8 + length + end}: "
            "it is cut short or damaged, download it again"
        )
    return found


def _bar(names: Iterable[str], progress: bool, what: str) -> tqdm[str]:
    return tqdm(
        list(names),
        desc=what,
        unit="tensor",
        dynamic_ncols=True,
        disable=not (progress and sys.stderr.isatty()),
    )


def _stream(
    wanted: Mapping[str, WeightInfo], files: Mapping[str, Path], progress: bool
) -> dict[str, Tensor]:
    """Read tensor by tensor, casting on the way."""
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    order = sorted(wanted, key=lambda name: str(files[name]))
    opened: dict[Path, Any] = {}
    for name in _bar(order, progress, "Loading weights"):
        file = files[name]
        try:
            if file not in opened:
                opened = {file: safe_open(file, framework="pt")}  # drops the one before
            stored = opened[file].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged at {name} ({error}): download it again") from error
        # Copied even if the dtype is right: what is mapped to the file would change with the file.
        weights[name] = torch.empty(stored.shape, dtype=torch_dtype(wanted[name].dtype)).copy_(
            stored
        )
    return weights


def _convert(
    source: ModelSource, spec: ModelSpec, wanted: Mapping[str, WeightInfo], dtype: DType
) -> dict[str, Tensor]:
    """Let transformers load: its checkpoint conversions (merged experts, renamed keys) apply."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=torch_dtype(dtype),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"can't load the weights of {source.name}: {reason}") from error
    model, info = loaded
    problems = [
        *(f"{name} is missing" for name in sorted(info["missing_keys"])),
        *(f"{item[0]} has another shape" for item in sorted(map(tuple, info["mismatched_keys"]))),
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"the checkpoint of {source.name} doesn't fit its config: "
            f"{', '.join(problems[:3])}{more}"
        )
    held = dict(model.named_parameters(remove_duplicate=False))
    held |= dict(model.named_buffers(remove_duplicate=False))
    weights = {}
    for name, want in wanted.items():
        weights[name] = held[name].detach().to(torch_dtype(want.dtype))
    return weights


def _random_weights(
    wanted: Mapping[str, WeightInfo], seed: int, progress: bool
) -> dict[str, Tensor]:
    """Random weights that keep activations near one: matrices scaled by their fan-in, norms at one.

    One block of normal numbers is drawn and cut up, since drawing billions takes minutes.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 22, generator=generator)
    weights: dict[str, Tensor] = {}
    for name in _bar(sorted(wanted), progress, "Making random weights"):
        info = wanted[name]
        dtype = torch_dtype(info.dtype)
        if len(info.shape) < 2:
            one = 0.0 if name.endswith("bias") else 1.0
            weights[name] = torch.full(info.shape, one, dtype=dtype)
            continue
        tensor = torch.empty(info.shape, dtype=dtype)
        scaled = (pool * info.shape[-1] ** -0.5).to(dtype)
        flat = tensor.view(-1)
        shift = int(torch.randint(0, pool.numel(), (1,), generator=generator))
        for start in range(0, flat.numel(), pool.numel()):
            piece = flat[start : start + pool.numel()]
            piece.copy_(scaled.roll(shift)[: piece.numel()])
            shift = (shift * 31 + 17) % pool.numel()
        weights[name] = tensor
    return weights
