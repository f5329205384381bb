"""The model card of a run, README.md in its folder: what the student is, and the lines that load it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mekd import files
from mekd.engine import dp
from mekd.engine.result import architecture, class_names, preprocess_of
from mekd.engine.run import Run
from mekd.nets.registry import file_of
from mekd.plots import PUBLIC
from mekd.student import Preprocess

#: Where the code of a student of the user's own lies: beside it, or, as code is not pushed, elsewhere.
IN_THIS_FOLDER, NOT_IN_IT = "lies in this folder too", "is not in this repository: it must lie beside the weights"
#: What reaches a student's teacher, by response, in words.
ANSWERS = {
    "logits": "logits", "probs": "probabilities of all classes", "label": "the name of one class, nothing else",
}  # fmt: skip
#: What of a card is its user's to write: the hub's metadata before it, and a licence.
_METADATA = re.compile(r"\A---\n.*?^---\n", re.MULTILINE | re.DOTALL)
_LICENCE = re.compile(r"^## Licen[cs]e\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def write(run: Run, text: str) -> None:
    """Write README.md. Licence and metadata of the one that lies there stay; where more was changed, it is kept too."""
    path = run.out / "README.md"
    if path.exists():
        before = path.read_text("utf-8-sig", "replace")
        if licence := _LICENCE.search(before):
            text = _LICENCE.sub(lambda _: licence[0].rstrip() + "\n\n", text).rstrip() + "\n"
        if metadata := _METADATA.match(before):
            text = metadata[0] + text
        written = (run.read_json("card.json") or {}).get("digest")  # an earlier version did not write it
        if before != text and files.digest(path) != written:
            names = ("README-before.md", *(f"README-before-{i}.md" for i in range(2, 1000)))
            beside = next(run.out / name for name in names if not (run.out / name).exists())
            path.rename(beside)
            run.log(f"report: README.md is written anew, with the licence that it had; as it was it is {beside.name}")
    files.write_text(path, text)
    run.write_json("card.json", {"digest": files.digest(path)})


def card(run: Run, summary: dict[str, Any], pictures: Sequence[tuple[str, str]], audited: Sequence[str] = ()) -> str:
    """The model card in Markdown; summary: as report.summarize gives it; pictures: captions and files in the folder;
    audited: the lines about the audit."""
    config, how = run.config, preprocess_of(run)
    classes, teacher = class_names(run), run.teacher_name
    named = ", ".join(classes[:20]) + (f" and {len(classes) - 20:,} more" if len(classes) > 20 else "")
    there = [(caption, name) for caption, name in pictures if name in PUBLIC and (run.out / name).is_file()]
    shown = [line for caption, name in there for line in (f"![{caption}]({name})", "", caption, "")]
    lines = [
        f"# {config.distill.student.rpartition(':')[2]}, distilled from {teacher}",
        "",
        f"A classifier of {how.channels} x {how.size} x {how.size} pixels into {len(classes):,} classes ({named}), "
        "distilled from a black box by MEKD (Ma et al., CVPR 2024): a generator learned from private images to draw, "
        "and the student learned from what the teacher answers to what it draws.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in [*facts(run, summary, teacher), *measured(run, summary)]),
        "",
        "## What was sent, and what was not",
        "",
        sent(run, summary),
        "",
        *audited,
        "## Load it",
        "",
        f"An image is prepared so: {how.words()}. The metadata of `student.onnx` says the same, and names the classes. "
        "With ONNX Runtime, in this folder:",
        "",
        "```python",
        *_onnx(how, config.oracle.transport),
        "```",
        "",
        "With torch, in this folder:",
        "",
        "```python",
        *_torch(how),
        "```",
        "",
        *_code_of_your_own(config.distill.student),
        "For whole folders: `mekd predict student.onnx PHOTOS --out predictions.csv`.",
        "",
        "## Licence",
        "",
        "Not chosen yet: it is for whoever distilled the student to choose, and to write here. What may be done with a "
        "teacher's answers is for its terms to say.",
        "",
        *(["## Pictures", "", *shown] if shown else []),
    ]
    return "\n".join(lines)


def facts(run: Run, summary: dict[str, Any], teacher: str) -> list[tuple[str, str]]:
    """Student, teacher, its answers, queries and cost, as pairs of a name and words."""
    config = run.config
    response = config.oracle.response
    answers = ANSWERS.get(response, f"the {config.oracle.k} best classes and their probabilities")
    if config.oracle.decimals is not None and response in ("probs", "topk"):
        answers += f", rounded to {config.oracle.decimals} decimals"
    paid = f"{summary['queries']:,} images, in {summary['calls']:,} calls"
    if summary["uncertain"]:
        paid += f", and {summary['uncertain']:,} more of which it is not known whether they were answered"
    if config.distill.store is not None:
        other = Path(config.distill.store).name
        paid = f"{config.distill.replay:,} answers of another run, {other}; by this one {paid}"
    found = [
        ("student", f"{architecture(run)}, {_megabytes(run)}"),
        ("teacher", f"{teacher}, {_reached(run)}"),
        ("its answers", answers),
        ("queries", paid),
    ]
    if "cost" in summary:
        found.append(("cost", f"{summary['cost']:,}, at {config.oracle.price:g} a query"))
    return found


def measured(run: Run, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured of the student, likewise."""
    found = []
    covered = run.read_json("coverage.json")
    if covered is not None:
        met = f"{covered['classes_met']:,} of {covered['classes']:,} by the first answers"
        found.append(("classes met", f"{met}, of which the most frequent took {_percent(covered['majority_share'])}"))
    agrees = (
        f"{_percent(summary['holdout_agreement'])} of {run.config.distill.holdout:,} generated images that were held "
        "out, and by which the best step was chosen; whoever always names the most frequent class agrees on "
        f"{_percent(summary['majority_share'])}"
    )
    found.append(("agreement with the teacher", agrees))
    if summary["student_accuracy"] is not None:
        against = f" (the teacher: {_percent(summary['teacher_accuracy'])})" if summary["teacher_accuracy"] else ""
        found.append(("test accuracy", f"{_percent(summary['student_accuracy'])}{against}"))
    if summary["agreement"] is not None:
        found.append(("agreement on test images", _percent(summary["agreement"])))
    if summary["student_accuracy"] is None:
        found.append(("test accuracy", "not measured"))
    return found


def _reached(run: Run) -> str:
    teacher = run.config.teacher
    if run.origin is not None:
        return "asked by another run"
    if teacher.python is not None:
        return "asked through a Python function"
    if teacher.url is not None:
        protocol = "Hugging Face's API" if teacher.protocol == "hf" else "the Open Inference Protocol"
        return f"asked over HTTP, by {protocol}"
    return "an ONNX file, asked on this machine and not looked into"


def sent(run: Run, summary: dict[str, Any]) -> str:
    """What was sent to the teacher, and what was not."""
    count = summary["queries"] + summary["uncertain"]
    text = f"No private photo was sent; generated images were: {count:,}. "
    if summary["simulation_queries"]:
        text = (
            f"For the student, generated images alone were sent: {count:,}. Beside that a simulation (`mekd evaluate`) "
            f"sent {summary['simulation_queries']:,} real images, to measure it. "
        )
    if run.config.distill.store is not None:
        text += "What was sent for the answers of another run stands in the card of that run. "
    if noise := dp.told(run):
        text += (
            f"The generator learned by DP-SGD: it, what it draws and the student are ({noise['epsilon']:.2f}, "
            f"{noise['delta']:.1e})-differentially private with respect to one of {noise['images']:,} private images. "
        )
    text += "That is no promise that no generated image resembles a private one: the generator learned from them."
    return text


def _onnx(how: Preprocess, transport: str) -> list[str]:
    grey = how.channels == 1
    axes = "[None, None]" if grey else ".transpose(2, 0, 1)[None]"
    return [
        "import json",
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image, ImageOps",
        "",
        *_photo(how),
        f"pixels = np.asarray(photo){axes}" + ("" if transport == "uint8" else ".astype(np.float32) / 255"),
        'session = onnxruntime.InferenceSession("student.onnx")',
        'logits = session.run(None, {"images": pixels})[0]',
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])',
        "print(classes[logits[0].argmax()])",
    ]


def _torch(how: Preprocess) -> list[str]:
    axes = "[None, None]" if how.channels == 1 else ".permute(2, 0, 1)[None]"
    return [
        "import numpy as np",
        "import torch",
        "from PIL import Image, ImageOps",
        "import mekd",
        "",
        *_photo(how),
        f"pixels = torch.from_numpy(np.array(photo)){axes}  # uint8",
        'student = mekd.load_student(".")',
        "with torch.inference_mode():",
        "    logits = student(pixels)",
        "print(student.classes[int(logits.argmax())])",
    ]


def _photo(how: Preprocess) -> list[str]:
    """Lines that make a photo an image of the network's size and colours."""
    size, colours = (how.size, how.size), "L" if how.channels == 1 else "RGB"
    lines = [
        'photo = Image.new("RGB", (640, 480))  # yours: Image.open("photo.jpg")',
        'photo = ImageOps.exif_transpose(photo).convert("RGBA")',
        f'photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("{colours}")',
    ]
    if how.resize == how.size:
        return [*lines, f"photo = ImageOps.fit(photo, {size}, Image.Resampling.BILINEAR)"]
    return [
        *lines,
        f"half, x, y = min(photo.size) * {how.size} / {how.resize} / 2, photo.width / 2, photo.height / 2",
        f"photo = photo.resize({size}, Image.Resampling.BILINEAR, (x - half, y - half, x + half, y + half))",
    ]


def _code_of_your_own(student: str) -> list[str]:
    if (file := file_of(student)) is not None:
        name = file.replace("\\", "/").rpartition("/")[2]
        return [f"That runs the code of {name}, which makes the network and {IN_THIS_FOLDER}.", ""]
    return []


def _megabytes(run: Run) -> str:
    return f"{(run.out / 'student.onnx').stat().st_size / 1e6:.2f} MB as ONNX"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
