"""What lies under run folders, as results: measurements, generation and training runs; and what could not be read.

A reference curve is a JSON file in ``digit/presets/curves``, written by ``digit report RUN --save-curve FILE``. A run
is recognised by what it trains (component, model, objective), not by a name; where its data or training settings
differ, the report says so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.evaluation.results import (
    OTHER,
    OURS,
    PAPER,
    RESULT,
    Result,
    Rows,
    flatten,
    legend,
    panels,
    provenance,
    shown,
)
from digit.training.logs import read_metrics

for _kinds in (
    "metrics.fidelity", "metrics.probe", "metrics.reconstruction", "metrics.stability", "metrics.toy",
    "studies.ablation", "studies.points", "studies.ranking", "studies.sweep",
):  # fmt: skip
    import_module(f"digit.evaluation.{_kinds}")  # every kind of result must be known when a file of it is read

GENERATION = "generation.json"
_SKIPPED = {"checkpoints", "tensorboard"}
_LARGEST = 64 * 1024 * 1024  # bytes of a JSON file; results are far smaller

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

    def rows(self) -> Rows:
        names = {"num": "Images", "decoder": "Decoder", "labels": "Labels", "seed": "Seed", "seconds": "Seconds",
                 "images_per_second": "Images per second"}  # fmt: skip
        known = {title: self.values[name] for name, title in names.items() if self.values.get(name) is not None}
        return [{title: v if isinstance(v, (int, float)) else flatten(v)[""] for title, v in known.items()}]

    def provenance(self) -> str:
        return provenance(model={"name": str(self.values["model"])}, sampling=self.values)


class Curve(NamedTuple):
    """A reference run: the name of its file, what was trained and how as in ``config.yaml``, and (step, value) pairs of
    each metric.
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
        rows: Rows = []
        for name, values in self.values.items():
            if finite := [(value, step) for step, value in values if math.isfinite(value)]:
                ends = {"Lowest": min(finite), "Highest": max(finite)}
                told = {title: f"{shown(value)} at {step:,}" for title, (value, step) in ends.items()}
                rows.append({"Metric": name, "First": values[0][1], "Last": values[-1][1], **told})
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
                        points = zip(*curve.metrics[key], strict=True)
                        axes.plot(*points, "--", color=PAPER, label=f"{curve.name}, {kind}")
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
        apart = {curve.name: "; ".join(differences(self.settings, curve.config)) for curve in found}
        notes = (f"it differs in {how}." if how else "the same data and training settings." for how in apart.values())
        told = tuple(f"Reference {name}: {note}" for name, note in zip(apart, notes, strict=True))
        return replace(self, references=found, notes=told)


# ---- reference curves ------------------------------------------------------------------------------------------------


def points(lines: Iterable[Mapping[str, Any]], most: int = POINTS) -> dict[str, Points]:
    """The metrics of a log by name; more than ``most`` values of one are averaged over neighbours."""
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(name, []).append((line["step"], float(value)))
    for name, values in found.items():
        width = -(-len(values) // most)
        parts = [values[i : i + width] for i in range(0, len(values), width)]
        found[name] = [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]
    return found


def known_curves(folders: Sequence[str | Path] = ()) -> list[Curve]:
    """The packaged curves, and those of other folders.

    Raises:
        DigitError: a file is not a curve.
    """
    packaged = Path(str(resources.files("digit"))) / "presets" / "curves"
    files = [file for folder in (packaged, *map(Path, folders)) for file in folder.iterdir() if file.suffix == ".json"]
    curves = []
    for path in sorted(files, key=lambda file: file.name):
        values = read_json(path)
        try:
            metrics = {name: [(int(s), float(v)) for s, v in pairs] for name, pairs in values["metrics"].items()}
            curves.append(Curve(path.stem, dict(values["config"]), metrics))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DigitError(
                f"{path} is not a reference curve; digit report RUN --save-curve FILE writes one."
            ) from error
    return curves


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


# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Something to report.

    Attributes:
        place: where, for people: from the given folder's name on.
        root: the given folder.
        folder: that holds it and its images.
    """

    result: Any  # a Result
    place: str
    root: Path
    folder: Path


class Problem(NamedTuple):
    """A file that is missing, broken or not as expected, and why."""

    place: str
    reason: str


@dataclass
class Collection:
    """Everything found, in the order of the folders."""

    found: list[Found] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @contextmanager
    def reading(self, place: str, folder: Path) -> Iterator[None]:
        """What is wrong with a file is noted, and the rest goes on."""
        try:
            yield
        except (DigitError, OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
            self.problem(place, error, folder)

    def of(self, kind: str) -> list[Found]:
        """What is of a kind."""
        return [item for item in self.found if item.result.kind == kind]

    def problem(self, place: str, error: BaseException | str, folder: Path | None = None) -> None:
        """Note once what could not be used; ``folder`` is left out of the reason, for the page is for others too."""
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror}."
        elif folder is not None:
            reason = reason.replace(f"{folder}{os.sep}", "")
        found = Problem(place, " ".join(reason.split()) or type(error).__name__)
        if found not in self.problems:
            self.problems.append(found)


def collect(folders: Sequence[str | Path]) -> Collection:
    """Look through folders and everything below them; links are not followed."""
    collection, seen = Collection(), set()
    for given in map(Path, folders):
        if not given.is_dir():
            raise DigitError(f"There is no folder {given} to report on; give run folders, such as runs/tour.")
        root = given.resolve()
        for walked, below, names in os.walk(root):
            below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith("."))
            folder = Path(walked)
            if folder not in seen:
                seen.add(folder)
                place = "/".join((root.name, *folder.relative_to(root).parts))
                _look(folder, set(names), place, root, collection)
    return collection


def _look(folder: Path, names: set[str], place: str, root: Path, collection: Collection) -> None:
    if "metrics.jsonl" in names:
        collection.found.append(Found(training_run(folder, place, collection), place, root, folder))
    for name in sorted(names):
        if not name.endswith(".json") or name.startswith("."):
            continue
        where, known = f"{place}/{name}", name in (RESULT, GENERATION)
        with collection.reading(where, folder):
            if (folder / name).stat().st_size > _LARGEST:
                raise DigitError("it is larger than 64 MB, and no result is.")
            result = _result(name, read_json(folder / name))
            if result is not None:
                collection.found.append(Found(result, place if known else where, root, folder))
            elif known:
                raise DigitError("it is not a result: 'kind', 'title' and 'values' are expected.")


def _result(name: str, data: Any) -> Result | None:
    """The result in a file; None for the many other JSON files of a run."""
    if not isinstance(data, dict):
        return None
    if name == GENERATION and {"model", "num"} <= data.keys():
        speed = data.get("images_per_second")
        rate = f", {shown(speed, 3)} per second" if isinstance(speed, (int, float)) else ""
        settings = {k: v for k, v in data.items() if k not in ("hardware", "versions")}
        own = {"title": f"{data['model']}: {shown(data['num'])} images{rate}", "values": data, "settings": settings}
        kept = {k: data[k] for k in ("seconds", "hardware", "versions") if data.get(k)}
        return Generation.from_dict({"kind": "generation", "plots": ("grid.png",), **own, **kept})
    if isinstance(data.get("kind"), str) and {"title", "values"} <= data.keys():
        return Result.from_dict(data)
    return None


def training_run(folder: Path, place: str = "", collection: Collection | None = None) -> Training:
    """A run of ``digit train``; what cannot be read of it is noted in ``collection``."""
    collection = collection or Collection()
    lines, settings, provenance = [], {}, {}
    with collection.reading(f"{place}/metrics.jsonl", folder):
        found = read_metrics(folder)
        count = sum(1 for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line.strip())
        lines = [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]
        if len(lines) < count:
            raise DigitError(f"only {len(lines)} of its {count} lines are readable.")
    with collection.reading(f"{place}/config.yaml", folder):
        written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(written, dict):
            raise DigitError("it holds no settings.")
        settings = written
    exported = folder / "model" / "config.json"
    if exported.is_file():  # otherwise the run is not finished
        with collection.reading(f"{place}/model/config.json", folder):
            provenance = dict(read_json(exported).get("provenance") or {})
    samples = sorted(folder.glob("samples/step-*.png"))
    return Training(
        title=f"Training of {settings.get('component', 'an unknown component')}",
        values=points(lines),
        last=lines[-1]["step"] if lines else 0,
        finished=bool(provenance),
        settings=settings,
        plots=(f"samples/{samples[-1].name}",) if samples else (),
        made=None,
        hardware=provenance.get("hardware") or {},
        versions=provenance.get("software") or {},
    )
