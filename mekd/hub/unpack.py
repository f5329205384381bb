"""What came from the hub, checked, as a folder that mekd's commands take; nothing in it is code that runs."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from mekd import files
from mekd.config import DataConfig, DeprivatizeConfig
from mekd.engine import reuse
from mekd.errors import MekdError
from mekd.hub.pack import ALLOWED, STORES
from mekd.nets import Generator
from mekd.nets.registry import is_users
from mekd.oracle.identity import external_files
from mekd.oracle.replay import write_store
from mekd.student import read

#: Files that become what a run's folder holds in their place.
CONVERTED = ("generator.safetensors", *(f"{name}.safetensors" for name in STORES))


class PulledError(MekdError, ValueError):
    """A repository holds nothing that mekd pushed, or something that is damaged."""


def wanted(name: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that are fetched, and the others; PulledError where a name leaves the folder or none is ours."""
    for one in names:
        path = PurePosixPath(one)
        if path.is_absolute() or ".." in path.parts or "\\" in one or "\0" in one:
            raise PulledError(f"{name} has a file called {one!a}, which leaves the folder: nothing was fetched")
    ours = [one for one in ALLOWED if one in names]
    if not any(one.endswith((".onnx", ".safetensors")) for one in ours):
        raise PulledError(f"{name} holds no student, generator or store that `mekd push` put there")
    return ours, [one for one in names if one not in ours and one != ".gitattributes"]


def unpack(down: Path, names: Sequence[str], out: Path) -> list[str]:
    """Check the files called names in one folder and make another of them; returns lines on how to use it.

    FOLDER stands for the new folder in them. Raises MekdError naming the file that is damaged.
    """
    out.mkdir()
    lines = []
    for name in names:
        if name not in CONVERTED:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(down / name, out / name)
    if "student.onnx" in names:
        if external_files(out / "student.onnx"):
            raise PulledError("student.onnx keeps its weights in other files, as no student of mekd does")
        lines.append("names photos:  mekd predict FOLDER/student.onnx PHOTOS --out predictions.csv")
    if "student.safetensors" in names:
        _, about = read(out / "student.safetensors")
        if is_users(about["architecture"]):
            lines.append(
                f"for torch it needs {about['architecture']!a}, code of whoever made it, which is not fetched: loading "
                "it runs that code"
            )
        else:
            lines.append("for torch:     mekd.load_student('FOLDER')")
    if "generator.safetensors" in names:
        _generator(down / "generator.safetensors", out / "checkpoints" / "deprivatize.pt")
        lines.append("draws images:  --deprivatize.generator FOLDER")
    stores = [name for name in STORES if f"{name}.safetensors" in names]
    for name in stores:
        _store(down / f"{name}.safetensors", out, name)
    missing = [name for name in (*STORES, "generator") if f"{name}.safetensors" not in names]
    if stores and missing:
        lines.append(
            f"its answers cannot be learnt from: {', '.join(f'{name}.safetensors' for name in missing)} is missing"
        )
    elif stores:
        lines.append("holds answers: --distill.store FOLDER")
    return lines


def _generator(path: Path, out: Path) -> None:
    weights, about = _tensors(path, "pt")
    try:
        depends = json.loads(about["depends"])
        step, seconds = int(about["step"]), float(about["seconds"])
        settings = {key.partition(".")[2]: value for key, value in depends.items() if key.startswith("deprivatize.")}
        recipe, classes, size = DeprivatizeConfig(**settings), depends["classes"], depends["data.size"]
        DataConfig(size=size, resize=depends.get("data.resize"))  # says itself what it may not be
        channels = weights["last.weight"].shape[0]
        with torch.device("meta"):  # which a width of any size costs nothing
            draws = Generator(classes, size, channels, recipe.width, recipe.nuisance).state_dict()
        if {name: x.shape for name, x in draws.items()} != {name: x.shape for name, x in weights.items()}:
            raise ValueError("its weights are not those of the network that it names")
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise PulledError(f"{path.name} does not say how it was trained: {error}") from error
    average = {f"module.{name}": value for name, value in weights.items()}
    state = {"generator": weights, "average": average}
    files.save(out, {"depends": depends, "step": step, "seconds": seconds, "state": state})


def _store(path: Path, out: Path, name: str) -> None:
    arrays, about = _tensors(path, "np")
    try:
        kind, origin = json.loads(about["kind"]), json.loads(about["origin"])
        if set(origin) != set(reuse.ORIGIN) or set(origin["answers"]) != set(reuse.ANSWERS):
            raise ValueError("it does not say what its answers come from")
        write_store(out / name, arrays, kind, origin)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise PulledError(f"{path.name} is damaged: {error}") from error
    files.save(out / "checkpoints" / f"{name}.pt", {"state": {"place": {"rows": len(arrays["images"])}}})


def _tensors(path: Path, framework: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise PulledError(f"{path.name} is damaged or no safetensors file ({error})") from error
