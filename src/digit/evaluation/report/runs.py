"""Runs as results: what was generated, and how a training went, beside reference runs of the same preset.

A reference curve is a JSON file in ``digit/presets/curves``, written by ``digit report RUN --save-curve FILE``. A run
is recognised by what it trains (component, model, objective), not by a name; where its data or training settings
differ, the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.evaluation.results import OTHER, OURS, PAPER, Result, Rows, flatten, legend, panels, provenance, shown

POINTS = 200
_INCIDENTAL = {
    "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "validate_every", "workers", "compile",
    "fused",
    "gradient_checkpointing",
}  # fmt: skip
_WHAT = ("component", "model", "objective")
_SPEED = {"gradient_norm", "lr", "examples_per_second", "tokens_per_second", "mfu", "memory_gib"}
"""How a training went, not how well; drawn last."""

_NAMES = {
    "psnr": "PSNR (dB)",
    "l1": "mean absolute error",
    "nll": "nats per token",
    "neighbour_accuracy": "20-NN accuracy",
    "feature_spread": "spread of the features (0 is collapse)",
    "codebook_use": "share of the codebook in use",
    "agreement": "tokens found again in the image",
}

Points = list[tuple[int, float]]


def label(name: str) -> str:
    """A metric's name in words."""
    base = name.removeprefix("validation/")
    return _NAMES.get(base, base.replace("_", " "))


@dataclass(frozen=True, kw_only=True)
class Generation(Result):
    """``values``: what ``generation.json`` says about a run of generation."""

    kind: str = "generation"

    @classmethod
    def of(cls, data: dict[str, Any]) -> Generation:
        """From the content of a ``generation.json``."""
        speed = data.get("images_per_second")
        rate = f", {shown(speed, 3)} per second" if isinstance(speed, (int, float)) else ""
        seconds = data.get("seconds")
        return cls(
            title=f"{data['model']}: {shown(data['num'])} images{rate}",
            values=data,
            settings={k: v for k, v in data.items() if k not in ("hardware", "versions")},
            plots=("grid.png",),
            seconds=seconds if isinstance(seconds, (int, float)) else 0.0,
            made=made if isinstance(made := data.get("made"), str) else None,
            hardware=data.get("hardware") or {},
            versions=data.get("versions") or {},
        )

    def rows(self) -> Rows:
        names = {"num": "Images", "decoder": "Decoder", "labels": "Labels", "seed": "Seed", "seconds": "Seconds",
                 "images_per_second": "Images per second"}  # fmt: skip
        known = {title: self.values[name] for name, title in names.items() if self.values.get(name) is not None}
        return [
            {title: value if isinstance(value, (int, float)) else flatten(value)[""] for title, value in known.items()}
        ]

    def provenance(self) -> str:
        return provenance(model={"name": str(self.values["model"])}, sampling=self.values)


@dataclass(frozen=True)
class Curve:
    """A reference run.

    Attributes:
        name: of its file.
        config: what was trained and how, as in a run's ``config.yaml``.
        metrics: name -> (step, value) pairs.
    """

    name: str
    config: dict[str, Any]
    metrics: dict[str, Points]


@dataclass(frozen=True, kw_only=True)
class Training(Result):
    """``values``: the logged metrics by name; ``settings``: the run's ``config.yaml``.

    Attributes:
        last: the last logged step.
        finished: whether its model was exported.
        references: the curves of runs that trained the same.
    """

    kind: str = "training"
    last: int = 0
    finished: bool = False
    references: tuple[Curve, ...] = ()

    def rows(self) -> Rows:
        rows = []
        for name, values in self.values.items():
            finite = [(value, step) for step, value in values if math.isfinite(value)]
            if finite:
                (low, at_low), (high, at_high) = min(finite), max(finite)
                ends = {"First": values[0][1], "Last": values[-1][1]}
                rows.append(
                    {
                        "Metric": name,
                        **ends,
                        "Lowest": f"{shown(low)} at {at_low:,}",
                        "Highest": f"{shown(high)} at {at_high:,}",
                    }
                )
        return rows

    def figure(self) -> Any:
        drawn = list(dict.fromkeys(name.removeprefix("validation/") for name in self.values))
        drawn.sort(key=lambda name: (name.rpartition("/")[2] in _SPEED, name != "loss", not name.endswith("loss")))
        if not drawn:
            return None
        figure, places = panels(len(drawn), columns=min(3, len(drawn)))
        for axes, name in zip(places, drawn, strict=True):
            for kind, key, color in (("training", name, OURS), ("validation", f"validation/{name}", OTHER)):
                for curve in self.references:
                    if key in curve.metrics and key in self.values:
                        axes.plot(
                            *zip(*curve.metrics[key], strict=True), "--", color=PAPER, label=f"{curve.name}, {kind}"
                        )
                if values := self.values.get(key):
                    style = "o-" if len(values) <= 12 else "-"
                    axes.plot(*zip(*values, strict=True), style, color=color, label=kind, markersize=4)
            axes.set(title=label(name), xlabel="step")
            axes.margins(y=0.1)
        legend(places)
        return figure

    def provenance(self) -> str:
        total = (self.settings.get("training") or {}).get("steps")
        steps = f"step {shown(self.last)} of {shown(total) if total else 'an unknown number'}"
        return "finished" if self.finished else f"not finished: {steps}"

    def beside(self, curves: Sequence[Curve]) -> Training:
        """The run with those of the ``curves`` that trained the same, and notes on how they differ."""
        found = tuple(matching(self.settings, curves))
        notes = []
        for curve in found:
            apart = "; ".join(differences(self.settings, curve.config))
            told = f"it differs in {apart}." if apart else "the same data and training settings."
            notes.append(f"Reference {curve.name}: {told}")
        return Training(**{**vars(self), "references": found, "notes": tuple(notes)})


# ---- reference curves ------------------------------------------------------------------------------------------------


def points(lines: Iterable[Mapping[str, Any]], most: int = POINTS) -> dict[str, Points]:
    """The metrics of a log by name; more than ``most`` values of one are averaged over neighbours."""
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, []).append((line["step"], float(value)))
    return {name: _thin(values, most) for name, values in found.items()}


def _thin(values: Points, most: int) -> Points:
    width = -(-len(values) // most)
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def known_curves(folders: Sequence[str | Path] = ()) -> list[Curve]:
    """The packaged curves, and those of other folders.

    Raises:
        DigitError: a file is not a curve.
    """
    packaged = resources.files("digit") / "presets" / "curves"
    files = [*packaged.iterdir()] if packaged.is_dir() else []
    files += [file for folder in folders for file in Path(folder).iterdir()]
    return [_read(Path(str(file))) for file in sorted(files, key=lambda f: f.name) if file.name.endswith(".json")]


def _read(path: Path) -> Curve:
    values = read_json(path)
    try:
        metrics = {name: [(int(s), float(v)) for s, v in pairs] for name, pairs in values["metrics"].items()}
        return Curve(path.stem, dict(values["config"]), metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DigitError(f"{path} is not a reference curve; digit report RUN --save-curve FILE writes one.") from error


def matching(config: Mapping[str, Any], curves: Iterable[Curve]) -> list[Curve]:
    """The curves of runs that trained the same thing; options that only one side knows, being newer, may differ."""
    return [curve for curve in curves if config and all(_agree(curve.config.get(p), config.get(p)) for p in _WHAT)]


def _agree(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        return all(_agree(theirs[name], ours[name]) for name in theirs.keys() & ours.keys())
    return bool(theirs == ours)


def differences(config: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """In what a run differs from a reference, as "name: theirs, here ours"."""
    sections = (*_WHAT, "data", "training")
    ours, theirs = (flatten({name: c.get(name) for name in sections}) for c in (config, reference))
    names = [name for name in {**theirs, **ours} if name.rpartition(".")[2] not in _INCIDENTAL]
    return [
        f"{name}: {theirs.get(name, 'not known')}, here {ours.get(name, 'not known')}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
