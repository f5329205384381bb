"""The pictures of a run: curves, what the generator draws, whom the student confuses, what will be sent."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mekd import files
from mekd.engine.pictures import families
from mekd.engine.result import audit_of, class_names, finished_student, held_out
from mekd.engine.run import Run
from mekd.engine.runlog import read_metrics
from mekd.engine.train import predict
from mekd.metrics import confusion, explained_by_rows, same_class
from mekd.oracle.response import Response
from mekd.pixels import as_float, to_uint8

#: Pictures of what the generator draws, and of numbers: all that is ever handed on. Others show private images.
PUBLIC = ("curves.png", "confusion.png", "samples/classes.png", "samples/families.png")
#: Rows and columns of a picture at most: of more classes those are shown that occur most.
SHOWN = 20


class Confusion(NamedTuple):
    """How often the student (columns) named a class of the rows: counts (C, C); rows: "teacher" or "label"."""

    counts: np.ndarray
    rows: str
    title: str


def there() -> bool:
    """Whether pictures can be drawn: matplotlib is an extra."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def draw(run: Run, found: Confusion) -> list[tuple[str, str]]:
    """Draw the pictures that the run has material for; returns captions and file names."""
    if not there():
        return []
    student, (images, answer) = finished_student(run), held_out(run)
    names = class_names(run)
    rows = occurring(answer.labels, len(names))
    met = len(answer.labels[answer.labels >= 0].unique())
    if len(names) <= SHOWN:
        which = ", ".join(names) + ("" if met == len(names) else "; a row without images is a class that was not met")
    else:
        which = f"the {len(rows)} that occur most, of {met} that occur at all"
    drawn: list[tuple[str, str, Callable[[], Any]]] = [
        ("Curves: losses of both steps, and agreement with the teacher on held-out synthetic queries.",
         "curves.png", lambda: _curves(run)),
        (f"Generated images, a row per class as the teacher names them (rows: {which}).",
         "samples/classes.png", lambda: _class_grid(images, answer, rows, names)),
        *_families(run, student),
        (f"How often the student (columns) names the class {_rows_of_confusion(run)}.",
         "confusion.png", lambda: _confusion(found, rows, names)),
    ]  # fmt: skip
    for _, name, picture in drawn:
        save(picture(), run.out / name)
    sent = [
        ("What was sent, each image beside the private one that is nearest to it.", "samples/sent.png"),
        ("Of all that was sent, the ten images that come nearest to a private one.", "samples/nearest.png"),
    ]
    if audit_of(run) is None:
        sent.pop()
    return [(caption, name) for caption, name, _ in drawn] + [one for one in sent if (run.out / one[1]).exists()]


def _rows_of_confusion(run: Run) -> str:
    evaluated = run.read_json("evaluate.json")
    labelled = evaluated is not None and evaluated["agreement"] is None
    return "of the label (rows)" if labelled else "that the teacher (rows) names"


def occurring(labels: Tensor, classes: int) -> list[int]:
    """The classes that a picture shows: all of a few, of many those that occur most in labels (n,)."""
    if classes <= SHOWN:
        return list(range(classes))
    counts = torch.bincount(labels[labels >= 0], minlength=classes)
    return [int(i) for i in counts.argsort(descending=True, stable=True)[:SHOWN] if counts[i] > 0]


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, bbox_inches="tight", format="png")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda file: file.write(buffer.getvalue()))


def tiles(images: Tensor) -> np.ndarray:
    """Images (rows, columns, ch, S, S), uint8, as one canvas (rows * (S + 2), columns * (S + 2)[, 3]) on white."""
    rows, columns, channels, size, _ = images.shape
    framed = torch.full((rows, columns, channels, size + 2, size + 2), 255, dtype=torch.uint8)
    framed[..., :size, :size] = images
    canvas = framed.permute(0, 3, 1, 4, 2).reshape(rows * (size + 2), columns * (size + 2), channels).numpy()
    return canvas[..., 0] if channels == 1 else canvas


def contact_sheet(sent: Tensor, nearest: Tensor, apart: Sequence[float], among: Sequence[float], caption: str) -> Any:
    """Images that are sent (k, ch, S, S), each beside the private image (k, ch, S, S) that is nearest; k even.

    apart: how far the two are from each other; among: how far that private image is from its nearest private one.
    """
    import matplotlib.pyplot as plt

    pairs, size = torch.stack([sent, nearest], 1), sent.shape[-1]
    columns = len(sent) // 2
    figure, axes = plt.subplots(2, columns, figsize=(1.5 * columns, 2.4), constrained_layout=True)
    for axis, pair, one, other in zip(axes.flat, pairs, apart, among, strict=True):
        axis.imshow(tiles(pair[None]), cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([size / 2, size * 1.5 + 2], ["sent", "yours"], fontsize=7)
        axis.set_xlabel(f"{one:.2f} apart, yours {other:.2f}", fontsize=7)
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.suptitle(
        f"{caption} The numbers: how far both are apart, and how far that\n"
        "image of yours is from the nearest other one of yours (0: the same picture, 1.4: nothing in common)",
        fontsize=8,
    )
    return figure


def _curves(run: Run) -> Any:
    import matplotlib.pyplot as plt

    rows = read_metrics(run.out / "metrics.jsonl")
    panels = [
        ("deprivatize", ("loss_d", "loss_g"), "step 1: GAN losses"),
        ("distill", ("image", "kl"), "step 2: loss terms"),
        ("distill", ("agreement",), "agreement on the holdout"),
    ]
    labels = {
        "loss_d": "discriminator",
        "loss_g": "generator",
        "image": "image L1",
        "kl": "KL",
        "agreement": "student = teacher",
    }
    drawn = {(stage, key): [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]
             for stage, keys, _ in panels for key in keys}  # fmt: skip
    panels = [panel for panel in panels if any(drawn[panel[0], key] for key in panel[1])]  # step 1 may be another run's
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), constrained_layout=True, squeeze=False)
    for axis, (stage, keys, title) in zip(axes[0], panels, strict=True):
        for key in keys:
            if points := drawn[stage, key]:
                marker = "o" if len(points) < 12 else None
                axis.plot(*zip(*points, strict=True), label=labels[key], marker=marker, ms=3)
        if keys == ("image", "kl"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return figure


def _class_grid(images: Tensor, answer: Response, shown: list[int], names: list[str], columns: int = 12) -> Any:
    import matplotlib.pyplot as plt

    pixels = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).to(torch.uint8)
    grid = torch.full((len(shown), columns, *images.shape[1:]), 255, dtype=torch.uint8)
    for row, number in enumerate(shown):
        # Most confident first: what the teacher takes for a clear case.
        found = (answer.labels == number).nonzero().squeeze(1)
        found = found[answer.confidence[found].argsort(descending=True, stable=True)][:columns]
        grid[row, : len(found)] = pixels[found]
    size = images.shape[-1]
    figure, axis = plt.subplots(figsize=(7, 7 * len(shown) / columns))
    axis.imshow(tiles(grid), cmap="gray", vmin=0, vmax=255)
    axis.set_yticks([(i + 0.5) * (size + 2) for i in range(len(shown))], [names[i] for i in shown], parse_math=False)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def _families(
    run: Run, student: nn.Module, rows: int = 6, columns: int = 10
) -> list[tuple[str, str, Callable[[], Any]]]:
    """What G makes of one code and many nuisances, and of one nuisance and many codes; nothing without a nuisance."""
    if run.config.deprivatize.nuisance == 0:
        return []
    drawn = families(run.load_generator(), 32, columns, run.device)
    shares = [explained_by_rows(images) for images in drawn]
    named = predict(student, drawn[0].flatten(0, 1), batch=64).view(32, columns)
    alike, apart = same_class(named)
    caption = (
        "Left: a row is one code, drawn with ten nuisances. Right: a row is one nuisance, drawn with ten codes. The "
        f"code explains {100 * shares[0]:.0f} % of a picture's variance, the nuisance {100 * shares[1]:.0f} %; the "
        f"student names one class for two pictures of a code in {100 * alike:.0f} % of cases, of two codes in "
        f"{100 * apart:.0f} %."
    )

    def picture() -> Any:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(11, 11 * rows / columns / 2 + 0.3), constrained_layout=True)
        for axis, images, title in zip(axes, drawn, ("a row: one code", "a row: one nuisance"), strict=True):
            pixels = to_uint8(images[:rows, :columns].cpu().contiguous())
            axis.imshow(tiles(pixels), cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, fontsize=10)
            axis.axis("off")
        return figure

    return [(caption, "samples/families.png", picture)]


def evaluated(run: Run) -> Confusion | None:
    """Whom the student confuses on the test images, where the simulation says so."""
    found = run.read_json("evaluate.json")
    if found is None:
        return None
    rows = "label" if found["agreement"] is None else "teacher"
    return Confusion(np.array(found["confusion"]), rows, "on the test images")


def confused(run: Run) -> Confusion:
    """The same, on the held-out synthetic queries where there was no simulation."""
    if (found := evaluated(run)) is not None:
        return found
    images, answer = held_out(run)
    named = predict(finished_student(run), images, device=run.device, convert=as_float)
    counts = confusion(answer.labels, named, run.num_classes).numpy()
    return Confusion(counts, "teacher", "on held-out synthetic queries")


def _confusion(found: Confusion, shown: list[int], names: list[str]) -> Any:
    import matplotlib.pyplot as plt

    counts, rows, title = found
    shares = (counts / counts.sum(1, keepdims=True).clip(1))[np.ix_(shown, shown)]
    figure, axis = plt.subplots(figsize=(5.5, 5))
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [names[i] for i in shown]
    wide = max(map(len, labels), default=0) > 2
    turned: dict[str, Any] = {"rotation": 45 if wide else 0, "ha": "right" if wide else "center"}
    axis.set_xticks(range(len(shown)), labels, parse_math=False, **turned)  # a name may hold dollars
    axis.set_yticks(range(len(shown)), labels, parse_math=False)
    for i, j in np.argwhere(counts[np.ix_(shown, shown)] > 0):
        colour = "white" if shares[i, j] > 0.5 else "black"
        axis.text(j, i, counts[shown[i], shown[j]], ha="center", va="center", fontsize=7, color=colour)
    axis.set(title=title, xlabel="student", ylabel=rows)
    figure.colorbar(drawn, label=f"share of the {rows}'s class", shrink=0.8)
    return figure
