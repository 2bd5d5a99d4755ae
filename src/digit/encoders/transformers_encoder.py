"""An encoder whose network comes from `transformers`: DINOv2 and its kin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from digit.core.config import config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.files import write_folder, write_json
from digit.encoders.base import Combine, Preprocessing, as_written, combined
from digit.encoders.families import (
    FAMILIES,
    Family,
    build_network,
    final_norm_name,
    load_network,
    network_config,
    patch_side,
    quiet_transformers,
)
from digit.models.codebook import Positions
from digit.models.component import read_component


@config
class EncoderConfig:
    """Description of an encoder.

    Attributes:
        hf_config: the network as `transformers` describes it ("model_type", "hidden_size", ...), with all its blocks.
        layer: the block whose output is taken, counted from the end. The paper: -3, the third-last.
        layers: several blocks whose outputs are taken instead, such as (-4, -3, -2, -1); ``combine`` says how they
            become one feature: "sum", "mean", or "concat", in the order given, which is as many times as wide.
        final_norm: apply the norm that follows the last block, as the paper does; to the output of each block.
        positions: how learned positions stretch to another grid: "hub" as transformers does for this family;
            "dinov2-offset" as DINOv2's first code and, with registers too, the DiGIT authors' do: see
            :func:`offset_positions`. A codebook belongs to one of them.
        preprocessing: from images to what the network sees. The paper: 256 in, 224 seen.
    """

    hf_config: dict[str, Any]
    layer: int = -3
    layers: tuple[int, ...] = ()
    combine: Combine = "sum"
    final_norm: bool = True
    positions: Positions = "hub"
    preprocessing: Preprocessing = Preprocessing(resize=224)

    @model_serializer(mode="wrap")
    def _plain(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return as_written(fields(self))

    @property
    def family(self) -> Family:
        """The facts about this kind of network."""
        return FAMILIES[self.hf_config["model_type"]]

    @property
    def last(self) -> int:
        """The last block that is taken, and kept."""
        return max(self.layers, default=self.layer)

    def network_config(self) -> Any:
        """The `transformers` config up to the last chosen layer; a DigitError for an unknown family or layer."""
        depth = network_config(self.hf_config).num_hidden_layers
        for layer in self.layers or (self.layer,):
            if not -depth <= layer <= -1:
                raise DigitError(
                    f"layer={layer} was given; this network has {depth} blocks: -{depth} (first) to -1 (last)."
                )
        return network_config(self.hf_config, blocks=depth + self.last + 1)

    def describe(self) -> str:
        """Its shape in a line."""
        hf, norm = self.hf_config, " with the final norm" if self.final_norm else ""
        layer = f"{self.combine} of layers {self.layers}" if self.layers else f"layer {self.layer}"
        return (
            f"{hf.get('model_type')}, {hf.get('num_hidden_layers')} blocks of width {hf.get('hidden_size')}, "
            f"patch {hf.get('patch_size')}; {layer}{norm}; {self.preprocessing.describe()}"
        )


class TransformersEncoder(nn.Module):
    """Images to the patch features of one or several layers of a network; blocks after the last one are not kept."""

    provenance: dict[str, Any]

    def __init__(self, config: EncoderConfig, network: nn.Module | None = None) -> None:
        """Build the network with random weights, unless one is given."""
        super().__init__()
        self.config = config
        self.preprocessing = config.preprocessing
        self.provenance = {}
        shape = config.network_config()
        self.dim: int = shape.hidden_size * (len(config.layers) or 1 if config.combine == "concat" else 1)
        self.patch = patch_side(shape)
        self.prefix = config.family.prefix + (getattr(shape, "num_register_tokens", 0) or 0)
        size = self.preprocessing.seen
        if size % self.patch:
            near = size // self.patch * self.patch
            raise DigitError(
                f"The network would see {size} x {size} pixels, which its patches of {self.patch} do not tile; "
                f"set resize={near} or resize={near + self.patch}."
            )
        self.grid: tuple[int, int] = (size // self.patch, size // self.patch)
        self.network = build_network(config.family, shape) if network is None else network
        self._norm = final_norm_name(self.network)
        if not config.final_norm:
            self.network.set_submodule(self._norm, nn.Identity())
        if config.positions == "dinov2-offset":
            if config.hf_config["model_type"] not in ("dinov2", "dinov2_with_registers", "vit"):
                raise DigitError("positions='dinov2-offset' is for DINOv2 and DINO networks only; leave it at 'hub'.")
            embeddings: Any = self.network.embeddings
            embeddings.interpolate_pos_encoding = functools.partial(offset_positions, embeddings)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in 0..1, of the size in or seen, to features (B, N, dim), row by row; else a
        DigitError.
        """
        if not self.config.layers:
            features: Tensor = self._run(images).last_hidden_state[:, self.prefix :]  # (B, N, D)
            return features
        found, norm = self._run(images, output_hidden_states=True), self.network.get_submodule(self._norm)
        normed = [*map(norm, found.hidden_states[1:-1]), found.last_hidden_state]  # of each block that is kept
        parts = [normed[layer - self.config.last - 1][:, self.prefix :] for layer in self.config.layers]
        return combined(parts, self.config.combine)

    def states(self, images: Tensor) -> list[Tensor]:
        """The features (B, N, D) after each block up to the chosen one, the last normed as :meth:`forward` gives it."""
        found = self._run(images, output_hidden_states=True)
        return [state[:, self.prefix :] for state in (*found.hidden_states[1:-1], found.last_hidden_state)]

    def _run(self, images: Tensor, **options: Any) -> Any:
        self.preprocessing.check(images)
        pixels = self.preprocessing(images)  # (B, 3, s, s)
        if self.config.family.interpolate:
            options["interpolate_pos_encoding"] = True
        if self.config.hf_config["model_type"] == "vit_mae":
            # the order in which MAE keeps patches is that of this noise
            patches = self.grid[0] * self.grid[1]
            options["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        return self.network(pixels.to(next(self.network.parameters()).dtype), **options)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` (hub names), optionally with tensors rounded to ``dtype``."""
        tensors = {
            name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
            for name, value in self.network.state_dict().items()
        }
        network: Any = self.network
        with quiet_transformers(), write_folder(folder) as aside:
            network.save_pretrained(aside, state_dict=tensors, max_shard_size="1TB")
            values = {"type": type(self).__name__, "config": to_dict(self.config), "provenance": self.provenance}
            write_json(aside / "config.json", values)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> TransformersEncoder:
        """Read a folder written by :meth:`save_pretrained`, in float32 and frozen, with ``changes`` of fields of its
        config.

        An earlier layer than the saved one is always possible; a later one only if the folder has its blocks. A
        DigitError where files are missing or damaged, or do not fit.
        """
        values = read_component(folder)
        saved = from_dict(EncoderConfig, values["config"], str(Path(folder) / "config.json"))
        return cls.from_weights(dataclasses.replace(saved, **changes), Path(folder), str(folder), values["provenance"])

    @classmethod
    def from_weights(
        cls,
        config: EncoderConfig,
        source: Path | Mapping[str, Tensor],
        where: str,
        provenance: Mapping[str, Any] | None = None,
    ) -> TransformersEncoder:
        """An encoder of given weights (see :func:`~digit.encoders.families.load_network`), in float32 and frozen."""
        network = load_network(config.family, config.network_config(), source, where, config.final_norm)
        encoder = cls(config, network)
        encoder.provenance = dict(provenance or {})
        return encoder.eval().requires_grad_(False)


def offset_positions(embeddings: Any, _tokens: Tensor, height: int, width: int) -> Tensor:
    """Positions (1, 1 + N, D) of a DINOv2 or ViT embedding module for the grid of an image of ``height`` and ``width``
    pixels, stretched by (side + 0.1) / table side: bicubic, no antialiasing.

    The 0.1 shifts every sample by a little, so this differs from a resize to the same grid. Source: DINOv2's first
    published code, which the authors' vits.py keeps (DAMO-NLP-SG/DiGIT at cd6d8ca). The signature is that of the method
    this stands for, which is given the tokens too.
    """
    table: Tensor = embeddings.position_embeddings  # (1, 1 + T * T, D)
    side = round((table.shape[1] - 1) ** 0.5)
    patch = patch_side(embeddings)
    rows, columns = height // patch, width // patch
    if (rows, columns) == (side, side):
        return table
    square = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, T, T)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    patches = F.interpolate(square, scale_factor=scale, mode="bicubic")  # (1, D, rows, columns)
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)
