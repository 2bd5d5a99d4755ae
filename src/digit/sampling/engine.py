"""One entrance to sampling: checks what was asked, makes each image's random numbers, and calls the engine of the
model's role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.models.feedforward import OnePassDecoder, StageTwo
from digit.sampling.autoregressive import sample_autoregressive
from digit.sampling.feedforward import noise, sample_onepass
from digit.sampling.masked import sample_masked
from digit.sampling.rng import uniforms
from digit.sampling.settings import SamplingSettings


@torch.inference_mode()
def sample(
    model: StageTwo,
    images: Sequence[int],
    seed: int = 0,
    settings: SamplingSettings | None = None,
    labels: Tensor | None = None,
    prefix: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callable[..., Any] | None = None,
) -> Tensor:
    """Sample the tokens of some images of a run.

    Args:
        model: any token model, or a one-pass decoder that gives VQ tokens; its role decides how.
        images: (B,) numbers of the images within the run; with ``seed`` they determine the random numbers.
        seed: of the run.
        settings: see :class:`SamplingSettings`.
        labels: (B,) classes in 0..C-1, or -1 for none.
        prefix: (B, P) semantic tokens, for decoders.
        given: tokens to keep: (B, length) with ``mask``; or, for an autoregressive model, (B, n) first tokens.
        mask: (B, length) bool, True where to sample.
        callback: told about every token or step; see the engines.

    Returns:
        (B, length) int64 ids on the model's device.

    Raises:
        DigitError: labels out of range, guidance that the model was not trained for.
    """
    settings = settings or SamplingSettings()
    config, device = model.config, model.start.device
    check_request(model, settings, labels)
    labels, prefix, given, mask = (None if t is None else t.to(device) for t in (labels, prefix, given, mask))
    if isinstance(model, OnePassDecoder):
        if prefix is None or model.config.head != "vq":
            raise DigitError(
                "Only a one-pass decoder with the head 'vq' gives tokens, and it needs semantic tokens to start from."
            )
        # the noise takes the numbers of the stage; the draw of the tokens has its own
        uniform = uniforms(seed, images, "onepass-tokens", (config.length,)).to(device)
        own = noise(model.config, images, seed)
        tokens = sample_onepass(model, uniform, own, settings, prefix, labels, given, mask)
        if callback is not None:
            callback(config.length, tokens)
        return tokens
    if config.role == "masked":
        shape: tuple[int, ...] = (settings.steps, 2, config.length)
        uniform = uniforms(seed, images, config.role, shape).to(device)
        return sample_masked(model, uniform, settings, labels, prefix, given, mask, callback)
    uniform = uniforms(seed, images, config.role, (config.length,)).to(device)
    return sample_autoregressive(model, uniform, settings, labels, prefix, given, mask, callback)


def check_request(model: StageTwo, settings: SamplingSettings, labels: Tensor | None) -> None:
    """Refuse labels that the model does not know and guidance that it was not trained for, before anything is
    sampled.
    """
    config = model.config
    if labels is not None and bool(((labels >= config.num_classes) | (labels < -1)).any()):
        bad = next(int(x) for x in labels if x >= config.num_classes or x < -1)
        raise DigitError(
            f"The label {bad} was given; this model knows 0 to {config.num_classes - 1}."
            if config.num_classes
            else f"The label {bad} was given, but this model is unconditional; leave labels out."
        )
    if settings.cfg_scale != 1:
        if not config.can_guide:
            reason = "has no classes" if not config.num_classes else "was trained without label dropout"
            raise DigitError(
                f"cfg_scale {settings.cfg_scale} was given, but this model {reason}; guidance needs both. Use 1."
            )
        if labels is None:
            raise DigitError(f"cfg_scale {settings.cfg_scale} needs class labels; give --labels, or use a scale of 1.")
