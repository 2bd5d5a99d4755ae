"""Fidelity over the settings of sampling: the paper's figure 6 (top-k, top-p), and temperature, guidance, steps.

Points that differ in the decoder's settings alone share the tokens of the prior. Every point is on disk as soon as it
is measured.
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
from torch import Tensor

from digit.core.config import read_value, to_dict
from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.core.progress import bar
from digit.evaluation.metrics.features import FeatureSet, Source, measure
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import FeatureExtractor
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.result import OTHER, OURS, Record, describe_model, figure
from digit.evaluation.studies.points import Points, key_of
from digit.pipeline.generation import load_tokens_file, save_tokens_file
from digit.pipeline.pipeline import Tokens

Axes = Mapping[str, Sequence[Any]]
SHOWN = ("fid", "is_mean", "precision", "recall", "kid_mean")
TITLES = {"fid": "FID", "is_mean": "Inception Score", "precision": "precision", "recall": "recall", "kid_mean": "KID"}
_LOWER = {"fid", "kid_mean"}


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


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
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
        how: dict[str, Any] = {"batch_size": options.batch_size, "split": split}
        return cls(measure(source, extractor, options.metrics, **how), extractor, options)

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

    def judge(self, run: SamplingRun, tokens: Tensor | None, name: str) -> dict[str, Any]:
        """Fidelity of a sampling run (or of the prior's ``tokens``), with what it took."""
        began = time.monotonic()
        how: dict[str, Any] = {"batch_size": self.options.batch_size, "name": name, "total": run.num}
        result = compare(
            measure(run.batches(tokens), self.extractor, self.options.metrics, **how), self.features, self.options
        )
        return {
            "values": result.values,
            "not_measured": result.not_measured,
            "notes": result.notes,
            "seconds": round(time.monotonic() - began, 2),
        }


def sweep(
    run: SamplingRun, axes: Axes, reference: Reference, out: str | Path, grid: bool = False
) -> list[dict[str, Any]]:
    """Measure every point, going on where an earlier run into ``out`` stopped.

    Args:
        run: the model, number of images, seed, and the settings that stay.
        axes: setting -> values, such as ``{"top_k": [0, 50], "decoder_top_p": [0.8, 1.0]}``.
        reference: the real images.
        out: a folder.
        grid: all combinations instead of one axis at a time.

    Returns:
        A record for each point: its settings, values, reasons for missing ones, seconds, and whether it shared the
            prior's tokens.

    Raises:
        DigitError: a setting that does not exist or that the model cannot do, before anything is sampled; or ``out``
            holds another sweep.
    """
    points, runs = plan(axes, grid), planned_runs(run, axes, grid)
    store = Points(Path(out) / "points", _identity(run, reference))
    found = []
    with bar("Sweep", len(points), "points") as progress:
        for point, each in zip(points, runs, strict=True):
            resolved = _resolved(each)
            value = store.get(resolved)
            if value is None:
                tokens, shared = _prior_tokens(each, Path(out) / "tokens")
                name = ", ".join(f"{key} {v}" for key, v in point.items())
                value = store.put(resolved, {**reference.judge(each, tokens, name), "prior_shared": shared})
            found.append({"settings": point, **value})
            progress.advance(
                1, "  ".join(f"{TITLES[m]} {value['values'][m]:.2f}" for m in SHOWN[:2] if m in value["values"])
            )
    return found


def _identity(run: SamplingRun, reference: Reference) -> dict[str, Any]:
    described = run.describe()
    del described["settings"], described["batch_size"]  # the ones that vary, and the one without influence
    return {**described, "model": describe_model(run.pipe)["parts"], "reference": reference.describe()}


def _resolved(run: SamplingRun) -> dict[str, Any]:
    """The settings of both stages with every default filled in: points that agree here are one."""
    prior, later = run.pipe.settings_for("prior", run.settings, run.classes is not None)
    stages = {"prior": to_dict(prior)}
    if run.pipe.space == "semantic":
        stages["decoder"] = to_dict(run.pipe.settings_for(run.pipe.pick_decoder(run.decoder), later)[0])
    return stages


def _prior_tokens(run: SamplingRun, folder: Path) -> tuple[Tensor, bool]:
    """The prior's tokens (num, N) under these settings, and whether they were there already."""
    vq = run.pipe.space == "vq"
    path = folder / f"{key_of(_resolved(run)['prior'])}.npz"
    if path.is_file():
        saved = load_tokens_file(path)
        tokens = saved.vq if vq else saved.semantic
        assert tokens is not None
        return tokens, True
    with bar("Sampling the prior", run.num) as progress:
        parts = []
        for part in run.prior():
            parts.append(part.cpu())
            progress.advance(len(part))
    tokens = torch.cat(parts)
    save_tokens_file(path, Tokens(None, tokens) if vq else Tokens(tokens, None))
    return tokens, False


# ---- what is shown ---------------------------------------------------------------------------------------------------


def sweep_record(
    run: SamplingRun, axes: Axes, reference: Reference, out: str | Path, grid: bool = False
) -> tuple[Record, list[dict[str, Any]]]:
    """Measure, and write ``result.json``, ``sweep.csv`` and a plot for each axis into ``out``."""
    out, began = Path(out), time.monotonic()
    points = sweep(run, axes, reference, out, grid)
    write_bytes(out / "sweep.csv", table_csv(axes, points).encode())
    plots = plot_sweep(axes, points, out, grid)
    record = Record(
        kind="sweep",
        title="Fidelity over the settings of sampling (figure 6)",
        values={"axes": {name: list(values) for name, values in axes.items()}, "grid": grid, "points": points},
        settings={**run.describe(), "reference": reference.describe()},
        model=describe_model(run.pipe),
        notes=fidelity_notes(points),
        plots=plots,
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, points


def fidelity_notes(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes and reasons of all points, each once."""
    lines = [line for point in points for line in (*point["notes"], *point["not_measured"].values())]
    return list(dict.fromkeys(lines))


def measured(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that every point has, in the order of :data:`SHOWN`."""
    return [metric for metric in SHOWN if all(metric in point["values"] for point in points)]


def table_csv(axes: Axes, points: Sequence[Mapping[str, Any]]) -> str:
    """One line a point: its settings, every value, seconds."""
    metrics = sorted({metric for point in points for metric in point["values"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, *metrics, "seconds"])
    for point in points:
        settings = [point["settings"].get(name, "") for name in axes]
        writer.writerow([*settings, *(point["values"].get(metric, "") for metric in metrics), point["seconds"]])
    return text.getvalue()


def plot_sweep(axes: Axes, points: Sequence[Mapping[str, Any]], out: Path, grid: bool) -> list[str]:
    """A picture for each axis, or with ``grid`` one over the first axis with a line for each combination of the
    others.
    """
    plots = []
    for name in list(axes)[:1] if grid else axes:
        mine = [point for point in points if name in point["settings"]]
        metrics = measured(mine)
        if len(axes[name]) < 2 or not metrics:
            continue
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for point in mine:
            others = ", ".join(f"{key} {setting_text(key, v)}" for key, v in point["settings"].items() if key != name)
            lines.setdefault(others, []).append(point)
        values = in_order(name, axes[name])
        with figure(out / f"sweep-{name}.png", len(metrics), (4.4, 3.8)) as panels:
            for panel, metric in zip(panels, metrics, strict=True):
                for index, (label, part) in enumerate(lines.items()):
                    at = {point["settings"][name]: point["values"][metric] for point in part}
                    color = (OURS, OTHER)[index] if len(lines) <= 2 else None
                    panel.plot(
                        range(len(values)), [at[v] for v in values], "o-", color=color, label=label, markersize=4
                    )
                panel.set_xticks(range(len(values)), [setting_text(name, v) for v in values])
                better = "lower" if metric in _LOWER else "higher"
                panel.margins(y=0.12)
                panel.set(xlabel=name.replace("_", " "), ylabel=f"{TITLES[metric]} ({better} is better)")
                if len(lines) > 1:
                    panel.legend(fontsize=8)
        plots.append(f"sweep-{name}.png")
    return plots


def in_order(name: str, values: Sequence[Any]) -> list[Any]:
    """Values of a setting from narrow to wide; a top-k of 0 keeps all and stands last. Words stay as given."""
    if not all(isinstance(v, (int, float)) for v in values):
        return list(values)
    return sorted(values, key=lambda v: float("inf") if name.endswith("top_k") and v == 0 else v)


def setting_text(name: str, value: Any) -> str:
    """A value of a setting as people read it."""
    return "all" if name.endswith("top_k") and value == 0 else f"{value:g}" if isinstance(value, float) else str(value)
