"""The contract of every op: its schema, fake kernel and autograd, and which backend runs it. Knows no math.

An op torch.ops.mekd.NAME returns its loss, and a gradient for each differentiable input (empty unless grad is True),
computed in the same pass. The dispatcher chooses the backend: C++ for the CPU where the extension is built, Triton for
CUDA (and for the CPU where TRITON_INTERPRET=1 was set before the import), mekd.reference elsewhere. functional and
losses are what to call; this is what they stand on.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library import autograd
from torch.autograd import forward_ad

from mekd import extension, reference
from mekd.checks import traced

IMPLS = ("reference", "cpp", "triton")
LIBRARY = torch.library.Library("mekd", "DEF")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # known now: torch.compile cannot look for it


class Op(NamedTuple):
    """What callers need to know: how many arguments get a gradient, how many are targets, what runs it, the formula."""

    differentiable: int
    targets: int
    dispatch: Any
    reference: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., Tensor]


OPS: dict[str, Op] = {}


def run(name: str, *arguments: Any, reduction: str, impl: str | None = None) -> Tensor:
    """The loss of the op for its arguments up to reduction; the last one, grad, is known here."""
    op = OPS[name]
    if transformed():
        return _formula(op, impl)(*arguments, reduction)
    inputs = arguments[: op.differentiable]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    call = kernel_of(name, impl, inputs[0])
    if torch.compiler.is_compiling():
        return call(*arguments, reduction, wanted)[0]
    if not wanted:
        with torch._C._AutoDispatchBelowAutograd():
            return call(*arguments, reduction, False)[0]
    # The same as the autograd that is registered below, at half the cost of a call.
    return _Loss.apply(call, arguments, reduction, *inputs)


def kernel_of(name: str, impl: str | None, on: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """What computes an op for tensors like on, its losses and gradients: the dispatcher's choice, or the one named."""
    return OPS[name].dispatch if impl is None else _backend(OPS[name], impl, on)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work.

    A kernel has one gradient and no more: there the formula runs, which PyTorch differentiates in any way.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _formula(op: Op, impl: str | None) -> Callable[..., Tensor]:
    if impl not in (None, "reference"):
        raise RuntimeError(
            f"impl is {impl!r} within torch.func or forward-mode differentiation, where the formula alone can run; "
            "leave impl out, or say 'reference'"
        )
    return op.formula


def _backend(op: Op, impl: str, on: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(map(repr, IMPLS))}, or None to choose")
    if impl == "reference":
        return op.reference
    if impl == "triton":
        _check_triton(on)
        return op.dispatch
    if on.device.type != "cpu":
        raise ValueError(f"impl='cpp' runs on the CPU, and the tensors are on {on.device}")
    if extension.LOADED is None:
        raise RuntimeError(f"impl='cpp' is not available: {extension.WHY_NOT}")
    return op.dispatch


def _check_triton(on: Tensor) -> None:
    if on.device.type != "cuda" and not (extension.INTERPRETED and on.device.type == "cpu"):
        raise ValueError(
            f"impl='triton' runs on CUDA, and the tensors are on {on.device}; with TRITON_INTERPRET=1 in the "
            "environment before mekd is imported, Triton interprets its kernels on the CPU"
        )
    if not _HAS_TRITON:
        raise RuntimeError("impl='triton' is not available: triton is not installed; pip install triton")


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Any, arguments: Any, reduction: str, *inputs: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *grads = call(*arguments, reduction, True)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [x.dtype for x in inputs]
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *scaled(ctx, upstream, looks=True))


def scaled(ctx: Any, upstream: Tensor, looks: bool) -> list[Tensor]:
    """The stored gradients times what comes from above; looks: whether they are ours, to spare a product with 1."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the losses of mekd have first derivatives only: call backward() or grad() without create_graph=True, "
            "or use the formulas in mekd.reference, which autograd can differentiate twice"
        )
    grads = ctx.saved_tensors
    looks = looks and not traced()  # a number that is asked for is none of a fake tensor
    if upstream.dim() > 0:
        grads = [grad * upstream.reshape(upstream.shape + (1,) * (grad.dim() - upstream.dim())) for grad in grads]
    elif not looks or _mapped(upstream):
        grads = [grad * upstream for grad in grads]
    elif upstream.device.type != "cpu" or extension.INTERPRETED:
        return [_on_device(grad, upstream, dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
    elif upstream.item() != 1:
        grads = [grad * upstream for grad in grads]
    elif _graph_is_kept():  # another backward finds them as they are, whatever becomes of these
        grads = [g.clone() if g.dtype == dtype else g for g, dtype in zip(grads, ctx.dtypes, strict=True)]
    return [g if g.dtype == dtype else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]


# Looked up once: every backward asks.
_is_legacy_batched, _is_batched = torch._C._functorch.is_legacy_batchedtensor, torch._C._functorch.is_batchedtensor


def _mapped(x: Tensor) -> bool:
    """Whether x stands for many: vmap over upstreams, by either of PyTorch's."""
    return _is_legacy_batched(x) or _is_batched(x)


def _on_device(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The product where upstream is not to be waited for; a second backward finds the stored gradient as it was."""
    if grad.dtype != dtype:
        return torch.mul(grad, upstream, out=torch.empty_like(grad, dtype=dtype))  # rounds in the same pass
    if _graph_is_kept():
        return grad * upstream
    _scale_(grad, upstream)
    return grad


#: Whether the backward that is running leaves the stored tensors for another one (retain_graph=True).
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scale_(x: Tensor, by: Tensor) -> None:
    if traced():
        x.mul_(by)
    elif _HAS_TRITON and (x.is_cuda or extension.INTERPRETED):
        _kernel("scale_")(x, by)
        torch.autograd.graph.increment_version(x)
    elif by.device.type != "cpu" or by.item() != 1:
        x.mul_(by)


def _define(name: str, schema: str, fake: Callable[..., tuple[Tensor, ...]], differentiable: int = 1) -> None:
    """Register one op: its last two arguments are reduction and grad."""
    results = ", ".join(["Tensor"] * (1 + differentiable))
    # An image's gradient is laid out as the image: a compiler must not choose other strides after the fake kernel has
    # spoken.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    LIBRARY.define(f"{name}({schema}, str reduction, bool grad) -> ({results})", tags=tags)
    count = schema.count(",") + 3

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)  # zeros as large as the gradients, which nobody reads
        ctx.dtypes = [x.dtype for x in inputs[:differentiable]]

    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * count
        return (*scaled(ctx, upstream, looks=False), *[None] * (count - differentiable))

    op = getattr(torch.ops.mekd, name).default
    _derive(name, setup_context, backward)
    torch.library.register_fake(f"mekd::{name}", fake, lib=LIBRARY)
    formula = getattr(reference, f"{name}_loss")
    plain = functools.partial(_by_autograd, formula, differentiable)

    def composite(*arguments: Any) -> tuple[Tensor, ...]:
        if arguments[0].device.type == "cpu":
            _warn_once()
        return plain(*arguments)

    LIBRARY.impl(name, composite, "CompositeExplicitAutograd")
    names = [x.name for x in op._schema.arguments]
    targets = names.index("tau") - 1 if "tau" in names else 0
    OPS[name] = Op(differentiable, targets, op, plain, formula)


def define_alone(
    name: str, schema: str, results: int, call: Callable[..., Any], fake: Callable[..., Any],
    setup_context: Callable[..., None], backward: Callable[..., Any],
) -> None:  # fmt: skip
    """Register an op that is made of others: one function for every device, with its gradient."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    LIBRARY.define(f"{name}({schema}) -> ({', '.join(['Tensor'] * results)})", tags=tags)
    _derive(name, setup_context, backward)
    torch.library.register_fake(f"mekd::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, call, "CompositeExplicitAutograd")


def _derive(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What torch.library.register_autograd registers, but that loses tangents without a word."""
    derive = autograd.make_autograd_impl(getattr(torch.ops.mekd, name).default, autograd.Info(backward, setup_context))
    LIBRARY.impl(name, functools.partial(_without_tangents, name, derive), "Autograd", with_keyset=True)


def _without_tangents(name: str, call: Callable[..., Any], keyset: Any, *arguments: Any) -> Any:
    if forward_ad._current_level >= 0:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(f"torch.ops.mekd.{name} has no forward-mode derivative; mekd.functional has")
    return call(keyset, *arguments)


def _by_autograd(formula: Callable[..., Tensor], differentiable: int, *arguments: Any) -> tuple[Tensor, ...]:
    """The loss by the reference and, if asked, its gradients by PyTorch's autograd, from within a kernel."""
    *rest, wanted = arguments
    inputs = [x.detach() for x in rest[:differentiable]]
    if not wanted:
        return formula(*inputs, *rest[differentiable:]).contiguous(), *(empty_grad(x, False) for x in inputs)
    # A kernel runs below autograd; the formula needs it back.
    key = torch._C.DispatchKey
    with (
        torch.enable_grad(),
        torch._C._SetExcludeDispatchKeyGuard(key.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(key.ADInplaceOrView, False),
    ):
        # Gradients add up in float32, and are rounded once.
        wide = [x.to(reference.accumulation_dtype(x)).requires_grad_() for x in inputs]
        loss = formula(*wide, *rest[differentiable:])
        grads = torch.autograd.grad(loss.sum(), wide)
    empty = empty_image_grad if formula is reference.tanh_l1_loss else empty_grad
    found = (empty(x, True).copy_(grad) for x, grad in zip(inputs, grads, strict=True))
    return loss.detach().contiguous(), *found  # the kernels' layout, which the fake kernel has promised


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"mekd runs on plain PyTorch: {extension.WHY_NOT}", stacklevel=4)


def empty_grad(x: Tensor, wanted: bool) -> Tensor:
    """Contiguous, however x lies; float32 for float16, which is too narrow before a GradScaler has scaled."""
    return x.new_empty(x.shape if wanted else (0,), dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)


def empty_image_grad(x: Tensor, wanted: bool) -> Tensor:
    """empty_grad, but laid out as x where that is channels_last: pixels are written as they lie."""
    grad = empty_grad(x, wanted)
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return grad.to(memory_format=torch.channels_last) if wanted and last else grad


def _empty_loss(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=reference.accumulation_dtype(x))


def _fake_rows(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, wanted = arguments
    return _empty_loss(student, student.shape[:-1] if reduction == "none" else ()), empty_grad(student, wanted)


def _fake_images(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, wanted = arguments
    return _empty_loss(x, x.shape[:1] if reduction == "none" else ()), empty_image_grad(x, wanted)


def _fake_elements(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, wanted = arguments
    return _empty_loss(x, x.shape if reduction == "none" else ()), empty_grad(x, wanted)


def _fake_discriminator(real: Tensor, fake: Tensor, reduction: str, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_loss(real, ()), empty_grad(real, wanted), empty_grad(fake, wanted)


_ROWS = "Tensor tau, Tensor? weights, Tensor? mask"
_define("tempered_kl", f"Tensor student, Tensor target, {_ROWS}, bool probs, float slack, str scale", _fake_rows)
_define("tempered_kl_labels", f"Tensor student, Tensor labels, {_ROWS}, int ignore_index, str scale", _fake_rows)
_define(
    "tempered_kl_topk",
    f"Tensor student, Tensor values, Tensor indices, {_ROWS}, str rest, float slack, str scale",
    _fake_rows,
)
_define(
    "dkd",
    f"Tensor student, Tensor teacher, Tensor labels, {_ROWS}, float alpha, float beta, int ignore_index, str scale",
    _fake_rows,
)
_define(
    "jsd",
    f"Tensor student, Tensor teacher, {_ROWS}, float beta, float left, float right, bool log_probs, str scale",
    _fake_rows,
)
_define("tanh_l1", "Tensor a, Tensor b, Tensor? weights, bool tanh, bool finished", _fake_images)
_define(
    "gan_generator",
    "Tensor d, Tensor? response, str kind, float slack, float base, float alpha, bool minimax",
    _fake_elements,
)
_define("gan_discriminator", "Tensor d_real, Tensor d_fake", _fake_discriminator, differentiable=2)
LIBRARY.define("tanh_l1_(Tensor(a!) a, Tensor b, Tensor? weights, bool tanh, bool finished, str reduction) -> Tensor")


def _tanh_l1_reference(a: Tensor, *arguments: Any) -> Tensor:
    loss, grad = OPS["tanh_l1"].reference(a, *arguments, True)
    a.copy_(grad)
    return loss


def _tanh_l1_below_autograd(keyset: Any, *arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.mekd.tanh_l1_.default(*arguments)


LIBRARY.impl("tanh_l1_", _tanh_l1_reference, "CompositeExplicitAutograd")
LIBRARY.impl(
    "tanh_l1_", functools.partial(_without_tangents, "tanh_l1_", _tanh_l1_below_autograd), "Autograd", with_keyset=True
)
torch.library.register_fake("mekd::tanh_l1_", lambda a, *rest: _fake_images(a, *rest, True)[0], lib=LIBRARY)


class _InPlace(torch.autograd.Function):
    """tanh_l1_, which leaves the gradient where a was: a may be read by nobody else, and only once."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, call: Any, *arguments: Any) -> Tensor:
        ctx.gradient = a.detach()
        with torch._C._AutoDispatchBelowAutograd():
            loss = call(ctx.gradient, *arguments)
        torch.autograd.graph.increment_version(a)  # whoever saved a finds out
        ctx.version = a._version
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.gradient = ctx.gradient, None
        if grad is None:
            raise RuntimeError(
                "a second backward through image_l1_loss(inplace=True): the gradient lies where the student's "
                "pre-activation was, and has been given away; use inplace=False, or where MEKDLoss drew it, call that "
                "again for each backward"
            )
        if grad._version != ctx.version:
            raise RuntimeError("the student's pre-activation was written to after image_l1_loss(inplace=True) used it")
        if torch.is_grad_enabled():
            raise RuntimeError("image_l1_loss has first derivatives only: use create_graph=False")
        if upstream.dim() > 0:
            grad.mul_(upstream.reshape((-1,) + (1,) * (grad.dim() - 1)))
        else:
            _scale_(grad, upstream)
        return grad, *[None] * 6


def run_in_place(a: Tensor, *arguments: Any, impl: str | None = None) -> Tensor:
    """tanh_l1_ with its gradient, for arguments up to reduction."""
    op = OPS["tanh_l1"]
    call = (
        torch.ops.mekd.tanh_l1_.default if impl is None or _backend(op, impl, a) is op.dispatch else _tanh_l1_reference
    )
    return _InPlace.apply(a, call, *arguments)


@functools.cache
def _kernel(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"mekd.kernels.{name.rstrip('_')}"), name)


def _register_triton(name: str, otherwise: Callable[..., Any]) -> None:
    """Triton is imported by the first call, not with mekd."""

    def call(*arguments: Any) -> Any:
        return _kernel(name)(*arguments) if _HAS_TRITON else otherwise(*arguments)

    for key in ("CUDA", "CPU") if extension.INTERPRETED else ("CUDA",):
        LIBRARY.impl(name, call, key)


for _name, _op in OPS.items():
    _register_triton(_name, _op.reference)
_register_triton("tanh_l1_", _tanh_l1_reference)
extension.load()
