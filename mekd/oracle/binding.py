"""Running an ONNX Runtime session on the memory of torch tensors; on CUDA the host does not wait for it.

Images go in and answers come out where they lie. What copies: a recorded graph, at both ends, and a call in pieces,
whose answers are put together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ask = Callable[[Tensor], Tensor]  # images (n, ...) as the session takes them -> its raw output (n, ...)

#: ONNX Runtime's names of the types that go in and come out.
DTYPES = {
    "tensor(uint8)": torch.uint8,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
_NUMPY = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.float64: np.float64,
    torch.int32: np.int32,
    torch.int64: np.int64,
}


def bound(session: Any, source: str, sink: str, row: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Ask:
    """Run on the tensors' own memory: images, contiguous and on device, to a fresh output (n, *row) of dtype."""
    options = run_options(device)

    def ask(images: Tensor) -> Tensor:
        out = torch.empty((len(images), *row), dtype=dtype, device=device)
        session.run_with_iobinding(_bind(session, source, images, sink, out), options)
        return out

    return ask


def replayed(
    session: Any,
    source: str,
    sink: str,
    images: Tensor,
    row: tuple[int, ...],
    dtype: torch.dtype,
) -> Ask:
    """The same at fixed addresses and for one size, that of images (n, ...), as a recorded CUDA graph needs it."""
    held = images.clone()
    out = torch.empty((len(held), *row), dtype=dtype, device=held.device)
    binding, options = _bind(session, source, held, sink, out), run_options(held.device, graph=True)

    def ask(images: Tensor) -> Tensor:
        held.copy_(images)
        session.run_with_iobinding(binding, options)
        return out.clone()

    return ask


def on_stream(ask: Ask, stream: torch.cuda.Stream | None) -> Ask:
    """Ask on the session's stream, in order with the caller's: ONNX Runtime does not wait for torch by itself."""
    if stream is None:
        return ask

    def ask_there(images: Tensor) -> Tensor:
        here = torch.cuda.current_stream(stream.device)
        stream.wait_stream(here)
        if images.is_cuda:
            images.record_stream(stream)
        with torch.cuda.stream(stream):
            out = ask(images)
        here.wait_stream(stream)
        if out.is_cuda:
            out.record_stream(here)
        return out

    return ask_there


def in_pieces(ask: Ask, batch: int | None, fixed: bool) -> Ask:
    """Ask for at most batch images at once; fixed: for exactly so many, the last piece filled up with an image."""
    if batch is None:
        return ask

    def ask_pieces(images: Tensor) -> Tensor:
        m = len(images)
        missing = -m % batch if fixed else 0
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        parts = [ask(images[start : start + batch]) for start in range(0, len(images), batch)]
        return parts[0][:m] if len(parts) == 1 else torch.cat(parts)[:m]

    return ask_pieces


def run_options(device: torch.device, *, wait: bool = False, graph: bool = False) -> Any:
    """How a session runs on device: whether it waits for a GPU at the end, and whether it is recorded as a graph."""
    import onnxruntime as ort

    options = ort.RunOptions()
    if device.type == "cuda" and not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    if device.type == "cuda" and not graph:
        options.add_run_config_entry("gpu_graph_id", "-1")
    return options


def out_of_memory(error: BaseException) -> bool:
    """Whether ONNX Runtime or torch says that the memory did not suffice."""
    said = str(error).lower()
    told = ("failed to allocate memory", "out of memory", "outofmemory", "bad_alloc", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in said for words in told)


def _bind(session: Any, source: str, images: Tensor, sink: str, out: Tensor) -> Any:
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, source, images), (binding.bind_output, sink, out)):
        device, shape = tensor.device, list(tensor.shape)
        bind(name, device.type, device.index or 0, _NUMPY[tensor.dtype], shape, tensor.data_ptr())
    return binding
