"""Fidelity over the settings of sampling: the paper's figure 6 (top-k, top-p), and temperature, guidance, steps.

Points that differ in the decoder's settings alone share the tokens of the prior.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from digit.core.config import read_value
from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.evaluation.metrics.fidelity import TITLES
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.results import Result, Rows, lines_figure, timed
from digit.evaluation.steps import Steps
from digit.evaluation.studies.points import (
    SHOWN,
    Point,
    Reference,
    measure_points,
    point_cells,
    point_notes,
    prior_step,
)
from digit.pipeline.card import describe_model

Axes = Mapping[str, Sequence[Any]]


def parse_axes(items: Sequence[str], option: str = "--vary") -> dict[str, list[Any]]:
    """What the user typed, such as ``["top_k=0,50,200", "decoder_top_p=0.8,1"]``, as settings and their values."""
    axes: dict[str, list[Any]] = {}
    for item in items:
        name, separator, text = item.partition("=")
        name = name.strip().replace("-", "_")
        values = [read_value(part) for part in text.split(",")] if separator else []
        if not name or not values or None in values:
            raise DigitError(f"{option} '{item}' was given; expected the form NAME=V1,V2,..., such as top_k=0,50,200.")
        if name in axes:
            raise DigitError(f"{option} {name} was given twice; put all of its values into one.")
        axes[name] = list(dict.fromkeys(values))
    if not axes:
        raise DigitError(f"Nothing to vary was given; expected {option} NAME=V1,V2,..., such as top_k=0,50,200.")
    return axes


def parse_settings(items: Sequence[str] | None) -> dict[str, Any]:
    """Settings that stay, such as ``["top_k=200"]``."""
    axes = parse_axes(items, "--set") if items else {}
    if several := [name for name, values in axes.items() if len(values) > 1]:
        raise DigitError(
            f"--set {several[0]} was given several values; a setting that stays has one, others go to --vary."
        )
    return {name: values[0] for name, values in axes.items()}


def plan(axes: Axes, grid: bool = False) -> list[dict[str, Any]]:
    """The settings of every point: one axis at a time with the others left alone, or with ``grid`` all combinations."""
    if grid:
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [{name: value} for name, values in axes.items() for value in values]


def planned_runs(run: SamplingRun, axes: Axes, grid: bool = False) -> list[SamplingRun]:
    """The run of every point of :func:`plan`, tried without sampling."""
    return [replace(run, settings={**run.settings, **point}).check() for point in plan(axes, grid)]


@timed
def sweep(run: SamplingRun, axes: Axes, reference: Reference, out: str | Path, grid: bool = False) -> Sweep:
    """Measure every point, going on where an earlier run into the folder ``out`` stopped.

    Args:
        run: with the settings that stay.
        axes: setting -> values, such as ``{"top_k": [0, 50], "decoder_top_p": [0.8, 1.0]}``.
        grid: all combinations instead of one axis at a time.

    Raises:
        DigitError: a setting that does not exist or that the model cannot do, before anything is sampled.
    """
    runs, model, against = planned_runs(run, axes, grid), describe_model(run.pipe), reference.describe()
    steps = Steps(Path(out), {**run.identity(), "model": model["parts"]})

    def point(each: SamplingRun, settings: Mapping[str, Any]) -> dict[str, Any]:
        tokens, prior = prior_step(steps, each)
        found = reference.measure(each.batches(tokens), run.num, settings_text(settings))
        return {**found, "prior_shared": prior.reused}

    planned = [
        ({"settings": settings}, {**each.stages(), "reference": against}, partial(point, each, settings))
        for settings, each in zip(plan(axes, grid), runs, strict=True)
    ]
    points = measure_points(steps, "Sweep", planned)
    return Sweep(
        title="Fidelity over the settings of sampling (figure 6)",
        values={"axes": {name: list(values) for name, values in axes.items()}, "grid": grid, "points": points},
        settings={**run.describe(), "reference": against},
        model=model,
        notes=point_notes(points),
    )


@dataclass(frozen=True, kw_only=True)
class Sweep(Result):
    """``values``: ``axes`` (setting -> values), ``grid``, and ``points``."""

    kind: str = "sweep"

    def rows(self) -> Rows:
        points = self.values["points"]
        return [
            {"Settings": settings_text(p["settings"]), **point_cells(p), "Seconds": round(p["seconds"])} for p in points
        ]

    def figure(self) -> Any:
        """A row for each axis, a panel for each metric; with ``grid`` the first axis, and a line for each combination
        of the others.
        """
        axes, points = self.values["axes"], self.values["points"]
        shown = [name for name in (list(axes)[:1] if self.values["grid"] else axes) if len(axes[name]) > 1]
        metrics = [key for key in SHOWN if points and all(key in point["values"] for point in points)]
        if not shown or not metrics:
            return None
        drawn: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for name, metric in itertools.product(shown, metrics):
            lines = drawn.setdefault(f"{TITLES[metric]} over {name.replace('_', ' ')}", {})
            for point in (p for p in points if name in p["settings"]):
                others = settings_text({k: v for k, v in point["settings"].items() if k != name})
                at = in_order(name, axes[name]).index(point["settings"][name])
                lines.setdefault(others, []).append((at, point["values"][metric]))
        figure = lines_figure(drawn, columns=len(metrics))
        for place, (name, _) in zip(figure.axes, itertools.product(shown, metrics), strict=True):
            values = in_order(name, axes[name])
            place.set_xticks(range(len(values)), [setting_text(name, v) for v in values])
            place.set_xlabel(name.replace("_", " "))
        return figure

    def save(self, folder: str | Path) -> Sweep:
        """As every result, and ``sweep.csv``: a line a point with its settings, every value, and seconds."""
        write_bytes(Path(folder) / "sweep.csv", table_csv(self.values["axes"], self.values["points"]).encode())
        return super().save(folder)


def table_csv(axes: Axes, points: Sequence[Point]) -> str:
    """A line a point: its settings, every value, seconds; empty where it has none."""
    metrics = sorted({metric for point in points for metric in point["values"]})
    text = io.StringIO()
    table = csv.DictWriter(text, [*axes, *metrics, "seconds"], lineterminator="\n")
    table.writeheader()
    table.writerows({**point["settings"], **point["values"], "seconds": point["seconds"]} for point in points)
    return text.getvalue()


def in_order(name: str, values: Sequence[Any]) -> list[Any]:
    """Values of a setting from narrow to wide; a top-k of 0 keeps all and stands last. Words stay as given."""
    if not all(isinstance(v, (int, float)) for v in values):
        return list(values)
    return sorted(values, key=lambda v: float("inf") if name.endswith("top_k") and v == 0 else v)


def setting_text(name: str, value: Any) -> str:
    """A value of a setting as people read it."""
    return "all" if name.endswith("top_k") and value == 0 else f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {setting_text(name, value)}" for name, value in settings.items())
