"""One entrance to sampling tokens: makes each image's random numbers and samples as the model's role needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from digit.models.token_model import TokenModel
from digit.sampling.autoregressive import sample_autoregressive
from digit.sampling.masked import sample_masked
from digit.sampling.request import SamplingParams, check_model
from digit.sampling.rng import uniforms


@torch.inference_mode()
def sample(
    model: TokenModel,
    images: Sequence[int],
    seed: int = 0,
    params: SamplingParams | None = None,
    labels: Tensor | None = None,
    prefix: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callable[..., Any] | None = None,
) -> Tensor:
    """Sample the tokens of some images of a run.

    Args:
        model: its role decides how.
        images: (B,) numbers of the images within the run; with ``seed`` they determine the random numbers.
        seed: of the run.
        params: how to sample.
        labels: (B,) classes in 0..C-1, or -1 for none.
        prefix: (B, P) semantic tokens, for decoders.
        given: tokens to keep: (B, length) with ``mask``; or, for an autoregressive model, (B, n) first tokens.
        mask: (B, length) bool, True where to sample.
        callback: told about every token, see :func:`sample_autoregressive`, or step, see :func:`sample_masked`.

    Returns:
        (B, length) int64 ids on the model's device.

    Raises:
        DigitError: labels out of range, guidance that the model was not trained for.
    """
    params = params or SamplingParams()
    config, device = model.config, model.start.device
    check_model(config, params, labels)
    labels, prefix, given, mask = (None if t is None else t.to(device) for t in (labels, prefix, given, mask))
    masked = config.role == "masked"
    shape = (params.steps, 2, config.length) if masked else (config.length,)
    uniform = uniforms(seed, images, config.role, shape).to(device)
    run = sample_masked if masked else sample_autoregressive
    return run(model, uniform, params, labels, prefix, given, mask, callback)
