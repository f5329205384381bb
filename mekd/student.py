"""A finished student: what its files say of themselves, and how it is loaded."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mekd import files
from mekd.errors import MekdError
from mekd.nets import build
from mekd.nets.registry import file_of
from mekd.oracle.export import Classifier

#: The file's name in a run's folder.
FILE = "student.safetensors"
#: What a student's files say of it.
ABOUT = (
    "architecture", "num_classes", "channels", "size", "classes", "preprocessing", "preprocess", "teacher", "mekd",
)  # fmt: skip


class StudentError(MekdError, ValueError):
    """A file is no student, or not one that can be loaded here."""


class Preprocess(NamedTuple):
    """From a photo to a network's input: upright by EXIF, on white, its shorter side resized, its middle cropped."""

    size: int
    resize: int
    channels: int
    scale: float = 1.0  # the input is scale * pixels + offset, pixels from 0 to 255; as they are for 1 and 0
    offset: float = 0.0

    def words(self) -> str:
        """For people."""
        colour = "grey (ITU-R 601)" if self.channels == 1 else "RGB"
        kind = {1.0: "uint8 from 0 to 255", 1 / 255: "float32, pixels / 255"}
        values = kind.get(self.scale, f"float32, pixels * {self.scale:.8g} + {self.offset:g}")
        return (
            f"upright as EXIF says, transparency on white, shorter side resized to {self.resize} (bilinear, "
            f"antialiased), centre {self.size} x {self.size} cropped, {colour}, {values}, "
            f"shape (m, {self.channels}, {self.size}, {self.size})"
        )

    def json(self) -> str:
        """For programs; read() reads it."""
        rule = {"upright": "exif", "background": "white", "filter": "bilinear", "crop": "centre"}
        return json.dumps(self._asdict() | rule)

    @classmethod
    def read(cls, text: str) -> "Preprocess":
        """What json() wrote."""
        told = json.loads(text)
        return cls(**{name: told[name] for name in cls._fields})


def load_student(run: str | os.PathLike[str]) -> Classifier:
    """The student of a run's folder, or of a student.safetensors, in eval mode: pixels to logits, preprocessing inside.

    It takes uint8 pixels (m, ch, S, S) and gives logits (m, C); classes are the names of the C. A student of the user's
    own is made by its factory, whose code runs: of a file that lies beside the weights, or a module that is installed.
    Raises StudentError for what is no student or does not fit, and UsageError for a factory that is not there.
    """
    path = Path(run)
    path = path / FILE if path.is_dir() else path
    weights, about = read(path)
    name = about["architecture"]
    if file_of(name):
        name = str(path.parent / name)
    try:
        # Not made larger than its weights are: a number that is damaged may be any.
        most = max((max(x.shape, default=0) for x in weights.values()), default=0)
        classes, channels = int(about["num_classes"]), int(about["channels"])
        if not (1 <= classes <= most and channels in (1, 3)):
            raise ValueError(f"num_classes is {classes} and channels {channels}, which its weights do not have")
        net = build(name, classes, channels)
        net.load_state_dict(weights)
        names = json.loads(about["classes"])
        if not (isinstance(names, list) and all(isinstance(x, str) for x in names)):
            raise ValueError("classes is no list of names")
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, MekdError):
            raise
        raise StudentError(f"{path} cannot be loaded as {about['architecture']}: {error}") from error
    classifier = Classifier(net)
    classifier.classes = tuple(names)
    return classifier.eval()


def read(path: Path) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The weights in a student's file, and what it says of them; StudentError where it is none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise StudentError("a student is loaded with safetensors: pip install safetensors") from error
    if not path.is_file():
        raise StudentError(
            f"{files.shown(path)}: no such file. Give a run's folder, in which `mekd distill` leaves {FILE}, or the "
            "file itself"
        )
    if path.suffix in (".onnx", ".pt"):
        raise StudentError(
            f"{files.shown(path)} is no file a student is loaded from; give its run's folder, or its {FILE}. (An "
            ".onnx is for onnxruntime and `mekd predict`, a .pt holds weights alone.)"
        )
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise StudentError(
            f"{files.shown(path)} is damaged or no safetensors file ({error}); put a copy back"
        ) from error
    if missing := {"architecture", "num_classes", "channels", "classes"} - set(about):
        raise StudentError(
            f"{files.shown(path)} does not say {', '.join(sorted(missing))}: it was not written by `mekd distill`, and "
            "weights alone are no student"
        )
    return weights, about
