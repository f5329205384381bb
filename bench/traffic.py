"""Bytes that a launch moves, counted in Triton's intermediate code: what each load and store touches, times how often.

Elements beyond a row's end are masked and not moved, and what a whole grid touches less than twice it touches once: so
a load of every row is one pass over its tensor, and the same load in a second loop another. A tensor of one element
stays in the cache and counts once.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from mekd.kernels.aot import Launch
from mekd.kernels.rows import EVEN

_ACCESS = re.compile(r"tt\.(?:load|store) (%[\w#]+).*? : (?:tensor<([\dx]+)x)?!tt\.ptr<")
_POINTER = re.compile(r"(%[\w#]+) = (?:tt|arith)\.\w+ (%.*?) : .*!tt\.ptr<")
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (-?\d+) : i\d+")
_LOOP = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
#: What a program moves at most in a branch inside a loop: the ends of a row, as kernels/rows.py loads them.
ENDS = 2 * (EVEN.value - 1)
_UNKNOWN = re.compile(r"(tt\.atomic\w*|tt\.descriptor_\w+|tt\.gather|scf\.while)\b")


def moved(launch: Launch) -> int:
    """Bytes read and written; ValueError for code that this cannot count."""
    total, programs = 0, math.prod(launch.grid)
    cached = set()
    for argument, touched in _accesses(launch.compiled.asm["ttir"]):
        tensor = launch.arguments[argument]
        if tensor.numel() == 1:
            cached.add(argument)
        else:
            total += tensor.element_size() * _passes(tensor.numel(), programs * touched)
    return total + sum(launch.arguments[argument].element_size() for argument in cached)


def _passes(there: int, wanted: int) -> int:
    return wanted if wanted < there else wanted // there * there


def _accesses(code: str) -> Iterator[tuple[str, int]]:
    """The argument that each load or store goes to, and the elements that one program touches by it."""
    origin: dict[str, str] = {name: name[1:] for name in re.findall(r"(%\w+): !tt\.ptr<", code)}
    constants: dict[str, int] = {}
    inside: list[int | None] = [1]  # how often what is here runs; None for a branch inside a loop
    for raw in code.splitlines():
        line = re.sub(r"\s*loc\(.*\)$", "", raw).strip()
        if unknown := _UNKNOWN.search(line):
            raise ValueError(f"{unknown[1]} is not counted; teach bench/traffic.py what it moves")
        if line.startswith("}"):
            inside.pop()
        if line.endswith("{"):
            loop, times = _LOOP.search(line), inside[-1]
            branch = "scf.if" in line and times != 1
            inside.append(None if branch or times is None else times * (_trips(loop, constants) if loop else 1))
        if constant := _CONSTANT.match(line):
            constants[constant[1]] = int(constant[2])
        if access := _ACCESS.search(line):
            size = math.prod(map(int, access[2].split("x"))) if access[2] else 1
            yield origin[access[1]], ENDS if inside[-1] is None else size * inside[-1]
        elif pointer := _POINTER.match(line):
            sources = [origin[name] for name in re.findall(r"%[\w#]+", pointer[2]) if name in origin]
            if sources:
                origin[pointer[1]] = sources[0]


def _trips(loop: Any, constants: dict[str, int]) -> int:
    if not all(bound in constants for bound in loop.groups()):
        raise ValueError(f"{loop[0]} has bounds that are known only when it runs; its trips are not counted")
    low, high, step = (constants[bound] for bound in loop.groups())
    return max(0, -(-(high - low) // step))
