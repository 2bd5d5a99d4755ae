"""A saved component: a folder with ``config.json`` (its config, and what it is) and ``model.safetensors``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from digit.core.config import from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_json, read_tensors, write_folder, write_json, write_tensors

M = TypeVar("M", bound="Component")


class Component(nn.Module):
    """A network that one config describes, and that is saved as a folder.

    Attributes:
        config: an instance of ``config_class``, and the only argument that the constructor needs.
        provenance: where the weights come from; saved with them.
        saved_as: the "type" in ``config.json``; the name of the class where nothing else is said.
    """

    config_class: ClassVar[type[Any]]
    saved_as: ClassVar[str]
    config: Any
    provenance: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "saved_as" not in cls.__dict__:
            cls.saved_as = cls.__name__

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.provenance = {}

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the folder; see :func:`save_component`."""
        save_component(folder, self, dtype=dtype)

    @classmethod
    def from_pretrained(cls: type[M], folder: str | Path) -> M:
        """Read a folder written by :meth:`save_pretrained`; see :func:`load_component`."""
        return load_component(folder, cls)

    def __repr__(self) -> str:
        """One line, instead of torch's list of every layer."""
        count = sum(p.numel() for p in self.parameters())
        return f"{self.saved_as}({self.config.describe()}; {millions(count)} parameters)"


def save_component(
    folder: str | Path,
    module: nn.Module,
    config: object = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a component as a folder, whole or not at all; ``config`` and ``provenance`` are the module's own where left
    out.

    ``dtype`` stores floating-point tensors in it (bfloat16 or float16 halve the file); None keeps them.
    """
    config = module.config if config is None else config
    facts = getattr(module, "provenance", {}) if provenance is None else provenance
    kind = getattr(module, "saved_as", type(module).__name__)
    tensors = {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    with write_folder(folder) as aside:
        write_json(aside / "config.json", {"type": kind, "config": to_dict(config), "provenance": dict(facts)})
        write_tensors(aside / "model.safetensors", tensors)


def read_component(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` says: "type", "config" and "provenance"; a DigitError where it describes no component."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise DigitError(f"{folder} is not a saved component: it has no config.json.")
    values = read_json(path)
    if not isinstance(values, dict) or "config" not in values:
        raise DigitError(f"{path} does not describe a component: it has no 'config' field.")
    return {"type": "", "provenance": {}, **values}


def load_component(folder: str | Path, *classes: type[M]) -> M:
    """Read a saved component of one of these classes, in float32, eval mode and frozen; a DigitError says what is
    wrong.
    """
    values = read_component(folder)
    module_class = next((one for one in classes if one.saved_as == values["type"]), classes[0])
    config = from_dict(module_class.config_class, values["config"], str(Path(folder) / "config.json"))
    tensors = read_tensors(Path(folder) / "model.safetensors")
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    with without_weights():
        module = module_class(config)
    load_strict(module, tensors, str(folder))
    module.provenance = dict(values["provenance"])
    return module.eval().requires_grad_(False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are built here get shapes and no weights, for those that are loaded afterwards. Nothing is drawn for
    them: PyTorch would import its compiler for that, two seconds.
    """
    with torch.device("meta"), _Uninitialized():
        yield


class _Uninitialized(TorchFunctionMode):
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:,.2f}M" if count >= 1e5 else f"{count:,}"


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


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 of a module's weights as float32 values, 64 hexadecimal digits: the one name that weights go by.

    Neither the names nor the order of the tensors count: they differ between versions of transformers.
    """
    digests = []
    for value in module.state_dict().values():
        plain = value.detach().cpu()
        plain = plain.float() if plain.is_floating_point() else plain
        digests.append(hashlib.sha256(plain.contiguous().view(-1).view(torch.uint8).numpy()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
