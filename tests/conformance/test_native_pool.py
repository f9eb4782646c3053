"""The native kernels' threads: many callers, many sizes, a process that forks."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from halyard.hal.kernels.native import library
from halyard.hal.kernels.native.linear import pack_linear, packed_linear


@pytest.fixture
def three_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _product(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + seed % 9
    weight = torch.randn(64 * (1 + seed % 40), 768, generator=generator)
    x = torch.randn(rows, 768, generator=generator)
    return packed_linear(x, pack_linear(weight), None, len(weight)), x @ weight.T


def test_callers_in_several_threads_get_their_own_answers(three_threads: None) -> None:
    wrong: list[int] = []

    def work(first: int) -> None:
        for seed in range(first, first + 40):
            found, truth = _product(seed)
            if not torch.allclose(found, truth, atol=1e-3):
                wrong.append(seed)

    callers = [threading.Thread(target=work, args=(first,)) for first in (0, 17, 23)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # this fork is the point
def test_a_forked_process_computes_without_the_threads_it_lost(three_threads: None) -> None:
    found, _ = _product(39)  # the threads are there
    x, packed = torch.ones(4, 768), pack_linear(torch.ones(2560, 768))
    process = os.fork()
    if process == 0:  # torch's own threads are gone too, and it would wait for them
        torch.set_num_threads(1)
        library._taken = 3
        right = bool((packed_linear(x, packed, None, 2560) == 768).all())
        os._exit(0 if right else 1)
    deadline = time.monotonic() + 60
    ended, status = os.waitpid(process, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert ended
    assert status == 0
    assert found.isfinite().all()


def test_threads_are_taken_from_torch_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_taken", None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        library.take_threads()
        assert torch.get_num_threads() == 1
        assert library.num_threads() == 2
        library.take_threads()
        assert library.num_threads() == 2
        torch.set_num_threads(3)  # a device was opened anew
        assert library.num_threads() == 3
    finally:
        torch.set_num_threads(before)
