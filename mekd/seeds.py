"""Random numbers as a function of what they are for, so that no process and no resumption changes them."""

import hashlib

import torch


def generator_at(*names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a run's seed, a purpose and a step, or whatever else names the draw."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
