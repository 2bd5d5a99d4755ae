"""Configuration: typed dataclasses that validate by field name, and YAML presets with ``--set a.b=c`` overrides.

A config class is a frozen pydantic dataclass made with :func:`config`; it is the single description of a component and
is saved as ``config.json`` beside its weights. A preset is a YAML file in ``digit/presets`` (or any path) with the
sections ``component`` (encoder, vqgan, prior or decoder), ``model``, ``data`` and ``training``; those in
``digit/presets/ablations`` say what is compared with what, see :mod:`digit.evaluation.studies.ablation_run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from digit.core.errors import DigitError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that refuses unknown fields and wrong types."""
    decorated: type[T] = pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[assignment]
    return decorated


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a config from plain values.

    Args:
        cls: a class made with :func:`config`.
        values: its fields, nested dicts for nested configs.
        where: what is being read, for the message: a file name or "preset NAME".

    Raises:
        DigitError: names every wrong field, what was given and what was expected; suggests the nearest known name.
    """
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise DigitError(f"{where} does not describe a valid {cls.__name__}: {_explain(error, cls)}") from error


def _explain(error: ValidationError, cls: type) -> str:
    known = [field.name for field in dataclasses.fields(cls)]
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        text = f"'{name}' = {item['input']!r}: {item['msg']}" if name else item["msg"]
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
    folder = resources.files("digit") / "presets" / group
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_preset(name: str, overrides: Iterable[str] = (), group: str = "") -> dict[str, Any]:
    """Read a preset by name or path and apply ``a.b=c`` overrides.

    Args:
        name: a packaged preset's name, or the path of a YAML file.
        overrides: items ``dotted.path=value``; the value is YAML, so ``3e-4``, ``true`` and ``[1, 2]`` mean what they
            say.
        group: "" for trainings, or "ablations".

    Raises:
        DigitError: unknown preset, broken YAML, or an override whose path is not in the preset.
    """
    text = _preset_text(name, group)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DigitError(f"Preset {name} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise DigitError(
            f"Preset {name} holds {type(values).__name__}, expected sections such as 'model:' and 'training:'."
        )
    for item in overrides:
        _override(values, item, name)
    return values


def _preset_text(name: str, group: str) -> str:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise DigitError(f"There is no preset file {path}.")
        return path.read_text(encoding="utf-8")
    known = preset_names(group)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."
        raise DigitError(f"There is no preset '{name}'; {hint}")
    return (resources.files("digit") / "presets" / group / f"{name}.yaml").read_text(encoding="utf-8")


def _override(values: dict[str, Any], item: str, preset: str) -> None:
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
    value = yaml.safe_load(text)
    # YAML 1.1 reads 3e-4 as text, for want of a dot
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    return value
