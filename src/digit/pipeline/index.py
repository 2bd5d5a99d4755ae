"""The index of a saved model: ``model_index.json``, which makes a folder a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.core.hub import INDEX as INDEX

FORMAT = 2
"""Of 1, which is read too, parts, decoders and class names are lists; diffusers takes lists for components of its own.
"""
CLASS_NAME = ("pipeline", "DigitDiffusionPipeline")  # the file and the class that diffusers looks for
CODE = """# for diffusers: DiffusionPipeline.from_pretrained(ID, custom_pipeline=ID, trust_remote_code=True)
try:
    from digit.pipeline.diffusion import DigitDiffusionPipeline  # noqa: F401
except ImportError as error:
    raise ImportError("This model needs the package digit-ar: pip install 'digit-ar[diffusers]'") from error
"""
PLAIN = ("name", "space", "default_decoder", "class_names", "provenance")
"""Attributes of a model that the index holds as they are."""


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a model folder. DigitError: not a model folder, or one of a later format."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise DigitError(
            f"{folder} is not a model: it has no {INDEX}. Models are made by: digit assemble, digit convert."
        )
    index = read_json(path)
    missing = {"format", "parts", "decoders", "settings", *PLAIN}.difference(index if isinstance(index, dict) else ())
    if missing:
        raise DigitError(f"{path} is not the index of a model: it lacks {', '.join(sorted(missing))}.")
    if index["format"] not in (1, FORMAT):
        raise DigitError(
            f"{path} has format {index['format']}; this version of digit reads formats 1 and {FORMAT}. Update digit."
        )
    names = index["class_names"]
    return {"card": {}, **index, "class_names": list(names.values()) if isinstance(names, dict) else names}
