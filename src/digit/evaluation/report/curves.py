"""Reference curves: how a training run with a packaged preset went, for other runs of that preset to stand beside.

A curve is a JSON file in ``digit/presets/curves``, written by ``digit report RUN --save-curve FILE``. A run is
recognised by what it trains (component, model, objective), not by a name; where its data or training settings differ,
the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.evaluation.report.collect import TRAINING, Found, collect
from digit.evaluation.report.html import flatten

POINTS = 200
_INCIDENTAL = {
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "validate_every",
    "workers",
    "compile",
}
_INCIDENTAL |= {"fused", "gradient_checkpointing"}

_WHAT = ("component", "model", "objective")

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """One reference run.

    Attributes:
        name: of its file.
        config: what was trained and how, as in a run's ``config.yaml``.
        metrics: name -> (step, value) pairs.
        software, hardware: what it ran on, as far as known.
    """

    name: str
    config: dict[str, Any]
    metrics: dict[str, Points]
    software: dict[str, Any]
    hardware: dict[str, Any]


def points(lines: Iterable[Mapping[str, Any]], most: int = POINTS) -> dict[str, Points]:
    """The metrics of a log by name; more than ``most`` values of one are averaged over neighbours."""
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or isinstance(value, bool):
                continue
            try:
                point = line["step"], float(value)
            except (TypeError, ValueError):
                continue  # not a number
            found.setdefault(name, []).append(point)
    return {name: _thin(values, most) for name, values in found.items()}


def _thin(values: Points, most: int) -> Points:
    width = -(-len(values) // most)
    if width == 1:
        return values
    parts = [values[i : i + width] for i in range(0, len(values), width)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def save_curve(run: Found, path: str | Path) -> Path:
    """Make a finished training run a reference.

    Raises:
        DigitError: the run is not finished, or has no settings.
    """
    if not run.data["config"] or not run.data["provenance"] or not run.data["metrics"]:
        raise DigitError(f"{run.place} is not a finished training run, so it cannot be a reference.")
    made = run.data["provenance"]
    values = {"config": run.data["config"], "metrics": points(run.data["metrics"])}
    return write_json(path, {**values, "software": made.get("software", {}), "hardware": made.get("hardware", {})})


def save_only_run(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Make the only training run under some folders a reference.

    Raises:
        DigitError: there is none, or more than one, or it is not finished.
    """
    runs = collect(folders).of(TRAINING)
    if len(runs) != 1:
        names = ", ".join(run.place for run in runs) or "none"
        raise DigitError(f"A reference curve is made from one training run; found: {names}.")
    return save_curve(runs[0], path)


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
        return Curve(path.stem, dict(values["config"]), metrics, dict(values["software"]), dict(values["hardware"]))
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
    ours, theirs = (dict(flatten({name: c.get(name) for name in sections})) for c in (config, reference))
    names = [name for name in dict.fromkeys((*theirs, *ours)) if name.rpartition(".")[2] not in _INCIDENTAL]
    missing = "not known"
    return [
        f"{name}: {theirs.get(name, missing)}, here {ours.get(name, missing)}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
