"""A running sequence moves from one engine to another: other backend, other block size, same tokens.

KV travels in the contract's canonical form, cut into tokens, so the two engines need to agree on
nothing but the model. It is the base of migration between nodes.
"""

from __future__ import annotations

import copy
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halyard.hal.dtypes import torch_dtype
from halyard.runtime.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from halyard.runtime.executor import Executor
    from halyard.runtime.scheduler import Scheduler

__all__ = ["MovingSequence", "give", "take"]


@dataclass(frozen=True, slots=True)
class MovingSequence:
    """A sequence between two engines."""

    sequence: Sequence  # tokens and counts; no blocks
    kv: Tensor  # [2, layers, computed tokens, kv_heads, head_dim] on the host, the sender's dtype


def take(scheduler: Scheduler, executor: Executor, request_id: str) -> MovingSequence:
    """Take a request out of an engine, between steps.

    Raises:
        RequestError: it isn't there, or has several answers.
    """
    sequence = scheduler.detach(request_id)
    host = bool(sequence.host_block_ids)
    pool = executor.host_pool if host else executor.pool
    blocks = sequence.host_block_ids if host else list(sequence.block_ids)
    if pool is None:
        raise AssertionError("a swapped sequence without a host pool")
    spec, computed = pool.layout.spec, sequence.num_computed_tokens
    shape = (2, spec.num_layers, len(blocks) * spec.block_size, spec.num_kv_heads, spec.head_dim)
    kv = torch.empty((*shape[:2], 0, *shape[3:]), dtype=torch_dtype(spec.dtype))
    if blocks:
        read = executor.kernels.read_blocks(pool, blocks).cpu()
        kv = read.reshape(shape)[:, :, :computed].clone()
    moving = copy.copy(sequence)
    scheduler.kv.release(sequence)
    sequence.status = SequenceStatus.FINISHED  # here: what was kept for it can go
    moving.block_ids, moving.host_block_ids = array("i"), []
    moving.block_digests = []  # of the other engine's block size
    moving.slot = -1
    return MovingSequence(moving, kv)


def give(scheduler: Scheduler, executor: Executor, moving: MovingSequence) -> bool:
    """Put it into another engine. False: it waits there and its KV is computed again.

    Raises:
        RequestError: it may grow longer than this engine allows.
    """
    sequence = copy.copy(moving.sequence)
    sequence.token_ids = list(sequence.token_ids)
    if not scheduler.adopt(sequence):
        return False
    # Making room may have evicted prefix blocks to the host tier: that copy comes first.
    moves = scheduler.kv.take_moves()
    executor.move(moves.swap_out, moves.swap_in, moves.copies)
    scheduler.kv.release_holds()
    spec = executor.pool.layout.spec
    blocks = list(sequence.block_ids)
    padded = torch.zeros(
        (2, spec.num_layers, len(blocks) * spec.block_size, spec.num_kv_heads, spec.head_dim),
        dtype=torch_dtype(spec.dtype),
    )
    padded[:, :, : moving.kv.shape[2]] = moving.kv.to(padded.dtype)
    shape = (
        2, spec.num_layers, len(blocks), spec.block_size, spec.num_kv_heads, spec.head_dim
    )  # fmt: skip
    executor.kernels.write_blocks(executor.pool, blocks, padded.view(shape))
    # Its full blocks hold what the tokens say: the next prompt that begins so finds them.
    for _ in scheduler.kv.publish(sequence, 0, sequence.num_computed_tokens):
        pass
    return True
