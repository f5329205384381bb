"""The parts of a page as HTML."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mekd import card
from mekd.engine import after
from mekd.nets.registry import file_of, without_folder
from mekd.page import curves, pictures
from mekd.page.facts import Facts
from mekd.page.going_on import going_on
from mekd.page.markup import LETTERS, code, percent, table, text, wide
from mekd.plots import Confusion

#: Account names in words; the first four are the student's, the last two a simulation's.
ACCOUNTS = {
    "deprivatize": "step 1, the generator",
    "holdout": "held out, to choose the student by",
    "replay": "kept, to learn from in every epoch",
    "distill": "step 2, fresh in every step",
    "audit": "for the audit",
    "evaluate-test": "simulation: labelled test images",
    "evaluate-private": "simulation: private images, for the plain baseline",
}
PAID, SIMULATED = tuple(ACCOUNTS)[:4], tuple(ACCOUNTS)[5:]
#: Settings that name a file or a folder of the machine: of them the last part is shown.
PATHS = {
    "data.path", "teacher.onnx", "teacher.python", "teacher.checkpoint", "oracle.classes", "deprivatize.generator",
    "deprivatize.after", "distill.store", "distill.checkpoint", "evaluate.path",
}  # fmt: skip
#: What a header may hold beside a secret's place.
_SCHEMES = re.compile(r"(?:Bearer|Basic|Token|Key)? ?\{(?:env|file):[^{}]+\}", re.IGNORECASE)
#: Behind the path of an address a part, in which a secret may be written out, and the places of secrets alone.
_PART, _PLACES = re.compile(r"([?&;#])((?:\{[^{}]*\}|[^&;#])+)"), re.compile(r"(?:\{(?:env|file):[^{}]+\})+")

#: The parts by id, in their order, with their headings.
HEADINGS = {
    "head": "", "tiles": "Result", "stages": "Stages", "curves": "Curves", "classes": "What the generator draws",
    "confusion": "Confusion", "coverage": "Coverage", "paid": "Queries and cost", "audit": "Audit",
    "sent": "What was sent, and what was not", "on": "How to go on", "settings": "Settings",
}  # fmt: skip


def parts(facts: Facts, audited: Sequence[str], side: int) -> dict[str, str]:
    """The HTML of each part of HEADINGS, empty where there is nothing to say; side: of pictures, 0 for none."""
    found = {
        "head": _head(facts), "tiles": _tiles(facts), "stages": _stages(facts), "curves": curves.curves(facts),
        "classes": _classes(facts, side), "confusion": _confusion(facts), "paid": _paid(facts),
        "coverage": _coverage(facts), "audit": _audit(facts, audited), "sent": _sent(facts),
        "on": going_on(facts.run) if facts.finished else "", "settings": _settings(facts),
    }  # fmt: skip
    return {
        name: f'<h2 id="{name}-title">{HEADINGS[name]}</h2>{part}' if part and HEADINGS[name] else part
        for name, part in found.items()
    }


def title(facts: Facts) -> str:
    """What the run is, in a line; not escaped."""
    config = facts.run.config
    what = config.data.name or "answers of another run"
    student = without_folder(config.distill.student)
    return f"{what}, {config.data.size} px: {student} from a black box that answers {config.oracle.response}"


def _head(facts: Facts) -> str:
    unfinished = "" if facts.finished else "<p>The run is not finished: this is what there is so far.</p>"
    return (
        f"<h1>{text(title(facts), 300)}</h1>"
        f'<p class="soft">teacher: {text(facts.run.teacher_name, 300)}; seed {facts.run.config.seed}</p>{unfinished}'
    )


# -- the result --------------------------------------------------------------------------------------------


def _tiles(facts: Facts) -> str:
    summary, paid = facts.summary or {}, _sum(facts, PAID)
    found: list[tuple[str, str, str]] = []
    if (accuracy := summary.get("student_accuracy")) is not None:
        teacher = summary.get("teacher_accuracy")
        found.append(("test accuracy", percent(accuracy), f"the teacher: {percent(teacher)}" if teacher else ""))
    if (agreement := summary.get("agreement")) is not None:
        found.append(("agreement, test images", percent(agreement), "student = teacher"))
    seen = [row["agreement"] for row in facts.metrics if row["stage"] == "distill" and row.get("agreement") is not None]
    held = summary.get("holdout_agreement", max(seen, default=None))
    if held is not None:
        most = summary.get("majority_share")
        note = f"the most frequent class: {percent(most)}" if most is not None else "so far"
        found.append(("agreement, held-out images", percent(held), note))
    note = f"{text(facts.run.config.oracle.response)}, in {paid['calls']:,} calls"
    if paid["uncertain"]:
        note += f"; {paid['uncertain']:,} more uncertain"
    found.append(("queries", f"{paid['queries']:,}", note))
    if (price := facts.run.config.oracle.price) is not None:
        found.append(("cost", f"{_cost(paid, price):,}", f"{price:g} a query"))
    tiles = "".join(
        f'<div><dt>{name}</dt><dd class="big">{value}</dd>{f"<dd class=note>{more}</dd>" if more else ""}</div>'
        for name, value, more in found
    )
    return f'<dl class="tiles">{tiles}</dl>{_networks(summary)}'


def _networks(summary: dict[str, Any]) -> str:
    """Teacher, baseline and student, where all three were tested."""
    if summary.get("baseline_accuracy") is None:
        return ""
    rows = [
        ("teacher", "its own training data", summary["teacher_accuracy"]),
        ("plain baseline", "private images, all of them sent", summary["baseline_accuracy"]),
        ("MEKD student", "generated images only", summary["student_accuracy"]),
    ]
    body = [[name, source, percent(value)] for name, source, value in rows if value is not None]
    shown = table(["network", "learned from", "test accuracy"], body, numbers=1)
    return f"<h3>Beside the alternatives</h3>{wide('networks', 'the three networks', shown)}"


def _stages(facts: Facts) -> str:
    """How far each stage is; nothing once all are done."""
    if facts.finished:
        return ""
    config = facts.run.config
    steps = {row["stage"]: row["step"] for row in facts.metrics}
    asked = {name: facts.accounts[name]["queries"] for name in ("holdout", "replay")}
    rows = []
    if not facts.run.given_teacher and config.teacher.checkpoint is None:
        rows.append(("teacher", steps.get("teacher", 0), config.teacher.steps, "steps"))
    if config.deprivatize.generator is None:
        rows.append(("step 1, the generator", steps.get("deprivatize", 0), config.deprivatize.steps, "steps"))
    if config.distill.store is None:
        rows.append(("answers held out", asked["holdout"], config.distill.holdout, "queries"))
        if config.distill.replay:
            rows.append(("answers to learn from", asked["replay"], config.distill.replay, "queries"))
    if config.distill.pretrain:
        rows.append(("pre-training", steps.get("pretrain", 0), config.distill.pretrain, "steps"))
    rows.append(("step 2, the student", steps.get("distill", 0), config.distill.steps, "steps"))
    items = "".join(
        f'<li><span id="stage-{i}">{name}</span><progress aria-labelledby="stage-{i}" max="{most}" '
        f'value="{min(done, most)}"></progress><span>{done:,} of {most:,} {unit}</span></li>'
        for i, (name, done, most, unit) in enumerate(rows)
    )
    log = "\n".join(text(line, 300) for line in facts.log)
    return f'<ul class="stages">{items}</ul>' + (f"<h3>The last of log.txt</h3><pre>{log}</pre>" if log else "")


# -- pictures and classes ----------------------------------------------------------------------------------


def _classes(facts: Facts, side: int) -> str:
    drawn = [] if facts.drawn is None else list(facts.drawn)
    if not facts.classes and not drawn:
        return ""
    if not pictures.there():
        return "<p>No pictures: Pillow is not installed (pip install 'mekd[plot]').</p>"
    if side == 0:
        return "<p>The pictures are left out: the page would be too large with them.</p>"
    if drawn:
        return (
            "<p>What the generator draws by its last checkpoint, of codes that stay the same; nobody was asked about "
            f"these.</p>{_images(drawn, side, 'generated images')}"
        )
    rows = "".join(
        f'<div class="name">{text(one.name)} <small>{one.count:,} answers</small></div>'
        + _images(list(one.images), side, f"{len(one.images)} generated images that the teacher names {one.name}")
        for one in facts.classes
    )
    many = len(facts.names) > len(facts.classes)
    which = f" Of {len(facts.names):,} classes those are shown that occur most." if many else ""
    lines = (
        f"<p>Generated images of the {facts.answers:,} that were held out, by the class that the teacher names, its "
        f'surest first.{which} No private image is on this page.</p><div class="classes">{rows}</div>'
    )
    families = facts.run.out / "samples" / "families.png"
    if facts.finished and families.is_file():
        lines += (
            "<h3>Codes and nuisances</h3><p>Left: a row is one code, drawn with ten nuisances. Right: a row is one "
            'nuisance, drawn with ten codes.</p><img class="whole" alt="Two grids of generated images: rows of one '
            f'code, and rows of one nuisance" src="{pictures.file(families, 12 * side)}">'
        )
    return lines


def _images(images: Sequence[Any], side: int, label: str) -> str:
    small = " small" if images and min(images[0].shape[-1], side) <= pictures.SMALL else ""
    tiles = "".join(f'<img alt="" src="{pictures.tile(image, side)}">' for image in images)
    none = "" if tiles else '<span class="soft">none: this class was not met</span>'
    role = f' role="img" aria-label="{text(label, 2 * LETTERS)}"' if tiles else ""
    return f'<div class="images{small}"{role}>{tiles}{none}</div>'


def _confusion(facts: Facts) -> str:
    found = facts.confusion
    if found is None:
        return "<p>The folder's report.html has it.</p>" if facts.finished else ""
    shown = list(facts.shown) or list(range(min(len(found.counts), 20)))
    names = [text(facts.names[i] if i < len(facts.names) else i, 40) for i in shown]
    shares = found.counts / found.counts.sum(1, keepdims=True).clip(1)
    body = "".join(_confusion_row(found, shares, shown, i, name) for i, name in zip(shown, names, strict=True))
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    right = percent(float(np.trace(found.counts) / max(found.counts.sum(), 1)))
    of = "of the label" if found.rows == "label" else "that the teacher names"
    return (
        f'<p class="soft">How often the student (columns) names the class {of} (rows), {found.title}; {right} lie on '
        "the diagonal. The stronger the colour, the larger the share of the row.</p>"
        '<div class="wide" id="confusion-wide" role="region" aria-label="confusion matrix" tabindex="0">'
        f'<table class="confusion"><thead><tr><th scope="col">{found.rows}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _confusion_row(found: Confusion, shares: np.ndarray, shown: Sequence[int], row: int, name: str) -> str:
    cells = "".join(
        f'<td class="s{min(9, int(np.ceil(9 * shares[row, j])))}">{found.counts[row, j]:,}</td>'
        if found.counts[row, j]
        else "<td></td>"
        for j in shown
    )
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


# -- what was asked ----------------------------------------------------------------------------------------


def _paid(facts: Facts) -> str:
    config = facts.run.config
    price = config.oracle.price
    rows = []
    for name, words in ACCOUNTS.items():
        if any(facts.accounts[name].values()):
            rows.append([words, *_counted(facts.accounts[name], price)])
        if name == PAID[-1]:
            rows.append(["in all, for the student", *_counted(_sum(facts, PAID), price)])
            summed = len(rows) - 1
    columns = ["", "queries", "calls", "MB up", "MB down", "uncertain", *(["cost"] if price is not None else [])]
    notes = []
    if config.distill.store is not None:
        notes.append(
            f"The student learned from {config.distill.replay:,} answers that another run paid for; they are in that "
            "run's books."
        )
    if earlier := sum(map(len, after.stores(config.deprivatize.after))):
        notes.append(f"It learned from {earlier:,} answers of earlier rounds as well, which are in their books.")
    if config.distill.replay and config.distill.store is None:
        notes.append("The answers are kept: another student learns from them without a query.")
    if config.oracle.budget is not None:
        notes.append(f"The budget of the run is {config.oracle.budget:,} queries.")
    if any(facts.accounts[name]["queries"] for name in SIMULATED):
        notes.append("A simulation measures; nothing of it flows into the student.")
    said = "".join(f"<p>{note}</p>" for note in notes)
    return f"{wide('paid', 'queries and cost', table(columns, rows, numbers=len(columns) - 1, summed=summed))}{said}"


def _counted(counts: dict[str, int], price: float | None) -> list[str]:
    megabytes = [f"{counts[name] / 1e6:,.1f}" for name in ("bytes_up", "bytes_down")]
    cost = [] if price is None else [f"{_cost(counts, price):,}"]
    return [f"{counts['queries']:,}", f"{counts['calls']:,}", *megabytes, f"{counts['uncertain']:,}", *cost]


def _sum(facts: Facts, names: Sequence[str]) -> dict[str, int]:
    accounts = [facts.accounts[name] for name in names]
    return {key: sum(account[key] for account in accounts) for key in accounts[0]}


def _cost(counts: dict[str, int], price: float) -> float:
    return round((counts["queries"] + counts["uncertain"]) * price, 6)


def _coverage(facts: Facts) -> str:
    found = facts.coverage
    if found is None:
        return ""
    sure = "" if found.get("mean_confidence") is None else f"; mean confidence {found['mean_confidence']:.3f}"
    lines = (
        f"<p>The teacher named {found['classes_met']:,} of {found['classes']:,} classes in its first "
        f"{found.get('answers', 0):,} answers, the most frequent in {percent(found['majority_share'])}{sure}.</p>"
    )
    if found.get("never_met"):
        lines += f"<p>About {found['never_met']:,} more would yet be met (an estimate).</p>"
    if found.get("stopped"):
        lines += (
            "<p><strong>The run stopped here: these are too few classes to learn from (log.txt says more).</strong></p>"
        )
    most = max((one.count for one in facts.classes), default=0)
    rows = [[text(one.name), f"{one.count:,}", _bar(one.count / max(most, 1))] for one in facts.classes]
    return lines + (table(["class", "held-out answers", ""], rows, numbers=1, kind="bars") if rows else "")


def _bar(share: float) -> str:
    bar = f'<rect width="{100 * share:.1f}" height="10"/>'
    return f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'


# -- what may be said of it --------------------------------------------------------------------------------


def _audit(facts: Facts, audited: Sequence[str]) -> str:
    if facts.noise is not None and facts.audit is not None:  # as in the model card
        return "<p>In report.md, and not here: epsilon does not count what the audit says of private images.</p>"
    if not audited:
        return "<p>Not measured: <code>mekd audit</code> does it, at home.</p>" if facts.finished else ""
    cells = [[text(cell.strip(), 2000) for cell in line.strip("|").split("|")] for line in audited if line[:1] == "|"]
    said = [
        re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text(line[2:], 2000)) for line in audited if line[:2] == "- "
    ]
    left_out = "<p>samples/nearest.png shows private photos, and is therefore not on this page.</p>"
    return (
        wide("audit", "audit", table(cells[0], cells[2:], numbers=2))
        + f"<ul>{''.join(f'<li>{line}</li>' for line in said)}</ul>"
        + (left_out if any("nearest.png" in line for line in said) else "")
    )


def _sent(facts: Facts) -> str:
    if facts.summary is None:
        return ""
    rows = card.facts(facts.run, facts.summary, facts.run.teacher_name) + card.measured(facts.run, facts.summary)
    named = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value, 600)}</td></tr>' for name, value in rows)
    said = code(text(card.sent(facts.run, facts.summary), 2000))
    return (
        f"<p>{said}</p><p>This page may be handed on: it holds generated images alone. samples/sent.png "
        "and samples/nearest.png show private photos, stay in the run's folder, and are left out here.</p>"
        f"{wide('facts', 'facts of the run', f'<table>{named}</table>')}"
    )


def _settings(facts: Facts) -> str:
    rows = [[f"<code>{text(key)}</code>", text(public(key, value), 500)] for key, value in facts.settings.items()]
    shown = wide("values", "settings", table(["setting", "value"], rows))
    return (
        "<p>As config.yaml has them, with what the defaults mean on that machine. Of files and folders the last part "
        f'of the name is shown, of a secret its place.</p><details id="all-settings"><summary>'
        f"{len(rows)} settings</summary>{shown}</details>"
    )


def public(key: str, value: Any) -> str:
    """A setting as whoever gets the page may see it: no folders of the machine, and no secret written out."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if key in PATHS or (key in ("teacher.arch", "distill.student") and file_of(value)):
        name = str(value).replace("\\", "/").rstrip("/")
        return name if "/" not in name else f"…/{name.rpartition('/')[2]}"
    if key == "teacher.url":
        return _places(_PART.sub(_named, re.sub("//[^/?#]*@", "//…@", str(value))))
    if key == "oracle.headers":
        shown = {name: _places(str(one)) if _SCHEMES.fullmatch(str(one)) else "…" for name, one in value.items()}
        return "; ".join(f"{name}: {one}" for name, one in shown.items())
    return str(value)


def _named(part: re.Match[str]) -> str:
    """A part of an address with the name of its value, if it has one; a token's base64 may end with = as well."""
    before, whole = part.groups()
    name, equals, value = whole.partition("=")
    if not value.strip("="):
        name, equals, value = "", "", whole
    return f"{before}{name}{equals}{value if _PLACES.fullmatch(value) else '…'}"


def _places(secrets: str) -> str:
    """The places of secrets, without the folders of {file:PATH}."""
    return re.sub(r"(\{file:)[^{}]*[/\\]", r"\1…/", secrets)
