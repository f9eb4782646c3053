"""Ahead-of-time compiles for GPUs that aren't here, held against what each of them has.

Triton's compiler and both assemblers are in its wheel, so a machine without any GPU can tell that a
kernel builds, fits in shared memory, doesn't spill and uses the matrix units. It can't tell that a
kernel computes the right thing: that is what the interpreter and real runs are for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halyard.hal.kernels.triton.launch import Shape, pad
from halyard.hal.kernels.triton.skinny import MAX_ROWS, choose_plan
from halyard.hal.kernels.triton.tiles import (
    SHARED_LIMITS,
    after_tile,
    decode_tile,
    family,
    hopper_shared_tile,
    hopper_tile,
    hopper_wide_shared_tile,
    prefill_tile,
    shared_room,
    shared_tile,
    wide_tile,
)
from halyard.hal.types import ITEM_SIZE, DType, SharedRows

__all__ = ["HEAD_DIMS", "KERNELS", "TARGETS", "CompileReport", "Variant", "compile_variant",
           "variants"]  # fmt: skip

KernelName = Literal["decode", "decode_split", "decode_features", "merge", "prefill",
                     "prefill_features", "write", "move", "draw", "draw_greedy", "change", "decode_shared",
                     "decode_after", "shared", "few_rows", "rows", "gate", "rotate", "prefill_hopper",
                     "wide_hopper", "shared_hopper", "wide_shared_hopper", "gated_hopper",
                     "sort_pairs", "experts_few", "experts_many", "largest"]  # fmt: skip
KERNELS: tuple[KernelName, ...] = (
    "decode", "decode_split", "decode_features", "merge", "prefill", "prefill_features", "write",
    "move", "draw", "draw_greedy", "change", "decode_shared", "decode_after", "shared", "few_rows", "rows",
    "gate", "rotate", "prefill_hopper", "wide_hopper", "shared_hopper", "wide_shared_hopper", "gated_hopper",
    "sort_pairs", "experts_few", "experts_many", "largest",
)  # fmt: skip
HEAD_DIMS = (64, 80, 128, 256)

# Triton's backend, its name for the architecture, threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "gfx1201": ("hip", "gfx1201", 32),
}

_SHORT: dict[str, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_MATRIX = re.compile(r"\b(wgmma|tcgen05|mma|v_s?w?mma|v_s?mfma)[._]\w[\w.]*")
_STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "cos_token", "sin_token", "source_layer",
            "source_block", "target_layer", "target_block", "row_stride", "x_row", "w_row", "num_inputs", "num_outputs",
            "split_inputs", "piece", "vocab", "inputs", "outputs", "w_expert", "w_output")  # fmt: skip
# Of a draw or a linear nothing depends on a head's dim.
_ONE_DIM = ("move", "draw", "draw_greedy", "change", "few_rows", "rows", "gate", "gated_hopper", "sort_pairs",
            "experts_few", "experts_many", "largest")  # fmt: skip
# Hopper alone, and whose heads they take.
_GLUON: dict[str, Callable[[int], object]] = {
    "prefill_hopper": hopper_tile, "wide_hopper": wide_tile, "shared_hopper": hopper_tile,
    "wide_shared_hopper": wide_tile, "gated_hopper": hopper_tile,
}  # fmt: skip
_SHARING = ("decode_shared", "decode_after", "shared")  # where a program has room for them
# 4-byte registers a thread may put into scratch memory; others: none. RDNA 3 has 256 registers a
# thread, and a head of 256 does not fit beside its sums. fp32 (any number) runs without matrix units
# and keeps its operands in registers: it is there for exactness, not for speed.
# Triton 3.6 leaves rows that go on from shared keys one too few.
_SPILLS_ALLOWED: dict[tuple[str, int], int] = {
    ("gfx1100", 256): 64,
    ("gfx1100", 128): 1,
    ("gfx1100", 80): 1,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel for one target; 8 kv heads of 4 query heads, blocks of 16 tokens."""

    kernel: KernelName
    target: str
    dtype: DType
    head_dim: int

    def __str__(self) -> str:
        return f"{self.target} {self.kernel} {self.dtype} d{self.head_dim}"


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What the compiler made of a variant."""

    variant: Variant
    tile: str  # "128x64, 8 warps, 3 stages"
    shared: int  # bytes of shared memory (LDS)
    shared_limit: int
    registers: int  # a thread
    spills: int  # 4-byte registers a thread
    matrix: dict[str, int]  # matrix instructions and how often each is there
    waits: int = 0  # instructions that wait for asynchronous ones of these

    def problems(self) -> list[str]:
        """Everything that is wrong with it; empty if it may ship."""
        found = []
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, {self.shared_limit} are there")
        allowed = _SPILLS_ALLOWED.get((self.variant.target, self.variant.head_dim), 0)
        if self.variant.dtype != "float32" and self.spills > allowed:
            found.append(f"{self.spills} registers spilled")
        dots = self.variant.kernel.startswith(
            ("decode", "prefill", "shared", "rows", "gated", "wide", "experts")
        )
        if dots and self.variant.dtype != "float32" and not self.matrix:
            found.append("no matrix instructions")
        if self.waits >= sum(self.matrix.values()) > 1:  # ptxas gave each a wait of its own
            found.append(f"{self.waits} waits for {self.matrix}: none runs beside anything")
        return found


def variants(
    targets: tuple[str, ...] = tuple(TARGETS),
    kernels: tuple[KernelName, ...] = KERNELS,
    dtypes: tuple[DType, ...] = ("bfloat16", "float16", "float32"),
    head_dims: tuple[int, ...] = HEAD_DIMS,
) -> Iterator[Variant]:
    """Every combination; moves copy words and have one dtype and dim, draws and linears one dim."""
    for target in targets:
        for kernel in kernels:
            if kernel == "move":
                yield Variant(kernel, target, dtypes[0], head_dims[0])
                continue
            if kernel in _GLUON:
                if family(target) == "sm_90":
                    dims = [dim for dim in head_dims if _GLUON[kernel](dim) is not None]
                    for dtype in (dtype for dtype in dtypes if ITEM_SIZE[dtype] == 2):
                        for dim in head_dims[:1] if kernel in _ONE_DIM else dims:
                            yield Variant(kernel, target, dtype, dim)
                continue
            for dtype in dtypes:
                for dim in head_dims[:1] if kernel in _ONE_DIM else head_dims:
                    if kernel not in _SHARING or 4 * SharedRows.WIDTH * pad(dim) <= shared_room(
                        target
                    ):
                        yield Variant(kernel, target, dtype, dim)


def compile_variant(
    variant: Variant, *, block_size: int = 16, **tile_changes: int
) -> CompileReport:
    """Compile it and read the result.

    Args:
        block_size: tokens of a block.
        tile_changes: block_n, num_warps, ... other than the tables' (to try them).

    Raises:
        whatever Triton raises when it can't compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function, constants, options, tile = _source(variant, block_size, tile_changes)
    signature = {
        name: "constexpr" if name in constants else _type(name, variant)
        for name in function.arg_names
    }
    if variant.kernel in ("gated_hopper", "wide_hopper", "wide_shared_hopper"):
        signature |= _boxes(variant)
    aligned = [["tt.divisibility", 16]]
    attrs = {
        (index,): aligned
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in _STRIDES
    }
    source = GluonASTSource if variant.kernel in _GLUON else ASTSource
    compiled = triton.compile(
        source(fn=function, signature=signature, constexprs=constants, attrs=attrs),
        target=GPUTarget(*TARGETS[variant.target]),
        options=options,
    )
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    names = [match[0].rstrip(".") for match in _MATRIX.finditer(text)]
    registers, spills = _registers(compiled.asm)
    waits = _disassembled(compiled.asm, "-sass").count("WARPGROUP.DEPBAR") if "wgmma" in text else 0
    return CompileReport(
        variant,
        tile,
        compiled.metadata.shared,
        SHARED_LIMITS[family(variant.target)],
        registers,
        spills,
        {name: names.count(name) for name in dict.fromkeys(names)},
        waits,
    )


def _source(
    variant: Variant, block_size: int, changes: dict[str, int]
) -> tuple[Any, dict[str, Any], dict[str, int], str]:
    """The function, its constants, the compiler's options, and the tile in words."""
    from dataclasses import replace

    from halyard.hal.kernels.triton import (
        change,
        decode,
        draw,
        experts,
        experts_kernel,
        gate,
        gated,
        largest_kernel,
        linear,
        moves,
        prefill,
        rotary,
        rotary_kernel,
        shared,
        write,
    )  # fmt: skip

    features = variant.kernel.endswith("features")
    item_size = ITEM_SIZE[variant.dtype]
    shape = Shape(32, 8, variant.head_dim, block_size, item_size, features, features, features)
    early = TARGETS[variant.target][0] == "cuda" and variant.target != "sm_80"
    if variant.kernel == "merge":
        constants: dict[str, Any] = {
            "HEADS": 32, "HEAD_DIM": variant.head_dim, "DIM_PAD": shape.dim_pad, "SPLITS_PAD": 64,
            "SINKS": True, "EARLY": early,
        }  # fmt: skip
        return decode.merge_kernel, constants, {"num_warps": 4}, "64 splits"
    if variant.kernel == "write":
        constants = {
            "KV_HEADS": 8, "HEAD_DIM": variant.head_dim, "DIM_PAD": shape.dim_pad, "BLOCK_SIZE": 16,
            "HEADS_TILE": 8,
        }  # fmt: skip
        return write.kv_write_kernel, constants, {"num_warps": 4}, "8 heads"
    if variant.kernel == "move":
        constants = {"WORDS": 8192, "CHUNK": moves.CHUNK_WORDS}
        return moves.move_blocks_kernel, constants, {"num_warps": 4}, f"{moves.CHUNK_WORDS} words"
    if variant.kernel == "draw_greedy":
        constants = {"GATHER": True, "SIZE": draw.CHUNK, "PIECES": 32, "PIECES_PAD": 32}
        return draw.draw_greedy_kernel, constants, {"num_warps": 8}, f"{draw.CHUNK} tokens"
    if variant.kernel == "draw":
        size = draw.FEW_ROWS_RANDOM_CHUNK
        constants = {"GATHER": True, "SIZE": size, "MOST": draw.CANDIDATES}
        return draw.draw_kernel, constants, {"num_warps": 16}, f"{size} tokens"
    if variant.kernel == "change":
        return (
            change.change_kernel,
            {"SIZE": change.CHUNK},
            {"num_warps": 8},
            f"{change.CHUNK} tokens",
        )
    if variant.kernel in ("few_rows", "rows"):
        rows = 2 if variant.kernel == "few_rows" else MAX_ROWS
        plan = choose_plan(rows, 2048, 8192, 132, item_size, variant.target)
        if plan is None:
            raise AssertionError(f"no plan for {variant}")
        constants = {
            "ROWS": rows, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "EVEN": True,
            "BIAS": True, "RESIDUAL": True,
        }  # fmt: skip
        if variant.kernel == "rows":
            constants["SPLITS"] = plan.splits
            options = {"num_warps": plan.num_warps, "num_stages": plan.stages}
            return linear.rows_kernel, constants, options, str(plan)
        constants |= {"STAGES": plan.stages, "NORM": True, "GATED": True}
        return linear.few_rows_kernel, constants, {"num_warps": plan.num_warps}, str(plan)
    if variant.kernel == "sort_pairs":
        constants = {"EXPERTS": 128, "BINS": 256, "BLOCK": 4096, "BLOCK_M": 128}
        return experts_kernel.sort_pairs_kernel, constants, {"num_warps": 8}, "4096 pairs"
    if variant.kernel.startswith("experts"):  # the first product: the second one has less in it
        pairs = 128 if variant.kernel == "experts_few" else 1 << 16
        piece = experts.choose_tile(pairs, 128, item_size, variant.target)
        constants = {
            "CHOICES": 8, "EVEN": True, "WHOLE": True, "TRANSPOSED": False, "INTERLEAVED": False,
            "BIAS": True, "ACTIVATION": "silu", "CLAMPED": False, "WEIGHTED": True, "w_input": 1,
            "BLOCK_M": piece.block_m, "BLOCK_N": piece.block_n, "BLOCK_K": piece.block_k,
            "GROUP_M": piece.group_m,
        }  # fmt: skip
        options = {"num_warps": piece.num_warps, "num_stages": piece.num_stages}
        return experts_kernel.experts_kernel, constants, options, str(piece)
    if variant.kernel == "largest":
        constants = {"COLUMNS": 128, "PAD": 128, "MOST": 8, "ROWS": 8}
        return largest_kernel.largest_kernel, constants, {"num_warps": 4}, "8 of 128"
    if variant.kernel == "gate":
        return gate.gate_kernel, {"BLOCK": 1024, "GELU": True}, {"num_warps": 4}, "1024 columns"
    if variant.kernel == "rotate":
        heads = rotary.rotary_tile(32, 8, variant.head_dim)
        options = {"num_warps": heads.num_warps}
        constants = heads.constants(32, 8, variant.head_dim)
        return rotary_kernel.rotate_kernel, constants, options, str(heads)
    if variant.kernel == "gated_hopper":
        from halyard.hal.kernels.triton import hopper_linear

        constants = {
            "BLOCK_M": gated.BLOCK_M, "BLOCK_N": gated.BLOCK_N, "BLOCK_K": gated.BLOCK_K,
            "STAGES": gated.STAGES, "GROUP_M": gated.GROUP_M, "GELU": True,
        }  # fmt: skip
        options = {"num_warps": gated.WARPS, "maxnreg": gated.REGISTERS}
        words = f"{gated.BLOCK_M}x2x{gated.BLOCK_N}, {gated.WARPS} warps, {gated.STAGES} stages"
        return hopper_linear.gated_product_kernel, constants, options, words
    if variant.kernel == "shared":
        tile = shared_tile(variant.target, shape.dim_pad, item_size, shape.group)
        constants = shape.shared_constants(tile) | {"EARLY": early}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return shared.shared_decode_kernel, constants, options, "shared keys"
    if variant.kernel == "prefill_hopper":
        from halyard.hal.kernels.triton import hopper

        own = hopper_tile(variant.head_dim)
        if own is None:
            raise AssertionError(f"no tile for {variant}")
        tile = replace(own, **changes)
        words = f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
        constants = shape.hopper_constants(tile) | {"SKIP_SINGLE": True}
        return hopper.hopper_prefill_kernel, constants, {"num_warps": tile.num_warps}, words
    if variant.kernel == "wide_hopper":
        from halyard.hal.kernels.triton import hopper_wide

        wide = wide_tile(variant.head_dim)
        if wide is None:
            raise AssertionError(f"no tile for {variant}")
        constants = shape.wide_constants(wide) | {"SKIP_SINGLE": True}
        options = {"num_warps": wide.num_warps, "maxnreg": wide.most_registers}
        words = f"{wide.parts}x{wide.block_m}x{wide.block_n}, {wide.num_stages} stages"
        return hopper_wide.hopper_wide_kernel, constants, options, words
    if variant.kernel == "shared_hopper":
        from halyard.hal.kernels.triton import hopper_shared

        own = hopper_shared_tile(variant.head_dim, SharedRows.WIDTH * shape.group)
        if own is None:
            raise AssertionError(f"no tile for {variant}")
        tile = replace(own, **changes)
        words = f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
        constants = shape.hopper_shared_constants(tile)
        return hopper_shared.hopper_shared_kernel, constants, {"num_warps": tile.num_warps}, words
    if variant.kernel == "wide_shared_hopper":
        from halyard.hal.kernels.triton import hopper_wide_shared

        wide = hopper_wide_shared_tile(variant.head_dim, SharedRows.WIDTH * shape.group)
        if wide is None:
            raise AssertionError(f"no tile for {variant}")
        constants = shape.wide_shared_constants(wide)
        options = {"num_warps": wide.num_warps, "maxnreg": wide.most_registers}
        words = f"{wide.parts}x{wide.block_m}x{wide.block_n}, {wide.num_stages} stages"
        return hopper_wide_shared.hopper_wide_shared_kernel, constants, options, words
    if variant.kernel.startswith("decode"):
        function: Any = decode.paged_decode_kernel
        choose = after_tile if variant.kernel == "decode_after" else decode_tile
        tile = choose(variant.target, shape.dim_pad, item_size, shape.group)
        extra = {
            "SPLIT": variant.kernel in ("decode_split", "decode_shared"),
            "SHARED": variant.kernel in ("decode_shared", "decode_after"),
            "EARLY": early,
            "BESIDE": early and variant.kernel.endswith(("split", "features")),
        }
    else:
        function = prefill.paged_prefill_kernel
        tile = prefill_tile(variant.target, shape.dim_pad, item_size)
        extra = {"SKIP_SINGLE": features, "EARLY": early}
    tile = replace(tile, **changes)
    words = f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return function, shape.constants(tile) | extra, options, words


def _boxes(variant: Variant) -> dict[str, str]:
    """The types of the matrices that are copied in boxes."""
    from triton.experimental.gluon import language as gl

    from halyard.hal.kernels.triton import gated

    layout, kind = gl.NVMMASharedLayout(128, 16, 2), _SHORT[variant.dtype]
    if variant.kernel.startswith("wide"):
        return {"boxes": f"tensordesc<{kind}[16, 64],{layout!r}>"}
    shapes = {
        "x": [gated.BLOCK_M, gated.BLOCK_K],
        "w": [gated.BLOCK_N, gated.BLOCK_K],
        "out": [gated.BLOCK_M, gated.BLOCK_N],
    }
    return {name: f"tensordesc<{kind}{shape},{layout!r}>" for name, shape in shapes.items()}


def _type(name: str, variant: Variant) -> str:
    """Triton's type of an argument."""
    if name in ("q", "k", "v", "pool", "out", "x", "w", "y", "bias", "residual", "norm", "cos", "sin",
                "q_out", "k_out"):  # fmt: skip
        return f"*{_SHORT[variant.dtype]}"
    if name in ("partial", "partial_lse"):  # without splits the output stands in for them
        split = variant.kernel in (
            "decode_split", "decode_shared", "decode_after", "shared", "shared_hopper", "wide_shared_hopper",
            "merge", "rows",
        )  # fmt: skip
        return "*fp32" if split else f"*{_SHORT[variant.dtype]}"
    if name == "logits":
        return f"*{_SHORT[variant.dtype]}"
    if name in ("rows", "tokens", "codes") and variant.kernel != "gated_hopper":
        return "*i64"
    if name in ("bad", "seen"):
        return "*i8"
    if name in ("sinks", "columns", "changed", "penalties", "answered", "weights"):
        return "*fp32"
    if name in ("block_tables", "seq_lens", "query_start", "row_keys", "tile_rows", "tile_keys",
                "parts", "tickets", "allowed", "candidates", "order", "tile_expert"):  # fmt: skip
        return "*i32"
    if name in ("slot_mapping", "source", "target", "pairs", "slots", "masks", "ids", "places"):
        return "*i64"
    if name in ("qk_scale", "cap_scale", "eps", "alpha", "limit"):
        return "fp32"
    return "i32"


def _registers(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and spilled registers of a thread."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]

        def last(key: str) -> int:
            found = re.findall(rf"\.{key}:\s*(\d+)", text)
            return int(found[-1]) if found else 0

        return last("vgpr_count"), last("vgpr_spill_count")
    found = _disassembled(asm, "-res-usage")
    usage = {key: int(number) for key, number in re.findall(r"(\w+):(\d+)", found)}
    return usage.get("REG", 0), usage.get("LOCAL", 0) // 4


def _disassembled(asm: dict[str, Any], what: str) -> str:
    """What NVIDIA's tool in Triton's wheel says of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(asm["cubin"])
        command = [str(tool), what, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
