"""What lies under run folders, as results: measurements, generation and training runs; and what could not be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.evaluation.report.runs import Generation, Training, points
from digit.evaluation.results import RESULT, Result
from digit.training.logs import read_metrics

for _kinds in (
    "metrics.fidelity", "metrics.model_reconstruction", "metrics.probe", "metrics.stability", "metrics.toy",
    "studies.ablation", "studies.prefix", "studies.ranking", "studies.robustness", "studies.sweep",
):  # fmt: skip
    import_module(f"digit.evaluation.{_kinds}")  # every kind of result must be known when a file of it is read

GENERATION = "generation.json"
_SKIPPED = {"checkpoints", "tensorboard"}
_LARGEST = 64 * 1024 * 1024  # bytes of a JSON file; results are far smaller


@dataclass(frozen=True)
class Found:
    """Something to report.

    Attributes:
        place: where, for people: from the given folder's name on.
        root: the given folder.
        folder: that holds it and its images.
    """

    result: Result
    place: str
    root: Path
    folder: Path


@dataclass(frozen=True)
class Problem:
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
        return Generation.of(data)
    if isinstance(data.get("kind"), str) and {"title", "values"} <= data.keys():
        return Result.from_dict(data)
    return None


def training_run(folder: Path, place: str = "", collection: Collection | None = None) -> Training:
    """A run of ``digit train``; what cannot be read of it is noted in ``collection``."""
    collection = collection or Collection()
    lines, settings, provenance = [], {}, {}
    with collection.reading(f"{place}/metrics.jsonl", folder):
        found = read_metrics(folder)
        written = sum(1 for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line.strip())
        lines = [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)]
        if len(lines) < written:
            raise DigitError(f"only {len(lines)} of its {written} lines are readable.")
    with collection.reading(f"{place}/config.yaml", folder):
        found_settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(found_settings, dict):
            raise DigitError("it holds no settings.")
        settings = found_settings
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
