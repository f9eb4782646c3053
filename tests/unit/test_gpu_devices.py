"""The cuda and rocm devices as far as a machine without a GPU can tell: probes, names, reasons."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halyard.hal.devices import cuda, gpu, nvml, rocm
from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.hal.errors import BackendUnavailableError
from halyard.hal.kernels.triton.kernels import TritonKernels
from halyard.hal.types import DeviceInfo

H100 = nvml.NvidiaGpu("NVIDIA H100", "580.65.06", (9, 0), 80 << 30, 132, 3.35e12, 63e9)


class FakeNvml:
    """Enough of libnvidia-ml to answer for two GPUs."""

    def __init__(self, count: int = 2, status: int = 0) -> None:
        self.count, self.status, self.asked = count, status, None
        self.shut = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.status

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.shut = True
        return 0

    def __getattr__(self, name: str) -> Any:
        numbers = {
            "nvmlDeviceGetCount_v2": self.count,
            "nvmlDeviceGetNumGpuCores": 16896,
            "nvmlDeviceGetMemoryBusWidth": 5120,
            "nvmlDeviceGetMaxClockInfo": 2619,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
        }

        def call(*args: Any) -> int:
            if name in numbers:
                args[-1]._obj.value = numbers[name]
            elif name == "nvmlDeviceGetCudaComputeCapability":
                args[1]._obj.value, args[2]._obj.value = 9, 0
            elif name == "nvmlDeviceGetMemoryInfo":
                args[1]._obj.total = 80 << 30
            elif name == "nvmlDeviceGetName":
                args[1].value = b"NVIDIA H100"
            elif name == "nvmlSystemGetDriverVersion":
                args[0].value = b"580.65.06"
            elif name.startswith("nvmlDeviceGetHandle"):
                self.asked = args[0]
                return 0 if args[0] in (0, 1, b"GPU-12") else 6
            else:
                raise AttributeError(name)
            return 0

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return fake


def test_what_nvml_says_is_read(driver: FakeNvml) -> None:
    gpu = nvml.read_gpu(None)
    assert (gpu.name, gpu.driver, gpu.capability) == ("NVIDIA H100", "580.65.06", (9, 0))
    assert gpu.num_cores == 132
    assert gpu.memory_bytes == 80 << 30
    assert gpu.bandwidth == pytest.approx(3.35e12, rel=0.01)
    assert gpu.link == pytest.approx(63e9, rel=0.01)
    assert driver.shut


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("1,0", 1), ("GPU-12", b"GPU-12"), (" 0 ", 0)]
)
def test_cuda_visible_devices_is_honoured(
    driver: FakeNvml, visible: str | None, asked: Any
) -> None:
    nvml.read_gpu(visible)
    assert driver.asked == asked


@pytest.mark.parametrize(("visible", "words"), [("", "hides every"), ("-1", "hides every"),
                                                ("7", "names '7'"), ("GPU-99", "GPU-99")])  # fmt: skip
def test_hidden_and_missing_gpus_are_reasons(driver: FakeNvml, visible: str, words: str) -> None:
    with pytest.raises(BackendUnavailableError, match=words):
        nvml.read_gpu(visible)
    assert driver.shut


def test_a_driver_that_does_not_answer(driver: FakeNvml) -> None:
    driver.status = 9
    with pytest.raises(BackendUnavailableError, match="NVML error 9"):
        nvml.read_gpu(None)
    driver.status, driver.count = 0, 0
    with pytest.raises(BackendUnavailableError, match="sees no GPU"):
        nvml.read_gpu(None)


def test_a_cuda_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "read_gpu", lambda visible: H100)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    probe = CudaDevice.probe()
    assert probe.available, probe.reasons
    info = probe.info
    assert info is not None
    assert (info.kind, info.vendor, info.arch, info.num_cores) == ("cuda", "nvidia", "sm_90", 132)
    assert "bfloat16" in info.native_dtypes
    assert probe.versions["driver"] == "580.65.06"


def test_all_reasons_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    old = nvml.NvidiaGpu("Tesla T4", "535.1", (7, 5), 16 << 30, 40, None, None)
    monkeypatch.setattr(cuda, "read_gpu", lambda visible: old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reasons = CudaDevice.probe().reasons
    assert len(reasons) == 2
    assert "compute capability 7.5" in reasons[0]
    assert "535.1 is too old" in reasons[1]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in CudaDevice.probe().reasons[0]


def test_a_machine_without_gpus_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(rocm, "KFD_NODES", Path("no/such/folder"))
    for kind, words in ((CudaDevice, ("without CUDA", "no NVIDIA driver")),
                        (RocmDevice, ("without ROCm", "no AMD GPU"))):  # fmt: skip
        probe = kind.probe()
        assert not probe.available
        assert all(any(word in reason for reason in probe.reasons) for word in words)
        with pytest.raises(BackendUnavailableError):
            kind()


def make_node(folder: Path, number: int, **properties: int) -> None:
    node = folder / str(number)
    (node / "mem_banks" / "0").mkdir(parents=True)
    lines = "".join(f"{key} {value}\n" for key, value in properties.items())
    (node / "properties").write_text(lines)
    (node / "mem_banks" / "0" / "properties").write_text(
        f"heap_type 1\nsize_in_bytes {192 << 30}\nwidth 8192\nmem_clk_max 2600\n"
    )


@pytest.fixture
def mi300x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_node(tmp_path, 0, cpu_cores_count=64, simd_count=0)
    make_node(tmp_path, 10, simd_count=512, simd_per_cu=4, gfx_target_version=90010)
    make_node(tmp_path, 2, simd_count=1216, simd_per_cu=4, gfx_target_version=90402)
    monkeypatch.setattr(rocm, "KFD_NODES", tmp_path)
    monkeypatch.setattr(rocm, "_KFD_DEVICE", tmp_path)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name in rocm._VISIBLE:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class FakeCuda:
    """As much of torch.cuda as recording a step needs; `recording` fails as it is told."""

    def __init__(self) -> None:
        self.fails: RuntimeError | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "CUDAGraph":
            return lambda: SimpleNamespace(replay=lambda: None)
        return lambda *_, **__: SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def stream(self, _: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, *_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            if self.fails is not None:
                raise self.fails


class FakeGenerator:
    """torch.Generator: what it was seeded with, and whose state it has."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seed, self.state = 0, self

    def manual_seed(self, seed: int) -> None:
        self.seed = seed

    def initial_seed(self) -> int:
        return self.state.seed

    def graphsafe_get_state(self) -> FakeGenerator:
        return self.state

    def graphsafe_set_state(self, other: FakeGenerator) -> None:
        self.state = other


def test_a_recording_that_memory_is_too_small_for_is_no_step_that_cannot_be_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    generator = FakeGenerator()
    generator.manual_seed(7)
    fake.default_generators = [generator]
    monkeypatch.setattr(gpu, "_gpu", fake)
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    device = CudaDevice.__new__(CudaDevice)
    device._graph_pool = device._recording = None
    device.torch_device = torch.device("cuda", 0)

    def step() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    steps: list[int] = []
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):
        device.capture(step)
    steps.clear()
    fake.fails = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(torch.OutOfMemoryError, match="2 GiB"):  # what ended the recording
        device.capture(step)
    # What was in the middle of a recording is another's now, with the same seed.
    assert generator.state is not generator
    assert generator.initial_seed() == 7
    before = generator.state
    assert device.capture(lambda: None) is None
    assert generator.state is not before
    # An allocator that isn't torch's can't grow while a step is recorded: that is no lack of memory.
    fake.fails = RuntimeError(
        "BFCArena: Failed to allocate memory for requested buffer of size 768"
    )
    assert device.capture(lambda: None) is None
    fake.fails = None
    before = generator.state
    assert device.capture(lambda: None) is not None
    assert generator.state is before


def test_an_amd_gpu_is_described(mi300x: Path) -> None:
    probe = RocmDevice.probe()
    assert probe.available, probe.reasons
    info = probe.info
    assert info is not None
    assert (info.kind, info.vendor, info.arch, info.num_cores) == ("rocm", "amd", "gfx942", 304)
    assert info.memory_bytes == 192 << 30
    assert info.bandwidth_bytes_per_second == pytest.approx(5.3e12, rel=0.01)


@pytest.mark.parametrize(("visible", "arch", "ok"), [("1", "gfx90a", True), ("5", "gfx942", False)])
def test_hip_visible_devices_is_honoured(
    mi300x: Path, monkeypatch: pytest.MonkeyPatch, visible: str, arch: str, ok: bool
) -> None:
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", visible)
    probe = RocmDevice.probe()
    assert probe.available == ok
    assert probe.info is not None
    assert probe.info.arch == arch
    assert ok or "HIP_VISIBLE_DEVICES" in probe.reasons[0]


@pytest.mark.parametrize(
    ("version", "arch"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110000, "gfx1100"),
     (110003, "gfx1103"), (120001, "gfx1201")],
)  # fmt: skip
def test_names_of_amd_architectures(version: int, arch: str) -> None:
    assert rocm._arch(version) == arch
    assert RocmDevice.arch_of(SimpleNamespace(gcnArchName=f"{arch}:sramecc+")) == arch


def test_triton_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def info(kind: str, arch: str) -> DeviceInfo:
        return DeviceInfo(kind, "any", arch, "any", 1 << 30, 8)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in TritonKernels.probe(info("cpu", "x86_64")).reasons[-1]
    assert "not on metal" in TritonKernels.probe(info("metal", "m3")).reasons[-1]
    assert "gfx1030" in TritonKernels.probe(info("rocm", "gfx1030")).reasons[-1]
    found = TritonKernels.probe(info("cuda", "sm_90"))
    assert found.available or found.reasons == (
        "the triton kernels need triton: pip install triton",
    )


def test_splits_fill_the_chip_and_depend_on_shapes_alone() -> None:
    pytest.importorskip("triton", reason="choose_splits is beside its kernel")
    from halyard.hal.kernels.triton.decode import choose_splits

    assert choose_splits(1, 8, 32768, 64, 132) >= 16
    assert choose_splits(64, 8, 1024, 64, 132) <= 2
    assert choose_splits(256, 8, 32768, 64, 132) <= 2
    assert choose_splits(1, 8, 16, 64, 132) == 1
    assert choose_splits(4, 8, 5000, 64, 132) == choose_splits(4, 8, 8192, 64, 132)


def test_triton_keeps_kernels_where_it_always_does_whatever_inductor_does_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    gpu.keep_kernels_in_one_place()
    own = str(tmp_path / ".triton" / "cache")
    assert os.environ["TRITON_CACHE_DIR"] == own
    assert triton_cache_dir(0) == own  # where Inductor looks and would have named another
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    gpu.keep_kernels_in_one_place()
    assert os.environ["TRITON_CACHE_DIR"] == "/elsewhere"


def test_that_is_tritons_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    expected = str(triton.knobs.cache.dir)
    gpu.keep_kernels_in_one_place()
    assert os.environ["TRITON_CACHE_DIR"] == expected
