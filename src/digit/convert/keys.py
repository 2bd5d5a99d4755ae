"""The tensors of a foreign file, taken one by one, so that none is missed, misread or left over unseen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from digit.core.errors import DigitError

_SHOWN = 30


class Keys:
    """A state dict that remembers what was asked of it.

    Problems are collected, so that one message names them all: see :meth:`check`.
    """

    def __init__(self, tensors: Mapping[str, Any], where: str) -> None:
        """Start with all keys untaken.

        Args:
            tensors: name to tensor.
            where: the file, for messages.
        """
        self.where = where
        self._tensors = tensors
        self._prefix = ""
        self._taken: set[str] = set()
        self._problems: list[str] = []

    def under(self, prefix: str) -> Keys:
        """The same record, seen from inside a prefix such as ``"vqgan."``."""
        inner = Keys(self._tensors, self.where)
        inner._prefix, inner._taken, inner._problems = self._prefix + prefix, self._taken, self._problems
        return inner

    def names(self) -> list[str]:
        """The names under the prefix, without it."""
        return [name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix)]

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that sizes are read from.

        Raises:
            DigitError: there is none of this name, so nothing can be said about the rest.
        """
        value = self._tensors.get(self._prefix + name)
        if not isinstance(value, Tensor):
            raise DigitError(
                f"{self.where} has no tensor {self._prefix + name}, from which the sizes of the model are read."
            )
        return tuple(value.shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name and shape; if it is missing or of another shape that is noted, and a placeholder
        returned.
        """
        full = self._prefix + name
        self._taken.add(full)
        value = self._tensors.get(full)
        if not isinstance(value, Tensor):
            self._problems.append(f"missing: {full} {shape}")
        elif tuple(value.shape) != shape:
            self._problems.append(f"wrong shape: {full} is {tuple(value.shape)}, expected {shape}")
        else:
            return value
        return torch.empty(shape, device="meta")

    def ignore(self, *names: str) -> None:
        """Names that may be there and carry nothing we need."""
        self._taken.update(self._prefix + name for name in names)

    def check(self) -> None:
        """Raise :class:`DigitError` naming every missing, misshapen and unexpected key, if there is any."""
        extra = [name for name in self._tensors if name not in self._taken and name.startswith(self._prefix)]
        problems = self._problems + [f"unexpected: {name} {_shape_of(self._tensors[name])}" for name in extra]
        if problems:
            shown = "; ".join(problems[:_SHOWN]) + (
                f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            )
            raise DigitError(f"The keys of {self.where} are not those of the published layout: {shown}.")


def _shape_of(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__}, not a tensor)"
