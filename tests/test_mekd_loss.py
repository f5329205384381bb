"""MEKDLoss: the image distance and the KL of step 2, and how it treats the generator."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mekd import losses
from mekd.config import PRESETS
from mekd.losses import MEKDLoss
from mekd.nets.frozen import freeze
from mekd.nets.generator import Generator
from small_generator import CLASSES, Plain, Rows, WithPreactivation, answer_of, centre, image, inputs, log_softmax

GENERATORS = [
    # Anybody's module: it is called.
    Plain,
    # Ours: the tanh is left to the loss.
    WithPreactivation,
]


def standardize(x: Rows) -> Rows:
    return ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).clip(-4, 4)


def kl(log_p: Rows, student: Rows, tau: float) -> float:
    """Batchmean KL of p^tau against softmax(student / tau); log p may be -inf."""
    log_p = log_softmax(log_p / tau)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return float(np.where(p > 0, p * (log_p - log_softmax(student / tau)), 0.0).sum(-1).mean())


def codes(code: str, target: str, student: Rows, teacher: Rows, log_p: Rows, tau: float) -> tuple[Rows, Rows]:
    """Both sides' codes, written out."""
    if code == "logits":
        return student / tau, teacher / tau
    if code == "log_probs":
        return centre(log_softmax(student)) / tau, centre(log_p) / tau
    if target == "labels":
        return standardize(np.exp(log_softmax(student))), standardize(np.exp(log_p))
    if target == "logits":
        return standardize(student), standardize(teacher)
    return standardize(centre(log_softmax(student))), standardize(centre(log_p))


FITTING = [
    # (what the teacher answers, the code asked for, the code that it is)
    # The paper: logits / tau.
    ("logits", "auto", "logits"),
    ("logits", "logits", "logits"),
    # Logits treated as an API's probabilities would be.
    ("logits", "log_probs", "log_probs"),
    # What the generator's prior looks like.
    ("logits", "standardized", "standardized"),
    # An API that answers probabilities.
    ("probs", "auto", "log_probs"),
    ("probs", "log_probs", "log_probs"),
    ("probs", "standardized", "standardized"),
    # An API that answers its best classes.
    ("topk", "auto", "log_probs"),
    ("topk", "log_probs", "log_probs"),
    ("topk", "standardized", "standardized"),
    # An API that answers a label.
    ("labels", "auto", "onehot"),
    ("labels", "onehot", "onehot"),
    ("labels", "standardized", "onehot"),
]


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize(("target", "code", "means"), FITTING)
def test_value_is_the_formula(target: str, code: str, means: str, kind: type[Plain], reduction: str) -> None:
    student, teacher = inputs()
    answer, log_p = answer_of(target, teacher)
    generator = kind()
    weights: dict[str, Any] = {"beta": 0.7, "image": 1.5}
    loss = MEKDLoss(generator, tau=4.0, kl_tau=3.0, code=code, reduction=reduction, **weights)
    s, t = student.double().numpy(), teacher.double().numpy()
    ours, theirs = (image(generator, c) for c in codes(means, target, s, t, log_p, 4.0))
    distance = np.abs(ours - theirs).sum(1).mean() / (12 if reduction == "mean" else 1)
    divergence = 9 * kl(log_p, s, 3.0)

    got_image, got_kl = loss.terms(student, **answer)
    assert got_image.item() == pytest.approx(distance, rel=2e-5)
    assert got_kl.item() == pytest.approx(divergence, rel=2e-5)
    assert loss(student, **answer).item() == pytest.approx(1.5 * distance + 0.7 * divergence, rel=2e-5)


def test_a_label_among_many_classes_is_clipped() -> None:
    student, teacher = inputs(30)
    answer, log_p = answer_of("labels", teacher)
    generator = Plain(30)
    s, t = student.double().numpy(), teacher.double().numpy()
    own, target = codes("onehot", "labels", s, t, log_p, 5.0)
    # One against 29 zeros stands sqrt(29) standard deviations out.
    assert target.max() == 4.0
    wanted = np.abs(image(generator, own) - image(generator, target)).mean()
    assert MEKDLoss(generator).terms(student, **answer)[0].item() == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("rest", ["spread", "drop", "tail"])
def test_top_k_and_its_rest(rest: str) -> None:
    student, _ = inputs()
    answer = (torch.tensor([[0.6, 0.2]] * 5), torch.tensor([[1, 4]] * 5))
    generator = Plain()
    image_term, kl_term = MEKDLoss(generator, rest=rest).terms(student, topk=answer)
    spread, dropped = (np.array([[x, y, x, x, z, x]] * 5) for x, y, z in ((0.05, 0.6, 0.2), (0.0, 0.75, 0.25)))
    s = student.double().numpy()
    # The code is made of what is spread, whatever the KL does with the rest.
    own, target = codes("log_probs", "topk", s, s, np.log(spread), 5.0)
    distance = np.abs(image(generator, own) - image(generator, target)).mean()
    assert image_term.item() == pytest.approx(distance, rel=2e-5)
    with np.errstate(divide="ignore"):
        wanted = kl(np.log(dropped if rest == "drop" else spread), s, 1.0)
    if rest == "tail":
        q = np.exp(log_softmax(s))
        p, q = np.array([0.6, 0.2, 0.2]), np.stack([q[:, 1], q[:, 4], q[:, [0, 2, 3, 5]].sum(-1)], -1)
        wanted = float((p * np.log(p / q)).sum(-1).mean())
    assert kl_term.item() == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("rest", ["spread", "drop", "tail"])
def test_an_answer_without_an_entry(rest: str) -> None:
    student, _ = inputs()
    values, indices = torch.tensor([[0.6, 0.2]] * 5), torch.tensor([[1, 4]] * 5)
    indices[2] = -1
    image_term, kl_term = MEKDLoss(Plain(), rest=rest).terms(student, topk=(values, indices))
    with_uniform = values.clone(), indices.clone()
    with_uniform[0][2], with_uniform[1][2] = 1 / 6, torch.tensor([1, 4])  # what is missing makes it uniform
    same_image, same_kl = MEKDLoss(Plain(), rest=rest).terms(student, topk=with_uniform)
    assert image_term.item() == pytest.approx(same_image.item(), rel=1e-5)
    kept = torch.tensor([0, 1, 3, 4])
    _, without = MEKDLoss(Plain(), rest=rest).terms(student[kept], topk=(values[kept], indices[kept]))
    assert kl_term.item() == pytest.approx((same_kl if rest == "spread" else without).item(), rel=1e-5)


# The generator is frozen.


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_generator_is_frozen(kind: type[Plain]) -> None:
    generator = kind().train()
    before = {name: x.clone() for name, x in generator.state_dict().items()}
    loss = MEKDLoss(generator)
    assert not any(module.training for module in generator.modules())
    # Training mode of the loss is not the generator's.
    loss.train()
    assert not generator.training
    student, teacher = inputs()
    student.requires_grad_()
    loss(student, teacher).backward()
    assert all(x.grad is None and not x.requires_grad for x in generator.parameters())
    assert all(torch.equal(x, before[name]) for name, x in generator.state_dict().items())


def test_the_generator_is_no_part_of_the_losss_state() -> None:
    loss = MEKDLoss(Plain())
    assert not list(loss.parameters()) and not loss.state_dict() and not list(loss.children())


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_teachers_half_keeps_no_graph(kind: type[Plain]) -> None:
    generator = kind()
    student, teacher = inputs()
    MEKDLoss(generator)(student.requires_grad_(), teacher)
    assert sorted(generator.runs) == [False, True]


@pytest.mark.parametrize("target", ["logits", "probs", "topk", "labels"])
def test_without_the_image_term_the_generator_is_not_run(target: str) -> None:
    generator = Plain()
    student, teacher = inputs()
    answer, log_p = answer_of(target, teacher)
    loss = MEKDLoss(generator, image=0.0, beta=2.0, kl_tau=3.0)
    got = loss(student, **answer).item()
    assert got == pytest.approx(2 * 9 * kl(log_p, student.double().numpy(), 3.0), rel=2e-5)
    assert generator.runs == []
    assert loss.terms(student, **answer)[0].item() == 0.0


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("target", ["logits", "probs", "topk", "labels"])
def test_the_student_learns_from_both_terms(target: str, kind: type[Plain]) -> None:
    _, teacher = inputs()
    answer, _ = answer_of(target, teacher)

    def gradient(**weights: Any) -> Tensor:
        student = inputs()[0].requires_grad_()
        MEKDLoss(kind(), **weights)(student, **answer).backward()
        assert student.grad is not None
        return student.grad

    image_only, kl_only = gradient(image=1.0, beta=0.0), gradient(image=0.0, beta=1.0)
    assert image_only.abs().max() > 1e-5
    assert kl_only.abs().max() > 1e-5
    both = gradient(image=2.0, beta=3.0)
    torch.testing.assert_close(both, 2 * image_only + 3 * kl_only, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("target", "code"),
    [
        # A float64 code for a float64 student, whatever the teacher answers.
        ("logits", "log_probs"),
        ("probs", "log_probs"),
        ("probs", "standardized"),
        ("topk", "log_probs"),
        # The same, where the code is made of the logits as they are, or of a one-hot label.
        *(fit for fit in (("logits", "logits"), ("logits", "standardized"), ("labels", "onehot"))),
    ],
)
def test_gradcheck(target: str, code: str) -> None:
    student, teacher = inputs(dtype=torch.float64)
    answer, _ = answer_of(target, teacher)
    loss = MEKDLoss(WithPreactivation().double(), code=code, kl_tau=2.0)
    assert torch.autograd.gradcheck(lambda s: loss(s, **answer), (student.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["logits", "probs", "topk", "labels"])
def test_narrow_students_get_a_float32_loss(target: str, dtype: torch.dtype) -> None:
    student, teacher = inputs(dtype=dtype)
    answer, _ = answer_of(target, teacher.float())
    got = MEKDLoss(Plain())(student, **answer)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, MEKDLoss(Plain())(student.float(), **answer))


# Presets.


@pytest.mark.parametrize(
    ("preset", "tau", "kl_tau", "beta", "factor", "pixels"),
    [
        # The KL untempered, the image distance averaged and twenty times as heavy: 12 / 20.
        ("default", 5, 1, 1.0, 1, 0.6),
        # Ma et al. (2024): the image distance is summed over the pixels, beta is 0.5.
        ("paper", 5, 1, 0.5, 1, 1),
        # Their public code: 5 for both temperatures, the KL times tau.
        ("authors", 5, 5, 1.0, 5, 12),
    ],
)
def test_presets(preset: str, tau: float, kl_tau: float, beta: float, factor: float, pixels: int) -> None:
    student, teacher = inputs()
    s, t = student.double().numpy(), teacher.double().numpy()
    generator = Plain()
    distance = np.abs(image(generator, s / tau) - image(generator, t / tau)).sum(1).mean() / pixels
    wanted = distance + beta * factor * kl(log_softmax(t), s, kl_tau)
    assert MEKDLoss(generator, **PRESETS[preset])(student, teacher).item() == pytest.approx(wanted, rel=2e-5)


def test_the_default_preset_is_what_the_loss_does_by_itself() -> None:
    student, teacher = inputs()
    by_name = MEKDLoss(Plain(), **PRESETS["default"])(student, teacher)
    assert torch.equal(by_name, MEKDLoss(Plain())(student, teacher))


# Errors.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # Temperatures that divide by nothing or turn the classes around.
        ({"tau": 0.0}, ["tau", "0.0", "above 0"]),
        ({"kl_tau": -1.0}, ["kl_tau", "-1.0", "above 0"]),
        # Weights that reward distance, or no loss at all.
        ({"beta": -0.5}, ["beta", "-0.5", "at least 0"]),
        ({"beta": float("nan")}, ["beta", "nan", "finite"]),
        ({"image": float("inf")}, ["image", "inf", "finite"]),
        ({"image": -1.0}, ["image", "-1.0", "at least 0"]),
        ({"beta": 0.0, "image": 0.0}, ["beta", "image", "one above 0"]),
        # No probability at all, and every one of them.
        ({"floor": 0.0}, ["floor", "0.0", "between 0 and 1"]),
        ({"floor": 1.0}, ["floor", "1.0", "between 0 and 1"]),
        # Choices, each with its name, its value and what it may be.
        ({"scale": "tau3"}, ["scale", "'tau3'", "'tau2', 'tau', 'one'"]),
        ({"code": "rank"}, ["code", "'rank'", "'auto', 'logits', 'log_probs', 'onehot', 'standardized'"]),
        ({"reduction": "sum"}, ["reduction", "'sum'", "'mean', 'batchmean'"]),
        ({"rest": "keep"}, ["rest", "'keep'", "'spread', 'drop', 'tail'"]),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        MEKDLoss(Plain(), **arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("image_weight", [0.0, 1.0])
def test_targets_are_checked(image_weight: float) -> None:
    student, teacher = inputs()
    loss = MEKDLoss(Plain(), image=image_weight)
    with pytest.raises(ValueError, match="targets given: none"):
        loss(student)
    with pytest.raises(ValueError, match="targets given: logits, labels"):
        loss(student, teacher, labels=teacher.argmax(-1))
    with pytest.raises(ValueError, match="logits requires grad"):
        loss(student, teacher.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"logits has shape \(4, 6\)"):
        loss(student, teacher[:4])


# The generator is the caller's, and may change.


def drawing() -> Generator:
    torch.manual_seed(0)
    generator = Generator(CLASSES, 16, width=0.1)
    generator(torch.randn(8, CLASSES))
    return generator


@pytest.mark.parametrize(
    "change",
    [
        # A training step, an average of weights, a checkpoint.
        lambda g: [x.mul_(1.5) for x in g.parameters()],
        lambda g: g.load_state_dict({name: 1.5 * x for name, x in g.state_dict().items()}),
        # Running statistics alone.
        lambda g: g.bn.running_var.mul_(3),
        # One bias alone, in new memory.
        lambda g: setattr(g.last.bias, "data", g.last.bias + 1),
        lambda g: setattr(g.last, "bias", torch.nn.Parameter(g.last.bias + 1)),
    ],
)
def test_a_generator_that_changed_is_folded_again(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, (student, teacher) = drawing(), inputs()
    folded: list[float] = []
    monkeypatch.setattr(losses, "freeze", lambda g, tau: folded.append(tau) or freeze(g, tau))
    loss = MEKDLoss(generator)
    before = [loss.terms(student, teacher)[0] for _ in range(2)]
    assert folded == [5.0] and torch.equal(*before)
    with torch.no_grad():
        change(generator)
    after = loss.terms(student, teacher)[0]
    assert folded == [5.0, 5.0] and not torch.equal(after, before[0])
    assert torch.equal(after, MEKDLoss(generator).terms(student, teacher)[0])


@pytest.mark.parametrize("made", [drawing, Plain, WithPreactivation])
def test_the_code_has_the_dtype_of_the_generator(made: Any) -> None:
    student, teacher = inputs(dtype=torch.float64)
    generator = made().eval()
    wanted = MEKDLoss(generator)(student.float(), teacher.float()).double()
    for dtype, loss in (
        (torch.float32, MEKDLoss(generator)),
        # Casts of the loss leave the generator alone.
        (torch.float32, MEKDLoss(generator).double()),
        (torch.float32, MEKDLoss(generator).bfloat16()),
        (torch.float64, MEKDLoss(copy.deepcopy(generator).double())),
        (torch.bfloat16, MEKDLoss(copy.deepcopy(generator).bfloat16())),
    ):
        for s, t in ((student, teacher), (student.float(), teacher)):
            s = s.clone().requires_grad_()
            got = loss(s, t)
            got.backward()
            near = 5e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.detach().double(), wanted, rtol=near, atol=0)
            assert s.grad is not None and s.grad.dtype == s.dtype
        assert {x.dtype for x in loss._generator[0].parameters()} == {dtype}


def test_a_generator_that_is_elsewhere_is_named() -> None:
    # meta stands for a GPU.
    for generator in (drawing(), Plain()):
        loss, (student, teacher) = MEKDLoss(generator).to("meta"), (x.to("meta") for x in inputs())
        with pytest.raises(ValueError, match=r"generator is on cpu and the answers on meta.*generator\.to\('meta'\)"):
            loss(student, teacher)
        generator.to("meta")
        assert loss(student, teacher).device.type == "meta"


def test_a_temperature_that_is_a_tensor_may_change() -> None:
    tau, kl_tau = torch.tensor(4.0), torch.tensor(2.0)
    student, teacher = inputs()
    for generator in (drawing(), Plain()):
        loss = MEKDLoss(generator, tau, kl_tau=kl_tau)
        for value in (4.0, 1.5):
            tau.fill_(value), kl_tau.fill_(value / 2)
            wanted = MEKDLoss(generator, value, kl_tau=value / 2)(student, teacher)
            torch.testing.assert_close(loss(student, teacher), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("made", [drawing, Plain])
def test_forward_mode_gives_the_same_derivative(made: Any) -> None:
    student, teacher = inputs(dtype=torch.float64)
    loss, along = MEKDLoss(made().double()), torch.ones_like(student).cumsum(-1)
    slope = torch.autograd.grad(loss(leaf := student.clone().requires_grad_(), teacher), leaf)[0]
    got = torch.func.jvp(lambda s: loss(s, teacher), (student,), (along,))[1]
    torch.testing.assert_close(got, (slope * along).sum())
    torch.testing.assert_close(torch.func.grad(lambda s: loss(s, teacher))(student), slope)
