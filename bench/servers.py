"""mekd's client against real servers of the Open Inference Protocol: what it must do with them, and images a second.

Triton and MLServer run beside it on the same cores, out of an environment of their own (make servers), as does
`mekd serve`. All of them have the same ONNX files and the same version of ONNX Runtime, so answers are compared bit for
bit. Then a query of a RemoteOracle with a ledger on the disk is timed, four calls in flight, against the file itself.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.oracle import CLASSES, IMAGE, serving, timed, versions
from bench.started import PYTHON, mlserver, triton
from bench.timing import Work, machine, spread, write_json
from mekd.errors import MekdError
from mekd.nets import build
from mekd.oracle.answers import Meaning
from mekd.oracle.export import Classifier, export
from mekd.oracle.http import Line
from mekd.oracle.images import Encoding
from mekd.oracle.ledger import Ledger, totals
from mekd.oracle.oip import Oip, describe
from mekd.oracle.ort import OnnxOracle
from mekd.oracle.remote import RemoteOracle

LOGITS = Meaning("logits", 1.0, "as the file is")
MOST, DIGITS_MOST = 256, 16  # images a call that the servers take
BATCHES = ((1, 128), (32, 512), (256, 1024))  # images a call, and of a query
IN_FLIGHT = 4


class Files:
    """The teachers: a ResNet20 of random weights that takes pixels, the same for floats, and a ResNet8 for digits."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        net = Classifier(build("resnet20", CLASSES, IMAGE[0]))
        self.pixels, self.floats, self.digits = (folder / f"{name}.onnx" for name in ("pixels", "floats", "digits"))
        export(net, self.pixels, IMAGE)
        export(net, self.floats, IMAGE, "float")
        export(Classifier(build("resnet8", CLASSES, 1)), self.digits, (1, 16, 16))

    def models(self) -> list[dict[str, Any]]:
        """As the servers are told."""
        return [
            {"name": "pixels", "file": str(self.pixels), "max_batch": MOST},
            {"name": "floats", "file": str(self.floats), "max_batch": MOST},
            {"name": "digits", "file": str(self.digits), "max_batch": DIGITS_MOST},
            {"name": "busy", "file": str(self.pixels), "max_batch": 1, "queue": 2, "slow_s": 0.02},
        ]


def service(url: str, *, binary: bool | None = None, transport: str = "uint8", k: int | None = None) -> Oip:
    """Calls of a model; MLServer does not say what its tensors are called."""
    line = Line(url, {}, 60.0)
    model = describe(line, IMAGE[0], input_name="images", output_name="logits", transport=transport, binary=binary)
    return Oip(line, model, CLASSES, mean=[0.0], std=[1.0], k=k)


def connect(url: str, folder: Path | None = None, *, response: str = "logits", batch: int = MOST, in_flight: int = 1,
            meaning: Meaning = LOGITS, transport: str = "uint8", **options: Any) -> RemoteOracle:  # fmt: skip
    return RemoteOracle(
        service(url, transport=transport, **options), IMAGE, CLASSES, response, encoding=Encoding("raw"), batch=batch,
        concurrency=in_flight, meaning=meaning, transport=transport, ledger=Ledger("query", folder),
    )  # fmt: skip


def values(oracle: Any, images: Tensor) -> Tensor:
    """What it answers to the images; it is closed."""
    with contextlib.closing(oracle):
        found = oracle.query(images).values
    assert found is not None
    return found


def pixels(m: int) -> Tensor:
    return torch.randint(0, 256, (m, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(m))


def of_file(file: Path, images: Tensor, transport: str = "uint8") -> Tensor:
    return values(OnnxOracle(file, "logits", providers="cpu", transport=transport), images)


# -- what must be so ---------------------------------------------------------------------------------------


def metadata(url: str, files: Files, folder: Path) -> str:
    line = Line(f"{url}/pixels", {}, 60.0)
    model = describe(line, IMAGE[0], input_name=None, output_name=None, transport="uint8", binary=None)
    line.close()
    found = (model.input, model.datatype, model.last, model.output, model.classes, model.size, model.binary,
             model.classification, model.versions, model.most)  # fmt: skip
    assert found == ("images", "UINT8", False, "logits", CLASSES, IMAGE[1], True, True, ("1",), MOST), found
    return model.note


def bits(url: str, files: Files, folder: Path, says_all: bool = True) -> str:
    """says_all: of a server that takes bytes, and says that a model takes floats, which pixels are then sent as."""
    for m, binary in itertools.product((1, 7, 32, MOST), (True, False) if says_all else (False,)):
        images = pixels(m)
        assert torch.equal(values(connect(f"{url}/pixels", binary=binary), images), of_file(files.pixels, images))
        if says_all:
            assert torch.equal(values(connect(f"{url}/floats", binary=binary), images), of_file(files.floats, images))
        unrounded = torch.rand(m, *IMAGE, generator=torch.Generator().manual_seed(m)) * 2 - 1
        answered = values(connect(f"{url}/floats", binary=binary, transport="float"), unrounded)
        assert torch.equal(answered, of_file(files.floats, unrounded, "float"))
    return f"1 to {MOST} images, UINT8 and FP32, by {'bytes and JSON' if says_all else 'JSON'}"


def mistakes(url: str, files: Files, folder: Path) -> str:
    """What a server says of them, and that it ends the run: nothing is asked again."""
    said = [_refused(lambda: service(f"{url}/nothing").call(pixels(1)))]
    for images in (pixels(1)[:, :, :5], pixels(MOST + 1)):
        oip = service(f"{url}/pixels")
        said.append(_refused(lambda images=images, oip=oip: oip.call(images)))
        oip.close()
    for message, word in zip(said, ("nothing", "shape", str(MOST)), strict=True):
        assert word in message, message
    return "".join(f"\n      {message}" for message in said)


def _refused(call: Callable[[], object]) -> str:
    try:
        call()
    except MekdError as error:
        return str(error)
    raise AssertionError("it was answered")


def best(url: str, files: Files, folder: Path) -> str:
    images = pixels(9)
    with contextlib.closing(service(f"{url}/pixels", k=3)) as oip:
        pairs = oip.call(images)[0].pairs
    assert pairs is not None
    wanted = of_file(files.pixels, images).topk(3)
    for row, scores, indices in zip(pairs, wanted.values.tolist(), wanted.indices.tolist(), strict=True):
        found = sorted(((float(score), int(name)) for name, score in row), reverse=True)
        assert [index for _, index in found] == indices, (found, indices)
        assert all(abs(a - b) < 1e-5 for (a, _), b in zip(found, scores, strict=True))
    return "the three best of each image, with six decimals"


def in_flight(url: str, files: Files, folder: Path) -> str:
    images = pixels(1024)
    found = values(connect(f"{url}/pixels", folder / "many", batch=2, in_flight=32), images)
    off = (found - of_file(files.pixels, images)).abs().max().item()
    assert off < 1e-4, off
    account = totals(folder / "many", "query")
    assert (account["calls"], account["queries"], account["uncertain"]) == (512, 1024, 0), account
    return f"512 calls of 2, 32 in flight: in order, off by {off:.2g} at most"


def overload(url: str, files: Files, folder: Path) -> str:
    """Its queue holds two: the others are refused, which is free, and asked again."""
    found = values(connect(f"{url}/busy", folder / "busy", batch=1, in_flight=16), pixels(48))
    assert torch.equal(found, of_file(files.pixels, pixels(48)))
    account, attempts = totals(folder / "busy", "query"), _attempts(folder / "busy")
    assert account["queries"] == 48 and account["uncertain"] == 0 and attempts > 48, (account, attempts)
    return f"48 calls answered, {attempts - 48} refused for a full queue, free"


def _attempts(folder: Path) -> int:
    import sqlite3

    with contextlib.closing(sqlite3.connect(folder / "query.sqlite")) as file:
        return int(file.execute("SELECT count(*) FROM calls").fetchone()[0])


def run(url: str, files: Files, folder: Path) -> str:
    """All stages, from a command line; the server takes fewer images a call than the reserve would allow."""
    settings = {
        "data.name": "digits", "data.size": 16, "teacher.url": f"{url}/digits", "teacher.name": "digits",
        "deprivatize.steps": 20, "deprivatize.batch": 16, "deprivatize.width": 0.1,
        "oracle.budget": 900, "oracle.reserve": 0.2, "oracle.concurrency": 2, "oracle.response": "logits",
        "distill.student": "resnet8", "distill.steps": 20, "distill.batch": 16, "distill.holdout": 64,
        "distill.eval_every": 10, "engine.device": "cpu", "out": folder / "run",
    }  # fmt: skip
    command = [sys.executable, "-m", "mekd", "run", "--yes"]
    command += [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    too_many = subprocess.run([*command, "--oracle.batch", "300"], text=True, capture_output=True)
    assert too_many.returncode == 2 and f"takes {DIGITS_MOST} images a call" in too_many.stderr, too_many.stderr
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    account = totals(folder / "run" / "ledger", "holdout", "replay")
    assert account["queries"] == 720 and account["uncertain"] == 0, account
    assert account["calls"] == 1 + -(-64 // DIGITS_MOST) + -(-656 // DIGITS_MOST), (
        account
    )  # the first call is cut in two
    assert (folder / "run" / "student.onnx").exists()
    return f"720 queries in {account['calls']} calls; --oracle.batch 300: {too_many.stderr.strip()}"


def silent_metadata(url: str, files: Files, folder: Path) -> str:
    line = Line(f"{url}/pixels", {}, 60.0)
    model = describe(line, IMAGE[0], input_name="images", output_name="logits", transport="uint8", binary=None)
    line.close()
    assert (model.classes, model.size, model.binary, model.most) == (None, None, False, None), model
    message = _refused(lambda: service(f"{url}/nothing"))
    assert "nothing" in message, message
    return f"{model.note}\n      {message}"


CHECKS: dict[str, dict[str, Callable[[str, Files, Path], str]]] = {
    "Triton": {
        "metadata": metadata, "bit for bit": bits, "mistakes": mistakes, "classification": best,
        "many in flight": in_flight, "a full queue": overload, "mekd run": run,
    },
    "MLServer": {
        "metadata": silent_metadata,
        "bit for bit": lambda url, files, folder: bits(url, files, folder, says_all=False),
    },
}  # fmt: skip


def checked(server: str, url: str, files: Files, folder: Path) -> bool:
    """Whether all is as it must be; a line for each."""
    well = True
    for name, check in CHECKS[server].items():
        try:
            print(f"  {server}, {name}: {check(url, files, folder)}", flush=True)
        except (AssertionError, MekdError) as error:
            well = False
            print(f"  {server}, {name}: FAILED: {error}", flush=True)
    return well


# -- how fast it is ----------------------------------------------------------------------------------------


def measured(urls: dict[str, str], files: Files, folder: Path, batch: int, count: int, repeats: int) -> dict[str, Any]:
    """Images a second by each way, of rounds that take all of them in turn."""
    images, works, oracles = pixels(count), {}, []
    direct = OnnxOracle(
        files.pixels, "probs", providers="cpu", batch=batch, ledger=Ledger("query", folder / f"{batch}")
    )
    works: dict[str, Work] = {"file": lambda: [direct.query(part) for part in images.split(batch)]}
    for server, url in urls.items():
        for binary in (True, False) if server != "MLServer" else (False,):
            name = f"{server} {'bytes' if binary else 'JSON'}"
            made = connect(
                url, folder / f"{name} {batch}", response="probs", batch=batch, in_flight=IN_FLIGHT, binary=binary
            )
            oracles.append(made)
            works[name] = lambda made=made: made.query(images)
    times = {name: spread(taken) for name, taken in timed(works, repeats).items()}
    for oracle in (direct, *oracles):
        oracle.close()
    speed = {name: count / taken["median_s"] for name, taken in times.items()}
    return {"batch": batch, "images": count, "images_s": speed, "times": times}


def main(arguments: Sequence[str]) -> int:
    """Check, then measure; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m bench servers", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=CHECKS, help="one server alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not PYTHON.exists():
        parser.error(f"{PYTHON} is missing: make servers makes it")
    begun, well, rows = time.perf_counter(), True, []
    print(", ".join(f"{key} {value}" for key, value in (machine() | versions()).items()))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mekd-servers-")))
        files, starts, urls = Files(folder), {"Triton": triton, "MLServer": mlserver}, {}
        for server in [options.only] if options.only else CHECKS:
            url = stack.enter_context(starts[server](folder, files.models()))
            well &= checked(server, url, files, folder)
            urls[server] = f"{url}/pixels"
        (served,) = stack.enter_context(serving(files.pixels, [0], response="logits"))
        urls["mekd serve"] = f"{served}/v2/models/pixels"
        for batch, count in BATCHES:
            rows.append(measured(urls, files, folder, batch, count, options.repeats))
    names = list(rows[0]["images_s"])
    print("images/s, batch" + "".join(f"{name:>18}" for name in names))
    for row in rows:
        print(f"{row['batch']:>15}" + "".join(f"{row['images_s'][name]:>18.0f}" for name in names))
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"{time.perf_counter() - begun:.0f} s; medians of {options.repeats} interleaved rounds, {IN_FLIGHT} calls in "
          f"flight; load average {load} on {len(os.sched_getaffinity(0))} cores")  # fmt: skip
    if options.json:
        write_json(options.json, rows, versions())
    return 0 if well else 1
