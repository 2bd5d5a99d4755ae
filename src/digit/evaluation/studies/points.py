"""Long measurements point by point: what is done is on disk at once, and a repeated command goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json, write_json


class Points:
    """Values of a measurement by their settings, one JSON file each.

    Args:
        folder: where; made if missing.
        identity: what all points have in common, plain JSON: model, number of images, seed, reference ...

    Raises:
        DigitError: the folder holds points of something else; the message says in what it differs.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        place, given = self.folder / "identity.json", json.loads(json.dumps(identity))
        if not place.is_file():
            write_json(place, given)
        saved = read_json(place)
        differing = sorted(key for key in {*saved, *given} if saved.get(key) != given.get(key))
        if differing:
            raise DigitError(
                f"{self.folder} holds values measured with another {', another '.join(differing)}; choose another --out, or "
                "give what it was begun with."
            )

    def get(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The value under these settings, or None."""
        path = self._path(settings)
        if not path.is_file():
            return None
        value: dict[str, Any] = read_json(path)["value"]
        return value

    def put(self, settings: Mapping[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a value; it is returned as it will be read again."""
        write_json(self._path(settings), {"settings": dict(settings), "value": dict(value)})
        kept = self.get(settings)
        assert kept is not None
        return kept

    def _path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(settings)}.json"


def key_of(settings: Mapping[str, Any]) -> str:
    """A short name for settings, the same on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
