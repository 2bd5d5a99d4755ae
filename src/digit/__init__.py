"""digit: image generation in a stable token space.

A frozen self-supervised encoder and k-means turn images into semantic tokens; a GPT (the prior) learns to predict
them; a decoder turns them into VQGAN tokens and pixels. Zhu et al. 2024, "Stabilize the Latent Space for Image
Autoregressive Modeling", arXiv 2410.12490.

>>> from digit import DigitPipeline
>>> pipe = DigitPipeline.from_pretrained("MODEL")
>>> images = pipe(labels=[3, 5], seed=0)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from digit._moved import MovedModules

__version__ = "0.1.0"
__all__ = ["VQGAN", "DigitError", "DigitPipeline", "SemanticTokenizer", "__version__", "load_images"]

if TYPE_CHECKING:
    from digit.core.errors import DigitError
    from digit.core.images import load_images
    from digit.models.vqgan import VQGAN
    from digit.pipeline.pipeline import DigitPipeline
    from digit.pipeline.tokenizer import SemanticTokenizer

_PLACES = {
    "DigitError": "digit.core.errors",
    "DigitPipeline": "digit.pipeline.pipeline",
    "SemanticTokenizer": "digit.pipeline.tokenizer",
    "VQGAN": "digit.models.vqgan",
    "load_images": "digit.core.images",
}
sys.meta_path.append(MovedModules())


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that ``digit --help`` does not wait for torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'digit' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
