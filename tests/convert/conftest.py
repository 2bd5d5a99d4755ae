"""Checkpoints of the DiGIT authors' layout with random weights, of any size."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

POSITIONS = 1026
NAMES = {"stage1": "stlm", "ar": "st2vtlm", "masked": "st2vtlm_nar", "vq": "st2vtlm_vq", "probe": "stlm_linearprobe"}


Shapes = dict[str, tuple[int, ...]]


def layer(name: str, out: int, *rest: int) -> Shapes:
    """Weight and bias of a linear or convolutional layer, or of a norm."""
    return {f"{name}.weight": (out, *rest), f"{name}.bias": (out,)}


def vit_shapes(dim: int, depth: int) -> Shapes:
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1370, dim),
        "register_tokens": (1, 4, dim),
        "mask_token": (1, dim),
    }
    shapes |= layer("patch_embed.proj", dim, 3, 14, 14) | layer("norm", dim)
    for block in (f"blocks.{n}" for n in range(depth)):
        shapes |= layer(f"{block}.norm1", dim) | layer(f"{block}.norm2", dim)
        shapes |= layer(f"{block}.attn.qkv", 3 * dim, dim) | layer(f"{block}.attn.proj", dim, dim)
        shapes |= layer(f"{block}.mlp.fc1", 4 * dim, dim) | layer(f"{block}.mlp.fc2", dim, 4 * dim)
        shapes |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
    return shapes


def vqgan_shapes(channels: int, multipliers: list[int], blocks: int, codes: int, code_dim: int) -> Shapes:
    shapes: Shapes = {"encoder.conv_in.weight": (channels, 3, 3, 3), "quantize.embedding.weight": (codes, code_dim)}

    def block(name: str, before: int, width: int) -> None:
        shapes.update(layer(f"{name}.norm1", before) | layer(f"{name}.norm2", width))
        shapes[f"{name}.conv1.weight"], shapes[f"{name}.conv2.weight"] = (width, before, 3, 3), (width, width, 3, 3)
        if before != width:
            shapes[f"{name}.nin_shortcut.weight"] = (width, width, 1, 1)

    widths = [channels * m for m in multipliers]
    before = channels
    for level, width in enumerate(widths):
        for index in range(blocks):
            block(f"encoder.down.{level}.block.{index}", before, width)
            before = width
    last = before
    for side in ("encoder", "decoder"):
        for index in (1, 2):
            block(f"{side}.mid.block_{index}", last, last)
    shapes |= layer("encoder.norm_out", last) | layer("encoder.conv_out", code_dim, last, 1, 1)
    shapes |= layer("decoder.conv_in", last, code_dim, 3, 3)
    for level in reversed(range(len(widths))):
        for index in range(blocks):
            block(f"decoder.up.{level}.block.{index}", before, widths[level])
            before = widths[level]
        if level:
            shapes |= layer(f"decoder.up.{level}.upsample.conv", before, before, 3, 3)
    return shapes | layer("decoder.norm_out", before) | layer("decoder.conv_out", 3, before, 3, 3)


def decoder_shapes(kind: str, dim: int, depth: int, ffn: int, clusters: int, codes: int, classes: int) -> Shapes:
    vocab = (clusters if kind in ("stage1", "probe") else codes) + 5
    rows = vocab + classes + (clusters + 5 if kind in ("ar", "masked") else 0)
    shapes: Shapes = {"version": (1,), "embed_tokens.weight": (rows, dim), "embed_positions.weight": (POSITIONS, dim)}
    shapes["output_projection.weight"] = (vocab, dim)
    if kind in ("ar", "masked"):
        shapes["embed_positions_1.weight"] = (POSITIONS, dim)
    if kind not in ("stage1", "probe"):
        shapes |= layer("layer_norm", dim)
    for block in (f"layers.{n}" for n in range(depth)):
        for x in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= layer(f"{block}.self_attn.{x}", dim, dim)
        shapes |= layer(f"{block}.self_attn_layer_norm", dim) | layer(f"{block}.final_layer_norm", dim)
        shapes |= layer(f"{block}.fc1", ffn, dim) | layer(f"{block}.fc2", dim, ffn)
    return shapes


class Upstream:
    """Builds checkpoints of one family: the frozen parts are the same in all of them, as in the published ones."""

    def __init__(
        self,
        dim: int = 32,
        depth: int = 2,
        heads: int = 4,
        ffn: int = 48,
        clusters: int = 24,
        codes: int = 16,
        vit_dim: int = 64,
        vit_depth: int = 4,
        vqgan: tuple[int, list[int], int, int] = (32, [1, 1, 2, 1, 1], 1, 32),
        seed: int = 0,
    ) -> None:
        self.dim, self.depth, self.heads, self.ffn = dim, depth, heads, ffn
        self.clusters, self.codes = clusters, codes
        channels, multipliers, blocks, code_dim = vqgan
        self.vit = self._random(vit_shapes(vit_dim, vit_depth), seed)
        self.vqgan = self._random(vqgan_shapes(channels, multipliers, blocks, codes, code_dim), seed + 1)
        self.centroids = self._random({"centroids": (clusters, vit_dim)}, seed + 2)["centroids"]

    @staticmethod
    def _random(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.empty(shape).uniform_(-0.05, 0.05, generator=generator) for name, shape in shapes.items()}

    def values(self, kind: str = "stage1", classes: int = 0, seed: int = 7) -> dict[str, Any]:
        shapes = decoder_shapes(kind, self.dim, self.depth, self.ffn, self.clusters, self.codes, classes)
        model = OrderedDict((f"decoder.{name}", value) for name, value in self._random(shapes, seed).items())
        if kind != "vq":
            model["centroids"] = self.centroids.T.contiguous()
            model["centroid_norm"] = self.centroids.square().sum(1)[None]
            model |= {f"pretrained_encoder.{name}": value for name, value in self.vit.items()}
        if kind in ("ar", "masked", "vq"):
            model |= {f"vqgan.{name}": value for name, value in self.vqgan.items()}
        if kind == "probe":
            for n in range(self.depth):
                model[f"linear_classifiers.classifier_{n}_blocks.weight"] = torch.randn(1000, self.dim)
                model[f"linear_classifiers.classifier_{n}_blocks.bias"] = torch.randn(1000)
        settings = {
            "_name": NAMES[kind],
            "activation_fn": "gelu",
            "dropout": 0.1,
            "decoder_layers": self.depth,
            "decoder_attention_heads": self.heads,
            "decoder_normalize_before": kind not in ("stage1", "probe"),
            "decoder_learned_pos": True,
        }
        return {
            "args": None,
            "cfg": {"model": settings, "task": {}, "criterion": {"label_smoothing": 0.1}},
            "model": model,
            "optimizer_history": [{"num_updates": 125000}],
            "last_optimizer_state": {"state": {}, "param_groups": []},
        }

    def save(self, path: Path, kind: str = "stage1", classes: int = 0, seed: int = 7, **changes: Any) -> Path:
        """Write a checkpoint; ``changes`` replace top-level entries."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**self.values(kind, classes, seed), **changes}, path)
        return path


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="session")
def upstream_class() -> type[Upstream]:
    return Upstream
