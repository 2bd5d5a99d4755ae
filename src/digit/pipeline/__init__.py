"""The pipeline and what is around a saved model: assembly, editing, Hub, card, description."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """``digit.pipeline.DigitPipeline`` and ``Tokens``, as the first edition had them."""
    if name not in ("DigitPipeline", "Tokens"):
        raise AttributeError(f"module 'digit.pipeline' has no attribute '{name}'")
    return getattr(importlib.import_module("digit.pipeline.pipeline"), name)
