"""Configuration: typed dataclasses that validate by field name, and YAML presets with ``--set a.b=c`` overrides.

A config class is a frozen pydantic dataclass made with :func:`config`; it is the single description of a component and
is saved as ``config.json`` beside its weights. A preset is a YAML file in ``digit/presets`` (or any path) with the
sections ``component`` (encoder, vqgan, prior or decoder), ``model``, ``objective``, ``data`` and ``training``.
``extends: NAME`` takes everything from another preset (or one of ``digit/presets/bases``, which explain every key) and
changes what the file itself says. Those in ``digit/presets/ablations`` say what is compared with what, see
:mod:`digit.evaluation.studies.ablation`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from digit.core.errors import DigitError

T = TypeVar("T")

# the types of config fields, for every module
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

_PRESETS = Path(__file__).parent.parent / "presets"


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that refuses unknown fields and wrong types."""
    decorated: type[T] = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[assignment]
    return decorated


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a config, a class made with :func:`config`, from plain values, nested dicts for nested configs.

    ``where`` is what is being read, a file name or "preset NAME". A DigitError names every wrong field, what was given
    and what was expected, and suggests the nearest known name.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise DigitError(f"{where}: {_explain(error, cls)}") from error


_EXPECTED = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be one of {expected}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    "string_type": "must be text",
    **dict.fromkeys(("dataclass_type", "dict_type"), "must hold fields of its own, as in 'name: value'"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
}
"""What pydantic's kinds of errors mean, with the words of its contexts."""


def _explain(error: ValidationError, cls: type) -> str:
    known = [field.name for field in dataclasses.fields(cls)]
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        expected = _EXPECTED.get(item["type"])
        reason = expected.format(**item.get("ctx", {})) if expected else item["msg"].removeprefix("Value error, ")
        text = f"{name} = {item['input']!r}: {reason}" if name else reason
        if item["type"] == "missing":
            text = f"'{name}' is missing"
        elif item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            near = difflib.get_close_matches(name, known, n=1)
            text = f"unknown field '{name}'" + (
                f"; did you mean '{near[0]}'?" if near else f"; known fields: {', '.join(known)}"
            )
        parts.append(text)
    return "; ".join(parts)


def to_dict(value: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    plain: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return plain


def preset_names(group: str = "") -> list[str]:
    """The names of the packaged presets, sorted: of trainings, or of the group "ablations"."""
    return sorted(path.stem for path in (_PRESETS / group).glob("*.yaml"))


def preset_summary(name: str, group: str = "") -> str:
    """What a packaged preset is: the first sentence of the comment at its top."""
    lines = (_PRESETS / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("# ") and not line.startswith("#  "), lines)
    return re.split(r"(?<=\.)\s", " ".join(line[2:] for line in comment))[0]


def load_preset(name: str, overrides: Iterable[str] = (), group: str = "") -> dict[str, Any]:
    """Read a preset by name or path, merged over those it extends, and apply ``a.b=c`` overrides.

    Args:
        name: a packaged preset's name, or the path of a YAML file.
        overrides: items ``dotted.path=value``; see :func:`read_value`.
        group: "" for trainings, or "ablations".

    Raises:
        DigitError: unknown preset, broken YAML, presets that extend each other in a circle, or an override whose path
            is not in the preset.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise DigitError(f"There is no preset file {path}.")
    else:
        path = _PRESETS / group / f"{name}.yaml"
        if not path.is_file():
            raise DigitError(f"There is no preset '{name}'; {_suggest(name, preset_names(group))}")
    values = _read_preset(path, ())
    for item in overrides:
        override(values, item, name)
    return values


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."


def _read_preset(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The preset merged over what it extends: a section over a section, anything else in place of what was there."""
    if path in extended_by:
        circle = " -> ".join(item.stem for item in (*extended_by, path))
        raise DigitError(f"Presets extend each other in a circle: {circle}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DigitError(f"Preset {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise DigitError(
            f"Preset {path} holds {type(values).__name__}, expected sections such as 'model:' and 'training:'."
        )
    base = values.pop("extends", None)
    if base is None:
        return values
    places = [folder / f"{str(base).removesuffix('.yaml')}.yaml" for folder in (path.parent, _PRESETS)]
    found = next((place.resolve() for place in places if place.is_file()), None)
    if found is None:
        raise DigitError(f"Preset {path} extends '{base}', which does not exist; {_suggest(str(base), preset_names())}")
    return _merge(_read_preset(found, (*extended_by, path.resolve())), values)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if both else value
    return base


def override(values: dict[str, Any], item: str, preset: str) -> None:
    """Apply one ``a.b=c`` to the sections of a preset, in place; see :func:`load_preset`."""
    path, separator, text = item.partition("=")
    if not separator or not path:
        raise DigitError(f"--set '{item}' was given; expected the form a.b=c, such as training.steps=1000.")
    *parents, leaf = path.strip().split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if not isinstance(node, dict) or part not in node:
            known = ", ".join(node) if isinstance(node, dict) else "nothing below it"
            raise DigitError(
                f"--set {item}: preset {preset} has no '{'.'.join(parents[: depth + 1])}'; there is: {known}."
            )
        node = node[part]
    if not isinstance(node, dict):
        raise DigitError(f"--set {item}: '{'.'.join(parents)}' is a value in preset {preset}, not a section.")
    node[leaf] = read_value(text)


def read_value(text: str) -> Any:
    """What was typed for a field, read as YAML, so ``3e-4``, ``true`` and ``[1, 2]`` mean what they say."""
    if text.strip() in ("no", "yes", "on", "off"):
        return text.strip()  # words, such as the precision "no"; YAML 1.1 would make booleans of them
    value = yaml.safe_load(text)
    # YAML 1.1 reads 3e-4 as text, for want of a dot
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return value
