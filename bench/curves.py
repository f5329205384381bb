"""The table of bench students in words and pictures: means over seeds with their spread, curves against queries."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import tables

Rows = Sequence[Mapping[str, str]]
#: Lines that do not depend on a number of queries, and how they are drawn.
LEVELS = {"ceiling": "--", "plain": ":"}
#: The other rows of a picture, each of the same colour in all of them; those that change one setting are the table's.
CURVES = ("mekd", "mekd-before", "kl", "l1", "pool", "pool-uncertain")
#: A point or more between these makes a share worth telling.
ROOM = 1.0


def main(arguments: Sequence[str]) -> int:
    """python -m bench curves FILE: print the tables, draw the pictures beside the file."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m bench curves bench/results/PROCESSOR/students.csv")
    path = Path(arguments[0])
    rows = tables.read(path)
    for data in dict.fromkeys(row["data"] for row in rows):
        print("\n".join(table(rows, data)), end="\n\n")
        for picture in draw(rows, data, path.parent):
            print(f"drawn: {picture}")
    return 0


def table(rows: Rows, data: str) -> list[str]:
    """Markdown: the mean over seeds of each row and its spread, half the range; the share of the gap that is closed."""
    lines = [
        "| data | private | row | response | queries | steps | seeds | accuracy | agreement | share | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, found in grouped(rows, data).items():
        private, row, response, queries, steps = key
        levels = {name: level(rows, data, private, response, steps, name) for name in LEVELS}
        accuracies = [float(one["accuracy"]) for one in found]
        cells = [data, private, row, response, queries, steps, str(len(found)), spread(accuracies)]
        cells += [spread([float(one["agreement"]) for one in found]), share(statistics.mean(accuracies), **levels)]
        cells += [f"{statistics.mean(float(one['seconds']) for one in found):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def grouped(rows: Rows, data: str) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    """The seeds of each (private, row, response, queries, steps), in the table's order."""
    found: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        if row["data"] == data:
            key = tuple(row[name] for name in ("private", "row", "response", "queries", "steps"))
            found.setdefault(key, []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][2], item[0][4])))


def level(rows: Rows, data: str, private: str, response: str, steps: str, name: str) -> float | None:
    """The mean accuracy of plain or of the ceiling, in the same experiment."""
    wanted = {"data": data, "private": private, "response": response, "steps": steps, "row": name}
    found = [float(row["accuracy"]) for row in rows if wanted.items() <= row.items()]
    return statistics.mean(found) if found else None


def share(accuracy: float, plain: float | None, ceiling: float | None) -> str:
    """(accuracy - plain) / (ceiling - plain), where that is a point or more."""
    if plain is None or ceiling is None:
        return ""
    return f"{(accuracy - plain) / (ceiling - plain):.2f}" if ceiling - plain >= ROOM else "no room"


def spread(values: Iterable[float]) -> str:
    """A mean, and half the range of several."""
    values = list(values)
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else "")


#: Per cent that a picture shows at least.
SPAN = 4.0


def draw(rows: Rows, data: str, folder: Path) -> list[Path]:
    """A picture for each share of private images and kind of answer; none where matplotlib is missing."""
    from mekd import plots

    if not plots.there():
        return []
    drawn, shown = [], [row for row in rows if row["data"] == data and row["row"] in (*CURVES, *LEVELS)]
    for private, response in dict.fromkeys((row["private"], row["response"]) for row in shown):
        mine = [row for row in shown if (row["private"], row["response"]) == (private, response)]
        drawn.append(folder / f"students-{data}-{private}-{response}.png")
        plots.save(picture(mine, f"{data}, {100 * float(private):g} % private, {response}"), drawn[-1])
    return drawn


def bottom(rows: Rows) -> float:
    """Three gaps between plain and the ceiling below plain, where both are there: what is worse is named, not drawn."""
    plain, ceiling = ([float(row["accuracy"]) for row in rows if row["row"] == name] for name in ("plain", "ceiling"))
    if not plain or not ceiling:
        return 0.0
    return statistics.mean(plain) - 3 * max(0.0, statistics.mean(ceiling) - statistics.mean(plain))


def picture(rows: Rows, title: str) -> Any:
    """Accuracy and agreement against queries on a log axis, a band from the worst seed to the best."""
    import matplotlib.pyplot as plt

    numbers = sorted({int(row["queries"]) for row in rows if row["queries"].isdigit()})
    edge = 2 * max(numbers, default=10_000)  # where unlimited stands
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)

    def against(name: str, what: str) -> dict[float, list[float]]:
        """The seeds of a row at each number of queries."""
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["row"] == name:
                at = int(row["queries"]) if row["queries"].isdigit() else edge
                points.setdefault(at, []).append(float(row[what]))
        return points

    def best(name: str, what: str) -> float:
        return max(statistics.mean(values) for values in against(name, what).values())

    names = list(dict.fromkeys(row["row"] for row in rows))
    # By their accuracy, in both halves: their legend is one.
    below = [name for name in names if name not in LEVELS and best(name, "accuracy") < bottom(rows)]
    for axis, what in zip(axes, ("accuracy", "agreement"), strict=True):
        for name in [name for name in names if name not in below]:
            points = against(name, what)
            if name in LEVELS:
                axis.axhline(statistics.mean(points[edge]), color="0.4", ls=LEVELS[name], lw=1.2, label=name)
                axis.axhspan(min(points[edge]), max(points[edge]), color="0.4", alpha=0.12, lw=0)
                continue
            at, colour = sorted(points), f"C{CURVES.index(name)}"
            axis.plot(at, [statistics.mean(points[x]) for x in at], marker="o", ms=4, color=colour, label=name)
            low, high = ([limit(points[x]) for x in at] for limit in (min, max))
            axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
            if len(at) == 1:  # a band would have no width
                axis.vlines(at, low, high, color=colour, alpha=0.4, lw=2)
        low, high = axis.get_ylim()
        if high - low < SPAN:  # two points of one row would look like all the difference in the world
            high = min((low + high + SPAN) / 2, 100.5)
            axis.set_ylim(high - SPAN, high)
        axis.set_xscale("log")
        ticks = {x: f"{x // 1000}k" if x >= 1000 else str(x) for x in numbers}
        if any(row["queries"] == "unlimited" for row in rows):
            ticks[edge] = "unlimited"
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
        axis.set(xlabel="queries paid", ylabel=f"{what}, %")
        if below:
            far = ", ".join(f"{name} {best(name, what):.1f}" for name in below)
            axis.set_xlabel(f"queries paid\nfar below, at best: {far}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(title)
    return figure
