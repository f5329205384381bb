"""The fused losses against eager PyTorch, torch.compile, mekd's own reference and this machine's limit."""

import argparse
import csv
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import eager
from bench.timing import interleaved, machine, spread, write_json
from mekd import extension, functional
from mekd.engine.profile import peak_mb

ROWS = ((128, 10), (128, 100), (256, 1000), (4096, 1000), (1024, 21841), (64, 128256))
IMAGES = ((128, 1, 32, 32), (64, 3, 64, 64), (64, 3, 224, 224))
#: What --quick measures: the cases that README quotes.
QUICK = {
    "tempered_kl": {"128x10", "128x100", "4096x1000", "1024x21841", "64x128256"},
    "tempered_kl_labels": {"128x100"},
    "tempered_kl_topk": {"128x100"},
    "dkd": {"4096x1000"},
    "jsd": {"4096x1000"},
    "tanh_l1": {"64x3x224x224"},
    "tanh_l1_": {"64x3x224x224"},
    "gan_generator": {"4096x1000"},
    "gan_generator_probs": {"4096x1000"},
}
DTYPES = ("float32", "bfloat16", "float16")
GROUPS_A_LINE = 18  # of the picture
COLUMNS = (
    "op", "case", "dtype", "direction", "impl", "median_s", "p20_s", "p80_s", "bytes_min", "gb_s", "peak_mb",
    "vs_eager", "vs_compile", "vs_limit", "vs_limit_alloc", "vs_copy",
)  # fmt: skip


class Case(NamedTuple):
    """One op on one shape: inputs, the student's among them first, ours, what a person would write, and its bounds."""

    op: str
    shape: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    read: tuple[Tensor, ...]  # what cannot be avoided: reading these,
    exponentials: int  # and this many exponentials; the gradient is written in the backward direction

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))


kd = partial(functional.kd_loss, tau=eager.TAU)
dkd = partial(functional.dkd_loss, tau=eager.TAU)


def kd_labels(student: Tensor, labels: Tensor, **how: Any) -> Tensor:
    """kd_loss against labels."""
    return kd(student, labels=labels, **how)


def kd_topk(student: Tensor, values: Tensor, indices: Tensor, **how: Any) -> Tensor:
    """kd_loss against the best classes."""
    return kd(student, topk=(values, indices), **how)


def generator_logits(d: Tensor, logits: Tensor, **how: Any) -> Tensor:
    """generator_loss with the teacher's logits."""
    return functional.generator_loss(d, logits=logits, **how)


def generator_probs(d: Tensor, probs: Tensor, **how: Any) -> Tensor:
    """generator_loss with the teacher's probabilities."""
    return functional.generator_loss(d, probs=probs, **how)


def cases(dtype: torch.dtype) -> list[Case]:
    """Every op on every shape."""
    found = []
    for n, c in ROWS:
        s, t = (3 * torch.randn(n, c)).to(dtype), (3 * torch.randn(n, c)).to(dtype)
        y, p, d = torch.randint(c, (n,)), t.float().softmax(-1).to(dtype), torch.randn(n).to(dtype)
        top, exps = p.topk(5), n * c
        found += [
            Case("tempered_kl", (n, c), (s, t), kd, eager.tempered_kl, (s, t), 2 * exps),
            Case("tempered_kl_labels", (n, c), (s, y), kd_labels, eager.tempered_kl_labels, (s,), exps),
            Case("tempered_kl_topk", (n, c), (s, *top), kd_topk, eager.tempered_kl_topk, (s,), exps),
            Case("dkd", (n, c), (s, t, y), dkd, eager.dkd, (s, t), 2 * exps),
            Case("jsd", (n, c), (s, t), functional.jsd_loss, eager.jsd, (s, t), 2 * exps),
            Case("gan_generator", (n, c), (d, t), generator_logits, eager.gan_generator, (t,), exps),
            Case("gan_generator_probs", (n, c), (d, p), generator_probs, eager.gan_generator_probs, (p,), 0),
        ]
    for shape in IMAGES:
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        twin = partial(functional.image_l1_loss, inplace=True)
        found += [
            Case("tanh_l1", shape, (a, b), functional.image_l1_loss, eager.tanh_l1, (a, b), 2 * a.numel()),
            Case("tanh_l1_", shape, (a.clone(), b), twin, eager.tanh_l1, (a, b), 2 * a.numel()),
        ]
    return found


def step(loss: Callable[..., Tensor], case: Case, backward: bool) -> Callable[[], object]:
    """One call of a loss, with its backward pass if asked."""
    student, *rest = case.inputs
    if not backward:
        return torch.no_grad()(lambda: loss(student, *rest))
    leaf = student.detach().requires_grad_()

    def forward_and_backward() -> None:
        leaf.grad = None
        # The in-place twin wants what a network puts out, not a leaf.
        loss(leaf.view_as(leaf) if case.op == "tanh_l1_" else leaf, *rest).backward()

    return forward_and_backward


def limits(case: Case, backward: bool, exp_s: float) -> dict[str, Callable[[], object]]:
    """Work that moves the bytes which the op must move, into memory that is there and into fresh memory."""
    student = case.inputs[0]
    if not backward or case.op.startswith("gan_generator"):
        reads = [x.view(-1) for x in case.read]
        return {"limit": lambda: [x.sum() for x in reads], "limit_alloc": lambda: [x.sum() for x in reads]}
    first, second = case.read[0], case.read[-1]
    if first is second:
        out = torch.empty_like(first)
        return {"limit": lambda: out.copy_(first), "limit_alloc": lambda: first.clone()}
    out = student if case.op == "tanh_l1_" else torch.empty_like(first)
    fresh = partial(torch.add, first, second)
    return {"limit": lambda: torch.add(first, second, out=out), "limit_alloc": fresh}


def exponential_seconds(repeats: int) -> float:
    """Seconds of one exponential: a vectorised loop in cache, on all threads."""
    x = torch.rand(1 << 14) - 0.5
    out = torch.empty_like(x)
    taken = interleaved({"exp": lambda: torch.exp(x, out=out)}, repeats)["exp"]
    return sorted(taken)[len(taken) // 2] / x.numel()


def measured(case: Case, backward: bool) -> tuple[str, ...]:
    """What a case in one direction is called: the first columns of its rows."""
    dtype = str(case.inputs[0].dtype).removeprefix("torch.")
    return case.op, case.name, dtype, "forward+backward" if backward else "forward"


def measure(case: Case, backward: bool, repeats: int, compiled: bool, exp_s: float) -> list[dict[str, Any]]:
    """A row for each implementation of one case in one direction."""
    plain = {"eager": case.plain}
    if compiled:
        torch._dynamo.reset()
        plain["compile"] = torch.compile(case.plain, dynamic=False)
    ours = {"cpp": case.ours} if extension.LOADED else {}
    mine = {"reference": partial(case.ours, impl="reference"), **ours}
    works = {name: step(loss, case, backward) for name, loss in {**plain, **mine}.items()}
    bounds = limits(case, backward, exp_s)
    taken = interleaved({**works, **bounds}, repeats)
    copy = spread(taken["limit"])["median_s"]  # of the bytes alone
    for bound in bounds:
        taken[bound] = [max(seconds, case.exponentials * exp_s) for seconds in taken[bound]]
    median = {name: spread(seconds)["median_s"] for name, seconds in taken.items()}
    written = case.inputs[0].nbytes if backward else 0
    bytes_min = sum(x.nbytes for x in case.read) + written
    rows = []
    for name, seconds in taken.items():
        rows.append(
            {
                **dict(zip(COLUMNS[:4], measured(case, backward), strict=True)),
                "impl": name,
                **spread(seconds),
                "bytes_min": bytes_min,
                "gb_s": bytes_min / median[name] / 1e9,
                "peak_mb": peak_mb(works[name]) if name in works else None,
                "vs_eager": median["eager"] / median[name],
                "vs_compile": median["compile"] / median[name] if compiled else None,
                "vs_limit": median[name] / median["limit"],
                "vs_limit_alloc": median[name] / median["limit_alloc"],
                "vs_copy": median[name] / copy,
            }
        )
    # Six figures of what noise changes by a tenth are enough.
    return [{key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def ranges(rows: list[dict[str, Any]]) -> list[str]:
    """Of each op the smallest and the largest ratio over its shapes, against eager and, where it ran, torch.compile."""
    ours = [r for r in rows if r["impl"] == "cpp"]
    columns = list(dict.fromkeys((r["direction"], r["dtype"]) for r in ours))
    head = [f"{direction}, {dtype}" for direction, dtype in columns]
    lines = [f"| op | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for op in dict.fromkeys(r["op"] for r in ours):
        cells = []
        for direction, dtype in columns:
            chosen = [r for r in ours if (r["op"], r["direction"], r["dtype"]) == (op, direction, dtype)]
            spans = [[r[key] for r in chosen if r[key]] for key in ("vs_eager", "vs_compile")]
            cells.append("; ".join(f"{min(span):.1f} to {max(span):.1f}" for span in spans if span))
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than eager, float32, forward + backward: a panel for each op, a group for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [r for r in rows if r["dtype"] == "float32" and r["direction"] == "forward+backward"]
    speed = {(r["op"], r["case"], r["impl"]): r["vs_eager"] for r in chosen}
    ops = {op: list(dict.fromkeys(r["case"] for r in chosen if r["op"] == op)) for op in (r["op"] for r in chosen)}
    bars = [(impl, colour) for impl, colour in (("compile", "#9aa5b1"), ("cpp", "#0b6e99"))
            if any(r["impl"] == impl for r in chosen)]  # fmt: skip
    lines: list[list[str]] = [[]]
    for op in ops:
        if sum(len(ops[other]) for other in [*lines[-1], op]) > GROUPS_A_LINE:
            lines.append([])
        lines[-1].append(op)
    widest = max(sum(len(ops[op]) for op in line) for line in lines)
    figure = plt.figure(figsize=(2.2 + 0.75 * widest, 3.8 * len(lines) + 0.4), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    panels = {}
    for part, line in zip(parts, lines, strict=True):
        widths = [len(ops[op]) + 0.4 for op in line]
        row = part.subplots(1, len(line), sharey=True, gridspec_kw={"width_ratios": widths}, squeeze=False)[0]
        row[0].set_ylabel("times faster than eager PyTorch")
        panels |= dict(zip(line, row, strict=True))
    for op, axes in panels.items():
        names = ops[op]
        for place, (impl, colour) in enumerate(bars):
            at = [x + 0.38 * (place - (len(bars) - 1) / 2) for x in range(len(names))]
            axes.bar(at, [speed[op, name, impl] for name in names], 0.36, color=colour, label=impl)
        bounds = [speed[op, name, "limit"] for name in names]
        axes.hlines(bounds, [x - 0.42 for x in range(len(names))], [x + 0.42 for x in range(len(names))],
                    color="#d98e04", linewidth=2.5, label="limit")  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 64)  # the limit of a call that is all overhead lies above
        axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.set_title(re.sub("_(probs|labels|topk)$", r"\n(\1)", op), fontsize=9)
        axes.set_xticks(range(len(names)), [name.replace("x", "\u00d7") for name in names], fontsize=7, rotation=35)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle(f"Forward + backward, float32, {machine()['threads']} threads", x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run that was stopped, of each case that has all of its implementations."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [
            {k: v if k in COLUMNS[:5] else float(v) if v else None for k, v in r.items()} for r in csv.DictReader(file)
        ]
    whole = {tuple(r[name] for name in COLUMNS[:4]) for r in rows if r["impl"] == "limit_alloc"}  # the last
    return [r for r in rows if tuple(r[name] for name in COLUMNS[:4]) in whole]


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table as it grows, and write CSV, PNG and, with --json, JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench losses", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the cases README quotes: forward + backward")
    parser.add_argument("--only", nargs="*", help="names of ops")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 with --quick, else float32 bfloat16")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for losses.csv and losses.png")
    parser.add_argument("--resume", action="store_true", help="keep what losses.csv holds, measure what is missing")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    begun, rows = time.perf_counter(), kept(options.out / "losses.csv") if options.resume else []
    done = {tuple(r[name] for name in COLUMNS[:4]) for r in rows}
    print(", ".join(f"{key} {value}" for key, value in machine().items()), f", kernels {extension.LOADED}", sep="")
    exp_s = exponential_seconds(options.repeats)
    print(f"one exponential: {1e9 * exp_s:.3f} ns, all threads")
    print(f"{'op':<19}{'case':<14}{'dtype':<10}{'direction':<17}{'ours ms':>9} {'(20-80 %)':<16}"
          f"{'eager':>7}{'compile':>9}{'copy':>7}{'limit':>7}{'alloc':>7}{'MB':>8}{'GB/s':>7}")  # fmt: skip
    with (options.out / "losses.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for dtype in options.dtypes or (DTYPES[:1] if options.quick else DTYPES[:2]):
        for case in cases(getattr(torch, dtype)):
            if options.only and case.op not in options.only:
                continue
            if options.quick and case.name not in QUICK.get(case.op, ()):
                continue
            for backward in (True,) if options.quick or case.op == "tanh_l1_" else (False, True):
                if measured(case, backward) in done:
                    continue
                new = measure(case, backward, options.repeats, not options.no_compile, exp_s)
                rows += new
                with (options.out / "losses.csv").open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS).writerows(new)
                own = next((r for r in new if r["impl"] == "cpp"), new[-3])
                between = f"({1e3 * own['p20_s']:.3g}-{1e3 * own['p80_s']:.3g})"
                against = f"{own['vs_compile']:8.1f}x" if own["vs_compile"] else f"{'-':>9}"
                print(f"{case.op:<19}{case.name:<14}{own['dtype']:<10}{own['direction']:<17}"
                      f"{1e3 * own['median_s']:9.3f} {between:<16}{own['vs_eager']:6.1f}x{against}"
                      f"{own['vs_copy']:7.2f}{own['vs_limit']:7.2f}{own['vs_limit_alloc']:7.2f}{own['peak_mb']:8.1f}{own['gb_s']:7.1f}",
                      flush=True)  # fmt: skip
    draw(rows, options.out / "losses.png")
    if not options.quick:
        print(
            "\n".join(
                ["", "smallest to largest over the shapes, times eager; times torch.compile:", "", *ranges(rows), ""]
            )
        )
    if options.json:
        write_json(options.json, rows)
    print("eager, compile: times faster than those; copy: times what moving the least bytes takes; limit, alloc: times")
    print("the larger of that and of the exponentials (alloc: with a fresh result)")
    print(f"{time.perf_counter() - begun:.0f} s; {options.out}/losses.csv, {options.out}/losses.png")
    return 0
