"""The CPU as a device: what it finds, what it refuses, and that limits of a container hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from halyard.hal import cpuinfo
from halyard.hal.contract import Device
from halyard.hal.devices.cpu import CpuDevice
from halyard.hal.errors import CapacityError
from halyard.hal.kernels.native import library
from halyard.hal.types import KVLayout, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_size=16)
LAYOUT = KVLayout(SPEC, (2, 16, 2, 8), "float32")


def test_it_honours_the_contract() -> None:
    device = CpuDevice()
    assert isinstance(device, Device)
    assert device.capture(lambda: None) is None
    device.synchronize()
    device.close()
    device.close()


def test_probe_describes_this_machine() -> None:
    probe = CpuDevice.probe()
    assert probe.available
    info = probe.info
    assert info is not None
    assert info.kind == "cpu"
    assert 1 <= info.num_cores <= (os.cpu_count() or 1)
    assert info.memory_bytes > 2**26
    assert ("bfloat16" in info.native_dtypes) == bool(
        {"avx512bf16", "amxbf16", "armbf16"} & set(info.features)
    )


def test_pools_have_the_layouts_shape() -> None:
    pool = CpuDevice().allocate_kv(LAYOUT, 5, host=True)
    assert pool.data.shape == (2, 5, 2, 16, 2, 8)
    assert pool.data.dtype == torch.float32
    assert pool.host
    assert pool.data.nbytes == 5 * LAYOUT.bytes_per_block


def test_a_pool_that_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(CapacityError, match=r"KV blocks need .* GiB") as caught:
        CpuDevice().allocate_kv(LAYOUT, 2**40, host=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "limit", "quota"),
    [
        ({"/sys/fs/cgroup/memory.max": "1000000", "/sys/fs/cgroup/cpu.max": "150000 100000"}, 1000000, 1.5),
        ({"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/cpu.max": "max 100000"}, None, None),
        (
            {
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000",
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2000000,
            3.0,
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None, None),
        ({}, None, None),
    ],
    ids=["v2", "v2 without limits", "v1", "v1 without limits", "none"],
)  # fmt: skip
def test_limits_of_a_container(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None, quota: float | None
) -> None:
    monkeypatch.setattr(cpuinfo, "_read", files.get)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cpuinfo.memory_limit() == (limit or machine)
    assert cpuinfo._cgroup_cpu_quota() == quota
    assert cpuinfo.num_cpus() >= 1


def test_a_quota_below_one_core_is_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuinfo, "_read", {"/sys/fs/cgroup/cpu.max": "20000 100000"}.get)
    assert cpuinfo.num_cpus() == 1


@pytest.mark.parametrize(
    ("asked", "threads"),
    [
        ("1", 1),
        (" 2 ", 2),
        ("3,1", 3),
        ("64", 4),
        ("", 4),
        ("0", 4),
        ("-1", 4),
        ("many", 4),
        (None, 4),
    ],
)
def test_omp_num_threads_asks_for_fewer(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, threads: int
) -> None:
    """What is no number of threads asks for nothing, as OpenMP has it."""
    monkeypatch.setattr(cpuinfo, "num_cpus", lambda: 4)
    monkeypatch.setattr(library, "_taken", None)  # no other test has opened the kernels
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        assert CpuDevice().info.num_cores == threads
        assert torch.get_num_threads() == library.num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_affinity_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuinfo, "_read", {}.get)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9}, raising=False)
    assert cpuinfo.num_cpus() == 3
    monkeypatch.setattr(cpuinfo, "_read", {"/sys/fs/cgroup/cpu.max": "200000 100000"}.get)
    assert cpuinfo.num_cpus() == 2


def test_it_works_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: no /proc/cpuinfo, so no flags, and names from the platform module."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    cpuinfo._proc_cpuinfo.cache_clear()
    try:
        info = CpuDevice.probe().info
        assert info is not None
        assert info.features == ()
        assert info.native_dtypes == ("float32",)
        assert info.vendor
        assert info.arch
    finally:
        monkeypatch.undo()
        cpuinfo._proc_cpuinfo.cache_clear()
