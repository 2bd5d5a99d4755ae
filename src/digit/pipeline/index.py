"""The index of a saved model: ``model_index.json``, which makes a folder a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.core.hub import INDEX as INDEX

FORMAT = 1
PLAIN = ("name", "space", "default_decoder", "class_names", "provenance")
"""Attributes of a model that the index holds as they are."""


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
    missing = {"format", "parts", "decoders", "settings", *PLAIN}.difference(index if isinstance(index, dict) else ())
    if missing:
        raise DigitError(f"{path} is not the index of a model: it lacks {', '.join(sorted(missing))}.")
    if index["format"] != FORMAT:
        raise DigitError(
            f"{path} has format {index['format']}; this version of digit reads format {FORMAT}. Update digit."
        )
    return {"card": {}, **index}
