"""One door for every encoder: our folder, a `transformers` folder, an original checkpoint file, or a Hub id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from digit.core.errors import DigitError
from digit.core.files import read_json, sha256_of
from digit.core.hub import repository_folder, repository_id
from digit.encoders.base import Combine, Preprocessing
from digit.encoders.conv import ConvEncoder, ConvEncoderConfig
from digit.encoders.families import FAMILIES, network_config, patch_side, plain_config
from digit.encoders.transformers_encoder import EncoderConfig, TransformersEncoder
from digit.models.codebook import Positions


def load_encoder(
    source: str | Path,
    *,
    layer: int | None = None,
    layers: tuple[int, ...] | None = None,
    combine: Combine | None = None,
    final_norm: bool | None = None,
    positions: Positions | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    family: str | None = None,
    heads: int | None = None,
) -> TransformersEncoder | ConvEncoder:
    """Load a frozen encoder, in float32 and eval mode.

    A foreign network takes the paper's choices where nothing is said: ``layer=-3`` with the final norm, images of 256
    seen at 224, and for DINOv2, with registers or without, ``positions="dinov2-offset"``. With ``image_size`` but no
    ``resize``, it sees the largest multiple of its patch that is not above ``image_size``. One of our own folders keeps
    what it was saved with.

    Args:
        source: a folder of ours, a folder that transformers saved, an original checkpoint file (DINOv2, DINO, iBOT,
            MAE, MoCo v3), a folder of one of timm's plain ViTs, or a Hub id: ``facebook/dinov2-with-registers-base``,
            ``timm/vit_base_patch14_dinov2.lvd142m``.
        layer, layers, combine, final_norm, positions: see :class:`~digit.encoders.transformers_encoder.EncoderConfig`.
        image_size, resize: see :class:`~digit.encoders.base.Preprocessing`.
        family: of an original checkpoint file, where its tensors do not tell; see :mod:`digit.convert.encoders`.
        heads: attention heads of an original checkpoint file; None: its width / 64, as all published ones have.

    Raises:
        DigitError: nothing was found (the message says where it looked), or what was found does not fit.
    """
    options: dict[str, Any] = {"layer": layer, "layers": layers, "combine": combine}
    options |= {"final_norm": final_norm, "positions": positions}
    options = {name: value for name, value in options.items() if value is not None}
    path = Path(source)
    if not path.exists():
        path = repository_folder(repository_id(str(source), "encoder"))
    described = path / "config.json"
    timm = read_json(described) if described.is_file() else {}
    if path.is_file() or "architecture" in timm:
        from digit.convert.encoders import convert_backbone, read_backbone, read_timm

        keys, guess = read_backbone(path) if path.is_file() else read_timm(path)
        hf_config, parts, facts = convert_backbone(keys, family or guess, heads)
        keys.check()
        config = _foreign_config(hf_config, timm.get("pretrained_cfg") or {}, image_size, resize, options)
        tensors = {name: pieces[0] for name, pieces in parts.items()}
        name, file = (path.name, path) if path.is_file() else (str(source), path / "model.safetensors")
        provenance = {"source": name, **facts, "sha256": sha256_of(file)}
        return TransformersEncoder.from_weights(config, tensors, str(path), provenance)
    return _load_folder(path, str(source), options, image_size, resize)


def _load_folder(
    folder: Path, name: str, options: dict[str, Any], image_size: int | None, resize: int | None
) -> TransformersEncoder | ConvEncoder:
    if not (folder / "config.json").is_file():
        raise DigitError(f"{folder} is not an encoder: it has no config.json.")
    values = read_json(folder / "config.json")
    kind = values.get("type")
    if kind == "ConvEncoder":
        if image_size or resize or not options.keys() <= {"layer", "layers", "combine"}:
            raise DigitError(
                f"{name} is a convolutional encoder: all but its layers is fixed; leave those options out."
            )
        if "layer" in options:
            options["layers"] = (options.pop("layer"),)
        return ConvEncoder.from_pretrained(folder).taking(**options)
    if kind == "TransformersEncoder":
        if image_size or resize:
            before = Preprocessing(**values["config"]["preprocessing"])
            size = image_size or before.image_size
            seen = resize or (_tiled(size, values["config"]["hf_config"]) if image_size else before.resize)
            options["preprocessing"] = dataclasses.replace(before, image_size=size, resize=seen)
        return TransformersEncoder.from_pretrained(folder, **options)
    if "model_type" not in values:
        raise DigitError(
            f"{folder / 'config.json'} describes no encoder: it has neither our 'type' nor a 'model_type'."
        )
    pixels = folder / "preprocessor_config.json"
    saved = read_json(pixels) if pixels.is_file() else {}
    given = {"mean": saved.get("image_mean"), "std": saved.get("image_std")}
    config = _foreign_config(plain_config(values, name), given, image_size, resize, options)
    return TransformersEncoder.from_weights(config, folder, name, {"source": name})


def _foreign_config(
    hf_config: dict[str, Any],
    pixels: dict[str, Any],
    image_size: int | None,
    resize: int | None,
    options: dict[str, Any],
) -> EncoderConfig:
    family = FAMILIES[hf_config["model_type"]]
    mean, std = tuple(pixels.get("mean") or family.mean), tuple(pixels.get("std") or family.std)
    if resize is None:
        resize = _tiled(image_size, hf_config) if image_size else 224
    if hf_config["model_type"].startswith("dinov2"):
        options = {"positions": "dinov2-offset", **options}
    preprocessing = Preprocessing(image_size=image_size or 256, resize=resize, mean=mean, std=std)
    return EncoderConfig(hf_config=hf_config, preprocessing=preprocessing, **options)


def _tiled(size: int, hf_config: dict[str, Any]) -> int:
    """The largest side not above ``size`` that whole patches tile."""
    patch = patch_side(network_config(hf_config))
    if size < patch:
        raise DigitError(f"image_size={size} is smaller than one patch of this network, {patch} pixels.")
    return size // patch * patch


def small_vit(
    image_size: int = 32, patch: int = 4, dim: int = 192, depth: int = 6, heads: int = 3
) -> TransformersEncoder:
    """A DINOv2 network of random weights for small images, with all its blocks and ready to train."""
    hf_config = {
        "model_type": "dinov2",
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch,
    }
    preprocessing = Preprocessing(image_size=image_size)
    return TransformersEncoder(EncoderConfig(hf_config=hf_config, layer=-1, preprocessing=preprocessing))


def small_conv(image_size: int = 32, **shape: Any) -> ConvEncoder:
    """A convolutional encoder of random weights (32 px to 8 x 8), ready to train; ``shape`` are fields of its
    config.
    """
    return ConvEncoder(ConvEncoderConfig(preprocessing=Preprocessing(image_size=image_size), **shape))
