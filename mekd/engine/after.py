"""A second round: what step 1 goes on from, and step 2 learns from besides, of a run that has a student already.

The student names the private images at home, and D is told the names: it judges an image together with its class
(Miyato and Koyama, 2018), so that G draws an image of the class that its code's largest entry says.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mekd.engine import reuse
from mekd.engine.run import Run
from mekd.errors import UsageError
from mekd.oracle.replay import Replay
from mekd.settings import read_saved
from mekd.student import FILE, load_student, read


def begin(run: Run, state: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Let the networks of step 1, by their names in a checkpoint, go on from the first round's; returns namer()."""
    saved = reuse.first_round(run.config)["state"]
    for name in saved.keys() & {"generator", "discriminator", "average"} & state.keys():
        state[name].load_state_dict(state[name].state_dict() | saved[name])  # the first D knows of no classes
    if "seen" in state:
        state["seen"].update(saved.get("seen", {}))
    return namer(run)


def namer(run: Run) -> Callable[[Tensor], Tensor]:
    """What names images: (m, ch, S, S), uint8, to the classes (m,) that the first round's student gives them."""
    student = load_student(str(run.config.deprivatize.after)).to(run.device)

    @torch.no_grad()
    def names(images: Tensor) -> Tensor:
        classes: Tensor = student(images).argmax(1)
        return classes

    return names


def check(run: Run) -> None:
    """UsageError where deprivatize.after is of another teacher, or was asked for other answers; StoreError where one of
    them is damaged. Nothing is asked."""
    config, folder = run.config, run.config.deprivatize.after
    if folder is None:
        return
    classes = int(read(Path(folder) / FILE)[1]["num_classes"])
    if classes != run.num_classes:
        raise UsageError(
            f"deprivatize.after is {folder!r}, whose student knows {classes} classes, and the teacher has "
            f"{run.num_classes}: give a run with this teacher"
        )
    for store in stores(folder):
        if not run.asked("distill")["queries"]:
            store.contents()  # a row that is damaged is known before anything is paid
        origin = reuse.origin_of(str(store.folder.parent))
        now = {name: getattr(config.oracle, name) for name in reuse.ANSWERS}
        if origin["teacher"] != run.teacher_digest or origin["answers"] != now:
            differs = [name for name, value in now.items() if origin["answers"][name] != value]
            raise UsageError(
                f"deprivatize.after is {folder!r}, whose answers, which are learnt from too, are "
                + (
                    f"those of {origin['teacher_name']!r}"
                    if origin["teacher"] != run.teacher_digest
                    else f"of another kind ({', '.join(f'oracle.{name}' for name in differs)})"
                )
                + ": give a run with this teacher and these settings of oracle"
            )


def stores(folder: str | None) -> list[Replay]:
    """The answers that earlier rounds paid for and kept, of the first round first."""
    if folder is None:
        return []
    before = read_saved(Path(folder) / "config.yaml")
    place = before.get("distill.store") or folder
    count = before.get("distill.replay")
    own = [Replay(Path(place) / "replay", count, part=True)] if count else []
    return [*stores(before.get("deprivatize.after")), *own]
