"""Several processes, as torchrun starts them: who writes, what they agree on, how a batch is shared.

A batch of the configuration is that of all processes together, so that one process and eight take the same steps and
pay the same queries. Process 0 writes; --out lies where all can read it. Alone, everything here does nothing.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mekd.errors import UsageError
from mekd.seeds import generator_at

Value = TypeVar("Value")


def join(device: str) -> None:
    """Join the processes that torchrun started, if it did: gloo for CPU tensors, nccl for CUDA's.

    device: engine.device; with CUDA every process takes the card of its LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own, count = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store over a restart: the addresses of the processes that were killed must not be found.
        # The count is that of one machine's torchrun alone; several have to be told not to share it (docs/imagenet.md).
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=own, world_size=count)
    barrier()  # one that is refused at once would end while another still connects, which would then say only that


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part(count: int) -> slice:
    """This process's rows of count ones: the parts of all are in order, and differ by one row at most."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def share(name: str, batch: int) -> int:
    """This process's images of a batch; UsageError names a batch that cannot be dealt out evenly."""
    if batch % world():
        raise UsageError(
            f"{name} is {batch} images over all processes together; with {world()} of them it must be a multiple of "
            f"{world()}"
        )
    return batch // world()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do the block before the others: it writes what they find there."""
    if rank():
        barrier()
    yield
    if rank() == 0:
        barrier()


def data_parallel(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over the processes by DistributedDataParallel.

    Buffers are not synchronised: batch norm in training reads none of them, process 0 saves its own, and writing them
    in the second of two forwards would change what the first one saved for backward.
    """
    if world() == 1:
        return module
    wrapped = DistributedDataParallel(module)
    wrapped.broadcast_buffers = False  # the argument's name depends on the release of torch
    return wrapped


def dropout_apart(seed: int) -> None:
    """Let processes after the first drop other channels than it does."""
    if rank():
        torch.manual_seed(generator_at(seed, "process", rank()).initial_seed())


def any_of(*flags: bool) -> list[bool]:
    """Whether each flag is up in any process: all of them learn it, and none goes on alone."""
    if world() == 1:
        return list(flags)
    raised = torch.tensor([int(flag) for flag in flags])
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised]


def sum_of(*numbers: float) -> list[float]:
    """Each number, summed over the processes."""
    if world() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Value) -> list[Value]:
    """The value of every process in order, at process 0; an empty list elsewhere."""
    if world() == 1:
        return [value]
    found: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, found)
    return found or []


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        any_of(False)
