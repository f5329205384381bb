"""Folders of a user's own photos: any format, any depth, decoded once, and nothing private about a broken one."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mekd import files
from mekd.config import Config, DataConfig, EvaluateConfig, OracleConfig
from mekd.data import open_source, photo_cache
from mekd.data.arrays import DataError
from mekd.data.photo_cache import PhotoCache
from mekd.data.photos import PhotoSource, find
from mekd.data.upright import decode
from mekd.engine.run import Run
from mekd.forecast import print_data

CPU = torch.device("cpu")


def photo(path: Path, shade: int, size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(shade).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Nine photos in albums, and what lies between them."""
    root = tmp_path / "photos"
    for i, name in enumerate(("a.jpg", "b.PNG", "2019/c.webp", "2019/garden/d.bmp", "Ünïcode/日本.tiff", "e.gif")):
        photo(root / name, i)
    photo(root / "f.jpeg", 6)
    photo(root / "2019" / "f.jpeg", 7)
    photo(root / "2019" / "spaces in it.jpg", 8)
    (root / "notes.txt").write_text("hello")
    (root / "film.mov").write_bytes(b"x")
    (root / "broken.jpg").write_bytes((root / "a.jpg").read_bytes()[:300])
    (root / "._a.jpg").write_bytes(b"x")
    photo(root / "__MACOSX" / "a.jpg", 9)
    (root / "2019" / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to("nowhere")
    return root


def source(path: Path, tmp_path: Path, rank: int = 0, world: int = 1, **data: Any) -> PhotoSource:
    as_they_are = {"flip": False, "shift": False}
    config = Config(data=DataConfig(path=str(path), size=16, **(as_they_are | data)))
    found = open_source(config, CPU, rank, world, tmp_path / "cache")
    assert isinstance(found, PhotoSource)
    return found


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded from now on, in this process."""
    counted: Counter[str] = Counter()

    def counting(path: str, *others: Any) -> np.ndarray:
        counted[os.path.basename(path)] += 1
        return decode(path, *others)

    monkeypatch.setattr(photo_cache, "decode", counting)
    return counted


def readable(album: Path) -> np.ndarray:
    """The photos (n, 3, 16, 16) that can be read, in their order."""
    return np.stack([decode(file, 16) for file in find(album)[0] if Path(file).name not in ("broken.jpg", "gone.jpg")])


def test_what_is_a_photo(album: Path, tmp_path: Path) -> None:
    found = source(album, tmp_path)
    assert found.count("local") == 9 and found.classes == () and found.image == (3, 16, 16)
    assert {Path(name).name for name in found.reasons()} == {"broken.jpg", "gone.jpg"}
    notes = "\n".join(found.notes())
    assert "9 photos; 2 damaged" in notes and "2 files (.mov 1, .txt 1)" in notes and "1 links" in notes
    assert "9 photos are few" in notes


def test_all_of_them_are_private_unless_told(album: Path, tmp_path: Path) -> None:
    assert source(album, tmp_path, local_fraction=0.5).count("local") == 4
    tree = photo(tmp_path / "tree" / "train" / "one" / "a.jpg", 1).parents[2]
    folder, photos = (DataConfig(path=str(path)).decided() for path in (tree, album))
    assert folder == DataConfig(name="folder", path=str(tree), local_fraction=0.1, flip=False, shift=False)
    assert photos == DataConfig(name="photos", path=str(album), local_fraction=1.0, flip=True, shift=True)
    assert DataConfig(path=str(album), flip=False).decided().flip is False
    assert DataConfig().decided() == DataConfig(local_fraction=0.1), "open until there is a path"


def test_it_is_said_that_moved_photos_count_as_photos(album: Path, tmp_path: Path) -> None:
    notes = "\n".join(source(album, tmp_path, flip=None, shift=None).notes())
    assert "count as photos mirrored and shifted too" in notes and "--data.flip false" in notes
    assert "count as photos mirrored too" in "\n".join(source(album, tmp_path, flip=None).notes())
    assert "count as photos" not in "\n".join(source(album, tmp_path).notes())


def test_batches_are_a_function_of_seed_and_step(album: Path, tmp_path: Path) -> None:
    pixels = {image.tobytes() for image in readable(album)}
    one, other = source(album, tmp_path), source(album, tmp_path)
    batch, labels = one.local(64).take(3)
    assert {image.numpy().tobytes() for image in batch} <= pixels and len(pixels) == 9 and not labels.any()
    assert torch.equal(batch, other.local(64).take(3)[0]) and not torch.equal(batch, one.local(64).take(4)[0])
    parts = [source(album, tmp_path, rank, 2).local(64).take(3)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), batch)
    assert torch.equal(torch.cat([images for images, _ in one.once("local", 4)]), one._images[one._rows])
    mirrored = source(album, tmp_path, flip=True).local(64).take(3)[0]
    assert not torch.equal(mirrored, batch)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["data.path", "no such folder", "--data.path"]),
        (lambda path: path.write_text("x"), ["data.path", "which is no folder", "--data.path"]),
        # What the system does not look up: too long a name, or one behind a folder that may not be entered.
        (lambda path: path.symlink_to("x" * 300 + "/y"), ["data.path", "no such folder", "--data.path"]),
        (lambda path: path.mkdir(), ["data.path is ", "holds no image", ".heic", "--data.path"]),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), ["holds no image", "1 files (.txt 1)"]),
        (lambda path: (path.mkdir(), (path / "a.jpg").write_text("x")), ["none of the 1 photos", "a.jpg"]),
    ],
)
def test_where_there_is_nothing_it_says_so(make: Any, parts: list[str], tmp_path: Path) -> None:
    make(tmp_path / "photos")
    with pytest.raises(DataError) as caught:
        source(tmp_path / "photos", tmp_path, name="photos")
    assert all(part in str(caught.value) for part in parts), caught.value


def test_without_name_and_path_it_asks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path is not set.*--data.path FOLDER.*--data.name digits"):
        open_source(Config(), CPU)


def test_no_teacher_is_trained_of_photos(album: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"have no labels"):
        source(album, tmp_path).training(8)
    with pytest.raises(DataError, match=r"have no labels.*--teacher.url.*--evaluate.path"):
        source(album, tmp_path).count("test")


def test_what_runs_left_among_the_photos_is_none(album: Path, tmp_path: Path) -> None:
    for name in ("2019/runs/a", "b"):
        (album / name / "checkpoints").mkdir(parents=True)
        (album / name / "config.yaml").write_text("seed: 0\n")
        photo(album / name / "samples" / "sent.png", 5)
    (album / "linked").symlink_to(tmp_path / "elsewhere")
    (album / "b").rename(tmp_path / "elsewhere")
    found = source(album, tmp_path)
    assert found.count("local") == 9
    assert "2 folders of runs were left out" in "\n".join(found.notes())


@pytest.mark.parametrize("out", ["photos", "."])
def test_a_run_writes_nothing_among_the_photos(album: Path, out: str, tmp_path: Path) -> None:
    """Its folder photos/ may be deleted, and its pictures would be photos when it goes on."""
    before = sorted(album.rglob("*"))
    with pytest.raises(DataError, match=r"data.path is .*photos., where .* --out .* keeps files .*another --out"):
        open_source(Config(data=DataConfig(path=str(album), size=16)), CPU, cache=tmp_path / out / "photos")
    assert sorted(album.rglob("*")) == before
    within = Config(data=DataConfig(path=str(album / "2019"), size=16))
    if out == "photos":
        assert open_source(within, CPU, cache=tmp_path / out / "photos").count("local") == 4
        assert open_source(Config(data=DataConfig(path=str(album), size=16)), CPU, cache=album / "run" / "photos")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_left_out_and_said(album: Path, tmp_path: Path) -> None:
    closed = photo(album / "closed" / "x.jpg", 1).parent
    closed.chmod(0)
    try:
        assert "1 folders cannot be read" in "\n".join(source(album, tmp_path).notes())
    finally:
        closed.chmod(0o755)


def test_a_photo_is_decoded_once(album: Path, tmp_path: Path, decodes: Counter[str]) -> None:
    first = source(album, tmp_path)
    assert set(decodes.values()) == {1, 2} and decodes["f.jpeg"] == 2 and len(decodes) == 10
    decodes.clear()
    again = source(album, tmp_path)
    assert not decodes and torch.equal(again._images[again._rows], first._images[first._rows])
    assert again.reasons() == first.reasons()


def test_only_what_changed_is_decoded_again(album: Path, tmp_path: Path, decodes: Counter[str]) -> None:
    before = source(album, tmp_path)
    kept = before._images[before._rows].clone()
    decodes.clear()
    (album / "e.gif").unlink()
    photo(album / "b.PNG", 77)
    photo(album / "new" / "z.png", 78)
    found = source(album, tmp_path)
    assert decodes == {"b.PNG": 1, "z.png": 1}
    assert "since they were last read 1 changed, 1 removed, 1 new" in found.notes()[0]
    assert np.array_equal(found._images[found._rows].numpy(), readable(album))
    assert kept.shape == found._images[found._rows].shape
    decodes.clear()
    assert "since" not in source(album, tmp_path).notes()[0] and not decodes


def test_another_size_is_another_cache(album: Path, tmp_path: Path) -> None:
    found, _ = find(album)
    for size, resize in ((16, None), (16, 24), (32, None), (16, None)):
        images = PhotoCache(tmp_path / "cache", album, found, size, resize)
        assert np.array_equal(images.images[images.rows[0]].numpy(), decode(found[0], size, resize))


@pytest.mark.parametrize("damage", ["index", "pixels", "no pixels", "no index"])
def test_a_cache_that_was_cut_short_is_mended(album: Path, tmp_path: Path, decodes: Counter[str], damage: str) -> None:
    whole = source(album, tmp_path)
    wanted = whole._images[whole._rows].clone()
    folder = tmp_path / "cache" / "photos-16"
    index, pixels = folder / "index.jsonl", folder / "pixels.u8"
    if damage == "index":
        index.write_bytes(index.read_bytes()[:-20])
    elif damage == "pixels":
        os.truncate(pixels, pixels.stat().st_size - 2 * 768 - 100)  # two rows wait for what was damaged
    else:
        (pixels if damage == "no pixels" else index).unlink()
    decodes.clear()
    mended = source(album, tmp_path)
    assert torch.equal(mended._images[mended._rows], wanted)
    assert sum(decodes.values()) == (1 if damage in ("index", "pixels") else 11)


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"[1, 2]", b'["NAME", {}]', b'["NAME", {"row": "a", "stamp": [], "how": []}]', b"\xff\xfe"]
)
def test_a_line_of_the_cache_that_is_damaged_costs_its_photo_alone(
    album: Path, tmp_path: Path, decodes: Counter[str], line: bytes
) -> None:
    wanted = source(album, tmp_path).count("local")
    index = tmp_path / "cache" / "photos-16" / "index.jsonl"
    first, *lines = index.read_bytes().split(b"\n")
    name = json.loads(first)[0].encode()
    index.write_bytes(b"\n".join([line.replace(b"NAME", name), *lines]))
    decodes.clear()
    assert source(album, tmp_path).count("local") == wanted and sum(decodes.values()) == 1


def test_another_way_of_decoding_decodes_again(
    album: Path, tmp_path: Path, decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(album, tmp_path)
    decodes.clear()
    monkeypatch.setattr(photo_cache, "VERSION", -1)
    source(album, tmp_path)
    assert sum(decodes.values()) == 11


def test_killed_between_two_photos_it_goes_on(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def killed(path: str, *others: Any) -> np.ndarray:
        asked.append(path)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return decode(path, *others)

    monkeypatch.setattr(photo_cache, "decode", killed)
    monkeypatch.setattr(photo_cache, "BATCH", 1)
    with pytest.raises(KeyboardInterrupt):
        source(album, tmp_path)
    found = source(album, tmp_path)
    assert len(asked) == 11 + 1, "the five that were done are not decoded again"
    assert np.array_equal(found._images[found._rows].numpy(), readable(album))


def test_a_full_disk_is_known_before_the_first_photo(
    album: Path, tmp_path: Path, decodes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(files.WriteError, match=r"pixels\.u8 needs 0 MB .*No space left.*free some space"):
        source(album, tmp_path)
    assert not decodes


def test_several_processes_decode_what_one_does(tmp_path: Path) -> None:
    root = tmp_path / "many"
    for i in range(photo_cache.HERE + 10):
        photo(root / f"{i:03}.png", i, 8)
    (root / "x.jpg").write_bytes(b"\xff\xd8\xff")
    found = source(root, tmp_path)
    wanted = np.stack([decode(root / f"{i:03}.png", 16) for i in range(photo_cache.HERE + 10)])
    assert np.array_equal(found._images[found._rows].numpy(), wanted) and len(found.reasons()) == 1


def labelled(tmp_path: Path, *classes: str) -> Path:
    for i, name in enumerate(classes):
        photo(tmp_path / "labelled" / name / "1.png", i)
    return tmp_path / "labelled"


def test_a_labelled_folder_is_for_testing(album: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nbird\n")

    def opened(folder: Path | None) -> Any:
        return open_source(
            Config(
                data=DataConfig(path=str(album), size=16), oracle=OracleConfig(classes=str(names)),
                evaluate=EvaluateConfig(enabled=True, path=None if folder is None else str(folder)),
            ),
            CPU,
        )  # fmt: skip

    numbers = labelled(tmp_path / "numbers", "0", "1", "2", "10")
    evaluation = EvaluateConfig(enabled=True, path=str(numbers))
    unnamed = open_source(Config(data=DataConfig(path=str(album), size=16), evaluate=evaluation), CPU)
    assert unnamed.classes == ("0", "1", "2", "10") and next(unnamed.once("test", 8))[1].tolist() == [0, 1, 3, 2]
    assert "without oracle.classes its folders are taken" in "\n".join(unnamed.notes())
    found = opened(labelled(tmp_path, "bird", "dog"))
    images, labels = next(found.once("test", 8))
    assert labels.tolist() == [2, 1] and found.classes == ("cat", "dog", "bird") and found.count("test") == 2
    assert np.array_equal(images[0].numpy(), decode(tmp_path / "labelled" / "bird" / "1.png", 16))
    (tmp_path / "labelled" / "bird" / "2.png").write_bytes(b"\x89PNG")
    damaged = opened(tmp_path / "labelled")
    assert damaged.count("test") == 2 and any(key.endswith("bird/2.png") for key in damaged.reasons())
    assert "labelled': 2 photos; 1 damaged: named in the report" in "\n".join(damaged.notes())
    with pytest.raises(DataError, match=r"evaluate.path .* has the class folder 'cow'.*oracle.classes"):
        opened(labelled(tmp_path, "cow"))
    with pytest.raises(DataError, match=r"evaluate.path is '.*nowhere'; no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"evaluate.path is '.*names.txt'; which is no folder"):
        opened(names)
    (tmp_path / "flat").mkdir()
    photo(tmp_path / "flat" / "1.png", 1)
    with pytest.raises(DataError, match=r"evaluate.path is '.*flat': .* has no class folders"):
        opened(tmp_path / "flat")
    with pytest.raises(DataError, match=r"evaluate.enabled is true.*--evaluate.path FOLDER"):
        opened(None)


def test_a_folder_that_cannot_take_them_is_named(album: Path, tmp_path: Path) -> None:
    """A path under a file, and a disk that is full before the first line of the index."""
    found = [str(album / "a.jpg"), str(album / "b.PNG")]
    with pytest.raises(files.WriteError, match=r"could not be written .*Not a directory"):
        PhotoCache(album / "a.jpg" / "photos", album, found, 16)
    if Path("/dev/full").exists():
        (tmp_path / "photos-of-it").mkdir()
        (tmp_path / "photos-of-it" / "index.jsonl").symlink_to("/dev/full")
        with pytest.raises(files.WriteError, match=r"could not be written .*No space left"):
            PhotoCache(tmp_path / "photos-of-it", album, found, 16)


def test_the_doctor_names_every_file_that_is_left_out(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(Config(data=DataConfig(path=str(album), size=16), oracle=OracleConfig(num_classes=7)), tmp_path / "none")
    assert print_data(run, tmp_path / "out")
    said = capsys.readouterr().out
    assert "9 photos; 2 damaged" in said
    assert all(f"left out: {album / name}" in said for name in ("broken.jpg", "gone.jpg"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photos"}, "the run will find them decoded"


def test_what_lacks_a_package_is_counted_and_tried_again(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.heic", "y.HEIC", "z.heif"):
        photo(album / "heic.jpg", 3).rename(album / name)

    def lacking(path: str, *others: Any) -> np.ndarray:
        if path.lower().endswith((".heic", ".heif")):
            raise DataError(f"{path}: HEIC and HEIF need pillow-heif: pip install pillow-heif")
        return decode(path, *others)

    with monkeypatch.context() as without:
        without.setattr(photo_cache, "decode", lacking)
        for _ in range(2):
            note = source(album, tmp_path).notes()[0]
            assert note.startswith(
                "9 photos; 2 .heic not readable without pillow-heif (pip install pillow-heif); 1 .heif not readable "
                "without pillow-heif (pip install pillow-heif); 2 damaged"
            )
            assert "since" not in note
    assert source(album, tmp_path).count("local") == 12
