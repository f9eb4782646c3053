"""`halyard devices`: what hardware is here, and for each backend whether it can run and why not."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from halyard.hal.matrix import load_matrix
from halyard.hal.registry import part_names, probe_device
from halyard.hal.selection import probe_backend

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="another hw_matrix.yaml")


def run(args: argparse.Namespace) -> int:
    matrix = load_matrix(args.matrix)
    devices = {name: probe_device(name) for name in part_names("devices")}
    reports = [probe_backend(row) for row in matrix.rows]
    if args.json:
        print(
            json.dumps(
                {
                    "devices": {name: asdict(probe) for name, probe in devices.items()},
                    "backends": [
                        {
                            "name": report.row.name,
                            "device": report.row.device,
                            "kernels": report.row.kernels,
                            "graph": report.row.graph,
                            "status": report.row.status,
                            "available": report.available,
                            "reasons": list(report.reasons),
                        }
                        for report in reports
                    ],
                },
                indent=2,
            )
        )
        return 0
    print("Devices")
    for name, probe in devices.items():
        info = probe.info
        if info is None or not probe.available:
            print(f"  {name:<8} not here: {'; '.join(probe.reasons)}")
            continue
        print(
            f"  {name:<8} {info.name}, {info.num_cores} cores, {info.memory_bytes / 2**30:.1f} GiB"
        )
        print(f"  {'':<8} {info.arch}: {' '.join(info.features) or 'no vector extensions known'}")
    print("\nBackends (in the order of hw_matrix.yaml)")
    for report in reports:
        row = report.row
        mark = "can run" if report.available else "cannot"
        print(
            f"  {row.name:<10} {mark:<8} {row.device} + {row.kernels} + {row.graph}  [{row.status}]"
        )
        for reason in report.reasons:
            print(f"  {'':<19} - {reason}")
    return 0
