"""What of a run's folder can be handed on: a fixed list of names, each made anew from what mekd knows of it."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_token

from mekd import __version__, files
from mekd.card import IN_THIS_FOLDER, NOT_IN_IT
from mekd.engine import reuse
from mekd.errors import MekdError, UsageError
from mekd.nets.registry import is_users
from mekd.oracle.address import Secrets
from mekd.oracle.replay import Replay
from mekd.plots import PUBLIC
from mekd.settings import flatten, read_saved
from mekd.student import ABOUT, read

#: The answers that were paid for, and the images that they are answers to.
STORES = ("holdout", "replay")
#: Every name that can be in what is pushed, and in what is pulled.
ALLOWED = (
    "README.md", "config.json", "student.onnx", "student.safetensors", *PUBLIC, "generator.safetensors",
    *(f"{name}.safetensors" for name in STORES),
)  # fmt: skip
#: Of what step 1 depends on, what a run that uses its generator is told.
RECIPE = ("data.name", "data.size", "data.resize", "data.flip", "data.shift", "classes")
FRONT = """---
library_name: mekd
pipeline_tag: image-classification
tags:
- image-classification
- knowledge-distillation
- onnx
---
"""


class PackError(MekdError, RuntimeError):
    """A run's folder does not hold what shall be handed on, or what it holds must not be."""


class Item(NamedTuple):
    """A file that is made: its name in the repository, where it lies, and what it is, for people."""

    name: str
    path: Path
    what: str


def pack(run: Path, into: Path, generator: bool = False, store: bool = False) -> list[Item]:
    """Make the files that hand on the student of a run's folder, and its generator and store where asked, in a folder.

    Raises PackError naming what is missing, or what would tell of this machine.
    """
    if not run.is_dir():
        raise UsageError(f"RUN is {str(run)!r}; no such folder. It must be the --out of a finished run")
    if store and not generator:
        raise UsageError(
            "--store is learnt from with the generator that drew its images: add --generator, or leave it out"
        )
    items = list(_student(run, into))
    if generator:
        items.append(_generator(run, into))
    if store:
        items += [_store(run, into, name) for name in STORES]
    for item in items:
        assert item.name in ALLOWED
    _check_private(run, items)
    return items


def about_student(run: Path) -> dict[str, str]:
    """What the student's file says of it."""
    _, about = read(_file(run, "student.safetensors"))
    return {name: about[name] for name in ABOUT if name in about}


def _student(run: Path, into: Path) -> Iterator[Item]:
    from safetensors.torch import save_file

    weights, _ = read(_file(run, "student.safetensors"))
    about = about_student(run)
    card = files.read_text(_file(run, "README.md"))
    without = ""
    if is_users(about["architecture"]):
        card = card.replace(IN_THIS_FOLDER, NOT_IN_IT)
        without = f", without {about['architecture'].rpartition(':')[0]}, whose code makes it"
    yield _made(into, "README.md", "the model card", (card if card.startswith("---\n") else FRONT + card).encode())
    told = json.dumps({"mekd": __version__, "holds": "a student by mekd"} | about, indent=1, ensure_ascii=False)
    yield _made(into, "config.json", "classes and preprocessing", told.encode())
    yield _made(into, "student.onnx", "the student for ONNX Runtime", _onnx(_file(run, "student.onnx")))
    save_file(weights, into / "student.safetensors", about)
    yield Item("student.safetensors", into / "student.safetensors", "the student for torch" + without)
    for name in PUBLIC:
        if (run / name).is_file():
            yield _made(into, name, "a picture of numbers or of generated images", _png(_file(run, name)))


def _onnx(path: Path) -> bytes:
    """The file without what it says of where it was written, as those of earlier versions do."""
    try:
        import onnx
    except ImportError as error:
        raise UsageError("student.onnx is looked through with onnx: pip install 'mekd[onnx]'") from error
    from mekd.oracle.export import forget_origin
    from mekd.oracle.identity import external_files

    if external_files(path):
        raise PackError(f"{path} keeps its weights in other files, as no student of mekd does")
    try:
        model = onnx.load(str(path))
    except Exception as error:
        raise PackError(f"{path} is damaged ({type(error).__name__}); `mekd distill` writes it again") from error
    told = {entry.key: entry.value for entry in model.metadata_props if entry.key in ABOUT}
    forget_origin(model)
    onnx.helper.set_model_props(model, told)
    return bytes(model.SerializeToString())


def _png(path: Path) -> bytes:
    """The pixels alone, whatever else the file says."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PackError(f"{path} is no picture ({error}); `mekd report` draws it again") from error
    made = io.BytesIO()
    Image.frombytes("RGB", pixels.size, pixels.tobytes()).save(made, "PNG")
    return made.getvalue()


def _generator(run: Path, into: Path) -> Item:
    from safetensors.torch import save_file

    config = read_saved(run / "config.yaml")
    other = config.get("deprivatize.generator") or config.get("distill.store")
    path = reuse.generator_of(other) if other else _file(run, "checkpoints/deprivatize.pt")
    saved, wanted = files.load(path), config.get("deprivatize.steps") or 0
    if not other and saved["step"] < wanted:
        raise PackError(f"{path} stands at step {saved['step']} of {wanted}: finish it first, with `mekd deprivatize`")
    depends = {key: value for key, value in saved["depends"].items()
               if key in RECIPE or key.startswith("deprivatize.")}  # fmt: skip
    weights = saved["state"]["generator"]
    if depends.get("deprivatize.ema"):
        weights = {name: saved["state"]["average"][f"module.{name}"] for name in weights}
    told = {"mekd": __version__, "depends": json.dumps(depends)}
    told |= {name: str(saved[name]) for name in ("step", "seconds")}
    save_file({name: x.contiguous().clone() for name, x in weights.items()}, into / "generator.safetensors", told)
    what = "the generator, which learned from private images to draw others"
    return Item("generator.safetensors", into / "generator.safetensors", what)


def _store(run: Path, into: Path, name: str) -> Item:
    from safetensors.numpy import save_file

    source = Path(read_saved(run / "config.yaml").get("distill.store") or run)
    origin, rows = reuse.origin_of(str(source)), reuse.rows_of(str(source), name)
    arrays, kind = Replay(source / name, rows).contents()
    told = {"mekd": __version__, "kind": json.dumps(kind)}
    told["origin"] = json.dumps({key: origin[key] for key in reuse.ORIGIN})
    path = into / f"{name}.safetensors"
    save_file(arrays, path, told)
    return Item(path.name, path, f"{rows:,} generated images, and the answers to them that were paid for")


def _made(into: Path, name: str, what: str, content: bytes) -> Item:
    path = into / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Item(name, path, what)


def _file(run: Path, name: str) -> Path:
    """A file of the run that is no link, on which anything could lie; PackError where it is not there."""
    path = run / name
    linked = next((part for part in (path, *path.parents[: name.count("/")]) if part.is_symlink()), None)
    if linked is not None:
        raise PackError(f"{linked} is a link; nothing that a link leads to is pushed: put the file itself there")
    if not path.is_file():
        stage = {"README.md": "report", "checkpoints/deprivatize.pt": "deprivatize"}.get(name, "distill")
        raise PackError(f"{path} is missing: `mekd {stage}` writes it; RUN must be the --out of a finished run")
    return path


# -- what must not be in it, whatever the files above hold ---------------------------------------------------------


def _check_private(run: Path, items: list[Item]) -> None:
    """PackError naming a file that tells a secret of the run, or a folder of this machine; never what it tells."""
    words = _private_words(run)
    for item in items:
        content = _text_in(item.path)
        for word, what in words.items():
            # Of more than a word's end: a teacher's name may end as a folder begins.
            if re.search(rb"(?<![\w.-])" + re.escape(files.shown(word).encode()), content):
                raise PackError(
                    f"{item.name} holds {what}, which is not to be handed on; nothing was sent. Take it out of "
                    f"{run / item.name}, or have it written again (`mekd report`, `mekd distill`)"
                )


def _text_in(path: Path) -> bytes:
    """What of a file can hold words: of safetensors its header, behind which numbers alone come."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return file.read(int.from_bytes(file.read(8), "little"))
        return file.read()


def _private_words(run: Path) -> dict[str, str]:
    """Secrets and folders that a run knows, and what they are."""
    found = {str(run.resolve()): "the name of the run's folder", str(Path.home()): "the name of your home folder"}
    path = run / "config.yaml"
    settings = read_saved(path)
    if path.exists() and not settings:
        raise PackError(f"{path} cannot be read as settings, which tell what must not go up: put a copy of it back")
    for key, value in flatten(settings):
        if not isinstance(value, str):
            continue
        for secret in re.findall(r"\{(?:env|file):[^}]*\}", value):
            with contextlib.suppress(UsageError):  # not set here, so that nothing can know it
                found[Secrets().expand(key, secret)] = f"the secret {secret} of {key}"
        if key.startswith("oracle.headers.") or "://" in value:
            found[value] = f"what {key} says"
        elif os.path.isabs(value):
            found[str(Path(value).parent if is_users(value) else value)] = f"what {key} says"
    if token := get_token():
        found[token] = "your token"
    return {word: what for word, what in found.items() if len(word) >= 5}
