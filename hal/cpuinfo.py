"""What the machine's processor is and how much of it this process may use. No torch here."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

__all__ = [
    "cpu_flags",
    "cpu_name",
    "cpu_vendor",
    "memory_available",
    "memory_limit",
    "num_cpus",
    "num_threads",
]

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "0x41": "arm", "0x61": "apple"}


@cache
def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty elsewhere than on Linux."""
    found: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if not line.strip() and found:
                break
            key, _, value = line.partition(":")
            found[key.strip()] = value.strip()
    return found


def cpu_vendor() -> str:
    info = _proc_cpuinfo()
    raw = info.get("vendor_id") or info.get("CPU implementer") or platform.system()
    return _VENDORS.get(raw, "apple" if raw == "Darwin" else raw.lower() or "unknown")


def cpu_name() -> str:
    return _proc_cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them ("avx2", "avx512_bf16", "asimd", "bf16", ...)."""
    info = _proc_cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def num_cpus() -> int:
    """Processors this process may use: affinity and cgroup quota respected, at least 1."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    quota = _cgroup_cpu_quota()
    return max(1, min(count, int(quota)) if quota else count)


def num_threads() -> int:
    """Threads to compute with: a processor each, or fewer where OMP_NUM_THREADS says so."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # of the outermost level
    return min(num_cpus(), int(asked) if asked.isdecimal() else 0) or num_cpus()


def _read(path: str) -> str | None:
    file = Path(path)
    try:
        return file.read_text().strip()
    except OSError:  # not there, or not ours to read: then there's no limit to respect
        return None


def _cgroup_cpu_quota() -> float | None:
    unified = _read("/sys/fs/cgroup/cpu.max")
    if unified and not unified.startswith("max"):
        quota, period = unified.split()
        return int(quota) / int(period)
    quota_text = _read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period_text = _read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota_text and period_text and int(quota_text) > 0:
        return int(quota_text) / int(period_text)
    return None


def memory_limit() -> int:
    """Bytes of memory this process may use in all: the machine's, or less by a cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read(path)
        if limit and limit.isdigit():
            total = min(total, int(limit))
    return total


def memory_available() -> int:
    """Bytes that can be taken now without swapping."""
    total = memory_limit()
    meminfo = _read("/proc/meminfo")
    available = total
    for line in (meminfo or "").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for usage in ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"):
        used = _read(usage)
        if used and used.isdigit():
            available = min(available, max(0, total - int(used)))
    return min(total, available)
