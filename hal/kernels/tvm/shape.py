"""What a TVM kernel is generated for: one function set per shape, dtype and feature set."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LANES", "PARTS", "PREFILL_TILE", "SPLIT", "KernelShape", "MoveShape", "num_parts",
           "num_tiles", "tile_of"]  # fmt: skip

LANES = 16  # fp32 lanes of the vectors that CPU kernels are written in; narrower ones split them

PREFILL_TILE = 8  # entries (a query of a head each) that share a load of keys and values


SPLIT = 512  # keys of a decode row that one thread block of a GPU does, if it has more
PARTS = 16  # at most; longer parts then


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Everything that is constant in a generated kernel."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # of activations and of KV, TVM's name is torch's
    softcap: bool = False
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def name(self) -> str:
        """A file name for what is compiled."""
        features = ("c" if self.softcap else "") + ("s" if self.sinks else "")
        return (
            f"{self.num_heads}-{self.num_kv_heads}-{self.head_dim}-{self.block_size}"
            f"-{self.dtype}{'-' if features else ''}{features}"
        )


@dataclass(frozen=True, slots=True)
class MoveShape:
    """Everything that is constant in a generated block move."""

    words: int  # of four bytes in one block of one layer, a multiple of LANES

    @property
    def name(self) -> str:
        """A file name for what is compiled."""
        return f"move-{self.words}"


def tile_of(shape: KernelShape, name: str) -> int:
    """Entries a tile of "decode" or "prefill": a decode row has one entry a head of the group."""
    if name == "prefill":
        return PREFILL_TILE
    parts = -(-shape.group // PREFILL_TILE)
    return -(-shape.group // parts)


def num_parts(max_seq_len: int) -> int:
    """Parts that the longest decode row is cut into on a GPU."""
    return min(-(-max_seq_len // SPLIT), PARTS)


def num_tiles(shape: KernelShape, name: str, max_query_len: int) -> int:
    """Tiles of the longest row that `name` is for."""
    queries = 1 if name == "decode" else max_query_len
    return -(-queries * shape.group // tile_of(shape, name))
