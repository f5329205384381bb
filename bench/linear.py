"""The last linear layer and the loss on it: one part of the rows at a time, against all logits at once.

Forward and backward, with the gradients of hidden, weight and bias. Peak memory is what is allocated beyond the inputs
and the gradients that are returned, by PyTorch's own profile; the bound is a quarter of logits and gradient in float32.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import eager
from bench.timing import interleaved, machine, spread
from mekd.engine.profile import peak_mb
from mekd.functional import kd_loss
from mekd.linear import linear_kd_loss

#: Rows, width and classes.
SHAPES = ((1024, 2048, 21841), (512, 2048, 128256))
QUICK = ((256, 512, 21841),)
COLUMNS = ("case", "dtype", "target", "impl", "median_s", "p20_s", "p80_s", "peak_mb", "bound_mb", "time", "threads")


def main(arguments: Sequence[str]) -> int:
    """Print the table and write linear.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench linear", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain one as well")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(arguments)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "linear.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for shape in QUICK if options.quick else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for target in ("logits", "topk"):
                    writer.writerows(measure(shape, dtype, target, options.repeats, options.compile))
                    file.flush()
    return 0


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, target: str, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    """One case, each way in turn; time is against the same products and kd_loss."""
    n, h, c = shape
    torch.manual_seed(0)
    layer = [torch.randn(n, h, dtype=dtype), torch.randn(c, h, dtype=dtype) * h**-0.5, torch.zeros(c, dtype=dtype)]
    parts = [x.requires_grad_() for x in layer]
    logits = torch.randn(n, c, dtype=dtype)
    given: dict[str, Any] = {"logits": logits} if target == "logits" else {"topk": top(logits)}
    ways: dict[str, Callable[..., Tensor]] = {
        "mekd.linear": lambda *layer: linear_kd_loss(*layer, **given, tau=eager.TAU, rest="tail"),
        "linear, kd_loss": lambda *layer: kd_loss(F.linear(*layer), **given, tau=eager.TAU, rest="tail"),
    }
    if target == "logits":
        ways["eager"] = lambda *layer: eager.tempered_kl(F.linear(*layer), logits)
        if compiled:
            ways["torch.compile"] = torch.compile(ways["eager"])
    works = {name: (lambda way=way: torch.autograd.grad(way(*parts), parts)) for name, way in ways.items()}
    taken = interleaved(works, repeats, most_s=60.0)
    whole = spread(taken["linear, kd_loss"])["median_s"]
    returned = sum(x.numel() * x.element_size() for x in parts) / 1e6
    rows = []
    for name, times in taken.items():
        found = spread(times)
        peak = peak_mb(works[name])
        row = {
            "case": "x".join(map(str, shape)), "dtype": str(dtype).removeprefix("torch."), "target": target,
            "impl": name, **{key: f"{value:.4g}" for key, value in found.items()},
            "peak_mb": f"{max(peak - returned, 0):.1f}", "bound_mb": f"{n * c * 8 / 4 / 1e6:.1f}",
            "time": f"{found['median_s'] / whole:.2f}", "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(" ".join(f"{key} {row[key]}" for key in COLUMNS), flush=True)
        rows.append(row)
    return rows


def top(logits: Tensor, k: int = 64) -> tuple[Tensor, Tensor]:
    """The k best classes' probabilities and which they are."""
    values, indices = logits.float().softmax(-1).topk(k)
    return values, indices
