"""``presets``: what can be trained, and with which settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml
from rich.table import Column, Table

from digit.cli import options
from digit.cli.options import argument
from digit.core.config import load_preset, preset_names, preset_summary
from digit.core.progress import console

Name = Annotated[str | None, argument("Name of a preset, or a YAML file.", autocompletion=options.complete_presets)]
Other = Annotated[str | None, argument("A second one to compare it with.", autocompletion=options.complete_presets)]


def presets(name: Name = None, other: Other = None) -> None:
    """List the presets of digit train and digit evaluate ablation; show every setting of one; or compare two.

    Examples:
      digit presets

      digit presets cifar10-tiny-prior

      digit presets imagenet256-base imagenet256-large
    """
    if name is None:
        columns = (Column("preset", no_wrap=True), Column("for", no_wrap=True), "what it is")
        table = Table(*columns, box=None, pad_edge=False)
        for group, made_for in (("", None), ("ablations", "ablation")):
            for each in preset_names(group):
                component = made_for or str(load_preset(each, group=group)["component"])
                table.add_row(each, component, preset_summary(each, group))
        console().print(table)
        return
    values = _load(name)
    if other is None:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)
        return
    mine, theirs = _lines(values), _lines(_load(other))
    headings = (Column(title, overflow="fold") for title in ("setting", name, other))
    table = Table(*headings, box=None, pad_edge=False)
    for path in dict.fromkeys([*mine, *theirs]):
        if mine.get(path) != theirs.get(path):
            table.add_row(path, mine.get(path, "-"), theirs.get(path, "-"))
    if table.row_count:
        console().print(table)
    else:
        typer.echo(f"{name} and {other} hold the same settings.")


def _load(name: str) -> dict[str, Any]:
    """A preset of a training, or of an ablation."""
    names, ablations = preset_names(), preset_names("ablations")
    group = "ablations" if name in ablations and name not in names else ""
    return load_preset(name, group=group)


def _lines(values: Any, path: str = "") -> dict[str, str]:
    """Every setting as text, by its dotted path."""
    if not isinstance(values, dict) or not values:
        return {path: yaml.safe_dump(values, default_flow_style=True).removesuffix("\n...\n").strip()}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= _lines(value, f"{path}.{key}" if path else str(key))
    return found
