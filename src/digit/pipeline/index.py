"""The index of a saved model: ``model_index.json``, which makes a folder a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json

INDEX = "model_index.json"
FORMAT = 1
_FIELDS = (
    "format", "space", "parts", "decoders", "default_decoder", "class_names", "settings", "provenance", "name",
)  # fmt: skip


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a model folder.

    Raises:
        DigitError: not a model folder, or one of a later format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise DigitError(
            f"{folder} is not a model: it has no {INDEX}. Models are made by: digit assemble, digit convert."
        )
    index = read_json(path)
    missing = set(_FIELDS) - set(index if isinstance(index, dict) else ())
    if missing:
        raise DigitError(f"{path} is not the index of a model: it lacks {', '.join(sorted(missing))}.")
    if index["format"] != FORMAT:
        raise DigitError(
            f"{path} has format {index['format']}; this version of digit reads format {FORMAT}. Update digit."
        )
    return {"card": {}, **index}
