"""What a server does to its answers against those who copy it: noise under the best class, and wrong answers far away.

Each is a function of the answer itself and of a seed, so that asking twice brings nothing more.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Defence:
    """noise: share of a random distribution that is mixed into each answer, whose best class stays the best (Orekondy
    et al., 2020, bound it likewise). mislead: answers whose top probability is below it name another class (adaptive
    misinformation; Kariyappa and Qureshi, 2020); 0 for none."""

    noise: float = 0.0
    mislead: float = 0.0
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.noise or self.mislead)

    def __call__(self, probs: Tensor) -> Tensor:
        """Probabilities (m, C) as they are given away, float32; without a defence as they are."""
        if not self:
            return probs
        return torch.stack([self._row(row) for row in probs.float()]) if len(probs) else probs.float()

    def _row(self, p: Tensor) -> Tensor:
        digest = hashlib.blake2b(p.numpy().tobytes() + str(self.seed).encode(), digest_size=8).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        best, top = int(p.argmax()), float(p.max())
        if top < self.mislead:
            return p.roll(int(random.integers(1, len(p))))
        if self.noise:
            p = (1 - self.noise) * p + self.noise * torch.from_numpy(random.dirichlet(np.ones(len(p)))).float()
            now = int(p.argmax())
            p[[best, now]] = p[[now, best]]
        return p
