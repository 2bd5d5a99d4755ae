"""The tensors of a foreign file, taken by a table of names, so that none is missed, misread or left over unseen."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError

Parts = Mapping[str, Sequence[Tensor]]
"""Our tensor name to slices of foreign tensors; laid end to end along dimension 0 they are our tensor. Nothing is
copied."""

Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Substitutions (pattern, replacement) that make their name of ours, one after the other. ``{a,b}`` in a name stands
for two tensors, which ours joins.
"""

_SHOWN = 30


class Keys:
    """A state dict, of the file ``where``, that remembers what was asked of it. Problems are collected, so that one
    message names them all: see :meth:`check`.
    """

    def __init__(self, tensors: Mapping[str, Any], where: str) -> None:
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

    def count(self, pattern: str) -> int:
        """How many there are of what names number from 0: the pattern's group is the number."""
        return 1 + max((int(m[1]) for name in self.names() if (m := re.match(pattern, name))), default=-1)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that sizes are read from. DigitError: there is none of this name, so nothing can be
        said about the rest.
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

    def parts(self, model: nn.Module, renames: Renames, rows: Mapping[str, int | slice] | None = None) -> Parts:
        """The tensors of a model of ours on the meta device, whose state dict says which, of which shapes. ``rows`` of
        theirs are ours, by our name, where theirs has more.
        """
        found = {}
        for ours, value in model.state_dict().items():
            theirs = ours
            for pattern, replacement in renames:
                theirs = re.sub(pattern, replacement, theirs)
            before, brace, rest = theirs.partition("{")
            choices, _, after = rest.partition("}")
            names = [before + choice + after for choice in choices.split(",")] if brace else [theirs]
            found[ours] = [self._piece(name, tuple(value.shape), len(names), (rows or {}).get(ours)) for name in names]
        return found

    def _piece(self, name: str, shape: tuple[int, ...], pieces: int, rows: int | slice | None) -> Tensor:
        if rows is None:
            return self.take(name, shape[0] // pieces, *shape[1:])
        needed, inner = (rows + 1, shape) if isinstance(rows, int) else (rows.start + shape[0], shape[1:])
        there = self.shape(name)[0] if name in self else needed
        return self.take(name, max(there, needed), *inner)[rows]

    def ignore(self, pattern: str) -> None:
        """Names (all of a name matches) that may be there and carry nothing we need."""
        self._taken.update(self._prefix + name for name in self.names() if re.fullmatch(pattern, name))

    def check(self) -> None:
        """Raise :class:`DigitError` naming every missing, misshapen and unexpected key, if there is any."""
        extra = [name for name in self._tensors if name not in self._taken and name.startswith(self._prefix)]
        shapes = [tuple(getattr(self._tensors[name], "shape", ("not a tensor",))) for name in extra]
        problems = self._problems + [f"unexpected: {name} {shape}" for name, shape in zip(extra, shapes, strict=True)]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise DigitError(
                f"The keys of {self.where} are not those of the published layout: {'; '.join(problems[:_SHOWN])}{more}."
            )
