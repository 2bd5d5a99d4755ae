"""What lies under run folders: results of measurements, generation runs and training runs; and what could not be
read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.training.logs import read_metrics

GENERATION, TRAINING = "generation", "training"
_SKIPPED = {"checkpoints", "tensorboard"}
_LARGEST = 64 * 1024 * 1024  # bytes of a JSON file; results are far smaller


@dataclass(frozen=True)
class Found:
    """Something to report.

    Attributes:
        kind: of the measurement, or "generation" or "training".
        place: where, for people: from the given folder's name on.
        root: the given folder.
        folder: that holds it and its pictures.
        data: what was written; for a training run "config", "metrics" and "provenance".
    """

    kind: str
    place: str
    root: Path
    folder: Path
    data: dict[str, Any]


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

    def of(self, *kinds: str) -> list[Found]:
        """What is of one of the kinds."""
        return [item for item in self.found if item.kind in kinds]


def collect(folders: Sequence[str | Path]) -> Collection:
    """Look through folders and everything below them; links are not followed.

    Raises:
        DigitError: a folder does not exist.
    """
    collection = Collection()
    seen: set[Path] = set()
    for given in map(Path, folders):
        if not given.is_dir():
            raise DigitError(f"There is no folder {given} to report on; give run folders, such as runs/tour.")
        root = given.resolve()
        for folder, names in _walk(root):
            if folder in seen:
                continue
            seen.add(folder)
            place = "/".join((root.name, *folder.relative_to(root).parts))
            _look(folder, names, place, root, collection)
    return collection


def _walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in _SKIPPED and not name.startswith("."))
        yield Path(folder), set(names)


def _look(folder: Path, names: set[str], place: str, root: Path, collection: Collection) -> None:
    if "metrics.jsonl" in names:
        data = _training(folder, place, collection.problems)
        collection.found.append(Found(TRAINING, place, root, folder, data))
    for name in sorted(names):
        if not name.endswith(".json") or name.startswith("."):
            continue
        where = f"{place}/{name}"
        try:
            if (folder / name).stat().st_size > _LARGEST:
                raise DigitError("it is larger than 64 MB, and no result is.")
            data = read_json(folder / name)
        except (DigitError, OSError, RecursionError) as error:
            collection.problems.append(Problem(where, _short(error, folder)))
            continue
        kind = _kind(name, data)
        if kind:
            collection.found.append(
                Found(kind, place if name in ("result.json", "generation.json") else where, root, folder, data)
            )
        elif name in ("result.json", "generation.json"):
            collection.problems.append(Problem(where, "it is not a result: 'kind', 'title' and 'values' are expected."))


def _kind(name: str, data: Any) -> str | None:
    """The kind of a result; None for the many other JSON files of a run."""
    if not isinstance(data, dict):
        return None
    if name == "generation.json" and "model" in data and "num" in data:
        return GENERATION
    if isinstance(data.get("kind"), str) and {"title", "values"} <= data.keys():
        return str(data["kind"])
    return None


def _training(folder: Path, place: str, problems: list[Problem]) -> dict[str, Any]:
    data: dict[str, Any] = {"config": {}, "metrics": [], "provenance": {}}
    try:
        lines = read_metrics(folder)
        written = sum(1 for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line.strip())
        data["metrics"] = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
        if len(data["metrics"]) < written:
            problems.append(
                Problem(f"{place}/metrics.jsonl", f"only {len(data['metrics'])} of its {written} lines are readable.")
            )
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        problems.append(Problem(f"{place}/metrics.jsonl", _short(error, folder)))
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise DigitError("it holds no settings.")
        data["config"] = config
    except (OSError, UnicodeDecodeError, yaml.YAMLError, DigitError, RecursionError) as error:
        problems.append(Problem(f"{place}/config.yaml", _short(error, folder)))
    exported = folder / "model" / "config.json"
    if exported.is_file():  # otherwise the run is not finished
        try:
            data["provenance"] = dict(read_json(exported).get("provenance") or {})
        except (DigitError, AttributeError, TypeError, ValueError) as error:
            problems.append(Problem(f"{place}/model/config.json", _short(error, folder)))
    return data


def _short(error: BaseException, folder: Path) -> str:
    """One line, without the path of the machine."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return " ".join(str(error).replace(f"{folder}{os.sep}", "").split()) or type(error).__name__
