"""The losses as modules, over mekd.functional, and the two of MEKD.

A temperature is a plain number of the module: no cast, no move and no state_dict touches it. Under torch.compile
another number compiles again; a schedule passes a 0-d tensor, which is held as it is, and fills it.
"""

import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mekd import checks, functional
from mekd.codes import CODES, FLOAT32_FLOOR, TARGETS, resolve_code, student_code, teacher_code
from mekd.nets.frozen import FrozenGenerator, freeze
from mekd.nets.generator import Generator, nuisance_of

log = logging.getLogger("mekd")


class _TemperedLoss(nn.Module):
    """A loss of functional with its settings; calling it passes the tensors on."""

    def __init__(self, loss: Callable[..., Tensor], tau: float | Tensor, settings: dict[str, Any]) -> None:
        super().__init__()
        checks.check_positive("tau", tau)
        self.loss, self.settings = loss, settings
        self.tau = tau if isinstance(tau, Tensor) else float(tau)

    def forward(self, student: Tensor, *targets: Tensor, **others: Any) -> Tensor:
        """The loss of logits (..., C) against targets, which the function of the same name describes."""
        return self.loss(student, *targets, tau=self.tau, **self.settings, **others)

    def extra_repr(self) -> str:
        settings = {"tau": self.tau, **self.settings}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


class KDLoss(_TemperedLoss):
    """functional.kd_loss with tau and settings (scale, rest, floor, ignore_index, dim, reduction, impl) held.

    Call it with student logits (..., C) and one target: logits, probs=, labels= or topk=; weights= and mask= too.
    """

    def __init__(self, tau: float | Tensor = 1.0, **settings: Any) -> None:
        super().__init__(functional.kd_loss, tau, settings)


class LogitStandardizedKDLoss(_TemperedLoss):
    """functional.logit_standardized_kd_loss with tau and settings held; call it with two logits (..., C)."""

    def __init__(self, tau: float | Tensor = 1.0, **settings: Any) -> None:
        super().__init__(functional.logit_standardized_kd_loss, tau, settings)


class DKDLoss(_TemperedLoss):
    """functional.dkd_loss with tau, alpha, beta and settings held; call it with student, teacher and labels."""

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, tau: float | Tensor = 4.0, **settings: Any) -> None:
        super().__init__(functional.dkd_loss, tau, {"alpha": alpha, "beta": beta, **settings})


class JSDLoss(_TemperedLoss):
    """functional.jsd_loss with beta, tau and settings held; call it with student and teacher."""

    def __init__(self, beta: float = 0.5, tau: float | Tensor = 1.0, **settings: Any) -> None:
        super().__init__(functional.jsd_loss, tau, {"beta": beta, **settings})


class ImageL1Loss(nn.Module):
    """functional.image_l1_loss with its settings (tanh, finished, reduction, inplace, impl) held."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of two images (m, ch, H, W)."""
        return functional.image_l1_loss(student, teacher, **self.settings)


class DeprivatizationLoss(nn.Module):
    """The losses of step 1 (Ma et al., 2024, section 3.2, with the signs set right).

    Calling it gives the generator's loss, see functional.generator_loss; discriminator() gives the other side's.
    """

    def __init__(self, alpha: float = 0.5, minimax: bool = False) -> None:
        super().__init__()
        checks.check_weight("alpha", alpha)
        self.alpha = alpha
        self.minimax = minimax

    def forward(self, d_fake: Tensor, confidence: Tensor | None = None, **answer: Any) -> Tensor:
        """mean (1 + alpha y) softplus(-d) for d_fake (m,) and y as confidence (m,), logits= or probs= (m, C)."""
        return functional.generator_loss(d_fake, confidence, alpha=self.alpha, minimax=self.minimax, **answer)

    def discriminator(self, d_real: Tensor, d_fake: Tensor) -> Tensor:
        """mean softplus(-d(x)) + mean softplus(d(G(z))) for d_real (m,), d_fake (n,)."""
        return functional.discriminator_loss(d_real, d_fake)


class MEKDLoss(nn.Module):
    """Step 2 (Ma et al., 2024, section 3.3): the distance of two generated images, and a tempered KL.

        L = || G(code(s)) - G(code(t)) ||_1 + beta * scale * KL(p_t^kl_tau || p_s^kl_tau)

    generator: a trained module from codes (m, C) to images in [-1, 1]; it is put in eval mode and its parameters
    stop requiring grad. It stays the caller's: no part of this module's state_dict(), train(), to() or double(). Codes
    are given to it in its dtype, and it must be where the student's logits are. A mekd.nets.Generator is rewritten by
    nets.frozen.freeze when it first draws, and when its weights have changed since (what is written through .data shows
    to nobody); what freeze() made is taken as it is. Another one that has a method preactivation(code) is asked for
    that, and the tanh is left to the loss. A generator with a nuisance (an attribute of that name: its entries) draws
    both pictures with the same one, generator(code, n). Of a mekd.nets.Generator backward runs once: the gradient is
    written over its picture.

    tau divides the code, kl_tau the logits of the KL; beta, scale ("tau2", "tau", "one") and image weigh the terms
    (image=0: KL alone, the generator is not run). code: "auto", or one of mekd.codes.CODES. floor: the smallest
    probability that the teacher's answer can tell from 0. rest ("spread", "drop", "tail"): what the KL does with what
    a top-k answer leaves out; for the code it is always spread. reduction of the image term: "mean" over pixels, so
    that one weight does for every size, or "batchmean" (sum over pixels). Raises ValueError naming the argument.
    """

    def __init__(
        self,
        generator: nn.Module,
        tau: float | Tensor = 5.0,
        beta: float = 1.0,
        scale: str = "tau2",
        code: str = "auto",
        reduction: str = "mean",
        *,
        kl_tau: float | Tensor = 1.0,
        image: float = 20.0,
        floor: float = FLOAT32_FLOOR,
        rest: str = "spread",
    ) -> None:
        super().__init__()
        checks.check_positive("tau", tau)
        checks.check_positive("kl_tau", kl_tau)
        checks.check_choice("scale", scale, checks.SCALES)
        checks.check_choice("code", code, CODES)
        checks.check_choice("reduction", reduction, ("mean", "batchmean"))
        checks.check_choice("rest", rest, checks.TOPK_RESTS)
        for name, value in (("beta", beta), ("image", image), ("floor", floor)):
            checks.check_number(name, value.detach() if isinstance(value, Tensor) else value)
        if not (beta >= 0 and image >= 0 and 0 < beta + image < math.inf):
            raise ValueError(
                f"beta is {beta} and image is {image}; both must be finite and at least 0, and one above 0"
            )
        if not 0 < floor < 1:
            raise ValueError(f"floor is {floor}; it must lie between 0 and 1")
        if not isinstance(generator, nn.Module):
            raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.nn.Module")
        if image > 0 and not isinstance(generator, Generator | FrozenGenerator):
            log.warning(
                "generator is a %s and not a mekd.nets.Generator: it is used as it is, without being folded, which is "
                "several times slower",
                type(generator).__name__,
            )
        # Kept out of the module tree, so that state_dict() and train() of the loss leave the generator alone.
        self._generator = [generator.eval().requires_grad_(False)]
        # By what a code is divided by: that depends on its kind, and so on the target.
        self._frozen: dict[float, FrozenGenerator] = {}
        self._frozen_of: list[tuple[Any, ...]] = []
        self.tau, self.kl_tau, self.beta, self.scale = tau, kl_tau, beta, scale
        self.code, self.reduction, self.image, self.floor, self.rest = code, reduction, image, floor, rest

    def forward(
        self,
        student: Tensor,
        logits: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        labels: Tensor | None = None,
        topk: tuple[Tensor, Tensor] | None = None,
        n: Tensor | None = None,
    ) -> Tensor:
        """The loss of student logits (m, C) against one target: logits, probs, labels or topk, as in kd_loss.

        n: the nuisance (m, entries) that the student's images were drawn with; drawn from N(0, I) without it.
        """
        image, kl = self.terms(student, logits, probs=probs, labels=labels, topk=topk, n=n)
        return self.image * image + self.beta * kl

    def terms(
        self, student: Tensor, logits: Tensor | None = None, *, n: Tensor | None = None, kept: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The image distance and the scaled KL, unweighted, with the arguments of forward.

        kept: what teacher_image() drew for this answer and this n before (m, ch, H, W); it is drawn here without it.
        """
        kl = functional.kd_loss(
            student, logits, tau=self.kl_tau, scale=self.scale, rest=self.rest, floor=self.floor, **others
        )
        if self.image == 0:
            return kl.new_zeros(()), kl
        if student.dim() != 2:
            raise ValueError(f"student has shape {tuple(student.shape)}; images are drawn of logits (m, C)")
        code, target, answer = self._resolve({"logits": logits, **others}, student.shape[-1])
        if kept is not None and n is None and self._entries:
            raise ValueError("kept was drawn with a nuisance, and n is None: pass the n that teacher_image() was given")
        draw, tau, frozen = self._drawing(code, self._nuisance(student, n))
        tanh = frozen or hasattr(self._generator[0], "preactivation")
        own = draw(self._fed(student_code(student, code, target, tau, self.floor)))
        theirs = kept
        if theirs is None:
            theirs = self._teacher_drawing(draw, tau, answer, code, target, student.shape[-1])
        image = functional.image_l1_loss(
            own, theirs.to(own.dtype), tanh=tanh, finished=tanh and kept is not None, reduction=self.reduction,
            inplace=frozen,  # freeze() needs its picture no more; of another generator, nobody knows
        )  # fmt: skip
        return image, kl

    def teacher_image(self, num_classes: int, n: Tensor | None = None, **target: Any) -> Tensor:
        """What the generator draws from the teacher's answer and n: (m, ch, H, W) in [-1, 1], to be kept."""
        code, kind, answer = self._resolve(target, num_classes)
        rows = answer[0] if isinstance(answer, tuple) else answer
        draw, tau, _ = self._drawing(code, self._nuisance(rows, n))
        drawn = self._teacher_drawing(draw, tau, answer, code, kind, num_classes)
        return drawn.tanh() if hasattr(self._generator[0], "preactivation") else drawn

    def _resolve(self, given: dict[str, Any], num_classes: int) -> tuple[str, str, Any]:
        targets = {name: value for name, value in given.items() if value is not None}
        if len(targets) != 1 or not targets.keys() <= TARGETS.keys():
            names = ", ".join(targets) or "none"
            raise ValueError(f"targets given: {names}; give exactly one of {', '.join(TARGETS)}")
        ((target, answer),) = targets.items()
        (generator,) = self._generator
        if isinstance(generator, Generator | FrozenGenerator) and num_classes != generator.num_classes:
            raise ValueError(
                f"there are {num_classes} classes, and the generator draws from codes of {generator.num_classes} "
                "entries: it must be one that was trained for as many classes"
            )
        return resolve_code(self.code, target, num_classes), target, answer

    @torch.no_grad()
    def _teacher_drawing(
        self, draw: Callable[[Tensor], Tensor], tau: float | Tensor, answer: Any, code: str, target: str, classes: int
    ) -> Tensor:
        return draw(self._fed(teacher_code(answer, code, target, tau, self.floor, classes)))

    @property
    def _entries(self) -> int:
        """The entries of the generator's nuisance."""
        return int(getattr(self._generator[0], "nuisance", 0))

    def _nuisance(self, rows: Tensor, n: Tensor | None) -> Tensor | None:
        """The nuisance for so many rows, the same for both pictures; None for a generator that takes none."""
        if n is None and not self._entries:
            return None
        like = torch.empty(len(rows), 0, device=rows.device)
        return self._fed(nuisance_of(like, self._entries, n))

    def _fed(self, code: Tensor) -> Tensor:
        """A code or a nuisance as the generator takes it: in the dtype of its weights."""
        weight = next((x for x in self._generator[0].parameters() if x.is_floating_point()), None)
        if weight is None:
            return code
        if weight.device != code.device:
            raise ValueError(
                f"generator is on {weight.device} and the answers on {code.device}; MEKDLoss.to() leaves the generator "
                f"alone: move it, generator.to('{code.device}')"
            )
        return code.to(weight.dtype)

    def _drawing(self, code: str, n: Tensor | None) -> tuple[Callable[[Tensor], Tensor], float | Tensor, bool]:
        """What draws pictures with n, what is left to divide codes by, and whether it is freeze()'s."""
        (generator,) = self._generator
        tau = self.tau if code in ("logits", "log_probs") else 1.0
        if not isinstance(generator, Generator | FrozenGenerator):
            draw = getattr(generator, "preactivation", generator)
            return (draw if n is None else lambda code: draw(code, n)), tau, False
        # A tensor may change its value between two calls: it is divided by each time.
        frozen = self._folded(1.0 if isinstance(tau, Tensor) else tau)
        tau = tau if isinstance(tau, Tensor) else 1.0
        if n is None:
            return frozen.preactivation, tau, True
        with torch.no_grad():
            offset = frozen.offset(n)  # the same for both pictures
        return (lambda code: frozen.preactivation_at(code, offset)), tau, True

    @_disable_dynamo  # which would compile the look at each weight by itself
    def _folded(self, tau: float) -> FrozenGenerator:
        """The generator as freeze() leaves it, dividing codes by tau; folded anew where its weights have changed."""
        (generator,) = self._generator
        of = [_version(x) for x in chain(generator.parameters(), generator.buffers())]
        if of != self._frozen_of:
            self._frozen, self._frozen_of = {}, of
        if tau not in self._frozen:
            whole = next(iter(self._frozen.values()), None)
            # It outlives the caller's inference mode or transform, and is differentiated in another one.
            with torch.inference_mode(False), temporarily_clear_interpreter_stack():
                if whole is None:
                    whole = generator if isinstance(generator, FrozenGenerator) else freeze(generator, tau)
                self._frozen[tau] = whole.divided_by(tau)
        return self._frozen[tau]


def _version(x: Tensor) -> tuple[Any, ...]:
    """What differs once somebody has written to a tensor or replaced its memory."""
    return id(x), x.data_ptr(), x.dtype, 0 if x.is_inference() else x._version
