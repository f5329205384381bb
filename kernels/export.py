"""python -m mekd.kernels.export --arch sm_90 --out DIR: the kernels as cubins, for programs without a compiler.

The class count, the row strides and the images' size are compiled in; manifest.json says how each cubin is launched.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from mekd import __version__
from mekd.files import WriteError, write, write_text
from mekd.kernels.aot import ARCHS, Launch, compiling
from mekd.kernels.variants import CLASSES, DTYPES, variants

LAUNCH = (
    "cuLaunchKernel with 32 * warps threads and shared bytes; parameters: the arguments in this order, then two null "
    "pointers. A pointer or number of which divisible_by_16 names the argument is a multiple of 16."
)


def export(
    arch: str, out: Path, dtypes: Sequence[torch.dtype] = DTYPES, classes: Sequence[int] = CLASSES
) -> list[dict[str, Any]]:
    """Write a cubin for each variant into the folder out, and last manifest.json, which lists them; returns the list.

    ValueError for an unknown arch or class count; WriteError where out cannot be written, with an earlier manifest as
    it was: a cubin's name holds its digest, so that none is written over by another.
    """
    if not classes or min(classes) < 1:
        raise ValueError(f"classes are {list(classes)}; they must be numbers from 1 on")
    with compiling(arch):
        pass  # an unknown arch is refused before anything is written
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"out is {out}, and the folder cannot be made ({error}); name one that can") from error
    kernels = []
    for variant in variants(dtypes, classes):
        with compiling(arch) as launches:
            variant.call()
        for launch in launches:
            cubin = launch.compiled.asm["cubin"]
            digest = hashlib.sha256(cubin).hexdigest()
            name = str(variant.dtype).removeprefix("torch.")
            path = out / f"{variant.kernel}-{variant.name}-{name}-{variant.classes}-{digest[:12]}.cubin"
            write(path, lambda file, cubin=cubin: file.write(cubin))  # type: ignore[misc]
            about = {"op": variant.kernel, "variant": variant.name, "dtype": name, "c": variant.classes}
            kernels.append({**about, "file": path.name, "sha256": digest, **_described(launch)})
    manifest = {
        "arch": arch, "mekd": __version__, "triton": triton.__version__, "launch": LAUNCH, "kernels": kernels
    }  # fmt: skip
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return kernels


def _described(launch: Launch) -> dict[str, Any]:
    source, metadata = launch.compiled.src, launch.compiled.metadata
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    return {
        "name": metadata.name,
        "arguments": {name: kind for name, kind in source.signature.items() if name not in constants},
        "divisible_by_16": [names[path[0]] for path, found in source.attrs.items() if ["tt.divisibility", 16] in found],
        "constants": {
            name: value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in constants.items()
        },
        "grid": list(launch.grid), "warps": metadata.num_warps, "shared": metadata.shared,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """The command line; returns 0, or 2 for a mistake, which it names."""
    parser = argparse.ArgumentParser(prog="python -m mekd.kernels.export", description=__doc__)
    parser.add_argument("--arch", required=True, help=", ".join(ARCHS))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--classes", type=int, nargs="+", default=CLASSES, metavar="C", help="the class counts to compile for"
    )
    options = parser.parse_args(arguments)
    try:
        kernels = export(options.arch, options.out, classes=options.classes)
    except (ValueError, OSError, WriteError) as error:
        print(f"mekd.kernels.export: {error}", file=sys.stderr)
        return 2
    print(f"{len(kernels)} kernels for {options.arch} and their manifest.json in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
