"""Kernels compiled ahead of their launches: for a GPU that isn't here, by Triton's own compiler."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets", allow_module_level=True)

import triton

from halyard.hal.kernels.triton import draw
from halyard.hal.kernels.triton.ahead import compiling_only, launching
from halyard.hal.kernels.triton.largest import largest_of_rows


class _Utils:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *others: Any) -> tuple[Any, ...]:
        self.loaded.append(name)
        return object(), object(), 32, 0, 1024


class _Driver:
    """Of a Hopper that launches nothing."""

    def __init__(self) -> None:
        self.utils = _Utils()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: pytest.fail("launched")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def hopper(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Driver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = _Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    kernels = (draw.draw_kernel, draw.draw_greedy_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    yield driver
    for kernel in kernels:
        kernel.device_caches.clear()


def _draw(num: int, random: bool = False) -> None:
    """As DrawLauncher launches it."""
    logits = torch.zeros(num, 1024)
    tokens, codes = torch.zeros((2, num), dtype=torch.int64)
    bad = torch.zeros(num, dtype=torch.int8)
    if random:
        draw.draw_kernel[(num,)](
            logits, tokens, torch.zeros(5, num), tokens, codes, bad, codes.int(), 1024, 1024, num,
            GATHER=False, SIZE=1024, MOST=1024, num_warps=4,
        )  # fmt: skip
    else:
        draw.draw_greedy_kernel[(num, 1)](
            logits, tokens, tokens, codes, bad, tokens, tokens, 1024, 1024, 1024,
            GATHER=False, SIZE=1024, PIECES=1, PIECES_PAD=1, num_warps=4,
        )  # fmt: skip


def _compiled(kernel: Any) -> list[Any]:
    return list(kernel.device_caches[0][0].values())


def test_kernels_are_compiled_at_once_and_not_launched(
    hopper: _Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()
    compile_one = triton.compiler.compile

    def watched(*arguments: Any, **options: Any) -> Any:
        threads.add(threading.current_thread().name)
        return compile_one(*arguments, **options)

    monkeypatch.setattr(triton.compiler, "compile", watched)
    with compiling_only():
        _draw(4)
        _draw(4, random=True)
        _draw(4)
    assert all(name.startswith("halyard-kernels") for name in threads)
    assert sorted(hopper.utils.loaded) == ["draw_greedy_kernel", "draw_kernel"]
    for kernel in (draw.draw_kernel, draw.draw_greedy_kernel):
        (made,) = _compiled(kernel)
        assert "ptx" in made.asm
    threads.clear()
    with compiling_only():
        _draw(4)
        _draw(4, random=True)
    assert not threads  # they are there


def test_any_number_of_rows_takes_the_same_kernels() -> None:
    with compiling_only():
        for num in (1, 2, 7, 16, 33):
            _draw(num)
            _draw(num, random=True)
    assert len(_compiled(draw.draw_kernel)) == 1
    assert len(_compiled(draw.draw_greedy_kernel)) == 1


def test_afterwards_launches_are_launches_again() -> None:
    run = triton.runtime.jit.JITFunction.run
    with compiling_only():
        assert triton.runtime.jit.JITFunction.run is not run
    assert triton.runtime.jit.JITFunction.run is run

    def breaks_off() -> None:
        with compiling_only():
            _draw(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_off()
    assert triton.runtime.jit.JITFunction.run is run


def test_one_that_does_not_compile_is_left_for_its_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_one = triton.compiler.compile

    def broken(source: Any, **options: Any) -> Any:
        if source.name == "draw_kernel":
            raise RuntimeError("no such instruction")
        return compile_one(source, **options)

    monkeypatch.setattr(triton.compiler, "compile", broken)
    with compiling_only():
        _draw(3, random=True)
        _draw(3)
    assert _compiled(draw.draw_greedy_kernel)
    assert [r.message for r in caplog.records if "no such instruction" in r.message] == [
        "a kernel waits for its launch to be compiled: RuntimeError('no such instruction')"
    ]
    with pytest.raises(RuntimeError, match="no such instruction"):
        _draw(3, random=True)


def test_places_are_of_a_column_when_nothing_is_launched() -> None:
    """The library's kernels run, and look at them: a router's choice is another one's index."""
    memory = torch.full((64, 8), 1 << 40)  # what new memory may hold
    del memory
    with compiling_only():
        assert not launching()
        _, places = largest_of_rows(torch.randn(64, 128), 8)
    assert launching()
    assert places.tolist() == [[0] * 8] * 64
