"""Distances between samples, and attacks, against what is known of them by hand."""

import math

import pytest
import torch

from mekd import distances

ot = pytest.importorskip("ot", reason="POT measures distances, and cannot be imported: pip install 'mekd[audit]'")


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_wasserstein_is_exact() -> None:
    # On a line the best plan keeps the order, also of unequal numbers.
    x, y = torch.tensor([3.0, 0.0, 1.0]), torch.tensor([5.0, 1.0, 2.0])
    assert distances.wasserstein((x[:, None] - y[None]).abs()) == pytest.approx((1 + 1 + 2) / 3)
    assert distances.wasserstein((x[:, None] - torch.tensor([0.0])[None]).abs()) == pytest.approx(4 / 3)


def test_of_labels_it_is_the_difference_of_how_often_each_is_named() -> None:
    one = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 2]), 3)
    other = torch.nn.functional.one_hot(torch.tensor([2, 1, 1, 2]), 3)
    assert distances.wasserstein(distances.half_l1(one, other)) == pytest.approx(0.5)


def test_a_student_that_is_the_teacher_is_within_its_noise_and_another_is_not() -> None:
    teacher = (3 * torch.randn(400, 10, generator=random())).softmax(1)
    apart, noise = distances.answers_apart(teacher, teacher, random(1))
    assert apart.mean == pytest.approx(noise.mean) and noise.low < noise.mean < noise.high
    off = (teacher.log() + torch.tensor([2.0, *[0.0] * 9])).softmax(1)  # prefers one class
    apart, noise = distances.answers_apart(off, teacher, random(1))
    assert apart.mean > noise.high


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.35, 0.35])
    right = torch.tensor([True, True, False, False, True, False])
    assert distances.calibration_error(confidence, right) == pytest.approx((4 * 0.4 + 2 * 0.15) / 6)


def test_who_repeats_comes_nearer_than_chance_and_who_does_not_does_not() -> None:
    private = torch.randn(300, 1, 6, 6, generator=random())
    repeated = private[:100] + 0.1 * torch.randn(100, 1, 6, 6, generator=random(1))
    assert distances.share_nearer(repeated, private) == 1.0
    fresh = torch.randn(300, 1, 6, 6, generator=random(2))
    assert 0.35 < distances.share_nearer(fresh, private) < 0.65
    # A picture of one colour is nearer to everything than anything is, and is no one's.
    grey = torch.ones(50, 1, 6, 6)
    assert distances.share_nearer(grey, private) == 1.0 and distances.share_of_one(grey, private) == 0.0
    assert distances.share_of_one(repeated, private) == 1.0 and distances.share_of_one(fresh, private) < 0.04


def test_a_perceptual_hash_sees_through_brightness_and_noise() -> None:
    grid = torch.randn(40, 3, 8, 8, generator=random())
    images = torch.nn.functional.interpolate(grid, (32, 32), mode="bicubic").mul(40).add(128).clamp(0, 255)
    changed = (0.8 * images + 20 + 4 * torch.randn(images.shape, generator=random(1))).clamp(0, 255).to(torch.uint8)
    assert distances.share_alike(changed, images.to(torch.uint8)) > 0.75
    assert distances.share_alike(changed[:20], images[20:].to(torch.uint8)) == 0.0


def test_neighbours_of_the_same_of_a_part_and_of_another_distribution() -> None:
    real, same = torch.randn(500, 4, generator=random()), torch.randn(500, 4, generator=random(1))
    alike = distances.neighbours(real, same)
    assert alike.precision > 0.85 and alike.recall > 0.85 and alike.coverage > 0.85 and 0.8 < alike.density < 1.2
    narrow = distances.neighbours(real, 0.3 * same)
    assert narrow.precision > 0.95 and narrow.recall < 0.3 and narrow.density > 1.2
    away = distances.neighbours(real, same + 20)
    assert away == (0.0, 0.0, 0.0, 0.0)


def test_mutual_information_and_ranks() -> None:
    assert distances.mutual_information(1000 * torch.eye(4)) == pytest.approx(math.log(4), abs=0.01)
    drawn = torch.randint(10, (2, 5000), generator=random())
    independent = torch.bincount(10 * drawn[0] + drawn[1], minlength=100).view(10, 10)
    assert distances.mutual_information(independent) < 0.003, "the bias of 81 cells would be 0.008"
    x = torch.randn(50, 7, generator=random())
    assert distances.rank_correlation(x, x.exp()) == pytest.approx(1) == -distances.rank_correlation(x, -x)
    assert abs(distances.rank_correlation(x, torch.randn(50, 7, generator=random(1)))) < 0.2


def test_an_attack_and_its_interval() -> None:
    chance = [
        distances.attack(torch.randn(300, generator=random(i)), torch.randn(400, generator=random(1000 + i)))
        for i in range(200)
    ]
    covered = sum(low < 0.5 < high for _, low, high in chance)
    assert 183 <= covered <= 198, "95 of 100"
    better = distances.attack(torch.randn(300, generator=random()) + 1, torch.randn(400, generator=random(1)))
    assert better.auc == pytest.approx(0.76, abs=0.04) and better.low > 0.7  # Phi(1 / sqrt 2)
    wider = distances.attack(torch.randn(300, generator=random()) + 1, torch.randn(400, generator=random(1)), 3)
    assert wider.auc == better.auc and wider.low < better.low < better.high < wider.high
    known = distances.attack(torch.ones(20), torch.zeros(300))
    assert known.auc == 1.0 and 0.8 < known.low < 0.9, "twenty say no more than that"


def test_images_apart_is_told_from_private_halves() -> None:
    private = torch.randn(400, 12, generator=random())
    same = distances.images_apart(torch.randn(300, 12, generator=random(1)), private, random(2))
    assert same["rows"] == 200 and same["w"] == pytest.approx(same["noise"], rel=0.08)
    pale = distances.images_apart(0.2 * torch.randn(300, 12, generator=random(1)), private, random(2))
    assert pale["w"] > same["w"] and pale["drawn"]["recall"] < 0.3 < pale["private"]["recall"]
