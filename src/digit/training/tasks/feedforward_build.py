"""From a one-pass preset, a dataset and a model to the task that trains a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.token_cache import TokenCache, open_token_cache
from digit.models.component import load_strict, weights_checksum
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokenizer import SemanticTokenizer
from digit.pipeline.tokens import load_tokens_file
from digit.training.auxiliary import set_embeddings
from digit.training.finetune import FineTune, start_folder, take_modules
from digit.training.tasks.feedforward import OnePassData, OnePassObjective, OnePassTask
from digit.training.tasks.images import image_chunks, open_images


def build(
    preset: Mapping[str, Any],
    data: str | Path,
    where: str,
    parts: DigitPipeline | None,
    start: FineTune | None = None,
) -> OnePassTask:
    """The task of a one-pass preset over a dataset, with random weights from torch's global generator or those of a
    saved decoder.

    Args:
        preset: its sections.
        data: the dataset.
        where: the preset's name, for messages.
        parts: a model with encoder and codebook, and with a VQGAN for the head "vq".
        start: the saved one-pass decoder to begin with.

    Raises:
        DigitError: a section is wrong or does not fit the model, or the dataset cannot be opened.
    """
    if parts is None or parts.encoder is None or parts.codebook is None:
        raise DigitError(
            "A one-pass decoder is trained on images and their semantic tokens: give the model whose encoder and codebook make them "
            "with --model, and a dataset (not a token cache) with --data."
        )
    tokenizer = parts.tokenizer
    objective: OnePassObjective = from_dict(OnePassObjective, preset.get("objective") or {}, f"{where}, objective")
    choice: OnePassData = from_dict(OnePassData, preset.get("data") or {}, f"{where}, data")
    train, held_out = open_images(data, choice.split, choice.held_out_split, choice.held_out)
    shape = _shape(preset["model"], tokenizer, parts.vqgan, train if choice.labels else None, f"{where}, model")
    model, origin = FeedForwardDecoder(shape), dict[str, Any]()
    if start is not None:
        model, origin = _start(start, shape)
    elif objective.centroid_embeddings:
        set_embeddings(model.token_embedding, tokenizer.codebook.centroids)
    cache = None if choice.tokens is None else _open_cache(choice.tokens, data, choice.split, tokenizer)
    samples = None if choice.samples is None else _open_samples(choice.samples, tokenizer)
    vqgan = None if parts.vqgan is None or shape.head == "pixels" else parts.vqgan.requires_grad_(False)
    task = OnePassTask(model, objective, tokenizer, train, held_out, choice, cache, samples, vqgan, origin)
    if start is not None:
        # a decoder gives its noise a meaning; a posterior that begins anew would not know it
        take_modules(task.modules, start.source, ("posterior", "discriminator"))
    return task


def _shape(
    values: Mapping[str, Any],
    tokenizer: SemanticTokenizer,
    vqgan: VQGAN | None,
    labelled: ImageDataset | None,
    where: str,
) -> FeedForwardConfig:
    """The config: what ``values`` leaves out comes from the tokenizer, the VQGAN and the classes."""
    known: dict[str, Any] = {"prefix_vocab_size": tokenizer.vocab_size, "grid": list(tokenizer.grid), "num_classes": 0}
    if labelled is not None:
        if int(labelled.labels.min()) < 0:
            raise DigitError(
                f"{where} asks for class labels, but images of {labelled.name} {labelled.split} have none."
            )
        known["num_classes"] = max(len(labelled.classes), int(labelled.labels.max()) + 1)
    if values.get("head") == "vq" and vqgan is not None:
        if vqgan.config.grid != tokenizer.grid:
            raise DigitError(
                f"The head 'vq' gives one VQ token for each semantic token, but the VQGAN has {vqgan.config.grid} of them and the "
                f"tokenizer {tokenizer.grid}; use the head 'pixels'."
            )
        known["vocab_size"] = vqgan.config.codes
    wrong = [
        f"{name} = {values[name]} (here: {value})" for name, value in known.items() if values.get(name, value) != value
    ]
    if wrong:
        raise DigitError(f"{where} does not fit the tokenizer or the data: {', '.join(wrong)}. Leave these fields out.")
    return from_dict(FeedForwardConfig, {**values, **known}, where)


def _start(start: FineTune, shape: FeedForwardConfig) -> tuple[FeedForwardDecoder, dict[str, Any]]:
    """A saved decoder, ready to be trained on, and what to note about it."""
    if start.freeze or start.lora:
        raise DigitError("--freeze and --lora are for token models; a one-pass decoder is trained as a whole.")
    folder, _ = start_folder(start.source, "onepass")
    saved = FeedForwardDecoder.from_pretrained(folder)
    if replace(saved.config, class_dropout=shape.class_dropout, transformer=shape.transformer) != shape:
        raise DigitError(
            f"{start.source} is a decoder of another shape or other tokens than the preset and the model describe."
        )
    model = FeedForwardDecoder(shape)
    load_strict(model, saved.state_dict(), start.source)
    return model.requires_grad_(True), {"weights": weights_checksum(saved)}


def _open_cache(folder: str, data: str | Path, split: str, tokenizer: SemanticTokenizer) -> TokenCache:
    """The cache of a dataset's tokens, seen to be of this dataset and this tokenizer."""
    cache, dataset = open_token_cache(folder), open_dataset(data, split)
    if cache.info["source"]["fingerprint"] != dataset.fingerprint:
        raise DigitError(
            f"The tokens in {folder} are of another dataset than {data} {split}: leave data.tokens out, or make them anew."
        )
    if not {"center", "flip"} <= set(cache.views):
        raise DigitError(
            f"The cache {folder} has the views {', '.join(cache.views)}; a one-pass decoder needs center and flip."
        )
    images = next(image_chunks(dataset.subset(range(min(16, len(dataset)))), tokenizer.image_size, "cpu"))
    stored = cache.tokens("semantic", np.arange(len(images)), cache.views.index("center"))  # (b, N)
    if (
        stored.shape != (len(images), tokenizer.num_tokens)
        or float((tokenizer.encode(images) == stored).float().mean()) < 0.9
    ):
        raise DigitError(f"The tokens in {folder} were made with another encoder or codebook than those of --model.")
    return cache


def _open_samples(path: str, tokenizer: SemanticTokenizer) -> Tensor:
    """Tokens (n, N) of the prior."""
    tokens = load_tokens_file(path).semantic
    if (
        tokens is None
        or tokens.ndim != 2
        or tokens.shape[1] != tokenizer.num_tokens
        or int(tokens.max()) >= tokenizer.vocab_size
    ):
        found = "none" if tokens is None else f"{tuple(tokens.shape)} up to {int(tokens.max())}"
        raise DigitError(
            f"data.samples = {path} should hold semantic tokens (n, {tokenizer.num_tokens}) below {tokenizer.vocab_size}; it has: {found}."
        )
    return tokens
