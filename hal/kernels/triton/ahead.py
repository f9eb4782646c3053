"""Kernels compiled before they are launched, several at once.

Triton compiles a kernel when it is first launched, one after the other, and then what launches it
(with a C compiler): on a machine that has never run a model these are ten seconds of first requests.
Most of that is outside of Python's lock, so a thread for each kernel takes as long as the longest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

__all__ = ["compiling_only", "launching"]

log = logging.getLogger(__name__)

_MOST_THREADS = 16
_compiling = 0  # contexts that are entered


class _Loader(ThreadPoolExecutor):
    """Whose kernels come out ready for their launch."""

    def submit(  # type: ignore[override]
        self, compile_one: Callable[[], Any]
    ) -> Future[Any]:
        def ready() -> Any:
            try:
                kernel = compile_one()
                kernel.run  # noqa: B018 - a property: asked for, it makes the launcher and loads the code
            except Exception as error:
                log.warning("a kernel waits for its launch to be compiled: %r", error)
                raise
            return kernel

        return super().submit(ready)


@contextmanager
def compiling_only() -> Iterator[None]:
    """Launches within it compile what they would launch, and launch nothing: results are left as they
    are. On leaving all is compiled. One that can't be is left to fail where it is launched.
    """
    global _compiling
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    with _Loader(threads, "halyard-kernels") as executor:
        JITFunction.run = only_compile
        _compiling += 1
        try:
            with triton.AsyncCompileMode(executor, ignore_errors=True):
                yield
        finally:
            _compiling -= 1
            JITFunction.run = run


def launching() -> bool:
    """Whether kernels write their results. Else places that others look at are to be made up: what isn't
    Triton's own is launched all the same.
    """
    return not _compiling
