"""Weights by name, streamed from safetensors or made up. Never a second copy of all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from halyard.hal.dtypes import torch_dtype
from halyard.hal.errors import ModelError
from halyard.hal.types import DType, WeightInfo
from halyard.models.headers import (
    StoredTensor,
    find_packed,
    read_header,
    unpacked_shapes,
    weight_files,
)
from halyard.models.source import ModelSource
from halyard.models.spec import ModelSpec
from halyard.models.unpack import unpack_fp8, unpack_mxfp4

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["load_weights"]

_STAGE = 16 << 20  # elements that are read at once when the dtype changes
_POOL = 1 << 22  # random numbers that are drawn
_PACKED = {"F8_E4M3": torch.float8_e4m3fn}  # need scales, and are no weights by themselves
_STORED = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_weights(
    source: ModelSource | None,
    spec: ModelSpec,
    wanted: Mapping[str, WeightInfo],
    dtype: DType,
    *,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = False,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """All tensors of `wanted`, in its shapes and dtypes; they belong to the caller.

    Args:
        load_format: "auto" reads safetensors; "dummy" makes random weights, the same for a seed.
        device: where they go, one by one as they are read; None: the host.

    Raises:
        ModelError: a file is missing, cut short or corrupt, or lacks a tensor; one line names it.
    """
    if load_format == "dummy" or source is None:
        return _random_weights(wanted, seed, progress, device)
    headers = {file: read_header(file) for file in weight_files(source)}
    shapes = unpacked_shapes(_all(headers))
    if all(shapes.get(name) == info.shape for name, info in wanted.items()):
        return _stream(wanted, headers, progress, device)
    converted = _convert(source, spec, wanted, dtype, _unpacked(headers, dtype, progress))
    return {name: tensor.to(device or "cpu") for name, tensor in converted.items()}


def _all(headers: Mapping[Path, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    return {name: item for header in headers.values() for name, item in header.items()}


def _bar(names: Iterable[str], progress: bool, what: str) -> tqdm[str]:
    return tqdm(
        list(names),
        desc=what,
        unit="tensor",
        dynamic_ncols=True,
        disable=not (progress and sys.stderr.isatty()),
    )


def _stream(
    wanted: Mapping[str, WeightInfo],
    headers: Mapping[Path, dict[str, StoredTensor]],
    progress: bool,
    device: torch.device | None,
) -> dict[str, Tensor]:
    """Read tensor by tensor into its own memory, casting on the way.

    The files aren't mapped: mapped pages count as the process's memory until the file is closed,
    which doubles the peak for a checkpoint in one file.
    """
    weights: dict[str, Tensor] = {}
    places = {name: file for file, header in headers.items() for name in header}
    packed = find_packed(_all(headers))

    def place(name: str) -> tuple[Path, int]:
        held = packed[name].values if name in packed else name
        return places[held], headers[places[held]][held].start

    with ExitStack() as stack:
        streams: dict[Path, BinaryIO] = {}

        def read(name: str, dtype: torch.dtype | None) -> Tensor:
            file = places[name]
            if file not in streams:
                streams[file] = stack.enter_context(file.open("rb", buffering=0))
            found = _read(streams[file], file, name, headers[file][name], dtype)
            return found.to(device or "cpu")

        for name in _bar(sorted(wanted, key=place), progress, "Loading weights"):
            dtype, parts = torch_dtype(wanted[name].dtype), packed.get(name)
            if parts is None:
                weights[name] = read(name, dtype)
                continue
            unpack = unpack_mxfp4 if parts.form == "mxfp4" else unpack_fp8
            weights[name] = unpack(read(parts.values, None), read(parts.scales, None), dtype)
    return weights


def _read(
    stream: BinaryIO, file: Path, name: str, stored: StoredTensor, dtype: torch.dtype | None
) -> Tensor:
    """In `dtype`; None: as it is stored, 8-bit floats too, which need scales."""
    source_dtype = _STORED.get(stored.dtype)
    if dtype is None:
        source_dtype = dtype = _PACKED.get(stored.dtype, source_dtype)
    if source_dtype is None or dtype is None:
        raise ModelError(
            f"{file} holds {name} as {stored.dtype}: quantised checkpoints can't be served yet, "
            "use the unquantised one"
        )
    tensor = torch.empty(stored.shape, dtype=dtype)
    flat = tensor.view(-1)
    if stored.end - stored.start != flat.numel() * source_dtype.itemsize:
        raise ModelError(f"{file} has a corrupt header at {name}: download it again")
    stream.seek(stored.start)
    if source_dtype == dtype:
        _fill(stream, file, flat)
        return tensor
    stage = torch.empty(min(_STAGE, flat.numel()), dtype=source_dtype)
    for start in range(0, flat.numel(), _STAGE):
        piece = stage[: flat.numel() - start]
        _fill(stream, file, piece)
        flat[start : start + piece.numel()].copy_(piece)
    return tensor


def _fill(stream: BinaryIO, file: Path, flat: Tensor) -> None:
    """Read a contiguous one-dimensional tensor's bytes, in as many reads as the system wants."""
    view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(f"{file} ended while it was read: download it again")
        view = view[count:]


def _unpacked(
    headers: Mapping[Path, dict[str, StoredTensor]], dtype: DType, progress: bool
) -> dict[str, Tensor] | None:
    """All tensors of a packed checkpoint by their names there, in `dtype` what was packed; None: nothing is."""
    stored = _all(headers)
    if not find_packed(stored):
        return None
    kept: dict[str, DType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    everything = {
        name: WeightInfo(shape, kept.get(stored[name].dtype, dtype) if name in stored else dtype)
        for name, shape in unpacked_shapes(stored).items()
    }
    return _stream(everything, headers, progress, None)


def _convert(
    source: ModelSource,
    spec: ModelSpec,
    wanted: Mapping[str, WeightInfo],
    dtype: DType,
    unpacked: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Let transformers load: its checkpoint conversions (merged experts, renamed keys) apply.

    `unpacked` is what its files hold, where transformers would compute with the packed numbers. These
    are twice in memory while it works.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_class: Any = AutoModelForCausalLM
    given: dict[str, Any] = {"pretrained_model_name_or_path": source.path}
    try:
        if unpacked is not None:  # a class that is told which needs no folder
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(spec.config)]
            given = {
                "pretrained_model_name_or_path": None,
                "config": spec.config,
                "state_dict": unpacked,
            }
        loaded: Any = model_class.from_pretrained(
            **given,
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
    wanted: Mapping[str, WeightInfo],
    seed: int,
    progress: bool,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Random weights that keep activations near one: matrices scaled by their fan-in, norms at one.

    One block of normal numbers is drawn and cut up, since drawing billions takes minutes.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_POOL, generator=generator).to(device or "cpu")
    pools: dict[torch.dtype, Tensor] = {}  # twice the numbers, so that any start has _POOL after it
    weights: dict[str, Tensor] = {}
    for name in _bar(sorted(wanted), progress, "Making random weights"):
        info = wanted[name]
        dtype = torch_dtype(info.dtype)
        if len(info.shape) < 2:
            one = 0.0 if name.endswith("bias") else 1.0
            weights[name] = torch.full(info.shape, one, dtype=dtype, device=device)
            continue
        if dtype not in pools:
            pools[dtype] = torch.cat([drawn, drawn]).to(dtype)
        tensor = torch.empty(info.shape, dtype=dtype, device=device)
        flat = tensor.view(-1)
        shift = int(torch.randint(0, _POOL, (1,), generator=generator))
        for start in range(0, flat.numel(), _POOL):
            piece = flat[start : start + _POOL]
            torch.mul(
                pools[dtype][shift : shift + piece.numel()], info.shape[-1] ** -0.5, out=piece
            )
            shift = (shift * 31 + 17) % _POOL
        weights[name] = tensor
    return weights
