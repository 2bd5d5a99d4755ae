"""Pieces that every section uses: pictures inside the page, and a card for each result."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from digit.core.errors import DigitError
from digit.evaluation.report.collect import Collection, Found, Problem
from digit.evaluation.report.curves import Curve
from digit.evaluation.report.html import Child, Html, bullets, details, join, notice, pairs, seconds, tag

_LARGEST_FILE, _LARGEST_SIDE = 1_500_000, 1600  # bytes and pixels that go into the page as they are


@dataclass
class Context:
    """What is reported, and the problems met on the way."""

    collection: Collection
    curves: list[Curve]

    def problem(self, item: Found, name: str, reason: str) -> None:
        """Note a file that could not be used."""
        self.collection.problems.append(Problem(f"{item.place}/{name}", reason))

    def each(self, items: list[Found], build: Callable[[Found], Html]) -> list[Html]:
        """Build a card for every result; one that does not hold what it should becomes a problem."""
        cards = []
        for item in items:
            try:
                cards.append(build(item))
            except Exception as error:  # whatever a damaged file may hold
                self.problem(item, "", f"this {item.kind} result is not as expected: {type(error).__name__}, {error}.")
        return cards

    def picture(self, item: Found, name: str, alt: str) -> Html | None:
        """A picture file beside a result as a part of the page; None, and a problem, where that cannot be."""
        try:
            if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
                raise DigitError("a picture's name is expected, without folders.")
            url, size = _data_url(item, name)
        except (DigitError, OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self.problem(item, str(name), f"the picture cannot be shown: {reason}")
            return None
        shape = "pixelated" if max(size) <= 320 else "wide" if size[0] > 2.5 * size[1] else None
        return tag("img", src=url, alt=alt, width=size[0], height=size[1], class_=shape)


def _data_url(item: Found, name: str) -> tuple[str, tuple[int, int]]:
    data = (item.folder / name).read_bytes()
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        image.load()
        kind = str(image.format).lower()
        if len(data) > _LARGEST_FILE or max(image.size) > _LARGEST_SIDE:
            image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, "WEBP", quality=88)
            data, kind = smaller.getvalue(), "webp"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.size


def card(item: Found, title: Child, *body: Child) -> Html:
    """One result: title, place, content, notes, and all that was set."""
    data = item.data
    facts = [data.get("made"), seconds(data["seconds"]) if isinstance(data.get("seconds"), (int, float)) else None]
    place = " · ".join([item.place, *(str(fact) for fact in facts if fact)])
    return tag(
        "article",
        tag("h3", title),
        tag("p", place, class_="place"),
        body,
        _notes(data.get("notes")),
        _settings(data),
        class_="card",
    )


def _notes(notes: Any) -> Html | None:
    if not notes:
        return None
    return tag("div", bullets(str(note) for note in ([notes] if isinstance(notes, str) else notes)), class_="notes")


def _settings(data: Mapping[str, Any]) -> Html | None:
    names = {
        "settings": "Settings",
        "options": "Options",
        "sampling": "Sampling",
        "model": "Model",
        "data": "Data",
        "reference": "Reference",
        "hardware": "Hardware",
        "versions": "Versions",
    }
    parts = [(tag("h4", title), pairs(data[key])) for key, title in names.items() if isinstance(data.get(key), dict)]
    return details("Settings, model, data and hardware", parts) if parts else None


def section(anchor: str, title: str, intro: Child, *content: Child) -> Html:
    """A part of the page that the menu links to."""
    return tag("section", tag("h2", title), tag("p", intro) if intro else None, content, id=anchor)


def warn(lines: list[str]) -> Html | None:
    """A notice of several sentences, or nothing."""
    return notice(*[tag("p", line) for line in lines]) if lines else None


def grid(*charts: Child) -> Html:
    """Charts beside each other where there is room."""
    return tag("div", join(charts), class_="grid")
