"""The decoder out of an ``AutoencoderRAE`` of diffusers, for the tokens of an encoder and a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.core.hub import repository_folder, repository_id
from digit.encoders.families import final_norm_name
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.models.codebook import Codebook
from digit.models.component import without_weights
from digit.models.rae import RAEConfig, RAEDecoder

_FACTS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "patch_size", "num_register_tokens")


def convert_rae(source: str | Path, encoder: Any, codebook: Codebook) -> RAEDecoder:
    """The decoder, with the codebook's centroids in the form in which it was trained to read features.

    An RAE leaves the gain and offset of the encoder's final norm out. Both are taken off the centroids here, which is
    exact: a mean of features, less the offset and over the gain, is the mean of features without them.

    Args:
        source: a folder that diffusers saved, or a Hub id such as ``nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08``.
        encoder, codebook: of the tokens; the codebook was fitted on features of the encoder.

    Raises:
        DigitError: nothing there, or it was trained on other features: another network, layer, number of registers,
            size, way to stretch positions or weights. The message names what differs.
    """
    name, path = str(source), Path(source)
    diffusers = require("diffusers", "diffusers", "The decoder of an RAE")
    if not path.is_dir():
        path = repository_folder(repository_id(name, "decoder"))
    try:
        model = diffusers.AutoencoderRAE.from_pretrained(path, local_files_only=True).float()
    except Exception as error:  # diffusers and transformers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DigitError(
            f"diffusers {diffusers.__version__} cannot read {name} as an AutoencoderRAE: {reason}"
        ) from error
    _check_facts(name, model, encoder, codebook)
    if codebook.config.depth > 1:
        raise DigitError(f"The codebook has {codebook.config.depth} tokens a place; an RAE's decoder reads one.")
    norm: Any = encoder.network.get_submodule(final_norm_name(encoder.network))
    gain, offset = norm.weight.cpu(), norm.bias.cpu()
    _check_features(name, model, encoder, gain, offset)
    theirs = model.decoder
    block = theirs.decoder_layers[0]
    config = RAEConfig(
        prefix_vocab_size=codebook.config.clusters,
        feature_dim=codebook.config.dim,
        side=encoder.grid[0],
        patch=theirs.patch_size,
        dim=theirs.decoder_hidden_size,
        depth=len(theirs.decoder_layers),
        heads=block.attention.heads,
        hidden_dim=block.intermediate.dense.out_features,
    )
    with without_weights():
        decoder = RAEDecoder(config)
    decoder.network, decoder.provenance = theirs, {"source": name}
    values = (codebook.centroids.cpu() - offset) / gain, model.encoder_mean.flatten(), model.encoder_std.flatten()
    decoder.features, decoder.mean, decoder.std = map(nn.Parameter, values)
    return decoder.eval().requires_grad_(False)


def _check_facts(name: str, model: Any, encoder: Any, codebook: Codebook) -> None:
    codebook.check_encoder(encoder)
    if not isinstance(encoder, TransformersEncoder):
        raise DigitError(f"{name} reads features of a network of transformers; this is a {type(encoder).__name__}.")
    theirs, mine = model.encoder.config, encoder.config.network_config()
    fitted = codebook.provenance.get("encoder") or {}
    facts = {fact: (getattr(theirs, fact, 0), getattr(mine, fact, 0)) for fact in _FACTS}
    facts["pixels seen"] = (model.config.encoder_input_size, encoder.preprocessing.seen)
    for fact, value in {"layer": -1, "final_norm": True, "positions": "hub"}.items():
        own = getattr(encoder.config, fact)
        facts[fact] = (value, own if own != value else fitted.get(fact, own))
    if differing := [f"{fact} is {one} there and {other} here" for fact, (one, other) in facts.items() if one != other]:
        raise DigitError(
            f"{name} was trained on other features than this encoder and codebook have: {'; '.join(differing)}. Make "
            "the encoder with: digit convert encoder --layer -1 --positions hub; and fit a codebook on it."
        )


def _check_features(name: str, model: Any, encoder: TransformersEncoder, gain: Tensor, offset: Tensor) -> None:
    """On the same images, both encoders must say the same; ``gain`` and ``offset`` (D,) are those of the final norm."""
    size = encoder.preprocessing.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        given = (encoder(images.to(next(encoder.parameters()).device)).cpu() - offset) / gain  # (2, N, D)
        wanted = model._denormalize_latents(model.encode(images, return_dict=False)[0] / model.config.scaling_factor)
    wanted = wanted.flatten(2).transpose(1, 2) if model.reshape_to_2d else wanted  # (2, N, D)
    if not (given - wanted).norm() <= 0.05 * wanted.norm():  # an encoder kept in half precision is within
        raise DigitError(
            f"{name} was trained on features of an encoder of other weights or other preprocessing than this one: "
            f"on the same images they differ by {float((given - wanted).norm() / wanted.norm()):.0%}."
        )
