"""The static sheet of the Triton kernels: what the machine code of each takes, read off without a GPU.

Every kernel, target kind, dtype and size class, with its gradient, for every architecture: registers, spills, shared
memory, how many loads and stores of which width, bytes moved an element against the least possible, what the backward
moves after it where the upstream gradient is 1 and where it is not, theoretical occupancy, and the time below which the
memory's bandwidth allows no run: a bound, not a measurement.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.timing import write_json
from bench.traffic import moved
from mekd.kernels.aot import ARCHS, access_widths, compiling, resources
from mekd.kernels.variants import CLASSES, DTYPES, ROWS, variants

#: Bytes a second by NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, H200 SXM; of B200 what its memory's clock gives,
#: for which the sheets round up to 8.
BANDWIDTH = {"sm_80": {"A100": 2.039e12}, "sm_90": {"H100": 3.35e12, "H200": 4.8e12}, "sm_100": {"B200": 7.67e12}}


def sheet(arch: str, dtypes: Sequence[torch.dtype] = DTYPES, classes: Sequence[int] = CLASSES) -> list[dict[str, Any]]:
    """One row for each variant; bytes are an element's of the largest tensor, bound_us is by the data sheet."""
    rows = []
    for variant in variants(dtypes, classes):
        with compiling(arch) as launches:
            variant.call()
        (launch,) = launches  # loss and gradient come from one launch
        taken, (loads, stores) = resources(launch), access_widths(launch)
        rows.append(
            {
                "kernel": variant.kernel, "variant": variant.name, "dtype": str(variant.dtype).removeprefix("torch."),
                "arch": arch, "c": variant.classes, "registers": taken.registers, "spill_bytes": taken.spill_bytes,
                "shared_bytes": taken.shared_bytes, "load_widths": loads, "store_widths": stores,
                "bytes_per_element": moved(launch) / variant.elements,
                "bytes_least": variant.bytes_least / variant.elements,
                "backward_bytes": [size / variant.elements for size in variant.backward],
                "occupancy": taken.occupancy,
                "bound_us": {name: 1e6 * variant.bytes_least / rate for name, rate in BANDWIDTH.get(arch, {}).items()},
            }
        )  # fmt: skip
    return rows


def _line(row: dict[str, Any]) -> str:
    loads, stores = (" ".join(f"{n}x{bits}" for bits, n in sorted(row[key].items(), reverse=True))
                     for key in ("load_widths", "store_widths"))  # fmt: skip
    back = ", ".join(f"{size:.2f}" for size in row["backward_bytes"])
    bounds = ", ".join(f"{name} {time:.1f}" for name, time in row["bound_us"].items())
    return (
        f"{row['kernel']:<18} {row['variant']:<10} {row['dtype']:<8} {row['c']:>6} {row['registers']:>4} "
        f"{row['spill_bytes']:>5} {row['shared_bytes']:>6}  {loads:<24} {stores:<14} {row['bytes_per_element']:>7.3f} "
        f"{row['bytes_least']:>7.3f} {back:>13} {row['occupancy']:>5.0%}  {bounds}"
    )


def main(arguments: Sequence[str]) -> int:
    """Print the sheet of all architectures; --json FILE also writes it."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    workers = min(len(ARCHS), len(os.sched_getaffinity(0)))
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for arch, found in zip(ARCHS, pool.map(sheet, ARCHS), strict=True):
            print(f"\n{arch}: {ROWS} rows, or 64 images of 3 x 224 x 224; bytes an element; bounds in us, not measured")
            print(
                f"{'kernel':<18} {'variant':<10} {'dtype':<8} {'C':>6} {'regs':>4} {'spill':>5} {'shared':>6}  "
                f"{'loads':<24} {'stores':<14} {'moved':>7} {'least':>7} {'backward':>13} {'occup':>5}  bound"
            )
            for row in found:
                print(_line(row), flush=True)
            rows += found
    if options.json:
        write_json(options.json, rows)
    return 0
