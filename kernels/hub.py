"""python -m mekd.kernels.hub --out DIR: a project for Hugging Face's kernel hub, which its kernel-builder publishes.

There a kernel is a package that loads under any name: it imports itself relatively, and else torch and triton alone. So
the kernels are copied with their imports rewritten, and with the two modules of mekd that they stand on.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mekd import checks, extension
from mekd.files import WriteError, write_text

OPS = (
    "dkd", "gan_discriminator", "gan_generator", "jsd", "tanh_l1", "tempered_kl", "tempered_kl_labels",
    "tempered_kl_topk",
)  # fmt: skip
SHARED = ("interpreted", "launch", "rows", "softmax", "tuning")
BUILD = """[general]
name = "mekd"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
pyext = ["json", "py"]
"""
FLAKE = """{
  description = "mekd: fused losses for knowledge distillation";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
INIT = '''"""Losses of mekd with their gradients, from one launch each: plain functions, without autograd."""

{imports}

__all__ = [{names}]
'''


def files() -> dict[str, str]:
    """The project: text by path."""
    here, package = Path(__file__).parent, Path("torch-ext/mekd")
    sources = {f"{name}.py": (here / f"{name}.py").read_text("utf-8") for name in (*OPS, *SHARED)}
    sources |= {Path(module.__file__).name: Path(module.__file__).read_text("utf-8") for module in (checks, extension)}
    project = {str(package / name): _relative(text) for name, text in sources.items()}
    imports = "\n".join(f"from .{name} import {name}" + ", tanh_l1_" * (name == "tanh_l1") for name in OPS)
    names = ", ".join(f'"{name}"' for name in (*OPS, "tanh_l1_"))
    project[str(package / "__init__.py")] = INIT.format(imports=imports, names=names)
    project[str(package / "tuning.json")] = (here / "tuning.json").read_text("utf-8")
    return {**project, "build.toml": BUILD, "flake.nix": FLAKE}


def _relative(text: str) -> str:
    text = re.sub(r"^( *)from mekd\.(?:kernels\.)?(\w+) import", r"\1from .\2 import", text, flags=re.MULTILINE)
    return re.sub(r"from \.kernels import|from mekd\.kernels import", "from . import", text)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns 0, or 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m mekd.kernels.hub", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    out = parser.parse_args(arguments).out
    try:
        for name, text in files().items():
            write_text(out / name, text)
    except WriteError as error:
        print(f"mekd.kernels.hub: {error}", file=sys.stderr)
        return 2
    print(f"{out} is a kernel-builder project; docs/kernel-hub.md says how it is built and published")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
