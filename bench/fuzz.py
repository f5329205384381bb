"""Damaged and malicious input for every parser of what comes from outside: nothing but clear errors may come of it.

Each case is a valid file, changed at random (bytes flipped, cut, doubled, numbers made huge), and read by another
process with a bound on memory and time. What comes of it is counted: read (the damage did not matter), refused (an
error of mekd that names the file or the setting), and what must not be: another exception, a crash, memory or time.
"""

import argparse
import functools
import gzip
import io
import json
import multiprocessing
import pickle
import random
import resource
import signal
import struct
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import loss_calls
from mekd.data.arrays import DataError
from mekd.errors import MekdError
from mekd.oracle.http import Reply, Secrets
from mekd.settings import known_keys

#: Bytes beyond what the process has when it begins, and seconds, that a case may take.
MEMORY, SECONDS = 2 << 30, 20
HUGE = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x40", b"999999999999", b"-1", b"1e999", b"\x00" * 16, b"nan")


def main(arguments: Sequence[str]) -> int:
    """Print a table; returns 1 where anything came that must not."""
    parser = argparse.ArgumentParser(prog="python -m bench fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="of each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARSERS)
    parser.add_argument("--losses", type=int, metavar="CALLS", help="random calls of the losses instead")
    options = parser.parse_args(arguments)
    if options.losses:
        return _calls(options.losses, options.seed)
    print("| parser | cases | read | refused | other exceptions | crashes, memory, time |")
    print("|---|---|---|---|---|---|")
    bad = 0
    for name in options.only or PARSERS:
        counts, examples = run(name, options.cases, options.seed)
        wrong = {kind: n for kind, n in counts.items() if kind not in ("read", "refused")}
        died = sum(n for kind, n in wrong.items() if kind.startswith("!"))
        row = (name, options.cases, counts["read"], counts["refused"], sum(wrong.values()) - died, died)
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        for kind, example in examples.items():
            print(f"    {kind}: {example}")
        bad += sum(wrong.values())
    return int(bad > 0)


def _calls(calls: int, seed: int) -> int:
    counts, examples = loss_calls.run(calls, seed)
    print(f"| {' | '.join(('calls', *counts))} |\n|{'---|' * (len(counts) + 1)}")
    print(f"| {' | '.join(map(str, (calls, *counts.values())))} |")
    for kind, example in examples.items():
        print(f"    {kind}: {example}")
    return int(bool(examples))


def run(name: str, cases: int, seed: int) -> tuple[Counter[str], dict[str, str]]:
    """How often each outcome came, and an example of each that must not."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    begin = 0
    context = multiprocessing.get_context("fork")
    while begin < cases:  # a process that dies is followed by another one
        with tempfile.TemporaryDirectory() as folder:
            here, there = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(name, Path(folder), range(begin, cases), seed, there))
            worker.start()
            there.close()
            done = begin
            while True:
                if not here.poll(SECONDS + 5):
                    worker.kill()
                try:
                    number, kind, words = here.recv()
                except EOFError:
                    break
                done = number + 1
                counts[kind] += 1
                if kind not in ("read", "refused"):
                    examples.setdefault(kind, f"case {number}, {words}")
            worker.join()
            if done < cases:
                kind = f"!died with {worker.exitcode}"
                counts[kind] += 1
                examples.setdefault(kind, f"case {done}")
                done += 1
            begin = done
    return counts, examples


def _work(name: str, folder: Path, numbers: range, seed: int, out: Any) -> None:
    make, read = PARSERS[name]
    torch.set_num_threads(1)
    good = make(folder)
    read(folder)  # what is whole is read, and imports what it takes
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    originals = {path: path.read_bytes() for path in good}
    for number in numbers:
        chance = random.Random(f"{seed} {name} {number}")
        for path, content in originals.items():
            path.write_bytes(content)
        victim = chance.choice(good)
        victim.write_bytes(changed(originals[victim], chance))
        signal.alarm(SECONDS)
        begun = time.perf_counter()
        try:
            read(folder)
            kind, words = "read", ""
        except MekdError as error:
            named = any(part in str(error) for part in (victim.name, str(folder), "the teacher", *known_keys()))
            kind, words = ("refused", "") if named else ("unnamed", repr(error)[:300])
        except KeyboardInterrupt:
            kind, words = "!time", f"{time.perf_counter() - begun:.0f} s"
        except MemoryError as error:
            kind, words = "!memory", repr(error)[:300]
        except BaseException as error:
            kind, words = type(error).__name__, repr(error)[:300]
        signal.alarm(0)
        out.send((number, kind, words))


def changed(content: bytes, chance: random.Random) -> bytes:
    """One to four changes: a bit, a byte, a number that is made huge, a cut, a part twice, a part that is gone."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = int(len(data) * chance.random() ** chance.choice((1, 3)))  # often in the header
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] = chance.randrange(256)
        elif kind == 2:
            new = chance.choice(HUGE)
            data[at : at + len(new)] = new
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = data[at : at + chance.randrange(1, 400)]
        else:
            del data[at : at + chance.randrange(1, 64)]
    return bytes(data)


# -- what is read: files that are whole, and the reading of a folder of them ---------------------------------


def _idx(folder: Path) -> list[Path]:
    paths = []
    for part, count in (("train", 12), ("t10k", 6)):
        images = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(count * 784)
        paths += [folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte.gz"]
        paths[-2].write_bytes(images)
        paths[-1].write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(count)))
    return paths


def _read_arrays(name: str, folder: Path) -> None:
    from mekd.data import arrays

    arrays.load(name, str(folder), 16)


def _cifar(folder: Path) -> list[Path]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names:
        batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b"] * 5}, protocol=2))
    return [folder / name for name in (*names, "batches.meta")]


def _jpeg(side: int = 24) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tar(folder: Path) -> list[Path]:
    (folder / "train").mkdir()
    (folder / "train" / "classes.txt").write_text("a\nb\n")
    path = folder / "train" / "0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            for name, content in ((f"{i}.jpg", _jpeg()), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return [path]


def _tfrecord(folder: Path) -> list[Path]:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    (folder / "train").mkdir()
    (folder / "train" / "classes.txt").write_text("a\nb\n")
    path, records = folder / "train" / "0.tfrecord", b""
    for i in range(4):
        label = field(3, field(1, bytes([1 + i % 2])))
        features = field(1, field(1, b"image/encoded") + field(2, field(1, field(1, _jpeg()))))
        features += field(1, field(1, b"image/class/label") + field(2, label))
        example = field(1, features)
        records += struct.pack("<QI", len(example), 0) + example + struct.pack("<I", 0)
    path.write_bytes(records)
    return [path]


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _read_shards(kind: str, folder: Path) -> None:
    from mekd.data import shards
    from mekd.data.listing import read

    listed = read(folder, kind, "train")
    assert listed.spans is not None
    for shard, *span in listed.spans.tolist():
        try:
            shards.sample(kind, listed.files[shard], tuple(span))
        except (OSError, ValueError) as error:  # which the stream gives the name of the shard
            raise DataError(f"{listed.files[shard]}: {error}") from error


def _photos(folder: Path) -> list[Path]:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    paths = [folder / f"x.{ending}" for ending in ("jpg", "png", "gif", "bmp", "tif", "webp")]
    for path in paths:
        image.save(path)
    return paths


def _read_photos(folder: Path) -> None:
    from mekd.data.upright import decode

    for path in sorted(folder.iterdir()):
        decode(path, 16)


def _checkpoint(folder: Path) -> list[Path]:
    torch.save({"step": 3, "state": {"weight": torch.zeros(4, 4)}}, folder / "checkpoint.pt")
    return [folder / "checkpoint.pt"]


def _read_checkpoint(folder: Path) -> None:
    from mekd import files

    files.load(folder / "checkpoint.pt")


def _yaml(folder: Path) -> list[Path]:
    from mekd.config import Config
    from mekd.settings import dump_yaml

    (folder / "run.yaml").write_text(dump_yaml(Config()))
    return [folder / "run.yaml"]


def _read_yaml(folder: Path) -> None:
    from mekd import cli

    cli.parse(["--config", str(folder / "run.yaml")])


def _student(folder: Path) -> list[Path]:
    from safetensors.torch import save

    from mekd.nets import build
    from mekd.student import FILE, Preprocess

    how = Preprocess(16, 16, 1, 1 / 127.5, -1.0)
    about = {"architecture": "resnet8", "num_classes": "10", "channels": "1", "classes": json.dumps(list("0123456789"))}
    weights = {name: value.contiguous() for name, value in build("resnet8", 10, 1).state_dict().items()}
    (folder / FILE).write_bytes(save(weights, about | {"preprocess": how.json()}))
    return [folder / FILE]


def _read_student(folder: Path) -> None:
    import mekd

    mekd.load_student(folder)


def _onnx(folder: Path) -> list[Path]:
    from mekd.nets import build
    from mekd.oracle.export import Classifier, export

    export(Classifier(build("resnet8", 10, 1)), folder / "teacher.onnx", (1, 16, 16))
    return [folder / "teacher.onnx"]


def _read_onnx(folder: Path) -> None:
    from mekd.oracle.ort import OnnxOracle

    oracle = OnnxOracle(folder / "teacher.onnx", "probs", providers="cpu", image=(1, 16, 16))
    oracle.query(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


def _store(folder: Path) -> list[Path]:
    from mekd.oracle.replay import Replay
    from mekd.oracle.response import Response

    store = Replay(folder / "replay", 8)
    store.write(0, torch.zeros(8, 1, 16, 16, dtype=torch.uint8), Response("probs", torch.full((8, 10), 0.1)))
    store.flush()
    return sorted((folder / "replay").iterdir())


def _read_store(folder: Path) -> None:
    from mekd.oracle.replay import Replay

    Replay(folder / "replay", 8).read(slice(None))


class _Says:
    """A line to a service whose answer is a file."""

    secrets = Secrets()

    def __init__(self, path: Path) -> None:
        self.path = path

    def exchange(self, *_: Any, **__: Any) -> Reply:
        body, length = self.path.read_bytes(), self.path.with_suffix(".length")
        return Reply(200, {"inference-header-content-length": length.read_text()} if length.exists() else {}, body)


def _answers(folder: Path, kind: str) -> list[Path]:
    probs = np.full((3, 4), 0.25, np.float32)
    tensor: dict[str, Any] = {"name": "probs", "datatype": "FP32", "shape": [3, 4]}
    path = folder / f"{kind}.answer"
    if kind == "hf":
        path.write_text(json.dumps([{"label": str(i), "score": 0.25} for i in range(4)]))
    elif kind == "json":
        path.write_text(json.dumps({"outputs": [tensor | {"data": probs.ravel().tolist()}]}))
    else:
        head = json.dumps({"outputs": [tensor | {"parameters": {"binary_data_size": probs.nbytes}}]}).encode()
        path.write_bytes(head + probs.tobytes())
        path.with_suffix(".length").write_text(str(len(head)))
    return [path]


def _read_answers(folder: Path) -> None:
    from mekd.oracle.answers import Meaning, establish, respond
    from mekd.oracle.hf import Pictures
    from mekd.oracle.oip import Model, Oip

    (path,) = folder.glob("*.answer")
    line: Any = _Says(path)
    names = ("0", "1", "2", "3")
    if path.stem == "hf":
        raw, _ = Pictures(line, "png", 4).call([b""])
        meanings, response = [Meaning("pairs", 1.0, "", names)], "topk"
    else:
        model = Model("x", "UINT8", False, "probs", 4, None, False, False, (), None, "")
        raw, _ = Oip(line, model, 4, mean=[0.0], std=[1.0], k=None).call(torch.zeros(3, 1, 4, 4, dtype=torch.uint8))
        meanings, response = [Meaning("probs", 1.0, "")], "probs"
    for meaning in (*meanings, establish(raw, 4, response, classes=names)):  # of a later answer, and of the first
        respond(raw, meaning, 4, response, 2, None)


#: What makes whole files in a folder, and what reads them.
PARSERS: dict[str, tuple[Callable[[Path], list[Path]], Callable[[Path], None]]] = {
    "idx": (_idx, lambda folder: _read_arrays("mnist", folder)),
    "cifar": (_cifar, lambda folder: _read_arrays("cifar10", folder)),
    "webdataset": (_tar, lambda folder: _read_shards("webdataset", folder)),
    "tfrecord": (_tfrecord, lambda folder: _read_shards("tfrecord", folder)),
    "photos": (_photos, _read_photos),
    "checkpoint": (_checkpoint, _read_checkpoint),
    "yaml": (_yaml, _read_yaml),
    "student": (_student, _read_student),
    "onnx": (_onnx, _read_onnx),
    "store": (_store, _read_store),
    **{
        f"answers ({kind})": (functools.partial(_answers, kind=kind), _read_answers)
        for kind in ("json", "binary", "hf")
    },
}
