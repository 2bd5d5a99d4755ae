"""Markup that cannot be forgotten to be escaped: plain strings become text, only :class:`Html` passes as it is."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Union


class Html(str):
    """Finished markup."""

    __slots__ = ()


Child = Union[str, int, float, None, "Iterable[Child]"]
DASH = "\u2013"  # stands where there is no value
_EMPTY = {"img", "meta", "link", "br"}


def join(children: Child) -> Html:
    """Children one after the other; plain strings and numbers are escaped, None is nothing."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, (str, int, float)):
        return Html(html.escape(str(children)))
    return Html("".join(join(child) for child in children))


def tag(name: str, *children: Child, **attributes: Any) -> Html:
    """An element; ``class_`` becomes ``class``, ``a_b`` becomes ``a-b``, an attribute that is None or False is left
    out.
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    opening = f"<{name}{''.join(given)}>"
    return Html(opening) if name in _EMPTY else Html(f"{opening}{join(children)}</{name}>")


def number(value: Any, digits: int = 4) -> str:
    """A number with ``digits`` significant digits; other things as text; nothing as a dash."""
    if value is None:
        return DASH
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:,.{min(decimals, 6)}f}"


def millions(value: float | None) -> str:
    """Parameters, given in millions, as people write them."""
    if value is None:
        return DASH
    if value >= 1000:
        return f"{value / 1000:.3g}B"
    return f"{value:.3g}M" if value >= 1 else f"{1000 * value:.3g}K"


def seconds(value: float) -> str:
    """A duration."""
    if value < 90:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"


Rows = Sequence[Sequence[Child]]


def table(head: Sequence[Child], groups: Mapping[str, Rows] | Rows, text: Collection[int] = ()) -> Html:
    """A table that scrolls inside its own box when it is wide.

    Args:
        head: of the columns; the first column names the rows.
        groups: rows, or groups of rows under a title of their own; a title that begins with ``*`` marks our own rows.
        text: the columns that hold words; the others are aligned as numbers.
    """
    if not isinstance(groups, Mapping):
        groups = {"": groups}
    words = ["text" if i in text else None for i in range(len(head))]
    bodies = []
    for title, rows in groups.items():
        ours = title.startswith("*")
        name = tag("span", title.lstrip("*"))
        first = tag("tr", tag("th", name, colspan=len(head), class_="group", scope="rowgroup")) if title else None
        lines = [
            tag(
                "tr",
                tag("th", row[0], scope="row"),
                [tag("td", c, class_=w) for c, w in zip(row[1:], words[1:], strict=True)],
            )
            for row in rows
        ]
        bodies.append(tag("tbody", first, lines, class_="ours" if ours else None))
    columns = tag(
        "thead", tag("tr", [tag("th", cell, scope="col", class_=w) for cell, w in zip(head, words, strict=True)])
    )
    return tag("div", tag("table", columns, bodies), class_="scroll", tabindex="0")


def flatten(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted name, text) pairs."""
    if isinstance(values, Mapping):
        return [
            pair for key, value in values.items() for pair in flatten(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(values, (list, tuple)):
        plain = all(not isinstance(v, (Mapping, list, tuple)) for v in values)
        return [(prefix, ", ".join(_exactly(v) for v in values) if plain else json.dumps(values, ensure_ascii=False))]
    return [(prefix, _exactly(values))]


def _exactly(value: Any) -> str:
    """A setting as it was given: no separators, no added zeros."""
    if value is None:
        return DASH
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def pairs(values: Any) -> Html:
    """Nested values as a list of names and values."""
    return tag("dl", [(tag("dt", name), tag("dd", text)) for name, text in flatten(values)])


def details(summary: Child, *children: Child) -> Html:
    """A part that opens on demand, and in print."""
    return tag("details", tag("summary", summary), *children)


def notice(*children: Child) -> Html:
    """Something that must not be overlooked."""
    return tag("div", *children, class_="notice", role="note")


def bullets(items: Iterable[Child]) -> Html | None:
    """A list, or nothing where there are no items."""
    lines = [tag("li", item) for item in items]
    return tag("ul", lines) if lines else None
