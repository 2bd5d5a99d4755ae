"""Fidelity over the settings of sampling: the paper's figure 6 (top-k, top-p), and temperature, guidance, steps.

Points that differ in the decoder's settings alone share the tokens of the prior.
"""

from __future__ import annotations

import csv
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from digit.core.config import read_value, to_dict
from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.core.progress import bar
from digit.core.steps import Steps
from digit.evaluation.metrics.features import Source, measure
from digit.evaluation.metrics.fidelity import TITLES, FidelityOptions, compare
from digit.evaluation.metrics.inception import FeatureExtractor
from digit.evaluation.metrics.statistics import FeatureSet
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.results import COLORS, Result, Rows, legend, panels
from digit.pipeline.card import describe_model
from digit.pipeline.tokens import Tokens, load_tokens_file, save_tokens_file

Axes = Mapping[str, Sequence[Any]]
Point = Mapping[str, Any]
"""What was measured at one point: its settings, ``values``, ``not_measured``, ``notes`` and ``seconds``."""
SHOWN = ("fid", "is_mean", "precision", "recall", "kid_mean")


# ---- what the user asks for ------------------------------------------------------------------------------------------


def parse_axes(items: Sequence[str], option: str = "--vary") -> dict[str, list[Any]]:
    """What the user typed, such as ``["top_k=0,50,200", "decoder_top_p=0.8,1"]``, as settings and their values.

    Raises:
        DigitError: nothing, not of that form, or a setting given twice.
    """
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
    """Settings that stay, such as ``["top_k=200"]``.

    Raises:
        DigitError: not of that form, or more than one value.
    """
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
    """The run of every point of :func:`plan`, tried without sampling.

    Raises:
        DigitError: a setting that does not exist, or that the model cannot do.
    """
    runs = [replace(run, settings={**run.settings, **point}) for point in plan(axes, grid)]
    for each in runs:
        each.check()
    return runs


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What generated images are compared with, measured once, and how."""

    features: FeatureSet
    extractor: FeatureExtractor
    options: FidelityOptions

    @classmethod
    def of(
        cls, source: Source, extractor: FeatureExtractor, options: FidelityOptions, split: str | None = None
    ) -> Reference:
        """Measure real images, or read their statistics."""
        features = measure(source, extractor, options.metrics, batch_size=options.batch_size, split=split)
        return cls(features, extractor, options)

    def describe(self) -> dict[str, Any]:
        """What decides whether two values may be compared."""
        side = self.features
        return {
            "name": side.name,
            "images": side.statistics.n,
            "trace": f"{side.statistics.sigma.trace():.6g}",  # tells references of one name apart
            "weights": self.extractor.weights.sha256,
            "options": {k: v for k, v in to_dict(self.options).items() if k != "batch_size"},
        }

    def measure(self, run: SamplingRun, tokens: torch.Tensor | None, name: str) -> dict[str, Any]:
        """Fidelity of a sampling run (or of the prior's ``tokens``, (num, N)) as the values of a :data:`Point`."""
        began = time.monotonic()
        batch_size = self.options.batch_size
        images = measure(
            run.batches(tokens), self.extractor, self.options.metrics, batch_size=batch_size, name=name, total=run.num
        )
        found = compare(images, self.features, self.options)
        seconds = round(time.monotonic() - began, 2)
        return {
            "values": found.values, "not_measured": found.not_measured, "notes": list(found.notes), "seconds": seconds
        }  # fmt: skip


def sweep(run: SamplingRun, axes: Axes, reference: Reference, out: str | Path, grid: bool = False) -> Sweep:
    """Measure every point, going on where an earlier run into the folder ``out`` stopped.

    Args:
        run: the model, number of images, seed, and the settings that stay.
        axes: setting -> values, such as ``{"top_k": [0, 50], "decoder_top_p": [0.8, 1.0]}``.
        reference: the real images.
        grid: all combinations instead of one axis at a time.

    Raises:
        DigitError: a setting that does not exist or that the model cannot do, before anything is sampled.
    """
    runs, began = planned_runs(run, axes, grid), time.monotonic()
    model, against = describe_model(run.pipe), reference.describe()
    steps = Steps(Path(out), {**run.identity(), "model": model["parts"]})

    def point(each: SamplingRun, name: str) -> dict[str, Any]:
        prior = steps.run("tokens", {"prior": each.stages()["prior"]}, lambda folder: _sample_prior(each, folder))
        tokens = getattr(load_tokens_file(prior.folder / "tokens.npz"), run.pipe.space)
        return {**reference.measure(each, tokens, name), "prior_shared": prior.reused}

    points = []
    with bar("Sweep", len(runs), "points") as progress:
        for settings, each in zip(plan(axes, grid), runs, strict=True):
            name = settings_text(settings)
            inputs = {**each.stages(), "reference": against}
            step = steps.run("points", inputs, lambda _, each=each, name=name: point(each, name))  # type: ignore[misc]
            points.append({"settings": settings, **step.value})
            values = step.value["values"]
            progress.advance(1, "  ".join(f"{TITLES[m]} {values[m]:.2f}" for m in SHOWN[:2] if m in values))
    return Sweep(
        title="Fidelity over the settings of sampling (figure 6)",
        values={"axes": {name: list(values) for name, values in axes.items()}, "grid": grid, "points": points},
        settings={**run.describe(), "reference": against},
        model=model,
        notes=fidelity_notes(points),
        seconds=time.monotonic() - began,
    )


def _sample_prior(run: SamplingRun, folder: Path) -> None:
    """Write the prior's tokens (num, N)."""
    parts = []
    with bar("Sampling the prior", run.num) as progress:
        for part in run.prior():
            parts.append(part.cpu())
            progress.advance(len(part))
    tokens = torch.cat(parts)
    save_tokens_file(folder / "tokens.npz", Tokens.of({run.pipe.space: tokens}))


# ---- what is shown ---------------------------------------------------------------------------------------------------


def fidelity_notes(points: Sequence[Point]) -> tuple[str, ...]:
    """Notes and reasons of all points, each once."""
    return tuple(dict.fromkeys(line for p in points for line in (*p["notes"], *p["not_measured"].values())))


def measured(points: Sequence[Point]) -> list[str]:
    """The metrics that every point has, in the order of :data:`SHOWN`."""
    return [metric for metric in SHOWN if all(metric in point["values"] for point in points)]


def point_cells(point: Point, metrics: Sequence[str] = SHOWN) -> dict[str, Any]:
    """The cells of a point's row: its values, as far as it has them."""
    return {TITLES[metric]: point["values"][metric] for metric in metrics if metric in point["values"]}


@dataclass(frozen=True, kw_only=True)
class Sweep(Result):
    """``values``: ``axes`` (setting -> values), ``grid``, and ``points``."""

    kind: str = "sweep"

    def rows(self) -> Rows:
        """A row for each point."""
        points = self.values["points"]
        return [
            {"Settings": settings_text(p["settings"]), **point_cells(p), "Seconds": round(p["seconds"])} for p in points
        ]

    def figure(self) -> Any:
        """A row for each axis, a panel for each metric; with ``grid`` the first axis, and a line for each combination of
        the others.
        """
        axes, points = self.values["axes"], self.values["points"]
        shown = [name for name in (list(axes)[:1] if self.values["grid"] else axes) if len(axes[name]) > 1]
        metrics = measured(points)
        if not shown or not metrics:
            return None
        figure, places = panels(len(metrics), rows=len(shown))
        for place, (name, metric) in zip(places, itertools.product(shown, metrics), strict=True):
            lines: dict[str, dict[Any, float]] = {}
            for point in (p for p in points if name in p["settings"]):
                others = settings_text({k: v for k, v in point["settings"].items() if k != name})
                lines.setdefault(others, {})[point["settings"][name]] = point["values"][metric]
            values = in_order(name, axes[name])
            for index, (label, at) in enumerate(lines.items()):
                color = COLORS[1 + index % (len(COLORS) - 1)]
                place.plot(range(len(values)), [at[v] for v in values], "o-", color=color, label=label, markersize=4)
            place.set_xticks(range(len(values)), [setting_text(name, v) for v in values])
            place.margins(y=0.12)
            place.set(xlabel=name.replace("_", " "), ylabel=TITLES[metric])
        legend(places)
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
