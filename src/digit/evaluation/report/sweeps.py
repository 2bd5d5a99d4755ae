"""Sections about fidelity over a range: sampling settings (figure 6) and lengths of the given prefix (figure 4b)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from digit.evaluation.metrics.fidelity import TITLES
from digit.evaluation.report.collect import Found
from digit.evaluation.report.html import DASH, Html, details, number, table
from digit.evaluation.report.parts import Context, card, grid, section
from digit.evaluation.report.svg import Series, line_chart
from digit.evaluation.studies.sweep import SHOWN, in_order, measured, setting_text

_LOWER = ("fid", "kid_mean")
_SPACES = {"semantic": "semantic tokens", "vq": "VQ tokens"}
Point = Mapping[str, Any]


def sweeps(context: Context) -> Html | None:
    """Fidelity over sampling settings."""
    cards = context.each(context.collection.of("sweep"), _sweep)
    intro = (
        "The paper's figure 6 sweeps top-k and top-p of the base model; its values were published as a picture only."
    )
    return section("sweeps", "Sweeps of sampling settings", intro, cards) if cards else None


def _sweep(item: Found) -> Html:
    axes, points = item.data["values"]["axes"], item.data["values"]["points"]
    charts = []
    for name in list(axes)[:1] if item.data["values"]["grid"] else axes:
        mine = [point for point in points if name in point["settings"]]
        if len(axes[name]) > 1:
            charts += [_axis_chart(name, axes[name], mine, metric) for metric in measured(mine)]
    metrics = [metric for metric in SHOWN if any(metric in point["values"] for point in points)]
    rows = [
        [
            ", ".join(
                f"{name.replace('_', ' ')} {setting_text(name, value)}" for name, value in point["settings"].items()
            ),
            *(number(point["values"][m]) if m in point["values"] else DASH for m in metrics),
        ]
        for point in points
    ]
    return card(
        item, item.data["title"], grid(charts), details("Every point", table(["", *(TITLES[m] for m in metrics)], rows))
    )


def _axis_chart(name: str, values: Sequence[Any], points: Sequence[Point], metric: str) -> Html:
    """One metric over the values of one setting, as places of equal distance; a line for each choice of the other
    settings.
    """
    order = in_order(name, values)
    lines: dict[str, dict[Any, float]] = {}
    for point in points:
        others = ", ".join(
            f"{k.replace('_', ' ')} {setting_text(k, v)}" for k, v in point["settings"].items() if k != name
        )
        lines.setdefault(others or "measured here", {})[point["settings"][name]] = point["values"][metric]
    series = []
    for number_, (title, at) in enumerate(lines.items()):
        places = [i for i, value in enumerate(order) if value in at]
        series.append(Series(title, places, [at[order[i]] for i in places], number_ % 6 + 1))
    names = [setting_text(name, value) for value in order]
    return line_chart(
        f"{TITLES[metric]} over {name.replace('_', ' ')}", series, name.replace("_", " "), _axis(metric), names=names
    )


def _axis(metric: str) -> str:
    return f"{TITLES[metric]}, {'lower' if metric in _LOWER else 'higher'} is better"


def prefixes(context: Context) -> Html | None:
    """Fidelity over the length of the given prefix."""
    cards = context.each(context.collection.of("prefix"), _prefix)
    intro = "Real tokens are given, the prior continues. The paper's figure 4b shows this; its values were published as a picture only."
    return section("prefix", "Fidelity against the given prefix", intro, cards) if cards else None


def _prefix(item: Found) -> Html:
    curves = item.data["values"]
    metrics = measured([point for curve in curves for point in curve["points"]])
    charts = []
    for metric in metrics:
        series = []
        for color, curve in enumerate(curves, 1):
            x, y = [100 * p["share"] for p in curve["points"]], [p["values"][metric] for p in curve["points"]]
            series.append(
                Series(f"{curve['name']}, {_SPACES.get(curve['space'], curve['space'])}", x, y, (color - 1) % 6 + 1)
            )
        charts.append(
            line_chart(f"{TITLES[metric]} by given prefix", series, "given prefix, % of the tokens", _axis(metric))
        )
    groups = {
        f"*{curve['name']}, {_SPACES.get(curve['space'], curve['space'])}": [
            [f"{100 * p['share']:g}% ({p['given']} tokens)", *(number(p["values"].get(m)) for m in metrics)]
            for p in curve["points"]
        ]
        for curve in curves
    }
    return card(item, item.data["title"], grid(charts), table(["Given", *(TITLES[m] for m in metrics)], groups))
