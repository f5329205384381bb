"""mekd predict: the classes that a student gives to photos, as a table."""

import argparse
import collections
import csv
import importlib.util
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mekd import files, system
from mekd.data.arrays import DataError
from mekd.data.names import is_hidden
from mekd.data.upright import decode
from mekd.errors import UsageError
from mekd.options import Parser
from mekd.oracle.session import ModelError, ProviderError, check_format, open_session
from mekd.student import Preprocess

#: Packages, and the modules in them.
NEEDS = {"pillow": "PIL", "tqdm": "tqdm"}
#: Photos that are decoded ahead of the network, in batches.
AHEAD = 3
#: Red, green and blue in grey, of 65536, as Pillow weighs them.
GREY = np.array([19595, 38470, 7471], np.uint32)


class Model(NamedTuple):
    """A student.onnx that says what it is."""

    session: Any
    classes: list[str]
    how: Preprocess


def main(words: Sequence[str]) -> int:
    """The command; returns 0. Raises MekdError where there is no student or no photo that can be read."""
    options = _parser().parse_args(list(words))
    if missing := [package for package, name in NEEDS.items() if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{' and '.join(missing)} cannot be imported: pip install {' '.join(missing)}")
    out = Path(options.out)
    if out.is_dir():
        raise UsageError(f"--out is {options.out!r}, a folder; it must be a file, such as predictions.csv")
    model = open_model(Path(options.file), options.provider)
    found = photos(Path(options.photos))
    predicted, left_out = predict(model, found, out, options.batch)
    print(f"{out}: {predicted:,} photos" + (f"; {left_out:,} files left out" if left_out else ""))
    return 0


def open_model(path: Path, provider: str = "auto") -> Model:
    """A student for ONNX Runtime; ModelError where the file does not say its classes and its preprocessing."""
    check_format(path, "FILE.onnx")
    try:
        session = open_session(path, provider)
    except ProviderError as error:  # it names the setting of mekd run
        raise ProviderError(str(error).replace("--oracle.provider", "--provider")) from error
    about = session.get_modelmeta().custom_metadata_map
    if missing := [name for name in ("classes", "preprocess") if name not in about]:
        raise ModelError(
            f"{files.shown(path)} does not say {' and '.join(missing)} in its metadata: it must be the student.onnx of "
            "a run's folder; `mekd distill` writes them into it"
        )
    try:
        classes, how = json.loads(about["classes"]), Preprocess.read(about["preprocess"])
        if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
            raise ValueError("classes is no list of names")
        if [one.name for one in session.get_inputs()] != ["images"]:
            raise ValueError("its input is not called images")
        shape = session.get_outputs()[0].shape
        if isinstance(shape[-1], int) and shape[-1] != len(classes):
            raise ValueError(f"it names {len(classes)} classes, and answers {shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{files.shown(path)} is no student.onnx as `mekd distill` writes it ({type(error).__name__}: {error}): "
            "put a copy back"
        ) from error
    return Model(session, classes, how)


def photos(path: Path) -> list[Path]:
    """The files of a folder at any depth, sorted, or the one file; nothing hidden, and no link to a folder is followed.

    A folder that cannot be read is named on stderr and left out. UsageError where there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"PHOTOS is {files.shown(path)!r}; no such file or folder")
    found, closed = [], list[str]()

    def left_out(error: OSError) -> None:
        closed.append(f"{files.shown(error.filename)}, a folder that cannot be read ({error.strerror})")
        system.say(f"left out: {closed[-1]}", sys.stderr)

    for folder, inside, names in os.walk(path, onerror=left_out):
        inside[:] = sorted(name for name in inside if not is_hidden(name))
        found += [Path(folder, name) for name in sorted(names) if not is_hidden(name)]
    if not found:
        why = f"; left out was {closed[0]}" if closed else ""
        raise UsageError(f"PHOTOS is {files.shown(path)!r}; there is no file in it{why}")
    return found


def predict(model: Model, found: Sequence[Path], out: Path, batch: int) -> tuple[int, int]:
    """Write a row a photo to out; returns how many were predicted and how many left out, which stderr names.

    Raises DataError, and writes nothing, where none can be read.
    """
    from tqdm import tqdm

    counts = collections.Counter[str]()

    def fill(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        best = min(3, len(model.classes))
        writer.writerow(["file", *_columns(best)])
        with tqdm(total=len(found), unit="photo", disable=None) as bar:
            for paths, decoded in _decoded(found, model.how, batch):
                names, images = [], []
                for path, pixels in zip(paths, decoded, strict=True):
                    if isinstance(pixels, DataError):
                        bar.write(f"left out: {pixels}", file=sys.stderr)
                    else:
                        names.append(files.shown(path))
                        images.append(pixels)
                if images:
                    rows = _best(_ask(model, np.stack(images)), best)
                    writer.writerows([name, *_cells(model.classes, row)] for name, row in zip(names, rows, strict=True))
                counts["predicted"] += len(images)
                bar.update(len(paths))
        text.detach()
        if not counts["predicted"]:
            raise DataError(f"none of the {len(found):,} files could be read; {files.shown(out)} is not written")

    files.write(out, fill)
    return counts["predicted"], len(found) - counts["predicted"]


def _decoded(
    found: Sequence[Path], how: Preprocess, batch: int
) -> Iterator[tuple[Sequence[Path], list[np.ndarray | DataError]]]:
    """The photos by batches, in order; threads decode ahead of what is taken, as Pillow lets go of the interpreter."""

    def load(path: Path) -> np.ndarray | DataError:
        try:
            return decode(path, how.size, how.resize)
        except DataError as error:
            return error

    pool = ThreadPoolExecutor(os.cpu_count())
    waiting: collections.deque[tuple[Sequence[Path], list[Future[Any]]]] = collections.deque()
    batches = iter([found[i : i + batch] for i in range(0, len(found), batch)])
    try:
        while True:
            for paths in itertools.islice(batches, AHEAD - len(waiting)):
                waiting.append((paths, [pool.submit(load, path) for path in paths]))
            if not waiting:
                return
            paths, futures = waiting.popleft()
            yield paths, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(model: Model, pixels: np.ndarray) -> np.ndarray:
    """RGB pixels (m, 3, S, S) to probabilities (m, C)."""
    how = model.how
    if how.channels == 1:
        pixels = ((np.tensordot(pixels.astype(np.uint32), GREY, (1, 0)) + 32768) >> 16)[:, None].astype(np.uint8)
    if (how.scale, how.offset) != (1, 0):
        pixels = pixels.astype(np.float32) * np.float32(how.scale) + np.float32(how.offset)
    logits = model.session.run(None, {"images": pixels})[0].astype(np.float64)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def _best(probabilities: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """The count most probable classes of each row, best first, with their probabilities."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
    return [[(int(c), float(p[c])) for c in row] for row, p in zip(order, probabilities, strict=True)]


def _columns(count: int) -> list[str]:
    names = [("class", "probability"), ("second", "second_probability"), ("third", "third_probability")]
    return [name for pair in names[:count] for name in pair]


def _cells(classes: list[str], row: list[tuple[int, float]]) -> list[str]:
    return [cell for c, p in row for cell in (classes[c], f"{p:.6f}")]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mekd predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE.onnx", help="the student.onnx of a run's folder")
    parser.add_argument("photos", metavar="PHOTOS", help="a folder of photos, at any depth, or one photo")
    parser.add_argument("--out", metavar="FILE.csv", default="predictions.csv", help="the table (%(default)s)")
    parser.add_argument(
        "--provider", choices=("auto", "cpu", "cuda"), default="auto", help="what computes (%(default)s)"
    )
    parser.add_argument("--batch", type=_count, default=64, metavar="N", help="photos at once (%(default)s)")
    return parser
