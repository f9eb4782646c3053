"""A tiny model's program, by any graph compiler."""

from __future__ import annotations

from tiny_models import tiny_model

from halyard.compiler.build import build_program
from halyard.compiler.program import HeadShape, UnboundProgram
from halyard.hal.contract import GraphCompiler
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.dtypes import DType
from halyard.models.adapter import build_meta_module
from halyard.models.spec import ModelSpec

__all__ = ["build_tiny"]


def build_tiny(family: str, compiler: GraphCompiler, dtype: DType = "float32") -> UnboundProgram:
    """Traced, cut and compiled for this machine's CPU; weights are bound to it later."""
    spec, device = ModelSpec.from_hf(tiny_model(family).config), CpuDevice()
    traceable = build_meta_module(spec, dtype)
    return build_program(
        traceable,
        traceable.buffers_by_name,
        compiler,
        device.info,
        name=family,
        windows=spec.windows,
        heads=HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim),
        vocab_size=spec.vocab_size,
        dtype=dtype,
        torch_device=device.torch_device,
    )
