"""Original checkpoints of vision transformers, to the names and configs of `transformers`.

All of them share one layout (``patch_embed``, ``blocks.N.attn.qkv``, ``norm``), under different wrappers:

======== ================================================== =========================================
family   published as                                       wrapper
======== ================================================== =========================================
dinov2   facebookresearch/dinov2, with and without          none; training checkpoints "teacher" and
         registers, S/B/L/g                                 ``backbone.``
dino     facebookresearch/dino                              none; "teacher"/"student", ``backbone.``
ibot     bytedance/ibot                                     "state_dict"; "teacher"/"student"
mae      facebookresearch/mae                               "model"
mocov3   facebookresearch/moco-v3                           "state_dict", ``module.base_encoder.``
======== ================================================== =========================================

timm's plain ViTs have it too, up to what :func:`read_timm` puts right.

Sizes are read from the tensors. The number of heads cannot be: see :func:`default_heads`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.convert.keys import Keys, Parts
from digit.convert.stream import Component
from digit.convert.torchfile import read_torch_file
from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.encoders.transformers_encoder import EncoderConfig

FAMILY_NAMES = ("dinov2", "dino", "ibot", "mae", "mocov3")
_ANCHOR = "patch_embed.proj.weight"
_WRAPPERS = ("teacher", "state_dict", "model", "student")
# heads of the self-supervised task, MAE's pixel decoder, mask tokens of plain ViTs: not part of the encoder
_IGNORED = r"(head|fc|fc_norm|decoder_\w+)\..*|(.*decoder_pos_embed|mask_token|masked_embed)"

# name in the file, without .weight and .bias, to its name on the Hub; the same names serve in every block
_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV2 = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def read_backbone(source: str | Path | Mapping[str, Any]) -> tuple[Keys, str]:
    """The backbone's tensors of an original checkpoint (its file, or what that holds), without wrappers and prefixes,
    chunked blocks flattened; and the family they look like. DigitError: damaged, hostile, or no vision transformer; the
    message names the file and the reason.
    """
    where = "the checkpoint" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_torch_file(source)
    if not isinstance(state, Mapping):
        raise DigitError(f"{where} holds a {type(state).__name__}, expected a state dict of an encoder.")
    wrapper = next((name for name in _WRAPPERS if isinstance(state.get(name), Mapping)), "")
    inner: Mapping[str, Any] = state[wrapper] if wrapper else state
    prefixes = [name.removesuffix(_ANCHOR) for name in inner if isinstance(name, str) and name.endswith(_ANCHOR)]
    if not prefixes:
        held = ", ".join(map(str, list(inner)[:5])) or "nothing"
        raise DigitError(
            f"{where} has no vision transformer: no tensor is named '...{_ANCHOR}' (it holds {held}, ...)."
        )
    # MoCo v3's own evaluation reads the base encoder, not its moving average
    prefix = min(prefixes, key=lambda name: ("base_encoder" not in name, len(name)))
    tensors = {
        re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name[len(prefix) :]): value
        for name, value in inner.items()
        if name.startswith(prefix)
    }
    return Keys(tensors, where), _guess_family(tensors, wrapper, prefix)


def read_timm(folder: Path) -> tuple[Keys, str]:
    """As :func:`read_backbone`, of a ViT in a folder that timm saved; the keys of other networks do not fit."""
    state = {
        name.replace("reg_token", "register_tokens"): t
        for name, t in read_tensors(folder / "model.safetensors").items()
    }
    positions = state.get("pos_embed", torch.empty(1, 2, 0))
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # none of the class token
        state["pos_embed"] = F.pad(positions, (0, 0, 1, 0))
    first, second = (state.get(f"blocks.0.mlp.fc{number}.weight", torch.empty(0, 0)) for number in (1, 2))
    if len(first) == 2 * second.shape[1]:  # a gated MLP
        state = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): t for name, t in state.items()}
    keys, family = read_backbone(state)
    keys.where = str(folder)
    return keys, family


def _guess_family(tensors: Mapping[str, Any], wrapper: str, prefix: str) -> str:
    if "blocks.0.ls1.gamma" in tensors or "register_tokens" in tensors:
        return "dinov2"
    if "base_encoder" in prefix or "momentum_encoder" in prefix:
        return "mocov3"
    if wrapper == "model" or any(name.startswith("decoder_") for name in tensors):
        return "mae"
    return "ibot" if wrapper == "state_dict" or "masked_embed" in tensors else "dino"


def encoder_component(keys: Keys, heads: int | None, **fields: Any) -> Component:
    """DINOv2 as DiGIT's authors use it, ready to be written; blocks after the layer are left out. See
    :func:`convert_backbone`; ``fields`` of the config are given where they are not the authors'.
    """
    hf_config, parts, facts = convert_backbone(keys, "dinov2", heads)
    config = EncoderConfig(hf_config=hf_config, **{"positions": "dinov2-offset", **fields})
    behind = tuple(f"encoder.layer.{index}." for index in range(facts["depth"] + config.last + 1, facts["depth"]))
    kept = {name: pieces for name, pieces in parts.items() if not name.startswith(behind)}
    return Component("TransformersEncoder", config, kept, facts, Path(keys.where))


def convert_backbone(keys: Keys, family: str, heads: int | None) -> tuple[dict[str, Any], Parts, dict[str, Any]]:
    """An original state dict as a `transformers` config ("model_type" and fields), tensors by their names on the Hub,
    and facts to keep with the encoder. DigitError: sizes cannot be read, or are not those of the family.

    Args:
        keys: the backbone's tensors. What does not fit is noted there: the caller calls its ``check()``.
        family: one of :data:`FAMILY_NAMES`.
        heads: attention heads; None takes :func:`default_heads`.
    """
    if family not in FAMILY_NAMES:
        raise DigitError(f"family='{family}' was given; known are {', '.join(FAMILY_NAMES)}.")
    dinov2 = "blocks.0.ls1.gamma" in keys  # among these families, LayerScale is DINOv2's alone
    if dinov2 != (family == "dinov2"):
        raise DigitError(
            f"{keys.where}: as family '{family}' it should {'not ' * dinov2}have LayerScale (blocks.0.ls1.gamma)."
        )
    dim, _, patch, _ = keys.shape(_ANCHOR)
    swiglu = "blocks.0.mlp.w3.weight" in keys
    hidden = keys.shape("blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight")[1]
    side = round((keys.shape("pos_embed")[1] - 1) ** 0.5)
    registers = keys.shape("register_tokens")[1] if "register_tokens" in keys else 0
    depth = keys.count(r"blocks\.(\d+)\.")
    bias = "blocks.0.attn.qkv.bias" in keys
    heads = heads or default_heads(family, dim, keys.where)
    if dim % heads:
        raise DigitError(f"heads={heads} does not divide the width {dim} of the encoder in {keys.where}.")
    hf_config: dict[str, Any] = {
        "model_type": "vit",
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": side * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
        "qkv_bias": bias,
        "hidden_act": "gelu",
    }
    if dinov2:  # a gated MLP keeps two thirds of the plain one's width, rounded up to a multiple of 8
        ratio = 4 if swiglu else hidden // dim
        expected = (int(dim * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else dim * ratio
        if hidden != expected:
            raise DigitError(f"{keys.where} is not DINOv2's network: its MLP is {hidden} wide, expected {expected}.")
        hf_config |= {"model_type": "dinov2", "mlp_ratio": ratio, "use_swiglu_ffn": swiglu}
        hf_config |= {"model_type": "dinov2_with_registers", "num_register_tokens": registers} if registers else {}
    else:
        hf_config["intermediate_size"] = hidden
    outer: dict[str, tuple[str, tuple[int, ...]]] = {
        "embeddings.cls_token": ("cls_token", (1, 1, dim)),
        "embeddings.position_embeddings": ("pos_embed", (1, 1 + side**2, dim)),
        "embeddings.patch_embeddings.projection.weight": (_ANCHOR, (dim, 3, patch, patch)),
        "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", (dim,)),
        "layernorm.weight": ("norm.weight", (dim,)),
        "layernorm.bias": ("norm.bias", (dim,)),
        **({"embeddings.register_tokens": ("register_tokens", (1, registers, dim))} if registers else {}),
    }
    parts = {ours: [keys.take(theirs, *shape)] for ours, (theirs, shape) in outer.items()}
    if dinov2:  # only pre-training uses it; some files leave it out
        mask = keys.take("mask_token", 1, dim) if "mask_token" in keys else torch.zeros(1, dim)
        parts["embeddings.mask_token"] = [mask]
    for index in range(depth):
        block = _block(keys.under(f"blocks.{index}."), dim, hidden, dinov2, swiglu, bias)
        parts |= {f"encoder.layer.{index}.{name}": [value] for name, value in block.items()}
    keys.ignore(_IGNORED)
    facts = {"family": family, "dim": dim, "depth": depth, "heads": heads, "patch": patch, "registers": registers}
    return hf_config, parts, facts


def default_heads(family: str, dim: int, where: str) -> int:
    """Heads of the published network of this width: width / 64, but for MoCo v3's ViT-S and for So400m, H, g and G.
    DigitError: the width is not a multiple of 64; heads must then be given.
    """
    if dim in (1152, 1280, 1408, 1664):
        return 16
    if (family, dim) == ("mocov3", 384):
        return 12
    if dim % 64:
        raise DigitError(
            f"The number of heads of the encoder in {where}, of width {dim}, is not known and not in its tensors; "
            "give heads= (--heads)."
        )
    return dim // 64


def _block(keys: Keys, dim: int, hidden: int, dinov2: bool, swiglu: bool, bias: bool) -> dict[str, Tensor]:
    """One block's tensors by their names on the Hub. Query, key and value are views of the fused tensor."""
    plain = {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    inner = {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)} if swiglu else plain
    block: dict[str, Tensor] = {}
    for name, shape in {"norm1": (dim,), "norm2": (dim,), "attn.proj": (dim, dim), **inner}.items():
        ours = (_DINOV2 if dinov2 else _VIT)[name]
        block[f"{ours}.weight"] = keys.take(f"{name}.weight", *shape)
        block[f"{ours}.bias"] = keys.take(f"{name}.bias", shape[0])
    for kind, shape in {"weight": (3 * dim, dim), **({"bias": (3 * dim,)} if bias else {})}.items():
        fused = keys.take(f"attn.qkv.{kind}", *shape)
        for part, chunk in zip(("query", "key", "value"), fused.chunk(3), strict=True):
            block[f"attention.attention.{part}.{kind}"] = chunk
    for index in (1, 2) if dinov2 else ():
        block[f"layer_scale{index}.lambda1"] = keys.take(f"ls{index}.gamma", dim)
    return block
