"""Checkpoints of the DiGIT authors' layout with random weights, of any size."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

POSITIONS = 1026
NAMES = {"stage1": "stlm", "ar": "st2vtlm", "masked": "st2vtlm_nar", "vq": "st2vtlm_vq", "probe": "stlm_linearprobe"}


def vit_shapes(dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1370, dim),
        "register_tokens": (1, 4, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, 14, 14),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for n in range(depth):
        for name, shape in {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "ls1.gamma": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim),
            "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim),
            "mlp.fc2.bias": (dim,),
            "ls2.gamma": (dim,),
        }.items():
            shapes[f"blocks.{n}.{name}"] = shape
    return shapes


def vqgan_shapes(
    channels: int, multipliers: list[int], blocks: int, codes: int, code_dim: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv_in.weight": (channels, 3, 3, 3),
        "quantize.embedding.weight": (codes, code_dim),
    }

    def block(name: str, before: int, width: int) -> None:
        for kind in ("weight", "bias"):
            shapes[f"{name}.norm1.{kind}"], shapes[f"{name}.norm2.{kind}"] = (before,), (width,)
        shapes[f"{name}.conv1.weight"], shapes[f"{name}.conv2.weight"] = (width, before, 3, 3), (width, width, 3, 3)
        if before != width:
            shapes[f"{name}.nin_shortcut.weight"] = (width, width, 1, 1)

    def conv(name: str, before: int, width: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width, before, kernel, kernel), (width,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

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
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", last, code_dim, 1)
    conv("decoder.conv_in", code_dim, last, 3)
    for level in reversed(range(len(widths))):
        for index in range(blocks):
            block(f"decoder.up.{level}.block.{index}", before, widths[level])
            before = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", before, before, 3)
    norm("decoder.norm_out", before)
    conv("decoder.conv_out", before, 3, 3)
    return shapes


def decoder_shapes(
    kind: str, dim: int, depth: int, ffn: int, clusters: int, codes: int, classes: int
) -> dict[str, Any]:
    vocab = (clusters if kind in ("stage1", "probe") else codes) + 5
    rows = vocab + classes + (clusters + 5 if kind in ("ar", "masked") else 0)
    shapes: dict[str, tuple[int, ...]] = {
        "version": (1,),
        "embed_tokens.weight": (rows, dim),
        "embed_positions.weight": (POSITIONS, dim),
        "output_projection.weight": (vocab, dim),
    }
    if kind in ("ar", "masked"):
        shapes["embed_positions_1.weight"] = (POSITIONS, dim)
    if kind not in ("stage1", "probe"):
        shapes |= {"layer_norm.weight": (dim,), "layer_norm.bias": (dim,)}
    for n in range(depth):
        for x in "kvq":
            shapes[f"layers.{n}.self_attn.{x}_proj.weight"] = (dim, dim)
            shapes[f"layers.{n}.self_attn.{x}_proj.bias"] = (dim,)
        shapes[f"layers.{n}.self_attn.out_proj.weight"] = (dim, dim)
        shapes[f"layers.{n}.self_attn.out_proj.bias"] = (dim,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{n}.{norm}.weight"] = shapes[f"layers.{n}.{norm}.bias"] = (dim,)
        shapes[f"layers.{n}.fc1.weight"], shapes[f"layers.{n}.fc1.bias"] = (ffn, dim), (ffn,)
        shapes[f"layers.{n}.fc2.weight"], shapes[f"layers.{n}.fc2.bias"] = (dim, ffn), (dim,)
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
    def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
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


@pytest.fixture
def upstream_class() -> type[Upstream]:
    return Upstream
