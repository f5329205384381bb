"""MEKDLoss: the image distance and the KL of step 2, and how it treats the generator."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mekd.losses import PRESETS, MEKDLoss

Rows = np.ndarray
CLASSES = 6
#: Half the spacing of float32 numbers just below 1.
FLOOR = 2.0**-25


class Plain(nn.Module):
    """Linear, batch norm, tanh: codes (m, C) to images (m, 3, 2, 2). Counts how it is run."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linear, self.bn = nn.Linear(num_classes, 12), nn.BatchNorm1d(12)
        with torch.no_grad():
            for x in (*self.parameters(), self.bn.running_mean, self.bn.running_var):
                assert x is not None
                low = 0.5 if x is self.bn.running_var else -0.3
                x.copy_(low + torch.rand(x.shape, generator=generator))
        self.runs: list[bool] = []

    def draw(self, code: Tensor) -> Tensor:
        self.runs.append(torch.is_grad_enabled())
        return self.bn(self.linear(code)).unflatten(1, (3, 2, 2))

    def forward(self, code: Tensor) -> Tensor:
        return self.draw(code).tanh()


class WithPreactivation(Plain):
    """The same, with the image before its tanh at hand; asking for more is a waste."""

    def preactivation(self, code: Tensor) -> Tensor:
        return self.draw(code)

    def forward(self, code: Tensor) -> Tensor:
        raise AssertionError("the tanh is the loss's")


GENERATORS = [
    # Anybody's module: it is called.
    Plain,
    # Ours: the tanh is left to the loss.
    WithPreactivation,
]


def image(generator: Plain, code: Rows) -> Rows:
    """What the generator draws with its running statistics, in float64: (m, 12)."""
    w = {name: x.double().numpy() for name, x in generator.state_dict().items()}
    x = code @ w["linear.weight"].T + w["linear.bias"]
    x = (x - w["bn.running_mean"]) / np.sqrt(w["bn.running_var"] + generator.bn.eps)
    return np.tanh(x * w["bn.weight"] + w["bn.bias"])


def log_softmax(x: Rows) -> Rows:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def centre(log_p: Rows, floor: float = FLOOR) -> Rows:
    log_p = np.maximum(log_p, np.log(floor))
    return log_p - log_p.mean(-1, keepdims=True)


def standardize(x: Rows) -> Rows:
    return ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).clip(-4, 4)


def kl(log_p: Rows, student: Rows, tau: float) -> float:
    """Batchmean KL of p^tau against softmax(student / tau); log p may be -inf."""
    log_p = log_softmax(log_p / tau)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return float(np.where(p > 0, p * (log_p - log_softmax(student / tau)), 0.0).sum(-1).mean())


def inputs(num_classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher (5, C)."""
    random = np.random.default_rng(0)
    student, teacher = torch.from_numpy(3 * random.standard_normal((2, 5, num_classes))).to(dtype)
    return student, teacher


def answer_of(target: str, teacher: Tensor) -> tuple[dict[str, Any], Rows]:
    """The answer as MEKDLoss takes it, and log p."""
    log_p = log_softmax(teacher.double().numpy())
    if target == "logits":
        return {"logits": teacher}, log_p
    if target == "labels":
        labels = teacher.argmax(-1)
        with np.errstate(divide="ignore"):
            return {"labels": labels}, np.log(np.eye(teacher.shape[-1])[labels.numpy()])
    probs = torch.from_numpy(np.exp(log_p)).to(teacher.dtype)
    if target == "probs":
        return {"probs": probs}, log_p
    # The best two, the rest shared equally.
    values, indices = probs.topk(2)
    rest = (1 - values.double().numpy().sum(-1, keepdims=True)) / (teacher.shape[-1] - 2)
    p = np.repeat(rest, teacher.shape[-1], axis=1)
    np.put_along_axis(p, indices.numpy(), values.double().numpy(), axis=1)
    return {"topk": (values, indices)}, np.log(p)


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


def test_top_k_without_the_rest() -> None:
    student, _ = inputs()
    answer = (torch.tensor([[0.6, 0.2]] * 5), torch.tensor([[1, 4]] * 5))
    generator = Plain()
    image_term, kl_term = MEKDLoss(generator, rest="drop").terms(student, topk=answer)
    with np.errstate(divide="ignore"):
        log_p = np.log(np.array([[0, 0.75, 0, 0, 0.25, 0]] * 5))
    s = student.double().numpy()
    own, target = codes("log_probs", "topk", s, s, log_p, 5.0)
    distance = np.abs(image(generator, own) - image(generator, target)).mean()
    assert image_term.item() == pytest.approx(distance, rel=2e-5)
    assert kl_term.item() == pytest.approx(kl(log_p, s, 1.0), rel=2e-5)


# The code is made alike on both sides.


@pytest.mark.parametrize(
    ("code", "target", "offset"),
    [
        # Logits against the very same logits.
        ("logits", "logits", 0.0),
        ("log_probs", "logits", 0.0),
        ("standardized", "logits", 0.0),
        # Logits against the probabilities that an API makes of them.
        ("log_probs", "probs", 0.0),
        ("standardized", "probs", 0.0),
        # ... and against all of them, sorted.
        ("log_probs", "topk", 0.0),
        ("standardized", "topk", 0.0),
        # A constant per row, which softmax ignores, is no difference where the code is centred.
        ("log_probs", "logits", 2.0),
        ("standardized", "logits", 2.0),
        ("log_probs", "probs", 2.0),
        ("standardized", "probs", 2.0),
    ],
)
def test_a_student_that_agrees_draws_the_same_image(code: str, target: str, offset: float) -> None:
    _, teacher = inputs()
    probs = teacher.softmax(-1)
    answers: dict[str, Any] = {"logits": teacher, "probs": probs, "topk": probs.sort(descending=True)}
    student = (teacher + offset).requires_grad_()
    image_term, kl_term = MEKDLoss(WithPreactivation(), code=code).terms(student, **{target: answers[target]})
    assert image_term.item() == pytest.approx(0, abs=1e-6)
    assert kl_term.item() == pytest.approx(0, abs=1e-6)


def test_a_student_sure_of_the_label_draws_the_same_image() -> None:
    labels = torch.tensor([0, 3, 5])
    student = 100 * nn.functional.one_hot(labels, CLASSES).float()
    image_term, _ = MEKDLoss(Plain()).terms(student, labels=labels)
    assert image_term.item() == pytest.approx(0, abs=1e-6)
    # Sure of another one, it does not.
    image_term, _ = MEKDLoss(Plain()).terms(student, labels=labels.flip(0))
    assert image_term.item() > 1e-2


@pytest.mark.parametrize(
    ("floor", "low", "lower", "alike"),
    [
        # An API of two decimals answers 0.00 for anything below half a step.
        (0.005, 0.004, 0.0, True),
        # Above the floor, a difference is a difference.
        (0.005, 0.02, 0.01, False),
        # What float32 cannot tell from 0 beside 1, by default.
        (FLOOR, 1e-9, 0.0, True),
        # What it can.
        (FLOOR, 1e-6, 1e-7, False),
    ],
)
def test_probabilities_are_floored(floor: float, low: float, lower: float, alike: bool) -> None:
    def probs(p: float) -> Tensor:
        # The others keep their values: nothing but the small one differs.
        return torch.tensor([[p, 0.3, 0.25, 0.2, 0.15, 0.1 - floor]], dtype=torch.float64)

    student = probs(low).log().float()
    # Normalisation of the student moves all by log of a sum that is near 1.
    total = float(probs(low).sum())
    generator = Plain()
    loss = MEKDLoss(generator, tau=1.0, floor=floor)
    got = loss.terms(student, probs=probs(lower).float())[0].item()

    def code(p: Tensor) -> Rows:
        return centre(np.log(np.maximum((p / p.sum()).numpy(), 1e-300)), floor)

    wanted = np.abs(image(generator, code(probs(low))) - image(generator, code(probs(lower)))).mean()
    assert abs(total - 1) < 0.02
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert (got < 2e-3) == alike


def test_a_floored_class_gets_no_gradient_from_the_image() -> None:
    student = torch.tensor([[-60.0, 1.0, 0.5, 0.0, -0.5, -1.0]], requires_grad=True)
    _, teacher = inputs()
    image_term, _ = MEKDLoss(Plain()).terms(student, probs=teacher[:1].softmax(-1))
    image_term.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert abs(student.grad[0, 0].item()) < 1e-12
    assert student.grad[0, 1:].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("code", "target", "num_classes"),
    [
        # Two classes, standardised, are +1 and -1 whatever their values.
        ("standardized", "logits", 2),
        ("standardized", "probs", 2),
        ("standardized", "labels", 2),
        # One class has no variance at all.
        ("standardized", "logits", 1),
        # A label of two classes is standardised too.
        ("auto", "labels", 2),
    ],
)
def test_standardizing_fewer_than_three_classes_is_refused(code: str, target: str, num_classes: int) -> None:
    student, teacher = inputs(num_classes)
    answer = {"logits": teacher, "probs": teacher.softmax(-1), "labels": teacher.argmax(-1)}[target]
    with pytest.raises(ValueError, match=f"at least 3 classes, not {num_classes}"):
        MEKDLoss(Plain(num_classes), code=code)(student, **{target: answer})


def test_two_classes_are_enough_for_probabilities() -> None:
    student, teacher = inputs(2)
    assert MEKDLoss(Plain(2))(student, probs=teacher.softmax(-1)).item() > 0


@pytest.mark.parametrize(
    ("code", "target"),
    [
        # log p is no logit: the difference of the two formats would be the loss.
        ("logits", "probs"),
        ("logits", "topk"),
        ("logits", "labels"),
        # A label has no log-probabilities.
        ("log_probs", "labels"),
        # Probabilities are more than their argmax.
        ("onehot", "logits"),
        ("onehot", "probs"),
        ("onehot", "topk"),
    ],
)
def test_codes_that_do_not_fit_the_answer_are_refused(code: str, target: str) -> None:
    student, teacher = inputs()
    with pytest.raises(ValueError, match=rf"code is '{code}'.*{target}.*auto"):
        MEKDLoss(Plain(), code=code)(student, **answer_of(target, teacher)[0])


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
        # The KL untempered, everything averaged.
        ("default", 5, 1, 1.0, 1, 12),
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
        ({"image": -1.0}, ["image", "-1.0", "at least 0"]),
        ({"beta": 0.0, "image": 0.0}, ["beta", "image", "one above 0"]),
        # No probability at all, and every one of them.
        ({"floor": 0.0}, ["floor", "0.0", "between 0 and 1"]),
        ({"floor": 1.0}, ["floor", "1.0", "between 0 and 1"]),
        # Choices, each with its name, its value and what it may be.
        ({"scale": "tau3"}, ["scale", "'tau3'", "'tau2', 'tau', 'one'"]),
        ({"code": "rank"}, ["code", "'rank'", "'auto', 'logits', 'log_probs', 'onehot', 'standardized'"]),
        ({"reduction": "sum"}, ["reduction", "'sum'", "'mean', 'batchmean'"]),
        ({"rest": "keep"}, ["rest", "'keep'", "'spread', 'drop'"]),
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
