"""Steps of long work that are done once: a repeated command takes what is finished and goes on with the rest."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from digit.core.files import read_json, write_json


@dataclass(frozen=True)
class Step:
    """A finished step: its folder, the value it gave (plain JSON), and whether it was finished before."""

    folder: Path
    value: Any
    reused: bool


@dataclass(frozen=True)
class Steps:
    """The steps of one piece of work.

    A step is named by everything that it depends on, so another setting never meets the values of this one, and steps
    with the same inputs are one. ``FOLDER/KIND/KEY.json`` (inputs, value, seconds) appears when a step is finished;
    until then what lies in ``FOLDER/KIND/KEY`` is for its next attempt to go on with.

    Attributes:
        folder: where.
        shared: inputs that all steps have in common, plain JSON.
    """

    folder: Path
    shared: Mapping[str, Any] = field(default_factory=dict)

    def run(self, kind: str, inputs: Mapping[str, Any], work: Callable[[Path], Any]) -> Step:
        """Do a step, unless it is finished.

        Args:
            kind: of steps, such as "tokens".
            inputs: plain JSON.
            work: gets the step's folder, which may not exist yet, and returns plain JSON.
        """
        given = {**self.shared, **inputs}
        key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
        folder, record = self.folder / kind / key, self.folder / kind / f"{key}.json"
        finished = record.is_file()
        if not finished:
            began = time.monotonic()
            value = work(folder)
            write_json(record, {"inputs": given, "value": value, "seconds": round(time.monotonic() - began, 2)})
        return Step(folder, read_json(record)["value"], finished)
