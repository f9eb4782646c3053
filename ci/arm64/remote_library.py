"""The native kernels' library in an emulated process, called as if it were a ctypes.CDLL.

Kernels get addresses. So that a call can carry what lies there, `recording` notes the storage of every
tensor whose data_ptr() is asked for; a call sends those it points into and takes back what they hold
then. See driver.cpp for the other end.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["RemoteLibrary", "forget", "recording"]

_seen: dict[int, torch.UntypedStorage] = {}  # by address, kept alive
_ADDRESSES = range(1 << 40, 1 << 47)  # no count, stride or pair of floats of a call lies there


@contextmanager
def recording() -> Iterator[None]:
    """Within, tensors whose addresses are asked for are known to RemoteLibrary."""
    plain = torch.Tensor.data_ptr

    def data_ptr(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        _seen[storage.data_ptr()] = storage
        return plain(tensor)

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.data_ptr = plain  # type: ignore[method-assign]


def forget() -> None:
    """Let go of all tensors: what was asked for so far is not called with again."""
    _seen.clear()


class _Call:
    """The storages that a call points into, numbered as they are met."""

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []

    @staticmethod
    def storage_at(pointer: int) -> int | None:
        """Where the storage begins that an address lies in."""
        for start, storage in _seen.items():
            if start and start <= pointer < start + max(1, storage.nbytes()):  # an empty one: null
                return start
        return None

    def address(self, pointer: int) -> bytes:
        start = self.storage_at(pointer)
        if start is None:
            raise AssertionError(f"nobody asked for the address {pointer:#x} of a tensor")
        storage = _seen[start]
        same = [i for i, one in enumerate(self.storages) if one.data_ptr() == start]
        if not same:
            self.storages.append(storage)
        index = same[0] if same else len(self.storages) - 1
        return struct.pack("<IQ", index, pointer - start)

    def argument(self, value: Any) -> bytes:
        if isinstance(value, ctypes.c_void_p):
            return (
                struct.pack("<Bq", 0, 0) if not value.value else b"\1" + self.address(value.value)
            )
        if isinstance(value, ctypes.c_int64 | int):
            number = value if isinstance(value, int) else value.value
            return struct.pack("<Bq", 0, number)
        content = value if isinstance(value, bytes) else bytes(value._obj)  # a byref()
        patches = []
        for offset in range(0, len(content) // 8 * 8, 8):
            (word,) = struct.unpack_from("<q", content, offset)
            if self.storage_at(word) is not None:  # counts and strides are no addresses
                patches.append(struct.pack("<I", offset) + self.address(word))
            elif word in _ADDRESSES:
                raise AssertionError(f"nobody asked for the address {word:#x} of a tensor")
        return b"".join([
            struct.pack("<BI", 2, len(content)), content, struct.pack("<I", len(patches)), *patches
        ])  # fmt: skip


class _Function:
    def __init__(self, library: RemoteLibrary, name: str) -> None:
        self.library, self.name = library, name
        self.restype: Any = ctypes.c_int

    def __call__(self, *args: Any) -> int | None:
        result = self.library.call(self.name, args)
        return None if self.restype is None else result


class RemoteLibrary:
    """Functions of the driver that `command` starts.

    Attributes:
        calls: how many were answered, by name.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.calls: dict[str, int] = {}
        self._functions: dict[str, _Function] = {}
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __getattr__(self, name: str) -> _Function:
        return self._functions.setdefault(name, _Function(self, name))

    def call(self, name: str, args: Sequence[Any]) -> int:
        """Have the driver run a function; storages hold what it left when this returns.

        Raises:
            RuntimeError: the driver ended: it crashed, or wrote beside a buffer.
        """
        call = _Call()
        told = [call.argument(one) for one in args]
        parts = [struct.pack("<I", len(name)), name.encode(), struct.pack("<I", len(call.storages))]
        for storage in call.storages:
            size = storage.nbytes()
            parts += [struct.pack("<Q", size), ctypes.string_at(storage.data_ptr(), size)]
        parts += [struct.pack("<I", len(told)), *told]
        with self._lock:
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None
            assert stdout is not None
            try:
                stdin.write(b"".join(parts))
                stdin.flush()
            except BrokenPipeError:
                pass  # the answer will be missing
            wanted = 8 + sum(storage.nbytes() for storage in call.storages)
            answer = stdout.read(wanted)
        if len(answer) != wanted:
            raise RuntimeError(f"{name}: the driver ended with status {self._process.wait()}")
        at = 8
        for storage in call.storages:
            ctypes.memmove(storage.data_ptr(), answer[at : at + storage.nbytes()], storage.nbytes())
            at += storage.nbytes()
        self.calls[name] = self.calls.get(name, 0) + 1
        return int(struct.unpack("<q", answer[:8])[0])

    def close(self) -> None:
        """End the driver.

        Raises:
            RuntimeError: it ended badly.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(timeout=30):
            raise RuntimeError(f"the driver ended with status {self._process.returncode}")
