"""Tile sizes by architecture family. No entry may need more shared memory than its architecture has.

`python ci/triton_targets.py` compiles every entry for its target and holds it against LIMITS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halyard.hal.errors import BackendUnavailableError

__all__ = [
    "SHARED_LIMITS",
    "Tile",
    "WideTile",
    "after_tile",
    "decode_tile",
    "family",
    "hopper_shared_tile",
    "hopper_tile",
    "hopper_wide_shared_tile",
    "prefill_tile",
    "shared_room",
    "shared_tile",
    "wide_tile",
]

_KIB = 1024

# Shared memory (LDS) one program may use, in bytes.
SHARED_LIMITS: dict[str, int] = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,  # also 8.9
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,  # also 10.3
    "sm_120": 99 * _KIB,
    "gfx90a": 64 * _KIB,
    "gfx942": 64 * _KIB,
    "gfx950": 160 * _KIB,
    "gfx11": 64 * _KIB,
    "gfx12": 64 * _KIB,
    "interpreter": 1 << 40,  # the host's memory: any tile will do
}


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's shape: M query rows (tokens x heads of a group) by N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class WideTile:
    """Of Hopper's kernels whose warpgroups, of 64 query rows each, share tiles of N keys."""

    parts: int
    block_n: int
    num_stages: int
    registers: int  # of a thread of each part but the first
    most_registers: int  # of a thread at the start

    block_m = 64
    num_warps = 4  # of the first part; the others come with the kernel


# By bytes of one padded head (padded head dim x element size), the largest that a row is for.
_Table = dict[int, Tile]

# Decode is bound by memory: what counts is whole tiles in flight, two programs a multiprocessor.
_DECODE_LARGE: _Table = {
    64: Tile(16, 128, 4, 4),
    128: Tile(16, 128, 4, 3),
    256: Tile(16, 64, 4, 3),
    512: Tile(16, 32, 4, 3),
    1024: Tile(16, 16, 4, 3),
}
_DECODE_SMALL: _Table = {  # 99 KiB of shared memory
    64: Tile(16, 128, 4, 3),
    128: Tile(16, 64, 4, 3),
    256: Tile(16, 64, 4, 2),
    512: Tile(16, 32, 4, 2),
    1024: Tile(16, 16, 4, 2),
}
_DECODE_AMD: _Table = {
    128: Tile(16, 128, 4, 2),
    256: Tile(16, 64, 4, 2),
    512: Tile(16, 32, 4, 2),
    1024: Tile(16, 16, 4, 2),
}
_DECODE_RDNA: _Table = {  # 256 registers a thread: smaller tiles, more threads
    128: Tile(16, 32, 4, 2),
    256: Tile(16, 32, 8, 2),
    512: Tile(16, 16, 8, 2),
    1024: Tile(16, 16, 8, 2),
}
_DECODE_INTERPRETER: _Table = {1024: Tile(16, 64, 4, 1)}

_DECODE: dict[str, _Table] = {
    "sm_80": _DECODE_LARGE,
    "sm_86": _DECODE_SMALL,
    "sm_90": _DECODE_LARGE,
    "sm_100": _DECODE_LARGE,
    "sm_120": _DECODE_SMALL,
    "gfx90a": _DECODE_AMD,
    "gfx942": _DECODE_AMD,
    "gfx950": _DECODE_AMD,
    "gfx11": _DECODE_RDNA,
    "gfx12": _DECODE_RDNA,
    "interpreter": _DECODE_INTERPRETER,
}

# Prefill is bound by the matrix units: large M, registers for M x head_dim fp32 sums.
_PREFILL_HOPPER: _Table = {
    128: Tile(128, 64, 8, 3),
    256: Tile(128, 64, 8, 3),
    512: Tile(64, 32, 4, 3),
}
_PREFILL_AMPERE: _Table = {
    128: Tile(128, 64, 4, 3),
    256: Tile(128, 32, 4, 3),
    512: Tile(64, 32, 4, 2),
}
_PREFILL_SMALL: _Table = {
    128: Tile(64, 64, 4, 2),
    256: Tile(64, 32, 4, 2),
    512: Tile(64, 16, 4, 2),
}
_PREFILL_CDNA: _Table = {
    128: Tile(128, 64, 4, 2),
    256: Tile(128, 32, 4, 2),
    512: Tile(64, 32, 4, 2),
}
_PREFILL_RDNA3: _Table = {
    128: Tile(64, 32, 8, 2),
    256: Tile(64, 16, 8, 2),
    512: Tile(16, 16, 8, 2),
}
_PREFILL_RDNA4: _Table = {
    128: Tile(64, 32, 8, 2),
    256: Tile(64, 32, 8, 2),
    512: Tile(32, 16, 8, 2),
}
_PREFILL: dict[str, _Table] = {
    "sm_80": _PREFILL_AMPERE,
    "sm_86": _PREFILL_SMALL,
    "sm_90": _PREFILL_HOPPER,
    "sm_100": _PREFILL_HOPPER,
    "sm_120": _PREFILL_SMALL,
    "gfx90a": _PREFILL_CDNA,
    "gfx942": _PREFILL_CDNA,
    "gfx950": _PREFILL_CDNA,
    "gfx11": _PREFILL_RDNA3,
    "gfx12": _PREFILL_RDNA4,
    "interpreter": {1024: Tile(64, 64, 4, 1)},
}
# Hopper's own prefill kernel, by head dim; stages: tiles of keys in shared memory. One warpgroup a
# program: two of one wait for each other at every tile, two programs take turns by themselves.
_PREFILL_OWN: _Table = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 3)}
# With long prompts three warpgroups share what they read, which is what a lone one is bound by.
_PREFILL_WIDE: dict[int, WideTile] = {128: WideTile(3, 64, 3, 160, 128)}
# And of its kernel for shared keys: what is left of a multiprocessor begins with rows' own keys.
_SHARED_OWN: _Table = {64: Tile(64, 64, 4, 4), 128: Tile(64, 64, 4, 2)}
# Where there are rows enough, two warpgroups share these too.
_SHARED_WIDE: dict[int, WideTile] = {128: WideTile(2, 64, 3, 160, 112)}
# And of rows' own keys behind shared ones, by bytes of a padded head.
_AFTER_HOPPER: _Table = {128: Tile(16, 32, 1, 2), 256: Tile(16, 32, 2, 3)}
# fp32 has no matrix units at full precision: small tiles, sums in registers.
_PREFILL_FLOAT32: _Table = {
    128: Tile(32, 32, 4, 2),
    256: Tile(32, 32, 4, 2),
    512: Tile(16, 32, 4, 2),
    1024: Tile(16, 16, 4, 2),
}


def family(arch: str) -> str:
    """The key of the tables for an architecture ("sm_90", "gfx1100", "x86_64": the interpreter).

    Raises:
        BackendUnavailableError: Triton has no matrix instructions, or we no tiles, for it.
    """
    if arch.startswith("sm_"):
        number = int(arch[3:].rstrip("af"))
        for least, name in ((120, "sm_120"), (100, "sm_100"), (90, "sm_90"), (86, "sm_86"),
                            (80, "sm_80")):  # fmt: skip
            if number >= least:
                return name
    elif arch in SHARED_LIMITS:
        return arch
    elif arch.startswith(("gfx11", "gfx12")):
        return arch[:5]
    elif not arch.startswith("gfx"):
        return "interpreter"
    raise BackendUnavailableError(
        f"the triton kernels have no tiles for {arch}: use sm_80 or later, gfx90a, gfx942, gfx950, "
        "gfx11 or gfx12"
    )


def _row(table: _Table, width: int) -> Tile:
    return table[min(size for size in table if size >= width)]


def decode_tile(arch: str, dim_pad: int, item_size: int, group: int) -> Tile:
    """The tile of the decode kernel; M holds as much of the group of query heads as fits.

    Args:
        dim_pad: head dim up to the next power of two; item_size: bytes of an element.
    """
    tile = _row(_DECODE[family(arch)], dim_pad * item_size)
    rows = min(max(16, 1 << (group - 1).bit_length()), 64 if dim_pad <= 128 else 32)
    return Tile(rows, tile.block_n, tile.num_warps, tile.num_stages)


def after_tile(arch: str, dim_pad: int, item_size: int, group: int) -> Tile:
    """For rows that go on from shared keys: of their own they have few, so that what counts is how
    many programs are under way at once (benchmarks/gpu_shared_rows.py).
    """
    tile = decode_tile(arch, dim_pad, item_size, group)
    own = _AFTER_HOPPER.get(dim_pad * item_size) if family(arch) == "sm_90" else None
    if own is not None and item_size == 2:
        return replace(own, block_m=tile.block_m)
    tile = replace(tile, block_n=min(tile.block_n, 64), num_stages=min(tile.num_stages, 2))
    return replace(tile, num_warps=2) if family(arch) == "sm_90" and item_size == 2 else tile


def shared_tile(arch: str, dim_pad: int, item_size: int, group: int) -> Tile:
    """For the kernel of shared keys: a decode tile, but many more query rows to hold."""
    tile = decode_tile(arch, dim_pad, item_size, group)
    if family(arch).startswith("gfx1"):  # 256 registers a thread
        return replace(tile, block_n=16, num_warps=8)
    return tile


def shared_room(arch: str) -> int:
    """How many fp32 sums a program for shared keys may hold: 128 x 128, half of that on RDNA."""
    return 8192 if family(arch).startswith("gfx1") else 16384


def hopper_shared_tile(head_dim: int, rows: int) -> Tile | None:
    """The tile of Hopper's own kernel for shared keys, `rows` query rows at once; None: not for these."""
    tile = _SHARED_OWN.get(head_dim)
    if tile is None or rows not in (64, 128):  # whole warpgroups
        return None
    return replace(tile, block_m=rows, num_warps=rows // 16)


def hopper_wide_shared_tile(head_dim: int, rows: int) -> WideTile | None:
    """The same for many rows, a pair of tiles or both halves of one; None: not for these."""
    return _SHARED_WIDE.get(head_dim) if rows in (64, 128) else None


def prefill_tile(arch: str, dim_pad: int, item_size: int) -> Tile:
    """The tile of the prefill kernel."""
    kind = family(arch)
    table = _PREFILL_FLOAT32 if item_size == 4 and kind != "interpreter" else _PREFILL[kind]
    return _row(table, dim_pad * item_size)


def hopper_tile(head_dim: int) -> Tile | None:
    """The tile of Hopper's own prefill kernel; None: it doesn't take heads of this size."""
    return _PREFILL_OWN.get(head_dim)


def wide_tile(head_dim: int) -> WideTile | None:
    """The tile of Hopper's prefill kernel for long prompts; None: it doesn't take heads of this size."""
    return _PREFILL_WIDE.get(head_dim)
