"""Learning rate schedules: a linear warm-up, then inverse square root, cosine or nothing."""

from __future__ import annotations

import math

from digit.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """The learning rate of a step.

    The inverse square root is fairseq's, as the paper used it (section 4): ``warmup_from`` at step 0, ``lr`` at step
    ``warmup_steps``, then ``lr * sqrt(warmup_steps / step)``.

    Args:
        config: the schedule and its numbers.
        step: number of the step, from 0.
        total: steps of the run; only the cosine needs it.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.warmup_from + (config.lr - config.warmup_from) * step / warmup
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(warmup / step)
    if config.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
