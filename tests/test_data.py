"""Data sets: idx folders, CIFAR's python batches, scikit-learn's digits; and the private local images."""

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mekd.data import Dataset, load, local_images
from mekd.data.arrays import DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")
#: Images in the training and in the test part of what is written here.
TRAIN, TEST = 12, 5


# Idx folders.


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An idx file of unsigned bytes (kind 8)."""
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_arrays(size: int = 28) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": random.integers(0, 256, (TRAIN, size, size), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(TRAIN) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (TEST, size, size), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (9 - np.arange(TEST)).astype(np.uint8),
    }


def write_idx(folder: Path, zipped: bool = False, **replaced: Any) -> Path:
    """The folder of an MNIST-like set; replaced names files by their first word and kind: train_labels."""
    folder.mkdir()
    for name, array in idx_arrays().items():
        short = "_".join(name.split("-")[:2])
        raw = idx(replaced.get(short, array))
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize(
    "zipped",
    [
        # As they are fetched.
        True,
        # As some unpack them.
        False,
    ],
)
def test_idx_folders(tmp_path: Path, name: str, zipped: bool) -> None:
    data = load(name, str(write_idx(tmp_path / "set", zipped)), 28)
    arrays = idx_arrays()
    assert (data.train_images.shape, data.test_images.shape) == ((TRAIN, 1, 28, 28), (TEST, 1, 28, 28))
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test_images[:, 0].numpy(), arrays["t10k-images-idx3-ubyte"])
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert data.test_labels.tolist() == [9, 8, 7, 6, 5]
    assert data.image == (1, 28, 28)
    assert len(data.classes) == 10
    assert data.classes[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]


def test_zipped_and_plain_files_may_be_mixed(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "set")
    labels = folder / "train-labels-idx1-ubyte"
    (folder / f"{labels.name}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    assert load("mnist", str(folder), 28).train_labels.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize(
    "size",
    [
        # Smaller: pixels are averaged.
        16,
        # Larger: the size that the paper trains at.
        32,
        # Larger by more than 2.
        64,
    ],
)
def test_images_are_resized(tmp_path: Path, size: int) -> None:
    # Half black, half white, left to right; and three that are gray all over.
    images = np.zeros((TRAIN, 28, 28), np.uint8)
    images[:, :, 14:] = 255
    for i, gray in enumerate((0, 77, 255)):
        images[i] = gray
    data = load("mnist", str(write_idx(tmp_path / "set", train_images=images)), size)
    assert data.train_images.shape == (TRAIN, 1, size, size)
    assert data.test_images.shape == (TEST, 1, size, size)
    assert data.train_images.dtype == torch.uint8
    for i, gray in enumerate((0, 77, 255)):
        assert (data.train_images[i] == gray).all()
    row = data.train_images[3, 0].float()
    # The edge stays in the middle, the same in every row, and darkness stays on the left.
    assert (row == row[0]).all()
    assert (row[0, : size // 2 - 2] == 0).all() and (row[0, size // 2 + 2 :] == 255).all()
    assert row[0].mean().item() == pytest.approx(127.5, abs=1)


def test_halving_the_size_averages_with_a_triangle(tmp_path: Path) -> None:
    # A single white dot: bilinear with antialiasing gives the 4 x 4 pixels around an output pixel the
    # weights 1 3 3 1 (over 8) along each side.
    images = np.zeros((TRAIN, 28, 28), np.uint8)
    images[0, 11, 12] = 255
    data = load("mnist", str(write_idx(tmp_path / "set", train_images=images)), 14)
    along_y = {5: 3 / 8, 6: 1 / 8}
    along_x = {5: 1 / 8, 6: 3 / 8}
    wanted = np.zeros((14, 14))
    for y, wy in along_y.items():
        for x, wx in along_x.items():
            wanted[y, x] = 255 * wx * wy
    np.testing.assert_allclose(data.train_images[0, 0].numpy(), wanted, atol=0.5)


def test_more_images_than_are_resized_at_once_keep_their_order(tmp_path: Path) -> None:
    count = 4100
    images = np.broadcast_to((np.arange(count) % 251).astype(np.uint8)[:, None, None], (count, 2, 2)).copy()
    labels = (np.arange(count) % 10).astype(np.uint8)
    folder = write_idx(tmp_path / "set", train_images=images, train_labels=labels)
    data = load("mnist", str(folder), 4)
    assert data.train_images.shape == (count, 1, 4, 4)
    assert data.train_images.float().mean((1, 2, 3)).tolist() == [i % 251 for i in range(count)]


Damage = Callable[[Path], Any]


def cut(name: str, keep: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        raw = file.read_bytes()
        file.write_bytes(raw[: keep(len(raw))])

    return damage


def change(name: str, at: int, value: int) -> Damage:
    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[at] = value
        (folder / name).write_bytes(bytes(raw))

    return damage


@pytest.mark.parametrize(
    ("zipped", "damage", "parts"),
    [
        # Not all files were fetched.
        (
            False,
            lambda f: (f / "t10k-labels-idx1-ubyte").unlink(),
            ["t10k-labels-idx1-ubyte", "missing", ".gz"],
        ),
        # The download stopped: pixels are missing, the header, everything.
        (False, cut("train-images-idx3-ubyte", lambda n: n - 1), ["train-images-idx3-ubyte", "truncated"]),
        (False, cut("train-images-idx3-ubyte", lambda n: 10), ["train-images-idx3-ubyte", "no idx file"]),
        (False, cut("train-labels-idx1-ubyte", lambda n: 0), ["train-labels-idx1-ubyte", "no idx file"]),
        # ... in a zipped file.
        (
            True,
            cut("train-images-idx3-ubyte.gz", lambda n: n // 2),
            ["train-images-idx3-ubyte.gz", "cut short"],
        ),
        (
            True,
            cut("train-images-idx3-ubyte.gz", lambda n: n - 1),
            ["train-images-idx3-ubyte.gz", "cut short"],
        ),
        (True, cut("train-images-idx3-ubyte.gz", lambda n: 5), ["train-images-idx3-ubyte.gz", "cut short"]),
        # A web page that says "not found", saved under the name of the file.
        (
            True,
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>"),
            ["train-images-idx3-ubyte.gz", "fetch it again"],
        ),
        (
            False,
            lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"<html>404 Not Found</html>"),
            ["train-images-idx3-ubyte", "no idx file"],
        ),
        # Another type (9 is int8), another number of dimensions, another magic.
        (
            False,
            change("train-images-idx3-ubyte", 2, 9),
            ["train-images-idx3-ubyte", "no idx file", "00 00 09 03"],
        ),
        (
            False,
            change("train-images-idx3-ubyte", 3, 1),
            ["train-images-idx3-ubyte", "no idx file", "00 00 08 01"],
        ),
        (
            False,
            change("train-labels-idx1-ubyte", 0, 7),
            ["train-labels-idx1-ubyte", "no idx file", "07 00 08 01"],
        ),
        # A header that promises more images, and one that promises fewer.
        (False, change("train-images-idx3-ubyte", 7, TRAIN + 1), ["train-images-idx3-ubyte", "truncated"]),
        (False, change("train-images-idx3-ubyte", 7, TRAIN - 1), ["train-images-idx3-ubyte", "promises"]),
        # A bit of a zipped file flipped on the disk: the checksum, and the stream itself.
        (True, change("train-images-idx3-ubyte.gz", -6, 1), ["train-images-idx3-ubyte.gz", "fetch it again"]),
        pytest.param(
            True,
            change("train-images-idx3-ubyte.gz", 10, 0xFF),
            ["train-images-idx3-ubyte.gz", "fetch it again"],
        ),
    ],
)
def test_damaged_idx_files(tmp_path: Path, zipped: bool, damage: Damage, parts: list[str]) -> None:
    folder = write_idx(tmp_path / "set", zipped)
    damage(folder)
    with pytest.raises(DataError) as caught:
        load("mnist", str(folder), 28)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        # A label above the classes.
        ({"train_labels": np.full(TRAIN, 10, np.uint8)}, ["mnist", "train", "10", "10 classes"]),
        ({"t10k_labels": np.full(TEST, 255, np.uint8)}, ["mnist", "test", "255", "10 classes"]),
        # The labels of another set.
        ({"train_labels": np.zeros(TRAIN + 1, np.uint8)}, [f"{TRAIN} train images but {TRAIN + 1} labels"]),
        ({"t10k_labels": np.zeros(TEST - 1, np.uint8)}, [f"{TEST} test images but {TEST - 1} labels"]),
        # Files without an image.
        (
            {"train_images": np.zeros((0, 28, 28), np.uint8), "train_labels": np.zeros(0, np.uint8)},
            ["train", "empty"],
        ),
    ],
)
def test_idx_files_that_do_not_fit(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    folder = write_idx(tmp_path / "set", **arrays)
    with pytest.raises(DataError) as caught:
        load("mnist", str(folder), 28)
    for part in parts:
        assert part in str(caught.value)


# CIFAR's python batches.


#: The pickler in Python, whose every opcode can be replaced.
Pickler: Any = vars(pickle)["_Pickler"]


class Python2Pickler(Pickler):
    """Writes protocol 2 as Python 2 did: text and bytes alike are its str."""

    dispatch: ClassVar = dict(Pickler.dispatch)

    def save_bytes(self, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_bytes


def python2(content: Any) -> bytes:
    """content as the authors of CIFAR pickled it, with the numpy of their time."""
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(content)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def python3(content: Any) -> bytes:
    """The same content, pickled today by somebody who kept to its bytes."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {kept(k): kept(v) for k, v in value.items()}
        if isinstance(value, list):
            return [kept(v) for v in value]
        return value.encode() if isinstance(value, str) else value

    return pickle.dumps(kept(content))


def cifar_content(hundred: bool) -> dict[str, dict[str, Any]]:
    """File name: its dictionary. Every image is told from every other by its first pixel."""
    parts = {"train": TRAIN, "test": TEST} if hundred else {f"data_batch_{i}": 3 for i in range(1, 6)}
    if not hundred:
        parts["test_batch"] = TEST
    random = np.random.default_rng(0)
    content: dict[str, dict[str, Any]] = {}
    seen = 0
    for name, count in parts.items():
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        pixels[:, 0] = np.arange(seen, seen + count)
        labels = [(7 * i) % (100 if hundred else 10) for i in range(seen, seen + count)]
        names = ["fine_labels", "coarse_labels"] if hundred else ["labels"]
        content[name] = {
            "batch_label": "one of several",
            "data": pixels,
            **{key: [label // 5 if key == "coarse_labels" else label for label in labels] for key in names},
        }
        seen += count
    if hundred:
        content["meta"] = {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": []}
    else:
        content["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)], "num_vis": 3072}
    return content


def write_cifar(
    folder: Path, hundred: bool, write: Callable[[Any], bytes] = python2, **replaced: dict[str, Any]
) -> Path:
    folder.mkdir()
    for name, content in cifar_content(hundred).items():
        (folder / name).write_bytes(write({**content, **replaced.get(name, {})}))
    return folder


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        # The files that everybody has.
        python2,
        # The same dictionaries, written today.
        python3,
    ],
)
def test_cifar_batches(tmp_path: Path, hundred: bool, write: Callable[[Any], bytes]) -> None:
    name, count = ("cifar100", TRAIN) if hundred else ("cifar10", 15)
    data = load(name, str(write_cifar(tmp_path / "set", hundred, write)), 32)
    content = cifar_content(hundred)
    assert data.train_images.shape == (count, 3, 32, 32)
    assert data.test_images.shape == (TEST, 3, 32, 32)
    # The five batches one behind the other, and the test images behind them.
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(count))
    assert data.test_images[:, 0, 0, 0].tolist() == list(range(count, count + TEST))
    # Red, green and blue plane by plane, row by row.
    first = content["train" if hundred else "data_batch_1"]["data"][0]
    assert data.train_images[0, 1, 2, 3].item() == first[1024 + 2 * 32 + 3]
    classes = 100 if hundred else 10
    assert data.train_labels.tolist() == [7 * i % classes for i in range(count)]
    assert data.test_labels.tolist() == [7 * i % classes for i in range(count, count + TEST)]
    assert len(data.classes) == classes
    assert data.classes[-1] == ("fine99" if hundred else "class9")


def test_cifar_is_resized(tmp_path: Path) -> None:
    data = load("cifar10", str(write_cifar(tmp_path / "set", False)), 64)
    assert data.image == (3, 64, 64) and data.test_images.shape == (TEST, 3, 64, 64)


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("attack", "wants"),
    [
        # Code as such.
        (lambda marker: Runs(exec, f"open({marker!r}, 'w').close()"), "exec"),
        # A program.
        (lambda marker: Runs(os.system, f"touch '{marker}'"), "system"),
        # A function of numpy: the module is trusted, the function is not.
        (lambda marker: Runs(np.save, f"{marker}", 0), "save"),
        # A harmless class: nothing but arrays is needed.
        (lambda marker: Path(marker), "PosixPath"),
    ],
)
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_that_wants_to_run_code_is_refused(
    tmp_path: Path, attack: Callable[[str], Any], wants: str, file: str
) -> None:
    marker = tmp_path / "was-run"
    folder = write_cifar(tmp_path / "set", False)
    attacked = {**cifar_content(False)[file], "more": attack(str(marker))}
    (folder / file).write_bytes(pickle.dumps(attacked, protocol=2))
    with pytest.raises(DataError, match=rf"{file} is no CIFAR batch.*{wants}"):
        load("cifar10", str(folder), 32)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    # The attack is one: without the guard it runs, or at least loads.
    pickle.loads((folder / file).read_bytes())
    assert wants == "PosixPath" or len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("hundred", "file", "keep"),
    [
        # One of five batches was not unpacked.
        (False, "data_batch_4", None),
        (False, "batches.meta", None),
        (True, "train", None),
        (True, "meta", None),
        # The download stopped.
        (False, "data_batch_2", 0.5),
        (True, "test", 0.99),
        (False, "batches.meta", 0.0),
    ],
)
def test_damaged_cifar_files(tmp_path: Path, hundred: bool, file: str, keep: float | None) -> None:
    folder = write_cifar(tmp_path / "set", hundred)
    if keep is None:
        (folder / file).unlink()
    else:
        raw = (folder / file).read_bytes()
        (folder / file).write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(DataError, match=f"{file} is {'missing' if keep is None else 'no CIFAR batch'}"):
        load("cifar100" if hundred else "cifar10", str(folder), 32)


BATCH = "data_batch_1"


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        # Labels under another name: CIFAR-100's file under CIFAR-10's name.
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "fine_labels": [0] * 3}, [BATCH, "labels"]),
        # No images.
        (BATCH, {"labels": [0] * 3}, [BATCH, "data"]),
        # Images of another size.
        (BATCH, {"data": np.zeros((3, 1000), np.uint8), "labels": [0] * 3}, [BATCH, "no CIFAR batches"]),
        # Fewer labels than images.
        (
            BATCH,
            {"data": np.zeros((3, 3072), np.uint8), "labels": [0] * 2},
            ["15 train images but 14 labels"],
        ),
        # A label below, and one above the classes.
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "labels": [0, -1, 0]}, ["train", "-1", "10 classes"]),
        (BATCH, {"data": np.zeros((3, 3072), np.uint8), "labels": [0, 10, 0]}, ["train", "10", "10 classes"]),
        # No dictionary at all.
        (BATCH, ["data", "labels"], [BATCH, "no CIFAR batches"]),
        # No names.
        ("batches.meta", {"num_vis": 3072}, ["batches.meta", "label_names"]),
        # No dictionary, and no list in it.
        *(
            pytest.param(
                "batches.meta",
                content,
                ["batches.meta", "label_names"],
            )
            for content in (["airplane"], {"label_names": 10})
        ),
    ],
)
def test_cifar_files_that_do_not_fit(tmp_path: Path, file: str, content: Any, parts: list[str]) -> None:
    folder = write_cifar(tmp_path / "set", False)
    (folder / file).write_bytes(python2(content))
    with pytest.raises(DataError) as caught:
        load("cifar10", str(folder), 32)
    for part in parts:
        assert part in str(caught.value)


# The folder.


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_the_folder_must_be_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"data.path is not set; {name} needs"):
        load(name, None, 32)
    with pytest.raises(DataError, match=r"data.path is '.*nowhere'; no such folder"):
        load(name, str(tmp_path / "nowhere"), 32)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.path is '.*file'; no such folder"):
        load(name, str(tmp_path / "file"), 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is missing"):
        load(name, str(tmp_path / "empty"), 32)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(ValueError, match=r"data.name is 'mnits'.*digits, mnist, .*, cifar100"):
        load("mnits", None, 32)


# Sets that need no download.


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'mekd[demo]'")
    return load("digits", None, 16)


def test_digits(digits: Dataset) -> None:
    assert digits.train_images.shape == (1437, 1, 16, 16)
    assert digits.test_images.shape == (360, 1, 16, 16)
    assert digits.train_images.dtype == torch.uint8
    assert len(digits.train_labels) == 1437 and len(digits.test_labels) == 360
    # Every digit is in both parts, about as often as every other.
    assert torch.bincount(digits.train_labels).min() > 100
    assert torch.bincount(digits.test_labels).min() > 20
    assert digits.classes == tuple("0123456789")


def test_digits_keep_their_own_pixels_and_labels() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    data = load("digits", None, 8)
    # Pixels from 0 to 16 become 0 to 255; and nothing is lost, doubled or given another's label.
    wanted = sorted(
        (int(label), *np.rint(image.ravel() * 255 / 16).astype(int).tolist())
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    images = torch.cat([data.train_images, data.test_images]).flatten(1).tolist()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    assert sorted((label, *image) for image, label in zip(images, labels, strict=True)) == wanted


def test_digits_are_split_alike_every_time(digits: Dataset) -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    again = load("digits", None, 16)
    assert torch.equal(again.test_images, digits.test_images)
    assert torch.equal(again.train_labels, digits.train_labels)


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"{FASHION} is not there: the real Fashion-MNIST")
def test_the_real_fashion_mnist() -> None:
    data = load("fashion_mnist", str(FASHION), 28)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train_labels).tolist() == [6000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    # The mean of its pixels, as everybody normalises with: 0.2860.
    assert data.train_images.double().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)


# The private local images.


@pytest.fixture(scope="module")
def numbered() -> Dataset:
    """200 training images, each of them told by its pixel; the test images are all 255."""
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    return Dataset(
        images,
        torch.zeros(200, dtype=torch.int64),
        torch.full((50, 1, 1, 1), 255, dtype=torch.uint8),
        torch.zeros(50, dtype=torch.int64),
        ("a",),
    )


@pytest.mark.parametrize(
    ("fraction", "count"),
    [
        # The paper's.
        (0.1, 20),
        # Rounded.
        (0.0126, 3),
        # Everything.
        (1.0, 200),
        # Less than one image is one image.
        (0.0, 1),
        (0.001, 1),
    ],
)
def test_local_images_are_part_of_the_training_set(numbered: Dataset, fraction: float, count: int) -> None:
    chosen = local_images(numbered, fraction, 0)
    assert chosen.shape == (count, 1, 1, 1)
    numbers = chosen.flatten().tolist()
    # No image twice, and none of the test images.
    assert len(set(numbers)) == count
    assert max(numbers) < 200


def test_local_images_follow_the_seed_alone(numbered: Dataset) -> None:
    first = local_images(numbered, 0.1, 7).flatten().tolist()
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert local_images(numbered, 0.1, 7).flatten().tolist() == first
    # Choosing them draws nothing from the generator that the weights are drawn from.
    assert torch.equal(torch.get_rng_state(), state)
    # They are shuffled, not the first ones.
    assert first != list(range(20))


def test_local_images_differ_between_seeds(numbered: Dataset) -> None:
    chosen = {tuple(local_images(numbered, 0.1, seed).flatten().tolist()) for seed in range(5)}
    assert len(chosen) == 5


def test_a_dataset_moves_as_a_whole(numbered: Dataset) -> None:
    moved = numbered.to(torch.device("meta"))
    tensors = (moved.train_images, moved.train_labels, moved.test_images, moved.test_labels)
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.train_images.shape == (200, 1, 1, 1) and moved.test_labels.shape == (50,)
    assert moved.classes == ("a",)
