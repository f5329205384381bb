"""The report of a run: summary.json, summary.csv, curves, pictures, report.md."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mekd import files
from mekd.card import card
from mekd.engine import parallel
from mekd.engine.pictures import families
from mekd.engine.run import Run, StageError
from mekd.engine.train import predict
from mekd.metrics import confusion, explained_by_rows, same_class
from mekd.nets import build
from mekd.oracle.replay import Replay
from mekd.pixels import as_float, to_uint8

STAGES = ("teacher", "deprivatize", "holdout", "replay", "distill", "baseline")


def report(run: Run) -> None:
    """Read the run's folder and write what people want to see of it, a model card too; nothing is trained or asked."""
    if parallel.rank():
        return
    if not run.checkpoint("distill").exists():
        raise StageError(f"{run.checkpoint('distill')} is missing: there is nothing to report before `mekd distill`")
    summary = summarize(run)
    run.write_json("summary.json", summary)
    files.write_text(run.out / "summary.csv", _csv(summary))
    pictures = draw(run, summary)
    files.write_text(run.out / "report.md", markdown(run, summary, pictures))
    if (run.out / "student.onnx").exists():
        files.write_text(run.out / "README.md", card(run, summary, pictures))
    run.log("")
    for line in table(summary):
        run.log(line)
    run.log(f"\nreport: {run.out / 'report.md'}")


def summarize(run: Run) -> dict[str, Any]:
    """What the run measured, flat."""
    evaluated = run.read_json("evaluate.json") or {}
    accounts = {name: run.asked(name) for name in ("deprivatize", "distill")}
    best = files.load(run.checkpoint("distill"))["state"]["best"]
    summary: dict[str, Any] = {
        name: evaluated.get(name) for name in ("teacher_accuracy", "student_accuracy", "baseline_accuracy", "agreement")
    }
    summary["holdout_agreement"] = best["agreement"]
    summary["best_step"] = best["step"]
    for key in ("queries", "calls", "bytes_up", "bytes_down", "uncertain"):
        summary[key] = sum(account[key] for account in accounts.values())
    for name, account in accounts.items():
        summary[f"queries_{name}"] = account["queries"]
    if run.config.oracle.price is not None:
        summary["cost"] = round((summary["queries"] + summary["uncertain"]) * run.config.oracle.price, 6)
    summary["simulation_queries"] = evaluated.get("simulation_queries", 0)
    saved = {name: run.checkpoint(name) for name in STAGES}
    seconds = {name: round(files.load(path)["seconds"], 1) for name, path in saved.items() if path.exists()}
    summary["seconds"] = seconds
    summary["seed"] = run.config.seed
    summary["response"] = run.config.oracle.response
    return summary


def table(summary: dict[str, Any]) -> list[str]:
    """Teacher, plain baseline and student beside each other, as Markdown."""
    rows = [
        ("teacher", "its own training data", summary["teacher_accuracy"]),
        ("plain baseline", "private images, sent to the teacher", summary["baseline_accuracy"]),
        ("MEKD student", "generated images only", summary["student_accuracy"]),
    ]
    lines = ["| network | learned from | test accuracy |", "|---|---|---|"]
    lines += [f"| {name} | {source} | {_percent(value)} |" for name, source, value in rows]
    agreement = summary["agreement"]
    measured = f"{_percent(agreement)} of the test images, " if agreement is not None else ""
    return [
        *lines,
        "",
        f"student = teacher on {measured}{_percent(summary['holdout_agreement'])} of the held-out synthetic queries",
        f"{summary['queries']:,} queries ({summary['response']}), {summary['bytes_up'] / 1e6:.1f} MB up, "
        f"{summary['bytes_down'] / 1e6:.1f} MB down"
        + (f", {summary['uncertain']} uncertain" if summary["uncertain"] else "")
        + (f", cost {summary['cost']}" if "cost" in summary else ""),
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()),
    ]


def markdown(run: Run, summary: dict[str, Any], pictures: list[tuple[str, str]]) -> str:
    """report.md."""
    settings = run.config
    head = [
        f"# {settings.data.name}, {settings.data.size} px: {settings.distill.student} from a black box that answers "
        f"{summary['response']}",
        "",
        *table(summary),
        "",
        "The plain baseline and the test accuracies are a simulation: they need labels and send real images, with an "
        f"oracle and a ledger of their own ({summary['simulation_queries']:,} queries). MEKD itself sent generated "
        "images only. That no private image was sent is not a promise that no generated image resembles one.",
        "",
    ]
    shown = [line for caption, name in pictures for line in (f"![{caption}]({name})", "", caption, "")]
    if not pictures:
        shown = ["No pictures: matplotlib is not installed (pip install 'mekd[plot]').", ""]
    return "\n".join([*head, *shown, "Settings: config.yaml. Figures: summary.json. Curves: metrics.jsonl.", ""])


def draw(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Draw the pictures that the run has material for; returns captions and file names."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    classes = class_names(run)
    names = f"rows: {', '.join(classes)}" if len(classes) <= 20 else f"the first 20 of {len(classes)} classes"
    drawn = [
        ("Curves: losses of both steps, and agreement with the teacher on held-out synthetic queries.",
         "curves.png", lambda path: _curves(run, path)),
        (f"Generated images, a row per class as the teacher names them ({names}).",
         "samples/classes.png", lambda path: _class_grid(run, classes, path)),
        *_families(run),
        ("How often the student (columns) names the class that the teacher (rows) names.",
         "confusion.png", lambda path: _confusion(run, classes, path)),
    ]  # fmt: skip
    for _, name, picture in drawn:
        _save(picture, run.out / name)
    return [(caption, name) for caption, name, _ in drawn]


def class_names(run: Run) -> tuple[str, ...]:
    """The names of the classes: the teacher's list if it has one, else the data set's, else numbers."""
    if run.class_names is not None:
        return tuple(run.class_names)
    return run.data.classes


def _save(picture: Callable[[Path], Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = picture(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, bbox_inches="tight", format="png")
    plt.close(figure)
    files.write(path, lambda file: file.write(buffer.getvalue()))


def _curves(run: Run, path: Path) -> Any:
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text("utf-8").splitlines()]
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
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for axis, (stage, keys, title) in zip(axes, panels, strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if row["stage"] == stage and key in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    label=labels[key],
                    marker="o" if len(points) < 12 else None,
                    ms=3,
                )
        if keys == ("image", "kl"):
            axis.set_yscale("log")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return figure


def _class_grid(run: Run, classes: tuple[str, ...], path: Path, columns: int = 12) -> Any:
    import matplotlib.pyplot as plt

    images, answer, _ = Replay(run.out / "holdout", run.config.distill.holdout).read(slice(None))
    shown = classes[:20]
    size, channels = images.shape[-1], images.shape[1]
    canvas = np.full((len(shown) * (size + 2), columns * (size + 2), channels), 255, np.uint8)
    for row in range(len(shown)):
        # Most confident first: what the teacher takes for a clear case.
        rows = (answer.labels == row).nonzero().squeeze(1)
        rows = rows[answer.confidence[rows].argsort(descending=True, stable=True)][:columns]
        for column, index in enumerate(rows.tolist()):
            pixels = images[index] if images.dtype == torch.uint8 else (images[index] + 1) * 127.5
            top, left = row * (size + 2), column * (size + 2)
            canvas[top : top + size, left : left + size] = pixels.permute(1, 2, 0).to(torch.uint8).numpy()
    figure, axis = plt.subplots(figsize=(7, 7 * len(shown) / columns))
    axis.imshow(canvas.squeeze(-1) if channels == 1 else canvas, cmap="gray", vmin=0, vmax=255)
    axis.set_yticks([(i + 0.5) * (size + 2) for i in range(len(shown))], shown)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def _families(run: Run, rows: int = 6, columns: int = 10) -> list[tuple[str, str, Callable[[Path], Any]]]:
    """What G makes of one code and many nuisances, and of one nuisance and many codes; nothing without a nuisance."""
    if run.config.deprivatize.nuisance == 0:
        return []
    drawn = families(run.load_generator(), 32, columns, run.device)
    student = build(run.config.distill.student, run.num_classes, run.image[0]).to(run.device)
    student.load_state_dict(files.load(run.out / "student.pt"))
    shares = [explained_by_rows(images) for images in drawn]
    named = predict(student, drawn[0].flatten(0, 1), batch=64).view(32, columns)
    alike, apart = same_class(named)
    caption = (
        "Left: a row is one code, drawn with ten nuisances. Right: a row is one nuisance, drawn with ten codes. The "
        f"code explains {100 * shares[0]:.0f} % of a picture's variance, the nuisance {100 * shares[1]:.0f} %; the "
        f"student names one class for two pictures of a code in {100 * alike:.0f} % of cases, of two codes in "
        f"{100 * apart:.0f} %."
    )

    def picture(path: Path) -> Any:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 2, figsize=(11, 11 * rows / columns / 2 + 0.3), constrained_layout=True)
        for axis, images, title in zip(axes, drawn, ("a row: one code", "a row: one nuisance"), strict=True):
            size = images.shape[-1]
            pixels = to_uint8(images[:rows, :columns].cpu().contiguous())
            tiles = torch.full((rows, columns, pixels.shape[2], size + 2, size + 2), 255, dtype=torch.uint8)
            tiles[..., :size, :size] = pixels
            canvas = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (size + 2), columns * (size + 2), -1).numpy()
            axis.imshow(canvas.squeeze(-1) if canvas.shape[-1] == 1 else canvas, cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, fontsize=10)
            axis.axis("off")
        return figure

    return [(caption, "samples/families.png", picture)]


def _confusion(run: Run, classes: tuple[str, ...], path: Path) -> Any:
    import matplotlib.pyplot as plt

    evaluated = run.read_json("evaluate.json")
    if evaluated:
        counts, title = np.array(evaluated["confusion"]), "on the test images"
        rows = "teacher" if evaluated["agreement"] is not None else "label"
    else:
        images, answer, _ = Replay(run.out / "holdout", run.config.distill.holdout).read(slice(None))
        student = build(run.config.distill.student, len(classes), images.shape[1])
        student.load_state_dict(files.load(run.out / "student.pt"))
        counts = confusion(answer.labels, predict(student, images, convert=as_float), len(classes)).numpy()
        title, rows = "on held-out synthetic queries", "teacher"
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    figure, axis = plt.subplots(figsize=(5.5, 5))
    shown = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    few = len(classes) <= 20
    if few:
        axis.set_xticks(
            range(len(classes)),
            classes,
            rotation=45 if max(map(len, classes)) > 2 else 0,
            ha="right" if max(map(len, classes)) > 2 else "center",
        )
        axis.set_yticks(range(len(classes)), classes)
        for i, j in np.argwhere(counts > 0):
            axis.text(
                j,
                i,
                counts[i, j],
                ha="center",
                va="center",
                fontsize=7,
                color="white" if shares[i, j] > 0.5 else "black",
            )
    axis.set(title=title, xlabel="student", ylabel=rows)
    figure.colorbar(shown, label=f"share of the {rows}'s class", shrink=0.8)
    return figure


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f}%"


def _csv(summary: dict[str, Any]) -> str:
    flat = {k: v for k, v in summary.items() if k != "seconds"}
    flat |= {f"seconds_{name}": value for name, value in summary["seconds"].items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, flat, lineterminator="\n")
    writer.writeheader()
    writer.writerow(flat)
    return text.getvalue()
