"""Modules of the first edition that the reference listed: their old paths import what the new ones hold, with a
``DeprecationWarning`` that names the new place.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "digit.assembly": "digit.pipeline.assembly",
    "digit.card": "digit.pipeline.card",
    "digit.config": "digit.core.config",
    "digit.data.images": "digit.core.images",
    "digit.errors": "digit.core.errors",
    "digit.evaluation.fidelity": "digit.evaluation.metrics.fidelity",
    "digit.evaluation.reconstruction": "digit.evaluation.metrics.reconstruction",
    "digit.evaluation.stability": "digit.evaluation.metrics.stability",
    "digit.generation": "digit.pipeline.generation",
    "digit.hub": "digit.pipeline.hub",
    "digit.sampling.acceleration": "digit.sampling.engines.acceleration",
    "digit.sampling.settings": "digit.sampling.request",
    "digit.tokenizers": None,  # a package of modules that are elsewhere now
    "digit.tokenizers.codebook": "digit.models.codebook",
    "digit.tokenizers.kmeans": "digit.clustering.kmeans",
    "digit.tokenizers.semantic": "digit.pipeline.tokenizer",
    "digit.tokenizers.vqgan": "digit.models.vqgan",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of :data:`MOVED`; it is asked after all others."""

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """The old module, if this is one."""
        return ModuleSpec(name, self, is_package=MOVED[name] is None) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and pass every name on to the new module."""
        place = MOVED[module.__name__]
        if place is None:
            return
        warnings.warn(
            f"{module.__name__} is now {place}; the old name goes in version 0.3.", DeprecationWarning, stacklevel=2
        )
        target = importlib.import_module(place)
        vars(module).update({name: value for name, value in vars(target).items() if not name.startswith("__")})
