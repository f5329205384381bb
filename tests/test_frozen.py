"""freeze(): the same pictures and input gradients as the trained generator in eval mode."""

import copy

import pytest
import torch
from torch import Tensor

from mekd.functional import image_l1_loss
from mekd.losses import MEKDLoss
from mekd.nets.frozen import freeze
from mekd.nets.generator import STAGES, Generator
from small_generator import Plain


def trained(num_classes: int, size: int, channels: int = 3, nuisance: int = 0) -> Generator:
    """Weights, running statistics and affine parameters that are nothing like their initial values."""
    torch.manual_seed(0)
    generator = Generator(num_classes, size, channels, width=0.125 if size > 32 else 0.25, nuisance=nuisance)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.01)
        for _ in range(3):
            generator(torch.randn(4, num_classes))
    return generator.eval()


def drawn(draw: object, code: Tensor) -> tuple[Tensor, Tensor]:
    code = code.detach().requires_grad_()
    image = draw(code)  # type: ignore[operator]
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=image.dtype)
    return image, torch.autograd.grad((image * weights).sum(), code)[0]


@pytest.mark.parametrize("size", STAGES)
# Few classes: all before the first leaky ReLU is one layer; many: it stays apart.
@pytest.mark.parametrize("num_classes", [2, 10, 100, 1000])
def test_pictures_and_input_gradients(size: int, num_classes: int) -> None:
    generator, code = trained(num_classes, size), torch.randn(3, num_classes)
    torch.testing.assert_close(freeze(generator)(code), generator(code), rtol=0, atol=1e-5)
    # In float64, as rounding turns a leaky ReLU over where its input is nearly 0, and with it the gradient.
    generator = generator.double()
    image, grad = drawn(generator.preactivation, code.double())
    got, got_grad = drawn(freeze(generator).preactivation, code.double())
    torch.testing.assert_close(got, image, rtol=0, atol=1e-10 * image.abs().max().item())
    torch.testing.assert_close(got_grad, grad, rtol=0, atol=1e-10 * grad.abs().max().item())


def test_few_classes_take_one_layer_and_many_do_not() -> None:
    assert freeze(trained(10, 32)).merged
    assert not freeze(Generator(1000, 32)).merged


def test_the_temperature_is_in_the_first_layer() -> None:
    generator = trained(10, 16)
    frozen, code = freeze(generator, tau=5.0), 5 * torch.randn(3, 10)
    assert frozen.tau == 5.0
    torch.testing.assert_close(frozen(code), generator(code / 5.0), rtol=0, atol=1e-5)


def test_nothing_is_left_to_train_and_the_generator_is_as_it_was() -> None:
    generator = trained(10, 16)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    torch.manual_seed(3)
    frozen = freeze(generator)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(3).get_state())  # a resumed run freezes again
    image_l1_loss(frozen.preactivation(torch.randn(3, 10, requires_grad=True)), torch.zeros(3, 3, 16, 16)).backward()
    assert not any(x.requires_grad or x.grad is not None for x in frozen.parameters())
    torch.testing.assert_close(dict(generator.state_dict()), before, rtol=0, atol=0)


def test_channels_last_and_the_twin_in_place() -> None:
    frozen = freeze(trained(10, 32))
    code = torch.randn(3, 10)
    with torch.no_grad():
        theirs = frozen.preactivation(torch.randn(3, 10))
    assert theirs.is_contiguous(memory_format=torch.channels_last)
    grads = []
    for inplace in (False, True):
        leaf = code.clone().requires_grad_()
        image_l1_loss(frozen.preactivation(leaf), theirs, inplace=inplace).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_a_generator_of_another_make_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Plain.*mekd\.nets\.Generator"):
        freeze(Plain())


def test_a_generator_of_another_make_is_used_as_it_is_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = Plain(10)
    loss = MEKDLoss(plain)
    assert "generator is a Plain" in caplog.text and "as it is" in caplog.text
    caplog.clear()
    student = torch.randn(3, 10, requires_grad=True)
    loss(student, torch.randn(3, 10)).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    MEKDLoss(trained(10, 16))
    MEKDLoss(plain, image=0.0)  # draws nothing
    assert not caplog.text


NUISANCES = [
    # (classes, entries of n)
    # The default for ten classes: the first up-convolution is in the first layer.
    (10, 54),
    # More of it than of the code.
    (2, 200),
    # Many classes: the first layer stays apart.
    (1000, 24),
]


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize(("num_classes", "entries"), NUISANCES)
def test_pictures_and_input_gradients_with_a_nuisance(size: int, num_classes: int, entries: int) -> None:
    generator = trained(num_classes, size, nuisance=entries)
    code, n = 5 * torch.randn(3, num_classes), torch.randn(3, entries)
    frozen = freeze(generator, tau=5.0)
    # n is not divided.
    torch.testing.assert_close(frozen(code, n), generator(code / 5, n), rtol=0, atol=1e-5)
    generator, code, n = generator.double(), code.double(), n.double()
    frozen = freeze(generator, tau=5.0)
    image, grad = drawn(lambda code: generator.preactivation(code / 5, n), code)
    offset = frozen.offset(n)
    for draw in (
        # Drawn once.
        lambda code: frozen.preactivation(code, n),
        # As one of two pictures with the same n.
        lambda code: frozen.preactivation_at(code, offset),
        # From another tau, as a loss divides it.
        lambda code: freeze(generator).divided_by(5.0).preactivation(code, n),
    ):
        got, got_grad = drawn(draw, code)
        torch.testing.assert_close(got, image, rtol=0, atol=1e-10 * image.abs().max().item())
        torch.testing.assert_close(got_grad, grad, rtol=0, atol=1e-10 * grad.abs().max().item())


def test_another_tau_shares_all_but_the_codes_weights() -> None:
    frozen = freeze(trained(10, 16, nuisance=6))
    other = frozen.divided_by(4.0)
    assert frozen.divided_by(1.0) is frozen and (frozen.tau, other.tau) == (1.0, 4.0)
    torch.testing.assert_close(other.first.weight, frozen.first.weight / 4, rtol=0, atol=0)
    assert other.first.weight is not frozen.first.weight
    assert all(a is b for a, b in zip(other.ups.parameters(), frozen.ups.parameters(), strict=True))


def test_a_nuisance_is_drawn_where_it_is_not_given_and_refused_where_it_does_not_fit() -> None:
    generator, code = trained(10, 16, nuisance=6), torch.randn(3, 10)
    for draw in (generator, freeze(generator)):
        torch.manual_seed(4)
        images = draw(code)
        n = torch.manual_seed(4) and torch.randn(3, 6)
        torch.testing.assert_close(images, draw(code, n), rtol=0, atol=0)
        assert not torch.equal(draw(code), images)
        with pytest.raises(ValueError, match=r"n has shape \(3, 5\).*takes \(3, 6\)"):
            draw(code, n[:, 1:])
    with pytest.raises(ValueError, match=r"n has shape \(3, 6\).*takes \(3, 0\)"):
        freeze(trained(10, 16))(code, n)
    with pytest.raises(ValueError, match=r"nuisance is -1.*at least 0"):
        Generator(10, 16, nuisance=-1)


def test_in_bfloat16_the_picture_is_near_and_comes_in_float32() -> None:
    frozen = freeze(trained(10, 32, nuisance=6))
    code, n = torch.randn(8, 10), torch.randn(8, 6)
    narrow = copy.deepcopy(frozen).bfloat16()(code, n)
    assert narrow.dtype == torch.float32
    assert (narrow - frozen(code, n)).abs().mean() < 0.01


def test_an_empty_batch_costs_nothing() -> None:
    # As student[labels >= 0] may leave it.
    for generator in (trained(10, 16), trained(1000, 16, nuisance=4)):
        student = torch.zeros(0, generator.num_classes, requires_grad=True)
        loss = MEKDLoss(generator)(student, torch.zeros(0, generator.num_classes))
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.shape == student.shape


@pytest.mark.parametrize("tau", [5.0, torch.tensor(5.0)])
def test_what_was_first_drawn_in_inference_mode_can_be_learnt_from(tau: float | Tensor) -> None:
    # A validation before the first step, and one against another kind of answer.
    generator, student, teacher = trained(10, 16), torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    loss = MEKDLoss(generator, tau)
    for target in ({"logits": teacher}, {"labels": teacher.argmax(-1)}):
        with torch.inference_mode():
            looked = loss(student, **target)
        assert torch.equal(loss(student, **target), looked)
        loss(student, **target).backward()


def test_it_may_be_folded_within_torch_func() -> None:
    generator, student, teacher = trained(10, 16), torch.randn(3, 10), torch.randn(3, 10)
    leaf = student.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(MEKDLoss(generator)(leaf, teacher), leaf)
    loss = MEKDLoss(generator)
    torch.testing.assert_close(torch.func.grad(lambda s: loss(s, teacher))(student), wanted)
    loss = MEKDLoss(generator)
    each = torch.func.vmap(lambda s, t: loss(s[None], t[None]))(student, teacher)
    torch.testing.assert_close(each.mean(), MEKDLoss(generator)(student, teacher))


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match=r"generator is a function; it must be a torch\.nn\.Module"):
        MEKDLoss(lambda code: code)  # type: ignore[arg-type]
    loss = MEKDLoss(trained(10, 16))
    with pytest.raises(ValueError, match="there are 7 classes, and the generator draws from codes of 10 entries"):
        loss(torch.randn(3, 7), torch.randn(3, 7))
    with pytest.raises(ValueError, match="there are 7 classes"):
        loss.teacher_image(7, logits=torch.randn(3, 7))
    for shape in ((10,), (2, 3, 10), (2, 10, 4, 4)):
        with pytest.raises(ValueError, match=r"student has shape .*; images are drawn of logits \(m, C\)"):
            loss(torch.randn(shape), torch.randn(shape))


def test_a_second_backward_says_what_to_do() -> None:
    loss, student, teacher = MEKDLoss(trained(10, 16)), torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    value = loss(student, teacher)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward .*MEKDLoss .*call that again for each backward"):
        value.backward()
    loss(student, teacher).backward()


def test_under_compile_its_weights_are_looked_at_in_eager() -> None:
    loss, student, teacher = MEKDLoss(trained(10, 16)), torch.randn(3, 10, requires_grad=True), torch.randn(3, 10)
    wanted = loss(student, teacher)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # for each weight
        for _ in range(2):
            assert torch.equal(torch.compile(loss, backend="aot_eager")(student, teacher), wanted)
    torch._dynamo.reset()
