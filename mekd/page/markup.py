"""Pieces of HTML. Whatever comes from outside goes through text(), which escapes and clips it."""

import re
from collections.abc import Sequence
from html import escape

#: Letters of a name or a value from outside that a page shows at most.
LETTERS = 120


def text(value: object, most: int = LETTERS) -> str:
    """A value as HTML shows it, cut where it is longer than that."""
    whole = str(value).encode("utf-8", "backslashreplace").decode()
    return escape(whole if len(whole) <= most else whole[: most - 1] + "…")


def code(escaped: str) -> str:
    """What stands between backticks as code."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escaped)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0, summed: int = -1, kind: str = ""
) -> str:
    """A table of HTML; the last columns, so many, are numbers (of kind bars the one before the last); summed: a row."""
    first = len(head) - numbers - (kind == "bars")
    right = set(range(first, first + numbers))

    def cell(tag: str, i: int, value: str, more: str = "") -> str:
        return f"<{tag}{more}{' class=n' if i in right else ''}>{value}</{tag}>"

    titles = "".join(cell("th" if x else "td", i, x, ' scope="col"' if x else "") for i, x in enumerate(head))
    body = "".join(
        f"<tr{' class=sum' if n == summed else ''}>{''.join(cell('td', i, x) for i, x in enumerate(row))}</tr>"
        for n, row in enumerate(rows)
    )
    return f"<table{f' class={kind}' if kind else ''}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def wide(name: str, label: str, content: str) -> str:
    """What may be wider than a phone: it scrolls alone."""
    return (
        f'<div class="wide" id="{name}-wide" role="region" aria-label="table of {label}" tabindex="0">{content}</div>'
    )


def percent(share: float) -> str:
    """A share of 1."""
    return f"{100 * share:.2f}\N{NO-BREAK SPACE}%"
