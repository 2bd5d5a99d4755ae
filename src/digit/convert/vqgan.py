"""MAGE's VQGAN (``vqgan_jax_strongaug.ckpt``) to ours, alone or out of a checkpoint that carries it under ``vqgan.``.

Source of the layout: taming-transformers' names; the arithmetic that MAGE's weights need is described in
:mod:`digit.models.vqgan`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.convert.keys import Keys
from digit.convert.stream import Component, Parts, write_component
from digit.convert.torchfile import Pages, read_torch_file
from digit.core.errors import DigitError
from digit.models.vqgan import VQGANConfig


def convert_vqgan(source: str | Path, out: str | Path, resolution: int = 256) -> Path:
    """Convert a VQGAN checkpoint to one of our component folders.

    Args:
        source: the ``.ckpt``, with or without a "state_dict" around.
        out: the folder; replaced if it exists.
        resolution: side of the images in pixels, which convolutions do not tell.

    Raises:
        DigitError: not such a file, or keys that do not fit; the message names the file and the keys.
    """
    keys = vqgan_keys(source)
    component = vqgan_component(keys, resolution, Path(source))
    keys.check()
    write_component(out, component, Pages(Path(source)).used)
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


def vqgan_component(keys: Keys, resolution: int, file: Path) -> Component:
    """Config and tensors; every size is read from the weights."""
    channels = keys.shape("encoder.conv_in.weight")[0]
    levels = [
        int(m.group(1))
        for name in keys.names()
        if (m := re.match(r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight$", name))
    ]
    blocks = [
        int(m.group(1))
        for name in keys.names()
        if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight$", name))
    ]
    if not levels or not blocks:
        raise DigitError(f"{keys.where} has no tensors encoder.down.*.block.*, from which the VQGAN's sizes are read.")
    widths = [keys.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(max(levels) + 1)]
    codes, code_dim = keys.shape("quantize.embedding.weight")
    config = VQGANConfig(
        resolution=resolution,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=max(blocks) + 1,
        codes=codes,
        code_dim=code_dim,
        shortcut=_shortcut(keys, channels, widths),
    )
    return Component("VQGAN", config, _parts(keys, config), file=file)


def _shortcut(keys: Keys, channels: int, widths: list[int]) -> Any:
    """What the 1x1 shortcut reads, "hidden" or "input", told by its shape."""
    for level, (before, width) in enumerate(zip([channels, *widths], widths, strict=False)):
        name = f"encoder.down.{level}.block.0.nin_shortcut.weight"
        if before != width and name in keys:
            return "input" if keys.shape(name)[1] == before else "hidden"
    return "hidden"


def _parts(keys: Keys, config: VQGANConfig) -> Parts:
    widths = [config.channels * m for m in config.multipliers]
    parts: dict[str, list[Tensor]] = {}

    def take(ours: str, theirs: str, *shape: int) -> None:
        parts[ours] = [keys.take(theirs, *shape)]

    def norm(ours: str, theirs: str, width: int) -> None:
        take(f"{ours}.weight", f"{theirs}.weight", width)
        take(f"{ours}.bias", f"{theirs}.bias", width)

    def conv(ours: str, theirs: str, width_in: int, width: int, kernel: int, bias: bool = True) -> None:
        take(f"{ours}.weight", f"{theirs}.weight", width, width_in, kernel, kernel)
        if bias:
            take(f"{ours}.bias", f"{theirs}.bias", width)

    def block(ours: str, theirs: str, width_in: int, width: int) -> None:
        norm(f"{ours}.norm1", f"{theirs}.norm1", width_in)
        conv(f"{ours}.conv1", f"{theirs}.conv1", width_in, width, 3, bias=False)
        norm(f"{ours}.norm2", f"{theirs}.norm2", width)
        conv(f"{ours}.conv2", f"{theirs}.conv2", width, width, 3, bias=False)
        if width_in != width:
            source = width_in if config.shortcut == "input" else width
            conv(f"{ours}.shortcut", f"{theirs}.nin_shortcut", source, width, 1, bias=False)

    conv("encoder.conv_in", "encoder.conv_in", 3, config.channels, 3, bias=False)
    before = config.channels
    for level, width in enumerate(widths):
        for index in range(config.blocks):
            block(f"encoder.levels.{level}.{index}", f"encoder.down.{level}.block.{index}", before, width)
            before = width
    last = before
    conv("decoder.conv_in", "decoder.conv_in", config.code_dim, last, 3)
    # theirs counts levels of the decoder from the finest, ours runs from the coarsest
    for place, level in enumerate(reversed(range(len(widths)))):
        for index in range(config.blocks):
            block(f"decoder.levels.{place}.{index}", f"decoder.up.{level}.block.{index}", before, widths[level])
            before = widths[level]
        if level:
            conv(f"decoder.upsample.{place}", f"decoder.up.{level}.upsample.conv", before, before, 3)
    for side, width, channels, kernel in (("encoder", last, config.code_dim, 1), ("decoder", before, 3, 3)):
        for index in range(2):
            block(f"{side}.middle.{index}", f"{side}.mid.block_{index + 1}", last, last)
        norm(f"{side}.norm_out", f"{side}.norm_out", width)
        conv(f"{side}.conv_out", f"{side}.conv_out", width, channels, kernel)
    take("codebook", "quantize.embedding.weight", config.codes, config.code_dim)
    return parts
