"""A saved component: a folder with ``config.json`` (its config, and what it is) and ``model.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from digit.core.config import from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_json, read_tensors, write_folder, write_json, write_tensors

M = TypeVar("M", bound=nn.Module)


def save_component(
    folder: str | Path,
    module: nn.Module,
    config: object,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a module and its config as a folder, whole or not at all.

    Args:
        folder: where; replaced if it exists.
        module: its state dict is saved.
        config: a config made with :func:`digit.core.config.config`.
        provenance: where the weights come from: data, steps, metrics, converted file; kept under "provenance".
        dtype: store floating-point tensors in it (bfloat16 or float16 halve the file); None keeps them.
    """
    tensors = {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    with write_folder(folder) as aside:
        write_json(
            aside / "config.json",
            {"type": type(module).__name__, "config": to_dict(config), "provenance": dict(provenance or {})},
        )
        write_tensors(aside / "model.safetensors", tensors)


def read_component_config(folder: str | Path, config_class: type[Any]) -> tuple[Any, dict[str, Any]]:
    """The config and the provenance of a saved component.

    Raises:
        DigitError: no ``config.json``, or not one of this class.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DigitError(f"{folder} is not a saved component: it has no config.json.")
    values = read_json(path)
    if not isinstance(values, dict) or "config" not in values:
        raise DigitError(f"{path} does not describe a component: it has no 'config' field.")
    return from_dict(config_class, values["config"], str(path)), dict(values.get("provenance", {}))


def load_component(folder: str | Path, module_class: type[M], config_class: type[Any]) -> M:
    """Read a module saved by :func:`save_component`, in float32 and eval mode, with ``module.provenance`` set.

    Raises:
        DigitError: files are missing or damaged, or tensors do not fit the config; the message names them.
    """
    config, provenance = read_component_config(folder, config_class)
    tensors = {
        k: v.float() if v.is_floating_point() else v
        for k, v in read_tensors(Path(folder) / "model.safetensors").items()
    }
    with torch.device("meta"):
        module = module_class(config)
    load_strict(module, tensors, str(folder))
    module.provenance = provenance  # type: ignore[assignment]
    return module.eval().requires_grad_(False)


def load_strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Put every tensor in its place, or say which are missing, extra or of another shape."""
    expected = module.state_dict()
    problems = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in tensors if name not in expected]
    problems += [
        f"wrong shape: {name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise DigitError(f"The weights in {where} do not fit its config: {shown}.")
    module.load_state_dict(dict(tensors), assign=True)
