"""Small plots as inline SVG: they take the page's colours, so they can be read in the dark, on a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from digit.evaluation.report.html import Child, Html, number, tag

WIDTH, HEIGHT = 380, 260  # units of the picture; about pixels on a phone, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 22, 36
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        name: for the legend.
        x, y: the points; those that are not finite are left out.
        color: 1 to 6, or 0 for the grey of the paper.
        dash: draw it dashed.
        markers: mark the points.
        band: lower and upper ends around the line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 1
    dash: bool = False
    markers: bool = True
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Circle:
    """A bubble: its place, a size in any unit (None: unknown, drawn as a ring), and whether it is ours."""

    name: str
    x: float
    y: float
    size: float | None
    ours: bool


@dataclass
class Axis:
    """Maps values to the units of the picture.

    Attributes:
        values: what must be visible.
        start, stop: in the picture.
        log: logarithmic.
        zero: begin at 0.
        pad: share of the range left free at both ends.
    """

    values: Iterable[float]
    start: float
    stop: float
    log: bool = False
    zero: bool = False
    pad: float = 0.04
    low: float = field(init=False)
    high: float = field(init=False)
    whole: bool = field(init=False)

    def __post_init__(self) -> None:
        self.values = list(self.values)
        self.whole = all(float(v).is_integer() for v in self.values if math.isfinite(v))
        inside = [self._scale(v) for v in self.values if math.isfinite(v) and (v > 0 or not self.log)] or [0.0, 1.0]
        low, high = min(inside), max(inside)
        if self.zero and not self.log:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
        room = (high - low) * self.pad
        self.low = low if self.zero and low == 0 else low - room
        self.high = high + room

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (self._scale(value) - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            fine = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            found = [factor * 10.0**power for power in powers for factor in fine]
            found = [v for v in found if self.low <= math.log10(v) <= self.high]
            if len(found) > 1:
                return found
            return [10**self.low, 10**self.high]
        return self._steps()

    def _steps(self) -> list[float]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(f for f in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * f) <= 6)
        if self.whole:
            step = max(1.0, round(step))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    levels: Sequence[tuple[str, float, int]] = (),
    reverse: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    names: Sequence[str] | None = None,
) -> Html:
    """Lines over a common axis, with a legend below.

    Args:
        title: shown above.
        series: the lines.
        x_label: under the picture.
        y_label: above it.
        levels: horizontal lines: name, value and colour.
        reverse: the largest x stands left.
        log_x: x axis logarithmic.
        log_y: y axis logarithmic.
        zero: begin the y axis at 0.
        names: of the places 0, 1, 2 ... on an x axis of words.
    """
    ends = (WIDTH - RIGHT, LEFT) if reverse else (LEFT, WIDTH - RIGHT)
    x = Axis((v for s in series for v in s.x), *ends, log=log_x, pad=0.02)
    seen = [v for s in series for part in (s.y, *(s.band or ())) for v in part] + [value for _, value, _ in levels]
    y = Axis(seen, HEIGHT - BOTTOM, TOP, log=log_y, zero=zero)
    lines = [_level(y(value), color) for _, value, color in levels] + [_line(s, x, y) for s in series]
    legend = [(f"c{s.color}", s.dash, s.name) for s in series] + [
        (f"c{color}", True, name) for name, _, color in levels
    ]
    return _figure(title, x, y, x_label, y_label, lines, legend, names)


def bubble_chart(title: str, circles: Sequence[Circle], x_label: str, y_label: str) -> Html:
    """Circles whose area stands for a size; those of the paper are grey."""
    x = Axis((c.x for c in circles), LEFT, WIDTH - RIGHT, pad=0.18)
    values = [c.y for c in circles]
    y = Axis(values, HEIGHT - BOTTOM, TOP, log=min(values) > 0 and max(values) > 15 * min(values), pad=0.16)
    largest = max((c.size for c in circles if c.size), default=1.0)
    drawn: list[Html] = []
    places = [(x(c.x), y(c.y), max(2.5, 22 * math.sqrt(c.size / largest)) if c.size else 5.0) for c in circles]
    taken: list[Box] = [(px - r, py - r, px + r, py + r) for px, py, r in places]
    for circle, place in sorted(zip(circles, places, strict=True), key=lambda pair: -pair[1][2]):
        tip = f"{circle.name}: {number(circle.x)} %, FID {number(circle.y)}"
        style = f"bubble {'c1' if circle.ours else 'c0'}{'' if circle.size else ' ring'}"
        px, py, radius = place
        drawn.append(tag("circle", tag("title", tip), cx=_n(px), cy=_n(py), r=_n(radius), class_=style))
        box = _name_box(circle.name, place, taken)
        taken.append(box)
        drawn.append(tag("text", circle.name, x=_n(box[0]), y=_n(box[3] - 3), class_="name"))
    return _figure(
        title, x, y, x_label, y_label, drawn, [("c1", False, "measured here"), ("c0", False, "the paper, ImageNet")]
    )


def _name_box(text: str, place: tuple[float, float, float], taken: Sequence[Box]) -> Box:
    """Room for a name beside, above or below its circle: the first that covers nothing, else the first."""
    px, py, radius = place
    width, height = 6.2 * len(text), 13.0
    gap = radius + 3
    corners = [(px + gap, py - height / 2), (px - gap - width, py - height / 2)]
    corners += [(px - width / 2, py + side) for side in (gap, -gap - height)]
    corners += [(px - width / 2, py + side * d) for d in (40, 55, 70) for side in (1, -1)]
    boxes = [(min(max(a, LEFT + 2), WIDTH - 2 - width), b) for a, b in corners]
    room = [(a, b, a + width, b + height) for a, b in boxes]
    free = [
        box
        for box in room
        if not any(_overlap(box, other) for other in taken) and box[1] >= TOP and box[3] <= HEIGHT - BOTTOM
    ]
    return (free or room)[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _figure(
    title: str,
    x: Axis,
    y: Axis,
    x_label: str,
    y_label: str,
    content: Child,
    legend: Sequence[tuple[str, bool, str]],
    names: Sequence[str] | None = None,
) -> Html:
    places = [(v, _text(v)) for v in x.ticks()] if names is None else list(enumerate(names))
    grid = [
        *(_tick(x(v), HEIGHT - BOTTOM, TOP, text, vertical=True) for v, text in places),
        *(_tick(y(v), LEFT, WIDTH - RIGHT, _text(v), vertical=False) for v in y.ticks()),
    ]
    labels = [
        tag("text", x_label, x=_n((LEFT + WIDTH - RIGHT) / 2), y=HEIGHT - 4, class_="label", text_anchor="middle"),
        tag("text", y_label, x=2, y=11, class_="label"),
    ]
    picture = tag(
        "svg",
        grid,
        labels,
        content,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {y_label} over {x_label}",
    )
    shown = dict.fromkeys(legend)
    keys = [tag("li", tag("span", class_=f"key {c}{' dashed' if dash else ''}"), name) for c, dash, name in shown]
    return tag(
        "figure",
        tag("figcaption", title),
        picture,
        tag("ul", keys, class_="legend") if len(keys) > 1 else None,
        class_="plot",
    )


def _tick(place: float, start: float, stop: float, text: str, vertical: bool) -> Html:
    if vertical:
        line = tag("line", x1=_n(place), x2=_n(place), y1=start, y2=stop, class_="grid")
        return Html(line + tag("text", text, x=_n(place), y=start + 14, class_="tick", text_anchor="middle"))
    line = tag("line", x1=start, x2=stop, y1=_n(place), y2=_n(place), class_="grid")
    return Html(line + tag("text", text, x=start - 5, y=_n(place + 3.5), class_="tick", text_anchor="end"))


def _level(place: float, color: int) -> Html:
    return tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(place), y2=_n(place), class_=f"line c{color} dashed")


def _line(series: Series, x: Axis, y: Axis) -> Html:
    points = _places(zip(series.x, series.y, strict=True), x, y)
    style = f"line c{series.color}{' dashed' if series.dash else ''}"
    parts = [tag("polyline", points=" ".join(f"{_n(a)},{_n(b)}" for a, b, _, _ in points), class_=style)]
    if series.band is not None:
        low, high = (_places(zip(series.x, side, strict=True), x, y) for side in series.band)
        outline = " ".join(f"{_n(a)},{_n(b)}" for a, b, _, _ in [*low, *reversed(high)])
        parts.insert(0, tag("polygon", points=outline, class_=f"band c{series.color}"))
    if series.markers:
        parts += [
            tag(
                "circle",
                tag("title", f"{series.name}: {number(b)} at {number(a)}"),
                cx=_n(px),
                cy=_n(py),
                r=2.6,
                class_=f"dot c{series.color}",
            )
            for px, py, a, b in points
        ]
    return tag("g", parts)


def _places(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> list[tuple[float, float, float, float]]:
    """(place x, place y, x, y) of the points that can be shown."""
    shown: Callable[[float, Axis], bool] = lambda v, axis: math.isfinite(v) and (v > 0 or not axis.log)  # noqa: E731
    return [(x(a), y(b), a, b) for a, b in points if shown(a, x) and shown(b, y)]


def _text(value: float) -> str:
    """A round value without needless digits."""
    value = float(f"{value:.6g}")
    return f"{int(value):,}" if value.is_integer() else f"{value:g}"


def _n(value: float) -> str:
    return f"{value:.1f}"
