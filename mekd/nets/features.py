"""What a classifier's last linear layer reads: its features."""

from types import TracebackType

from torch import Tensor, nn


def last_linear(network: nn.Module) -> nn.Linear:
    """The last linear layer of a network; ValueError for a network without one."""
    found = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError("the network has no linear layer, so that there are no features that one would read")
    return found[-1]


class Features:
    """A context in which value is what the last linear layer read of the last batch: (m, D)."""

    value: Tensor

    def __init__(self, network: nn.Module) -> None:
        self._layer = last_linear(network)

    def __enter__(self) -> "Features":
        self._hook = self._layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.value = inputs[0].flatten(1)
