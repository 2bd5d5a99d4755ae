"""MAGE's VQGAN (``vqgan_jax_strongaug.ckpt``) to ours, alone or out of a checkpoint that carries it under ``vqgan.``.

Source of the layout: taming-transformers' names; the arithmetic that MAGE's weights need is described in
:mod:`digit.models.vqgan`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from digit.convert.keys import Keys, Renames
from digit.convert.stream import Component, write_component
from digit.convert.torchfile import read_torch_file
from digit.core.errors import DigitError
from digit.models.component import without_weights
from digit.models.vqgan import VQGAN, VQGANConfig


def convert_vqgan(source: str | Path, out: str | Path, resolution: int = 256) -> Path:
    """Convert a ``.ckpt``, with or without a "state_dict" around, to one of our component folders, which is replaced if
    it exists. Convolutions do not tell the side of the images in pixels. DigitError: not such a file, or keys that do
    not fit; the message names the file and the keys.
    """
    keys = vqgan_keys(source)
    component = vqgan_component(keys, resolution)
    keys.check()
    write_component(out, component)
    return Path(out)


def vqgan_keys(source: str | Path) -> Keys:
    """The tensors of a standalone file."""
    values = read_torch_file(source)
    values = values.get("state_dict", values) if isinstance(values, dict) else values
    if not isinstance(values, dict) or not any(name.startswith(("encoder.", "quantize.")) for name in map(str, values)):
        raise DigitError(
            f"{source} is not a VQGAN checkpoint: expected tensors named encoder.*, decoder.* and quantize.*."
        )
    foreign = [name for name in values if re.search(r"(^(post_)?quant_conv\.|\.attn[._])", str(name))]
    if foreign:
        raise DigitError(
            f"{source} is a VQGAN of another architecture: it has {foreign[0]}. The one that DiGIT uses (MAGE's "
            "vqgan_jax_strongaug.ckpt) has no attention and no quant_conv; taming-transformers' own VQGANs do not fit."
        )
    return Keys(values, str(source))


def vqgan_component(keys: Keys, resolution: int) -> Component:
    """Config and tensors; every size is read from the weights."""
    channels = keys.shape("encoder.conv_in.weight")[0]
    levels = keys.count(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight$")
    blocks = keys.count(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight$")
    if not levels or not blocks:
        raise DigitError(f"{keys.where} has no tensors encoder.down.*.block.*, from which the VQGAN's sizes are read.")
    widths = [keys.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    codes, code_dim = keys.shape("quantize.embedding.weight")
    config = VQGANConfig(
        resolution=resolution,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        codes=codes,
        code_dim=code_dim,
        shortcut=_shortcut(keys, channels, widths),
    )
    renames: Renames = [
        (r"^codebook$", "quantize.embedding.weight"),
        (r"^encoder\.levels\.(\d+)\.(\d+)", r"encoder.down.\1.block.\2"),
        # theirs counts levels of the decoder from the finest, ours runs from the coarsest
        (r"^decoder\.levels\.(\d+)\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}"),
        (r"^decoder\.upsample\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample.conv"),
        (r"middle\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"shortcut", "nin_shortcut"),
    ]
    with without_weights():
        model = VQGAN(config)
    return Component("VQGAN", config, keys.parts(model, renames), file=Path(keys.where))


def _shortcut(keys: Keys, channels: int, widths: list[int]) -> Any:
    """What the 1x1 shortcut reads, "hidden" or "input", told by its shape."""
    for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
        name = f"encoder.down.{level}.block.0.nin_shortcut.weight"
        if before != width and name in keys:
            return "input" if keys.shape(name)[1] == before else "hidden"
    return "hidden"
