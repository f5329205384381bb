"""What a run ends with: the student as files that say what they are."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mekd import __version__, files
from mekd.data import TREES
from mekd.engine.run import Run
from mekd.errors import MekdError
from mekd.nets import build
from mekd.nets.registry import file_of, without_folder
from mekd.oracle.export import Classifier, export
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response
from mekd.student import FILE, Preprocess

#: The student's files; the last is written last.
STUDENT = ("student.pt", FILE, "student.onnx")


def write_student(run: Run, student: nn.Module) -> float:
    """Write the student's files into the run's folder; returns what student.onnx differs from torch by, as export."""
    from safetensors.torch import save

    weights = student.state_dict()
    files.save(run.out / "student.pt", weights)
    file = file_of(run.config.distill.student)
    if file is not None and Path(file).resolve() != (run.out / Path(file).name).resolve():
        shutil.copyfile(file, run.out / Path(file).name)  # so that the folder can be handed on
    own = {name: value.cpu().contiguous().clone() for name, value in weights.items()}  # tied weights are refused
    how = preprocess_of(run)
    safe = save(own, about(run, how._replace(scale=1 / 127.5, offset=-1.0)))
    files.write(run.out / FILE, lambda beside: beside.write(safe))
    return export(
        Classifier(student), run.out / "student.onnx", run.image, run.config.oracle.transport, about(run, how)
    )


def finished_student(run: Run) -> nn.Module:
    """The run's student, in eval mode, on its device."""
    student = build(run.config.distill.student, run.num_classes, run.image[0])
    student.load_state_dict(files.load(run.out / "student.pt"))
    return student.to(run.device).eval()


def audit_of(run: Run) -> dict[str, Any] | None:
    """audit.json, where it is of the student that is there, and not of an earlier one."""
    found, path = run.read_json("audit.json"), run.out / "student.pt"
    return found if found is not None and path.exists() and found["of"]["student"] == files.digest(path) else None


def held_out(run: Run) -> tuple[Tensor, Response]:
    """The images that are held out, and the teacher's answers to them."""
    images, answer, _ = Replay(run.store("holdout"), run.config.distill.holdout).read(slice(None))
    return images, answer


def about(run: Run, how: Preprocess) -> dict[str, str]:
    """What a file of the student's says of itself; how: an image becomes what that file takes."""
    return {
        "architecture": architecture(run),
        "num_classes": str(run.num_classes),
        "channels": str(how.channels),
        "size": str(how.size),
        "classes": json.dumps(class_names(run), ensure_ascii=False),
        "preprocessing": how.words(),
        "preprocess": how.json(),
        "teacher": run.teacher_name,
        "mekd": __version__,
    }


def architecture(run: Run) -> str:
    """distill.student, without the folder of a file, which is copied beside the weights."""
    return without_folder(run.config.distill.student)


def preprocess_of(run: Run) -> Preprocess:
    """How a photo becomes what student.onnx takes: as the images became that G learnt to draw."""
    size, name, resize = (getattr(run.config.data, key) for key in ("size", "name", "resize"))
    if run.config.deprivatize.generator is not None:  # whose data may have been another run's
        learnt = files.load(run.checkpoint("deprivatize"))["depends"]
        name, resize = learnt.get("data.name", name), learnt.get("data.resize", resize)
    if resize is None:
        resize = round(size * 256 / 224) if name in TREES else size
    return Preprocess(size, resize, run.image[0], 1.0 if run.config.oracle.transport == "uint8" else 1 / 255)


def class_names(run: Run) -> list[str]:
    """The names of the classes, and where nobody knows them, numbers."""
    return known_names(run) or [str(i) for i in range(run.num_classes)]


def known_names(run: Run) -> list[str] | None:
    """The teacher's list of its classes, or that of the answers' run, else those of the data where they are as many."""
    if run.class_names is not None or run.origin is not None or run.config.data.name == "photos":
        return run.class_names
    with contextlib.suppress(MekdError):  # data that is gone
        if len(names := list(run.data.classes)) == run.num_classes:
            return names
    return None
