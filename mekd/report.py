"""The report of a run: summary.json, summary.csv, curves, pictures, report.md, report.html."""

import csv
import io
from typing import Any

from mekd import card, files, page
from mekd.audited import audited
from mekd.data.photos import PhotoSource
from mekd.engine import coverage, dp, parallel
from mekd.engine.private import answers_at_home
from mekd.engine.result import STUDENT, audit_of, class_names, finished_student, held_out
from mekd.engine.run import Run, StageError
from mekd.errors import MekdError
from mekd.metrics import majority_share
from mekd.plots import PUBLIC, confused, draw

STAGES = ("teacher", "deprivatize", "pretrain", "holdout", "replay", "distill", "baseline")


def report(run: Run) -> None:
    """Read the run's folder and write what people want to see of it, a model card too; nothing is trained or asked."""
    if parallel.rank():
        return
    if not all((run.out / name).exists() for name in STUDENT):
        _unfinished(run)
        return
    summary = summarize(run)
    run.write_json("summary.json", summary)
    files.write_text(run.out / "summary.csv", _csv(summary))
    found = confused(run)
    pictures = draw(run, found)
    for _, name in pictures:
        if name in PUBLIC:
            run.tracks.picture(name)
    files.write_text(run.out / "report.md", markdown(run, summary, pictures))
    noisy = run.config.deprivatize.dp is not None or dp.told(run)  # epsilon counts nothing that the audit says
    said = [] if noisy else audited(audit_of(run))
    card.write(run, card.card(run, summary, pictures, said))
    page.write(page.gather(run, class_names(run), summary, found), said)
    run.log("")
    for line in table(run, summary):
        run.log(line)
    run.log(f"\nreport: {run.out / 'report.md'}, and as a page: {run.out / 'report.html'}")


def _unfinished(run: Run) -> None:
    """Write the page of a run that has no student yet; StageError where it has not begun."""
    if not (run.out / "metrics.jsonl").exists():
        raise StageError(
            f"{run.out / 'metrics.jsonl'} is missing: there is nothing to report yet; run `mekd run` first"
        )
    page.write(page.gather(run, class_names(run)), [])
    run.log(f"report: the run is not finished; {run.out / 'report.html'} shows what there is")


def summarize(run: Run) -> dict[str, Any]:
    """What the run measured, flat."""
    evaluated = run.read_json("evaluate.json") or {}
    accounts = {name: run.asked(name) for name in ("deprivatize", "distill", "audit")}
    best = files.load(run.checkpoint("distill"))["state"]["best"]
    summary: dict[str, Any] = {
        name: evaluated.get(name) for name in ("teacher_accuracy", "student_accuracy", "baseline_accuracy", "agreement")
    }
    if evaluated:
        rows = [sum(row) for row in evaluated["confusion"]]
        summary["test_majority_share"] = round(max(rows) / max(sum(rows), 1), 6)
    summary["holdout_agreement"] = best["agreement"]
    _, answer = held_out(run)
    summary["majority_share"] = round(majority_share(answer.labels), 6)
    summary["best_step"] = best["step"]
    coverage = run.read_json("coverage.json") or {}
    summary["coverage_classes"] = coverage.get("classes_met")
    summary |= answers_at_home(run, finished_student(run))
    sent = run.read_json("sent.json") or {}
    summary |= {key: value for key, value in sent.items() if key not in ("private_images", "generator")}
    for key in ("queries", "calls", "bytes_up", "bytes_down", "uncertain"):
        summary[key] = sum(account[key] for account in accounts.values())
    for name, account in accounts.items():
        summary[f"queries_{name}"] = account["queries"]
    if run.config.oracle.price is not None:
        summary["cost"] = round((summary["queries"] + summary["uncertain"]) * run.config.oracle.price, 6)
    simulated = run.asked("evaluate")  # by the books: evaluate.json is not there yet, or is an earlier student's
    summary["simulation_queries"] = simulated["queries"] + simulated["uncertain"]
    saved = {name: run.checkpoint(name) for name in STAGES}
    seconds = {name: round(files.load(path)["seconds"], 1) for name, path in saved.items() if path.exists()}
    summary["epsilon"] = (dp.told(run) or {}).get("epsilon")
    summary["seconds"] = seconds
    summary["seed"] = run.config.seed
    summary["response"] = run.config.oracle.response
    return summary


def table(run: Run, summary: dict[str, Any]) -> list[str]:
    """What the run measured, as lines of Markdown: teacher, plain baseline and student only where they were tested."""
    rows = [
        ("teacher", "its own training data", summary["teacher_accuracy"]),
        ("plain baseline", "private images, sent to the teacher", summary["baseline_accuracy"]),
        ("MEKD student", "generated images only", summary["student_accuracy"]),
    ]
    tested = [f"| {name} | {source} | {_percent(value)} |" for name, source, value in rows if value is not None]
    lines = ["| network | learned from | test accuracy |", "|---|---|---|", *tested, ""] if tested else []
    agrees = []
    if summary["agreement"] is not None:
        most = _percent(summary["test_majority_share"])
        agrees.append(f"{_percent(summary['agreement'])} of the test images (always the most frequent class: {most})")
    most = _percent(summary["majority_share"])
    agrees.append(
        f"{_percent(summary['holdout_agreement'])} of the held-out synthetic queries (always the most frequent class: "
        f"{most})"
    )
    lines.append(f"student = teacher on {', '.join(agrees)}")
    if summary["holdout_agreement"] <= summary["majority_share"]:
        lines.append("that is NO better than always naming one class: train it longer, or learn from more answers")
    covered = run.read_json("coverage.json")
    if covered:
        lines.append(f"the teacher named {coverage.describe(covered)}")
    if "private_images" in summary:
        lines.append(
            f"at home, on {summary['private_images']:,} private images, the student names {summary['private_classes']} "
            f"classes, the most frequent in {_percent(summary['private_majority_share'])}; mean confidence "
            f"{summary['private_confidence']:.3f}"
        )
    return [
        *lines,
        f"{summary['queries']:,} queries ({summary['response']}) in {summary['calls']:,} calls, "
        f"{summary['bytes_up'] / 1e6:.1f} MB up, {summary['bytes_down'] / 1e6:.1f} MB down"
        + (f", {summary['uncertain']} uncertain" if summary["uncertain"] else "")
        + (f", cost {summary['cost']}" if "cost" in summary else ""),
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()),
    ]


def markdown(run: Run, summary: dict[str, Any], pictures: list[tuple[str, str]]) -> str:
    """report.md."""
    settings = run.config
    head = [
        f"# {settings.data.name or 'answers of another run'}, {settings.data.size} px: {settings.distill.student} from "
        f"a black box that answers {summary['response']}",
        "",
        *(line if not line or line.startswith("|") else f"- {line}" for line in table(run, summary)),
        "",
        *_simulated(summary),
        "MEKD itself sent generated images only. That no private image was sent is not a promise that no generated "
        "image resembles one.",
        "",
        *audited(audit_of(run)),
        *_left_out(run),
    ]
    shown = [line for caption, name in pictures for line in (f"![{caption}]({name})", "", caption, "")]
    if not pictures:
        shown = ["No pictures: matplotlib is not installed (pip install 'mekd[plot]').", ""]
    return "\n".join([*head, *shown, "Settings: config.yaml. Figures: summary.json. Curves: metrics.jsonl.", ""])


def _simulated(summary: dict[str, Any]) -> list[str]:
    """What was measured with labels, and what it sent."""
    if summary["student_accuracy"] is None:
        return []
    if not summary["simulation_queries"]:
        return ["The test accuracy was measured at home, on labelled images of which none was sent.", ""]
    return [
        "The test accuracies and the plain baseline are a simulation: they need labels and send real images, with an "
        f"oracle and a ledger of their own ({summary['simulation_queries']:,} queries).",
        "",
    ]


def _left_out(run: Run, most: int = 200) -> list[str]:
    """The photos that could not be read."""
    try:
        data = run.data
    except MekdError:
        return []
    if not isinstance(data, PhotoSource) or not data.reasons():
        return []
    reasons = sorted(data.reasons().items())
    more = [f"- and {len(reasons) - most:,} more"] if len(reasons) > most else []
    return ["Photos that were left out:", "", *(f"- {why}" for _, why in reasons[:most]), *more, ""]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _csv(summary: dict[str, Any]) -> str:
    flat = {k: v for k, v in summary.items() if k != "seconds"}
    flat |= {f"seconds_{name}": value for name, value in summary["seconds"].items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, flat, lineterminator="\n")
    writer.writeheader()
    writer.writerow(flat)
    return text.getvalue()
