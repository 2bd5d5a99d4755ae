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

Sizes are read from the tensors. The number of heads cannot be: see :func:`default_heads`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from digit.convert.torchfile import read_torch_file
from digit.encoders.base import Preprocessing
from digit.encoders.transformers_encoder import EncoderConfig, TransformersEncoder
from digit.errors import DigitError
from digit.files import sha256_of

FAMILY_NAMES = ("dinov2", "dino", "ibot", "mae", "mocov3")
_ANCHOR = "patch_embed.proj.weight"
_WRAPPERS = ("teacher", "state_dict", "model", "student")
# heads of the self-supervised task, MAE's pixel decoder, mask tokens of plain ViTs: not part of the encoder
_IGNORED = re.compile(r"(head|fc|fc_norm|decoder_\w+)\.|decoder_pos_embed$|mask_token$|masked_embed$")

_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
_BLOCK_VIT = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_BLOCK_DINOV2 = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.proj.": "attention.output.dense.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
    "mlp.w12.": "mlp.weights_in.",
    "mlp.w3.": "mlp.weights_out.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


@dataclass(frozen=True)
class EncoderFacts:
    """What a checkpoint turned out to be.

    Attributes:
        family: one of :data:`FAMILY_NAMES`.
        dim, depth, heads, patch, registers: of the network.
        options: fields of an encoder config that follow the family's original code.
        provenance: the same facts, to be kept with the encoder.
    """

    family: str
    dim: int
    depth: int
    heads: int
    patch: int
    registers: int
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def read_encoder_file(
    path: str | Path, family: str | None = None, heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], EncoderFacts]:
    """Read an original checkpoint file; arguments and result as :func:`convert_encoder_state`.

    Raises:
        DigitError: damaged, hostile, or not an encoder of these families; the message names the file and the reason.
    """
    try:
        hf_config, tensors, facts = convert_encoder_state(read_torch_file(path), family, heads)
    except DigitError as error:
        text = str(error)
        raise error if str(path) in text else DigitError(f"{path}: {text}") from error
    facts.provenance["sha256"] = sha256_of(path)
    return hf_config, tensors, facts


def convert_encoder_state(
    state: Mapping[str, Any], family: str | None = None, heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], EncoderFacts]:
    """An original state dict to a `transformers` config and tensors by their names on the hub.

    Args:
        state: what the file holds, wrappers and all.
        family: one of :data:`FAMILY_NAMES`; None tells it from the tensors' names.
        heads: attention heads; None takes :func:`default_heads`.

    Returns:
        the config ("model_type" and fields), the tensors (views of the given ones, nothing is copied), and the facts.

    Raises:
        DigitError: not such a state dict, or tensors are missing, extra or of another shape: each is named.
    """
    if family is not None and family not in FAMILY_NAMES:
        raise DigitError(f"family='{family}' was given; known are {', '.join(FAMILY_NAMES)}.")
    tensors, guess = _backbone(state)
    family = family or guess
    sizes = _Sizes.read(tensors)
    if sizes.dinov2 != (family == "dinov2"):
        raise DigitError(
            f"family='{family}' was given, but the tensors {'have' if sizes.dinov2 else 'lack'} DINOv2's LayerScale."
        )
    _check(tensors, sizes.expected())
    heads = heads or default_heads(family, sizes.dim)
    if sizes.dim % heads:
        raise DigitError(f"heads={heads} does not divide the width {sizes.dim} of this encoder.")
    hf_config = _config(sizes, heads)
    # DINOv2's own code stretches positions by side + 0.1 without registers, and plainly with antialiasing with them
    options = {"positions": "dinov2-offset"} if family == "dinov2" and not sizes.registers else {}
    facts = EncoderFacts(family, sizes.dim, sizes.depth, heads, sizes.patch, sizes.registers, options)
    facts.provenance.update(family=family, dim=sizes.dim, depth=sizes.depth, heads=heads, patch=sizes.patch)
    return hf_config, _rename(tensors, sizes), facts


def encoder_from_dinov2(
    state: Mapping[str, Any],
    heads: int | None = None,
    layer: int = -3,
    positions: Literal["hub", "dinov2-offset"] = "dinov2-offset",
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> TransformersEncoder:
    """The frozen encoder in a DINOv2 state dict, as DiGIT's authors use it.

    Args:
        state: the tensors, with any common prefix such as ``pretrained_encoder.``.
        heads: attention heads; None takes width / 64, as every published DINOv2 has.
        layer: which block's output, from the end.
        positions: the authors use "dinov2-offset" with registers too.
        preprocessing: None is the paper's: 256 in, 224 seen.
        provenance: kept with the encoder.
    """
    hf_config, tensors, facts = convert_encoder_state(state, "dinov2", heads)
    config = EncoderConfig(
        hf_config=hf_config, layer=layer, positions=positions, preprocessing=preprocessing or Preprocessing(resize=224)
    )
    return TransformersEncoder.from_weights(config, tensors, "the encoder", {**facts.provenance, **(provenance or {})})


def default_heads(family: str, dim: int) -> int:
    """Heads of the published network of this width: width / 64, but for MAE-Huge and MoCo v3's ViT-S.

    Raises:
        DigitError: the width is not a multiple of 64; heads must then be given.
    """
    published = {("mae", 1280): 16, ("mocov3", 384): 12}
    if (family, dim) in published:
        return published[family, dim]
    if dim % 64:
        raise DigitError(f"The number of heads of an encoder of width {dim} is not known and not in its tensors; give heads=.")
    return dim // 64


def _backbone(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The backbone's tensors without wrappers and prefixes, chunked blocks flattened; and the family they look like."""
    wrapper = next((name for name in _WRAPPERS if isinstance(state.get(name), Mapping)), "")
    inner: Mapping[str, Any] = state[wrapper] if wrapper else state
    prefixes = [name.removesuffix(_ANCHOR) for name in inner if isinstance(name, str) and name.endswith(_ANCHOR)]
    if not prefixes:
        held = ", ".join(map(str, list(inner)[:5])) or "nothing"
        raise DigitError(f"There is no vision transformer in it: no tensor is named '...{_ANCHOR}' (it holds {held}, ...).")
    # MoCo v3's own evaluation reads the base encoder, not its moving average
    prefix = min(prefixes, key=lambda name: ("base_encoder" not in name, len(name)))
    tensors = {
        re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name[len(prefix) :]): value
        for name, value in inner.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    return tensors, _guess_family(tensors, wrapper, prefix)


def _guess_family(tensors: Mapping[str, Tensor], wrapper: str, prefix: str) -> str:
    if "register_tokens" in tensors or any(name.endswith(("ls1.gamma", "mlp.w12.weight")) for name in tensors):
        return "dinov2"
    if "base_encoder" in prefix or "momentum_encoder" in prefix:
        return "mocov3"
    if wrapper == "model" or any(name.startswith("decoder_") for name in tensors):
        return "mae"
    return "ibot" if wrapper == "state_dict" or "masked_embed" in tensors else "dino"


@dataclass(frozen=True)
class _Sizes:
    """Sizes read from a backbone's tensors, in the original names."""

    dim: int
    depth: int
    patch: int
    positions: int  # side of the position table
    hidden: int  # width inside the MLP
    registers: int
    swiglu: bool
    dinov2: bool  # has LayerScale, as among these families DINOv2 alone does
    bias: bool  # of the fused query, key, value projection

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> _Sizes:
        swiglu = "blocks.0.mlp.w3.weight" in tensors
        needed = ["pos_embed", "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"]
        if absent := [name for name in needed if name not in tensors]:
            raise DigitError(f"The sizes of this encoder cannot be told: missing {', '.join(absent)}.")
        side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        blocks = [int(match.group(1)) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
        return cls(
            dim=tensors[_ANCHOR].shape[0],
            depth=1 + max(blocks),
            patch=tensors[_ANCHOR].shape[-1],
            positions=side,
            hidden=tensors[needed[1]].shape[1],
            registers=tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0,
            swiglu=swiglu,
            dinov2="blocks.0.ls1.gamma" in tensors,
            bias="blocks.0.attn.qkv.bias" in tensors,
        )

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the network needs, with its shape."""
        d, h = self.dim, self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, d),
            "pos_embed": (1, 1 + self.positions**2, d),
            _ANCHOR: (d, 3, self.patch, self.patch),
            "patch_embed.proj.bias": (d,),
            **_affine("norm", d),
        }
        if self.registers:
            shapes["register_tokens"] = (1, self.registers, d)
        for index in range(self.depth):
            block = {
                **_affine("norm1", d),
                **_affine("norm2", d),
                **_affine("attn.proj", d, d),
                **_affine("attn.qkv", 3 * d, d),
            }
            if not self.bias:
                del block["attn.qkv.bias"]
            if self.swiglu:
                block |= {**_affine("mlp.w12", 2 * h, d), **_affine("mlp.w3", d, h)}
            else:
                block |= {**_affine("mlp.fc1", h, d), **_affine("mlp.fc2", d, h)}
            if self.dinov2:
                block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
            shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
        return shapes


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in expected and not _IGNORED.match(name)]
    problems += [
        f"wrong shape: {name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise DigitError(f"This is not a complete vision transformer of a known layout: {shown}.")


def _config(sizes: _Sizes, heads: int) -> dict[str, Any]:
    common = {
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": heads,
        "image_size": sizes.positions * sizes.patch,
        "patch_size": sizes.patch,
        "layer_norm_eps": 1e-6,
        "qkv_bias": sizes.bias,
        "hidden_act": "gelu",
    }
    if not sizes.dinov2:
        return {"model_type": "vit", **common, "intermediate_size": sizes.hidden}
    # a gated MLP keeps two thirds of the plain one's width, rounded up to a multiple of 8
    ratio = 4 if sizes.swiglu else sizes.hidden // sizes.dim
    hidden = (int(sizes.dim * ratio * 2 / 3) + 7) // 8 * 8 if sizes.swiglu else sizes.dim * ratio
    if hidden != sizes.hidden:
        raise DigitError(f"This is not DINOv2's network: its MLP is {sizes.hidden} wide, expected {hidden}.")
    name = "dinov2_with_registers" if sizes.registers else "dinov2"
    extra = {"num_register_tokens": sizes.registers} if sizes.registers else {}
    return {"model_type": name, **common, "mlp_ratio": ratio, "use_swiglu_ffn": sizes.swiglu, **extra}


def _rename(tensors: Mapping[str, Tensor], sizes: _Sizes) -> dict[str, Tensor]:
    """The needed tensors by their names on the hub. Query, key and value are views of the fused tensor."""
    renamed: dict[str, Tensor] = {}
    for name in sizes.expected():
        value = tensors[name]
        if not name.startswith("blocks."):
            renamed[_translate(name, _TOP)] = value
            continue
        _, index, rest = name.split(".", 2)
        block = f"encoder.layer.{index}."
        if rest.startswith("attn.qkv."):
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{block}attention.attention.{part}.{rest.rpartition('.')[2]}"] = chunk
        else:
            renamed[block + _translate(rest, _BLOCK_DINOV2 if sizes.dinov2 else _BLOCK_VIT)] = value
    if sizes.dinov2:  # only pre-training uses it; some files leave it out
        token = tensors.get("mask_token")
        renamed[_TOP["mask_token"]] = torch.zeros(1, sizes.dim) if token is None else token.view(1, sizes.dim)
    return renamed


def _translate(name: str, table: Mapping[str, str]) -> str:
    start = next(key for key in table if name.startswith(key))
    return table[start] + name[len(start) :]
