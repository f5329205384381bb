"""Random calls of the losses: right ones are held against float64, wrong ones must end in an error that says what.

A right call draws its kind, shape, dtype, values, temperature, reduction, layout, weights and mask, on every backend
that runs here. A wrong one is a right one in which an argument is replaced by what it may not be, or by what it may.
"""

import math
import multiprocessing
import random
import re
from collections import Counter
from typing import Any

import torch

from mekd import testing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PART = 2000
#: Of so many random calls a few are off by more than the tests allow, which hold what rounds in another order; so many
#: times as much is a fault.
NEAR = 4
FINE = ("right", "near", "refused", "answered")
WRONG: tuple[Any, ...] = (
    None, "3", math.nan, math.inf, -1.0, 0.0, 10**30, [], (), {}, b"x", True, torch.nan, torch.tensor(math.nan),
    torch.tensor([1.0, 2.0]), torch.zeros(0), torch.zeros(3, 4, dtype=torch.complex64), torch.zeros(2, 3).to_sparse(),
    torch.full((6, 7), math.nan), torch.full((6, 7), -math.inf), torch.full((6, 7), 10**6),
    torch.empty(6, 7, device="meta"),
    torch.zeros(6, dtype=torch.long), torch.full((6,), 99), torch.full((6,), -5), torch.zeros(6, dtype=torch.bool),
    (torch.zeros(6, 3), torch.zeros(6, 3)), (torch.full((6, 3), 0.3), torch.full((6, 3), 9)), "nothing", object(),
)  # fmt: skip


def run(calls: int, seed: int, impls: tuple[str, ...] = ("cpp", "reference")) -> tuple[Counter[str], dict[str, str]]:
    """How often each outcome came of so many calls, and an example of each that must not."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    context = multiprocessing.get_context("fork")
    for begin in range(0, calls, PART):
        numbers = range(begin, min(begin + PART, calls))
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(numbers, seed, impls, there))
        worker.start()
        there.close()
        try:
            found, more = here.recv()
            counts.update(found)
            examples = more | examples
        except EOFError:
            worker.join()
            counts[f"!died with {worker.exitcode}"] += 1
            examples.setdefault(f"!died with {worker.exitcode}", f"calls {numbers}")
        worker.join()
    return counts, examples


def _work(numbers: range, seed: int, impls: tuple[str, ...], out: Any) -> None:
    torch.set_num_threads(1)
    out.send(outcomes(numbers, seed, impls))


def outcomes(
    numbers: range, seed: int, impls: tuple[str, ...] = ("cpp", "reference")
) -> tuple[dict[str, int], dict[str, str]]:
    """The same of some calls, in this process, which a crash ends."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number in numbers:
        chance = random.Random(f"{seed} {number}")
        try:
            outcome, words = (_right if chance.random() < 0.6 else _wrong)(chance, chance.choice(impls), number)
        except BaseException as error:
            outcome, words = f"{type(error).__name__}", repr(error)[:400]
        counts[outcome] += 1
        if outcome not in FINE:
            examples.setdefault(outcome, f"call {number}, {words}")
    return counts, examples


def _problem(chance: random.Random, number: int, fixed: bool = False) -> testing.Problem:
    kind = chance.choice(testing.KINDS)
    shape = testing.SHAPES[kind]
    if not fixed:
        rows, classes = chance.choice((0, 1, 2, 7, 33)), chance.choice((1, 2, 3, 10, 17, 100, 257))
        lead: tuple[int, ...] = (rows,) if chance.random() < 0.7 else (rows, chance.choice((1, 3)))
        shape = (rows, chance.choice((1, 3)), chance.randrange(1, 9), chance.randrange(1, 9))
        if kind not in testing.IMAGE_KINDS:
            shape = (*(lead if kind in testing.ROW_KINDS else (rows,)), classes)
    options: dict[str, Any] = {}
    if kind in testing.ROW_KINDS and kind != "jsd-log":
        options["tau"] = chance.choice((0.5, 1.0, 2.0, 4.0))
    dtype = chance.choice(DTYPES)
    values = chance.choice(("plain", "plain", "near", "gap")) if dtype != torch.float16 else "plain"
    problem = testing.make(kind, shape, dtype, values, seed=number, **options)
    if kind in testing.ROW_KINDS and not fixed:
        random_of = torch.Generator().manual_seed(number)
        if chance.random() < 0.3:
            problem.options["weights"] = torch.rand(shape[:-1], generator=random_of)
        if chance.random() < 0.3:
            problem.options["mask"] = torch.rand(shape[:-1], generator=random_of) < 0.7
    return problem


def _right(chance: random.Random, impl: str, number: int) -> tuple[str, str]:
    problem = _problem(chance, number)
    if problem.kind != "in-place" and chance.random() < 0.4:  # another layout of the same numbers
        problem.students = [_laid_out(x, chance) for x in problem.students]
        problem.target = {
            k: _laid_out(x, chance) if isinstance(x, torch.Tensor) else x for k, x in problem.target.items()
        }
    reduction = chance.choice(_reductions(problem.kind))
    try:
        testing.check(problem, impl, reduction)
    except AssertionError as error:
        off = re.search(r"(\S+) apart where (\S+) is allowed", str(error))
        near = off is not None and float(off[1]) <= NEAR * float(off[2])
        return "near" if near else "wrong", f"{problem.kind} {problem.students[0].shape} {reduction} {impl}: {error}"
    return "right", ""


def _reductions(kind: str) -> tuple[str, ...]:
    if kind == "discriminator":
        return ("mean", "sum")
    return ("rowmean", "none", "mean", "batchmean", "sum")[0 if kind in testing.ROW_KINDS else 1 :]


def _laid_out(x: torch.Tensor, chance: random.Random) -> torch.Tensor:
    if x.dim() > 1 and chance.random() < 0.5:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = x.new_empty((*x.shape[:-1], 2 * x.shape[-1])) if x.dim() else x.clone()
    if x.dim():
        wide[..., ::2] = x
        return wide[..., ::2]
    return wide


def _wrong(chance: random.Random, impl: str, number: int) -> tuple[str, str]:
    problem = _problem(chance, number, fixed=True)
    arguments = {**problem.target, **problem.options, "reduction": _reductions(problem.kind)[-1], "impl": impl}
    named = [
        *(name for name, value in arguments.items() if not isinstance(value, bool)),
        "student",
        "weights",
        "mask",
        "dim",
        "scale",
        "alpha",
        "skew",
        "ignore_index",
        "tau_teacher",
    ]
    replaced = {name: chance.choice(WRONG) for name in chance.sample(named, chance.choice((1, 1, 2)))}
    students: list[Any] = [x.clone() for x in problem.students]
    if "student" in replaced:
        students[0] = replaced.pop("student")
    words = f"{problem.kind} {replaced} {students[0] if not isinstance(students[0], torch.Tensor) else ''}"
    try:
        loss = problem.function(*students, **{**arguments, **replaced})
    except (ValueError, TypeError, NotImplementedError, IndexError, RuntimeError) as error:
        said = str(error)
        clear = len(said) < 1500 and any(part in said for part in (*named, "d_fake", "d_real", "target", "unexpected"))
        return ("refused", "") if clear else (f"unclear {type(error).__name__}", f"{words}: {error!r}"[:600])
    return ("answered", "") if isinstance(loss, torch.Tensor) else ("no tensor", words)
