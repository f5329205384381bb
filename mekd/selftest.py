"""mekd selftest: every op on this machine against float64, and how fast it is, as one table for a bug report.

Each op runs in a process of its own: one that crashes, hangs or breaks the device takes no other with it.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mekd import __version__, extension, reference
from mekd.errors import UsageError
from mekd.ops import IMPLS
from mekd.testing import IMAGE_KINDS, Problem, compare, make, result, weights_of

#: The kinds of problems that exercise each op; the first one is timed.
OPS = {
    "tempered_kl": ("logits", "probs"),
    "tempered_kl_labels": ("labels",),
    "tempered_kl_topk": ("spread", "drop", "tail"),
    "dkd": ("dkd",),
    "jsd": ("jsd", "jsd-forward", "jsd-reverse", "jsd-skew", "jsd-skew-reverse", "jsd-log"),
    "tanh_l1": ("tanh", "finished", "images"),
    "tanh_l1_": ("in-place",),
    "gan_generator": ("gan-logits", "gan-probs", "gan-label", "minimax", "confidence"),
    "gan_discriminator": ("discriminator",),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Few classes, many, as many as a program holds in registers, and more; images of odd and of even sizes.
ROWS = ((65, 10), (7, 1000), (2, 16384), (3, 21841))
IMAGES = ((4, 3, 5, 5), (3, 3, 64, 64))
TIMED_ROWS = ((128, 100), (4096, 1000), (1024, 21841))
TIMED_IMAGES = ((64, 3, 64, 64), (64, 3, 224, 224))
#: On a card torch.compile of plain PyTorch is timed as well, of these alone: it takes seconds to compile each.
TIMED_COMPILED = ((4096, 1000), (64, 3, 224, 224))
LIMIT_S = 600.0  # for one op, compiling included


def main(arguments: Sequence[str]) -> int:
    """Run the self-test; returns 0 if everything passed, else 1. UsageError where the backend cannot run here."""
    parser = argparse.ArgumentParser(prog="mekd selftest", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--impl", choices=IMPLS, help="triton on cuda and cpp on the CPU, unless named")
    parser.add_argument("--only", nargs="+", choices=OPS, metavar="OP", help="these ops alone")
    parser.add_argument("--child", choices=OPS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = device_named(options.device)
    impl = options.impl or ("triton" if device.type == "cuda" else "cpp")
    if options.child:
        for line in op_lines(options.child, device, impl):
            print(json.dumps(line), flush=True)
        return 0
    print(*header(device, impl), sep="\n")
    lines = [line for op in options.only or OPS for line in run_op(op, device, impl)]
    table(lines)
    failed = [line for line in lines if line.get("failed")]
    for line in failed:
        print(f"\n{line['op']}, {line['part']}:\n{line['failed']}")
    print(f"\n{len(lines) - len(failed)} of {len(lines)} parts passed")
    return 1 if failed else 0


def device_named(text: str) -> torch.device:
    """The device, made current if it is one of several cards; UsageError where it is not here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UsageError(f"device is {text!r}; it must be cpu, cuda or cuda:N")
    device = torch.device(text)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device is {text!r}, and no CUDA device is visible; use --device cpu")
    if device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UsageError(f"device is {text!r}, and there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
        torch.cuda.set_device(device)  # events, which the speed is measured with, belong to the current one
    return device


def header(device: torch.device, impl: str) -> list[str]:
    """What the figures depend on."""
    lines = [
        f"mekd {__version__}, torch {torch.__version__}, python {platform.python_version()}, {platform.platform()}",
        f"backend {impl} on {device}",
    ]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        lines.append(
            f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB, "
            f"{card.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
        )
    else:
        lines.append(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    return lines


def run_op(op: str, device: torch.device, impl: str) -> list[dict[str, Any]]:
    """The lines of one op from a process of its own, and one that failed if it ended early."""
    environment = dict(os.environ)
    if impl == "triton" and device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    # With -m it would take a mekd that lies where the command runs, as a checkout that this one was installed from.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from mekd.selftest import main; raise SystemExit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--device", str(device), "--impl", impl, "--child", op]
    begun, ending = time.perf_counter(), ""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        output, errors = done.stdout, done.stderr
        if done.returncode:
            ending = f"the process ended with status {done.returncode}:\n{errors[-2000:]}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ending = f"nothing more after {LIMIT_S:.0f} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if ending:
        lines.append({"op": op, "part": "process", "failed": ending})
    bad = sum(bool(line.get("failed")) for line in lines)
    print(f"{op:<19} {len(lines) - bad} of {len(lines)} parts, {time.perf_counter() - begun:.0f} s", flush=True)
    return lines


def op_lines(op: str, device: torch.device, impl: str) -> Iterator[dict[str, Any]]:
    """One line for each part of one op: values by dtype, torch.compile, CUDA graphs, speed by case."""
    interpreted = impl == "triton" and extension.INTERPRETED
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        f"values {_name(dtype)}": partial(values, op, dtype, device, impl, interpreted) for dtype in DTYPES
    }
    if impl != "reference":  # which the dispatcher takes where there is nothing else
        parts["torch.compile"] = partial(compiled, op, device, impl)
    if device.type == "cuda":
        parts["CUDA graph"] = partial(captured, op, device, impl)
    for shape in ((4, 10),) if interpreted else TIMED_IMAGES if op.startswith("tanh") else TIMED_ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            compiling = device.type == "cuda" and shape in TIMED_COMPILED
            parts[f"speed {'x'.join(map(str, shape))} {_name(dtype)}"] = partial(
                speed, op, shape, dtype, device, impl, compiling
            )
    for name, part in parts.items():
        try:
            yield {"op": op, "part": name, **part()}
        except Exception as error:  # whatever it is, the next part shall run
            yield {"op": op, "part": name, "failed": f"{type(error).__name__}: {error}"[:2000]}


def values(op: str, dtype: torch.dtype, device: torch.device, impl: str, interpreted: bool) -> dict[str, Any]:
    """The worst error as a share of what is allowed, over kinds, shapes, values and reductions."""
    worst, cases = 0.0, 0
    for kind in OPS[op]:
        shapes = IMAGES if kind in IMAGE_KINDS else ROWS[:2] if interpreted else ROWS
        for shape in shapes:
            for numbers in ("plain", "near", "gap"):
                for reduction in ("mean",) if kind == "discriminator" else ("none", "mean"):
                    problem = make(kind, shape, dtype, numbers, str(device))
                    worst = max(worst, compare(problem, result(problem, impl, reduction), reduction))
                    cases += 1
    return {"cases": cases, "worst": worst}


def compiled(op: str, device: torch.device, impl: str) -> dict[str, Any]:
    """torch.compile in one graph gives what eager gives."""
    problem = make(OPS[op][0], device=str(device))
    if problem.options.get("inplace"):
        problem.options["inplace"] = False  # what the compiler is given
    expected = result(problem, impl, "mean")
    leaves = [x.detach().requires_grad_() for x in problem.students]
    loss = torch.compile(lambda *xs: problem.loss(*xs, reduction="mean", impl=impl), fullgraph=True)(*leaves)
    got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    torch.testing.assert_close(got, expected)
    return {}


def captured(op: str, device: torch.device, impl: str) -> dict[str, Any]:
    """A CUDA graph replays forward and backward on other numbers."""
    first, second = (make(OPS[op][0], device=str(device), seed=seed) for seed in (0, 1))
    expected = result(Problem(second.kind, second.students, first.target, first.options), impl, "mean")
    still = Problem(first.kind, [x.clone() for x in first.students], first.target, first.options)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        result(still, impl, "mean")  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = result(still, impl, "mean")
    for x, y in zip(still.students, second.students, strict=True):
        x.copy_(y)
    graph.replay()
    torch.cuda.synchronize(device)
    torch.testing.assert_close(got, expected)
    return {}


def speed(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, impl: str, compiling: bool
) -> dict[str, Any]:  # fmt: skip
    """Seconds of loss and gradient, GB/s of the bytes that must move, that as a share of a copy's, and the others'."""
    if op.startswith("tanh") and len(shape) == 2:
        shape = (shape[0], 1, shape[1])
    problem = make(OPS[op][0], shape, dtype, device=str(device))
    tensors = [x for x in _tensors(problem.target) if x.numel() >= problem.students[0].numel()]
    # The student is read and its gradient written; before the twin in place, result() copies it.
    touched = 4 if problem.options.get("inplace") else 2
    moved = sum(x.nbytes for x in tensors) + touched * sum(x.nbytes for x in problem.students)
    seconds, eager = (median_seconds(partial(result, problem, name, "mean"), device) for name in (impl, "reference"))
    versus = {"vs_reference": eager / seconds}
    if compiling:
        leaves = [x.detach().requires_grad_() for x in problem.students]
        twin = torch.compile(lambda *xs: plain(op, xs, problem.target, problem.options), fullgraph=True)
        versus["vs_compile"] = median_seconds(lambda: torch.autograd.grad(twin(*leaves), leaves), device) / seconds
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device)
    return {
        "seconds": seconds,
        "gb_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / copy,
        **versus,
    }


def plain(op: str, students: tuple[Tensor, ...], target: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The loss of an op's timed problem, reduction "mean", as a formula, which torch.compile sees through."""
    x, *others = (student.float() for student in students)
    if op.startswith("tanh_l1"):
        return reference.tanh_l1(x.flatten(1), target["teacher"].float().flatten(1)).sum() / x.numel()
    if op == "gan_generator":
        return reference.gan_generator(x, target["logits"].float().softmax(-1).amax(-1), 0.5).mean()
    if op == "gan_discriminator":
        return torch.stack([losses.mean() for losses in reference.gan_discriminator(x, *others)]).sum()
    tau: float = options["tau"]
    if op == "jsd":
        return reference.jsd(x, target["teacher"].float(), tau, *weights_of("jsd", options)).sum() / x.numel()
    if op == "dkd":
        losses = reference.dkd(x, target["teacher"].float(), target["labels"], tau, 1.0, options["beta"])
    elif op == "tempered_kl_labels":
        losses = reference.tempered_kl_labels(x, target["labels"], tau)
    elif op == "tempered_kl_topk":
        values, indices = target["topk"]
        losses = reference.tempered_kl_topk(x, values.float(), indices, tau, target["rest"])
    else:
        losses = reference.tempered_kl(x, target["logits"].float(), tau)
    return losses.sum() * tau**2 / x.numel()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(values: dict[str, Any]) -> Iterator[Tensor]:
    for value in values.values():
        yield from (x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor))


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median over repeats, on the device's clock; caches are overwritten before each on CUDA."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        taken = []
        for _ in range(repeats):
            begun = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken)
    others = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in pairs:
        others.zero_()
        first.record()
        work()
        last.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in pairs) / 1e3


def table(lines: list[dict[str, Any]]) -> None:
    """Markdown: values as shares of the allowed error, speed as GB/s and as a share of a copy's."""
    print("\n| op | part | result |\n|---|---|---|")
    for line in lines:
        if line.get("failed"):
            text = "FAILED"
        elif "worst" in line:
            text = f"{line['cases']} cases, worst error {line['worst']:.2f} of what is allowed"
        elif "seconds" in line:
            text = (
                f"{1e6 * line['seconds']:.0f} us, {line['gb_s']:.1f} GB/s, {100 * line['of_copy']:.0f} % of a copy, "
                f"{line['vs_reference']:.1f} times plain PyTorch"
            ) + (f", {line['vs_compile']:.1f} times its torch.compile" if "vs_compile" in line else "")
        else:
            text = "equal to eager"
        print(f"| {line['op']} | {line['part']} | {text} |")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
