"""Putting trained parts together to a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digit.encoders import load_encoder
from digit.errors import DigitError
from digit.models.component import load_component
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.pipeline import DigitPipeline
from digit.tokenizers.codebook import Codebook
from digit.tokenizers.vqgan import VQGAN


def part_folder(path: str | Path) -> Path:
    """The folder of a component, given that or the folder of the training run that made it.

    Raises:
        DigitError: neither.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise DigitError(f"{path} is not a saved part: there is no config.json in it or in {path / 'model'}.")


def assemble(
    encoder: str | Path | None = None,
    codebook: str | Path | None = None,
    vqgan: str | Path | None = None,
    prior: str | Path | None = None,
    decoders: Sequence[str | Path] = (),
    base: str | None = None,
    name: str | None = None,
    class_names: list[str] | None = None,
) -> DigitPipeline:
    """Load parts and put them into one pipeline; what ``base`` has and is not given is taken over.

    A prior that was trained on VQ tokens makes a baseline in VQ space.
    """
    parts: dict[str, Any] = {}
    if encoder is not None:
        parts["encoder"] = load_encoder(part_folder(encoder))
    if codebook is not None:
        parts["codebook"] = Codebook.from_pretrained(part_folder(codebook))
    if vqgan is not None:
        parts["vqgan"] = VQGAN.from_pretrained(part_folder(vqgan))
    if prior is not None:
        parts["prior"] = load_component(part_folder(prior), TokenModel, TokenModelConfig)
        provenance = getattr(parts["prior"], "provenance", {})
        parts["class_names"] = list(provenance.get("class_names", []))
        parts["space"] = provenance.get("space", "semantic")
    if decoders:
        models = [load_component(part_folder(d), TokenModel, TokenModelConfig) for d in decoders]
        parts["decoders"] = {m.config.role: m for m in models}
    if class_names is not None:
        parts["class_names"] = class_names
    if name is not None:
        parts["name"] = name
    if base is None:
        return DigitPipeline(**parts)
    start = DigitPipeline.from_pretrained(base)
    if "decoders" in parts:
        parts["decoders"] = {**start.decoders, **parts["decoders"]}
    return start.with_parts(**parts)
