"""Black-box knowledge distillation by mapping emulation (MEKD), fast.

``mekd.functional`` and ``mekd.losses`` need nothing but torch. The command line, the oracles and the data
sets import what they need when they are used.
"""

from mekd import functional, losses

__version__ = "0.1.0"
__all__ = ["functional", "losses"]
