"""Which rows of a decode step have their first blocks in common. No torch.

Kernels that know of it read such blocks once for up to 16 rows (hal.types.SharedRows). Whether it
pays is judged by the keys that need not be read again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halyard.hal.types import SharedRows

__all__ = ["filled_up", "find_shared_rows"]

_LEAST_ROWS = 4  # of a group
_LEAST_KEYS = 256  # that they share
_MOST_GROUPS = 8
_LEAST_SAVING = 0.2  # of all keys that the step reads

Found = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def find_shared_rows(
    tables: NDArray[np.int32], starts: NDArray[np.int64], block_size: int
) -> Found | None:
    """SharedRows' fields for rows that decode. None: no gain.

    Shapes follow from the number of rows alone. Only blocks that are full before this step count, so
    every row has keys of its own left.

    Args:
        tables: [rows, blocks] block ids; starts: [rows] tokens before this step's.
    """
    width = SharedRows.WIDTH
    groups = _groups(tables, starts // block_size, block_size)
    if not groups:
        return None
    saved = sum((len(rows) - -(-len(rows) // width)) * blocks for rows, blocks in groups)
    if saved * block_size < _LEAST_SAVING * float(starts.sum()):
        return None
    num_tiles = _num_tiles(len(tables))
    tile_rows = np.full((num_tiles, width), -1, np.int32)
    tile_keys = np.zeros(num_tiles, np.int32)
    row_keys = np.zeros(len(tables), np.int32)
    tile = 0
    for rows, blocks in groups:
        row_keys[rows] = blocks * block_size
        for first in range(0, len(rows), width):
            part = rows[first : first + width]
            tile_rows[tile, : len(part)] = part
            tile_keys[tile] = blocks * block_size
            tile += 1
        tile += tile % 2
    return tile_rows, tile_keys, row_keys


def filled_up(found: tuple[NDArray[np.int32], ...], num_rows: int) -> Found:
    """The same for num_rows rows, of which the last are nobody's and share nothing."""
    tile_rows, tile_keys, row_keys = found
    tiles = _num_tiles(num_rows) - len(tile_keys)
    return (
        np.pad(tile_rows, ((0, tiles), (0, 0)), constant_values=-1),
        np.pad(tile_keys, (0, tiles)),
        np.pad(row_keys, (0, num_rows - len(row_keys))),
    )


def _num_tiles(num_rows: int) -> int:
    """Each group's last pair may be its only one, and may have one row."""
    return 2 * (-(-num_rows // (2 * SharedRows.WIDTH)) + _MOST_GROUPS)


def _groups(
    tables: NDArray[np.int32], full: NDArray[np.int64], block_size: int
) -> list[tuple[NDArray[np.int64], int]]:
    """(rows, blocks in common) of the groups that save most."""
    order = np.argsort(tables[:, 0], kind="stable")
    edges = np.flatnonzero(np.diff(tables[order, 0])) + 1
    first, after = np.append(0, edges), np.append(edges, len(order))
    found = []
    for group in np.flatnonzero(after - first >= _LEAST_ROWS):
        rows = order[first[group] : after[group]]
        limit = int(full[rows].min())
        same = (tables[rows, :limit] == tables[rows[0], :limit]).all(axis=0)
        blocks = limit if same.all() else int(same.argmin())
        if blocks * block_size >= _LEAST_KEYS:
            found.append((rows, blocks))
    found.sort(key=lambda group: -len(group[0]) * group[1])
    return found[:_MOST_GROUPS]
