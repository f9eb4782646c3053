"""Compiled segments answer as eager ones do, at every size of batch, fresh and from the cache."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from test_program_matches_hf import Batch, check
from tiny_models import tiny_model
from tiny_programs import build_tiny

from halyard.compiler.cache import ArtefactCache, load_or_build
from halyard.compiler.graphs.inductor import InductorCompiler
from halyard.compiler.program import Program, UnboundProgram
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.kernels.native.library import num_threads, product_seconds
from halyard.hal.kernels.reference.kernels import ReferenceKernels
from halyard.models.spec import ModelSpec

DEVICE = CpuDevice()
COMPILER = InductorCompiler()

pytestmark = pytest.mark.skipif(
    not COMPILER.probe(DEVICE.info).available, reason="no C++ compiler here"
)


def obtain(family: str, cache: ArtefactCache, *, may_build: bool = True) -> UnboundProgram:
    spec = ModelSpec.from_hf(tiny_model(family).config)

    def build() -> UnboundProgram:
        assert may_build, "the cache should have held it"
        return build_tiny(family, COMPILER)

    facts = {"model": spec.digest(), "dtype": "float32"}
    return load_or_build(cache, facts, build, COMPILER, DEVICE.info)


def bound(family: str, unbound: UnboundProgram) -> Program:
    spec = ModelSpec.from_hf(tiny_model(family).config)
    state = tiny_model(family).state_dict()
    kernels = ReferenceKernels(DEVICE)
    program = unbound.bind({name: state[name].clone() for name in unbound.weights}, kernels)
    layout = kernels.layout(spec.kv_spec("float32", 4))
    program.set_pool(DEVICE.allocate_kv(layout, 64, host=False))
    return program


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ArtefactCache:
    return ArtefactCache(tmp_path_factory.mktemp("cache"))


def test_compiled_program_gives_hugging_face_logits(cache: ArtefactCache) -> None:
    fresh = obtain("llama", cache)
    assert not fresh.from_cache
    check("llama", bound("llama", fresh))
    again = obtain("llama", cache, may_build=False)
    assert again.from_cache
    check("llama", bound("llama", again))


def test_torch_has_its_threads_until_steps_begin(cache: ArtefactCache) -> None:
    """Weights are made ready with all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        program = bound("llama", obtain("llama", cache))
        assert torch.get_num_threads() == 3
        Batch([[1, 2, 3]]).step(program, {0: 3})
        assert torch.get_num_threads() == 1
        assert num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_tokens(cache: ArtefactCache) -> None:
    program = bound("llama", obtain("llama", cache))
    batch = Batch([[1, 2, 3, 4, 5, 6]])
    whole = batch.step(program, {0: 6})[0]
    assert whole.shape == (6, 128)


def test_the_time_of_linears_is_counted(cache: ArtefactCache) -> None:
    """Generated code calls them without torch and without Python: only their own clock knows."""
    program = bound("llama", obtain("llama", cache))
    before = product_seconds()
    began = time.perf_counter()
    Batch([[1, 2, 3, 4, 5, 6]]).step(program, {0: 6})
    assert 0 < product_seconds() - before < time.perf_counter() - began


def test_cut_short_library_is_discarded(
    cache: ArtefactCache, caplog: pytest.LogCaptureFixture
) -> None:
    obtain("llama", cache)
    spec = ModelSpec.from_hf(tiny_model("llama").config)
    key = cache.key({"model": spec.digest(), "dtype": "float32"}, COMPILER, DEVICE.info)
    library: Path = cache.directory / key / "segment-1" / "segment.so"
    # A new file in its place, as a broken copy would be: the old one is mapped by this process, and
    # cutting that short would pull code from under it.
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(whole[:1000])
    with caplog.at_level(logging.WARNING, logger="halyard.cache"):
        assert cache.load(key, COMPILER, DEVICE.info) is None
    assert len(caplog.records) == 1
    assert not (cache.directory / key).exists()


def test_one_openmp_runtime() -> None:
    """A second one would have threads of its own, and both would fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    loaded = {Path(path).name.split(".so")[0].split("-")[0] for path in paths if "omp" in path}
    runtimes = [
        path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))
    ]
    assert len(runtimes) == 1, (loaded, runtimes)
