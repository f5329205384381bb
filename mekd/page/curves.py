"""The curves of a run: agreement and losses, against steps, and against queries where a step pays for some."""

from collections.abc import Sequence
from typing import Any

from mekd.page.chart import Line, chart
from mekd.page.facts import Facts, queries_before

#: Title, stage, keys of metrics.jsonl with their names, and how they are drawn.
PANELS: Sequence[tuple[str, str, dict[str, str], dict[str, bool]]] = (
    ("Agreement, held-out images", "distill", {"agreement": "student = teacher"}, {"percent": True}),
    ("Step 2: terms of the student's loss", "distill", {"image": "image L1", "kl": "KL"}, {"log": True}),
    ("Step 1: losses of the GAN", "deprivatize", {"loss_d": "discriminator", "loss_g": "generator"}, {}),
    ("Step 1: the teacher's confidence", "deprivatize", {"confidence": "mean confidence"}, {"percent": True}),
    ("Pre-training: loss", "pretrain", {"loss": "loss"}, {}),
    ("Teacher: loss", "teacher", {"loss": "cross entropy"}, {"log": True}),
    ("Plain baseline: loss", "baseline", {"loss": "KL"}, {"log": True}),
)


def curves(facts: Facts) -> str:
    """All panels that have points, as HTML."""
    figures, both = [], False
    for number, (title, stage, keys, how) in enumerate(PANELS):
        rows = [row for row in facts.metrics if row["stage"] == stage]
        found = {name: [row for row in rows if _number(row.get(key))] for key, name in keys.items()}
        if not any(found.values()):
            continue
        lines = [Line(name, [(row["step"], row[key]) for row in found[name]]) for key, name in keys.items()]
        before, each = queries_before(facts.run, stage)
        drawn = f'<div class="by-steps">{chart(title, lines, "steps", **how)}</div>'
        if each:
            paid = [Line(line.name, [(before + each * step, y) for step, y in line.points]) for line in lines]
            drawn += f'<div class="by-queries">{chart(title, paid, "queries", **how)}</div>'
            both = True
        names = "".join(f'<span class="key k{i}">{name}</span>' for i, name in enumerate(keys.values()))
        figures.append(
            f'<figure id="chart-{number}"{" class=both" if each else ""}><figcaption><b>{title}</b>{names}</figcaption>'
            f"{drawn}</figure>"
        )
    if not figures:
        return ""
    choice = (
        "<fieldset><legend>Against</legend>"
        '<label><input type="radio" name="axis" id="by-steps" checked> steps</label>'
        '<label><input type="radio" name="axis" id="by-queries"> queries paid</label></fieldset>'
    )
    return f"{choice if both else _when_paid(facts)}<div class=charts>{''.join(figures)}</div>"


def _when_paid(facts: Facts) -> str:
    replay = facts.run.config.distill.replay
    if facts.run.config.distill.store is not None or not replay:
        return ""
    paid = queries_before(facts.run, "distill")[0] + replay
    return f"<p>All {paid:,} queries are paid before the first step of the student: its curves have no price.</p>"


def _number(value: Any) -> bool:
    return isinstance(value, int | float)
