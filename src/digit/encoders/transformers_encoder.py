"""An encoder whose network comes from `transformers`: DINOv2 and its kin."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.config import config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.files import write_folder, write_json
from digit.encoders.base import Preprocessing
from digit.encoders.families import (
    FAMILIES,
    Family,
    build_network,
    final_norm_name,
    load_network,
    network_config,
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
        final_norm: apply the norm that follows the last block, as the paper does.
        positions: how learned positions stretch to another grid: "hub" as transformers does for this family;
            "dinov2-offset" as DINOv2's first code and, with registers too, the DiGIT authors' do: see
            :func:`offset_positions`. A codebook belongs to one of them.
        preprocessing: from images to what the network sees. The paper: 256 in, 224 seen.
    """

    hf_config: dict[str, Any]
    layer: int = -3
    final_norm: bool = True
    positions: Positions = "hub"
    preprocessing: Preprocessing = Preprocessing(resize=224)

    @property
    def family(self) -> Family:
        """The facts about this kind of network."""
        return FAMILIES[str(self.hf_config.get("model_type"))]

    def network_config(self) -> Any:
        """The `transformers` config with the blocks up to the chosen layer only.

        Raises:
            DigitError: an unknown family, or a layer that the network does not have.
        """
        depth = network_config(self.hf_config).num_hidden_layers
        if not -depth <= self.layer <= -1:
            raise DigitError(
                f"layer={self.layer} was given; this network has {depth} blocks: -{depth} (first) to -1 (last)."
            )
        return network_config(self.hf_config, blocks=depth + self.layer + 1)

    def describe(self) -> str:
        """Its shape in a line."""
        hf, norm = self.hf_config, " with the final norm" if self.final_norm else ""
        return (
            f"{hf.get('model_type')}, {hf.get('num_hidden_layers')} blocks of width {hf.get('hidden_size')}, "
            f"patch {hf.get('patch_size')}; layer {self.layer}{norm}; {self.preprocessing.describe()}"
        )


class TransformersEncoder(nn.Module):
    """Images to the patch features of one layer of a `transformers` network.

    Attributes:
        network: the network up to the chosen layer; blocks after it are not kept.
        preprocessing: applied inside :meth:`forward`.
        provenance: where the weights come from.
    """

    provenance: dict[str, Any]

    def __init__(self, config: EncoderConfig, network: nn.Module | None = None) -> None:
        """Build the network with random weights, unless one is given."""
        super().__init__()
        self.config = config
        self.preprocessing = config.preprocessing
        self.provenance = {}
        shape = config.network_config()
        self.dim: int = shape.hidden_size
        self.patch = _side(shape.patch_size)
        self.prefix = config.family.prefix + (getattr(shape, "num_register_tokens", 0) or 0)
        size = self.preprocessing.resize or self.preprocessing.image_size
        if size % self.patch:
            near = size // self.patch * self.patch
            raise DigitError(
                f"The network would see {size} x {size} pixels, which its patches of {self.patch} do not tile; "
                f"set resize={near} or resize={near + self.patch}."
            )
        self.grid: tuple[int, int] = (size // self.patch, size // self.patch)
        self.network = build_network(config.family, shape) if network is None else network
        if not config.final_norm:
            self.network.set_submodule(final_norm_name(config.family, self.network), nn.Identity())
        if config.positions == "dinov2-offset":
            if config.hf_config["model_type"] not in ("dinov2", "dinov2_with_registers", "vit"):
                raise DigitError("positions='dinov2-offset' is for DINOv2 and DINO networks only; leave it at 'hub'.")
            embeddings: Any = self.network.embeddings
            embeddings.interpolate_pos_encoding = functools.partial(offset_positions, embeddings)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in 0..1 to features (B, N, dim), row by row; S is the preprocessing's size in, or the
        size seen.

        Raises:
            DigitError: images of another shape.
        """
        features: Tensor = self._run(images).last_hidden_state[:, self.prefix :]  # (B, N, D)
        return features

    def states(self, images: Tensor) -> list[Tensor]:
        """The features (B, N, D) after each block up to the chosen one, the last normed as :meth:`forward` gives it."""
        found = self._run(images, output_hidden_states=True)
        return [state[:, self.prefix :] for state in (*found.hidden_states[1:-1], found.last_hidden_state)]

    def _run(self, images: Tensor, **options: Any) -> Any:
        check_images(images, self.preprocessing)
        pixels = self.preprocessing(images)  # (B, 3, s, s)
        return self.network(pixels.to(next(self.network.parameters()).dtype), **self._call(pixels), **options)

    def _call(self, pixels: Tensor) -> dict[str, Any]:
        arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if self.config.family.interpolate else {}
        if self.config.hf_config["model_type"] == "vit_mae":
            # the order in which MAE keeps patches is that of this noise
            patches = self.grid[0] * self.grid[1]
            arguments["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        return arguments

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
        """Read a folder written by :meth:`save_pretrained`, in float32 and frozen.

        Args:
            folder: where it is.
            changes: fields of :class:`EncoderConfig` to replace. An earlier layer than the saved one is always
                possible; a later one only if the folder has its blocks.

        Raises:
            DigitError: files are missing or damaged, or do not fit; the message names them.
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
        """An encoder of given weights, in float32 and frozen.

        Args:
            config: its description.
            source: a folder that transformers can read, or tensors by their names on the hub.
            where: what is being read, for messages.
            provenance: kept with the encoder.
        """
        network = load_network(config.family, config.network_config(), source, where)
        encoder = cls(config, network)
        encoder.provenance = dict(provenance or {})
        return encoder.eval().requires_grad_(False)


def check_images(images: Tensor, preprocessing: Preprocessing) -> None:
    """Refuse what is not a batch of images of the size in or the size seen.

    Raises:
        DigitError: says which shape was given and which is expected.
    """
    sizes = sorted({preprocessing.image_size, preprocessing.resize or preprocessing.image_size}, reverse=True)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] not in sizes:
        expected = " or ".join(f"(B, 3, {size}, {size})" for size in sizes)
        raise DigitError(f"This encoder takes images {expected}; {tuple(images.shape)} was given.")


def offset_positions(embeddings: Any, _tokens: Tensor, height: int, width: int) -> Tensor:
    """Positions (1, 1 + N, D) for another grid, stretched by (side + 0.1) / table side: bicubic, no antialiasing.

    The 0.1 shifts every sample by a little, so this differs from a resize to the same grid. Source: DINOv2's first
        published
    code, which the authors' vits.py keeps (DAMO-NLP-SG/DiGIT at cd6d8ca).

    Args:
        embeddings: a DINOv2 or ViT embedding module of transformers.
        _tokens: (B, 1 + N, D), not used: the signature is that of the method this stands for.
        height, width: of the image, in pixels.
    """
    table: Tensor = embeddings.position_embeddings  # (1, 1 + T * T, D)
    side = round((table.shape[1] - 1) ** 0.5)
    patch = _side(embeddings.patch_size)
    rows, columns = height // patch, width // patch
    if (rows, columns) == (side, side):
        return table
    square = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, T, T)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    patches = F.interpolate(square, scale_factor=scale, mode="bicubic")  # (1, D, rows, columns)
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def _side(patch_size: int | list[int] | tuple[int, ...]) -> int:
    return patch_size if isinstance(patch_size, int) else patch_size[0]
