"""Shapes in signatures (jaxtyping) are checked in the tests, by beartype; outside of them they cost nothing.

Functions and methods of :data:`ROOMS` that name a shape are wrapped when their module is imported. While a compiler
traces them the plain function runs, for it could not look through the checks.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any, get_args, get_type_hints

import torch
from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

ROOMS = ("digit.models", "digit.sampling", "digit.encoders", "digit.clustering")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which refuses and returns only what its signature says."""
    strict = jaxtyped(function, typechecker=beartype)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_compiling() else strict)(*args, **kwargs)

    return call


def names_a_shape(value: object) -> bool:
    """Whether it is a function with a shape in its annotations."""
    if not isinstance(value, FunctionType):
        return False
    try:
        return any(map(is_shape, get_type_hints(value).values()))
    except NameError:  # a name that only type checkers import
        return False


def is_shape(hint: object) -> bool:
    """Whether a type is one of jaxtyping's, or has one inside."""
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(is_shape, get_args(hint)))


def check_module(module: ModuleType) -> None:
    """Wrap what the module itself defines."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for place in (module, *filter(inspect.isclass, own)):
        for name, value in list(vars(place).items()):
            if getattr(value, "__module__", module.__name__) != module.__name__:
                continue
            if names_a_shape(value):
                setattr(place, name, checked(value))
            elif isinstance(value, classmethod | staticmethod) and names_a_shape(value.__func__):
                setattr(place, name, type(value)(checked(value.__func__)))


class ShapeChecks(MetaPathFinder):
    """Finds the modules of :data:`ROOMS` as ever, and checks them once they are there."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith(ROOMS) else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_check(module: ModuleType) -> None:
            execute(module)
            check_module(module)

        spec.loader.exec_module = execute_and_check  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Check what is imported from now on."""
    if not any(isinstance(finder, ShapeChecks) for finder in sys.meta_path):
        sys.meta_path.insert(0, ShapeChecks())
