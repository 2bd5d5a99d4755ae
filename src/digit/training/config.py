"""How a component is trained: the ``training`` section of a preset, and its learning rate."""

from __future__ import annotations

import math
from typing import Literal

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, config


@config
class TrainingConfig:
    """Everything about a run that is not the model or the data; ``presets/bases/training.yaml`` explains each field.

    The defaults are the paper's stage 1 (section 4; DAMO-NLP-SG/DiGIT at cd6d8ca, config/stage1), except for the
    length. A run keeps the ``precision`` that "auto" chose at its beginning. Patience goes by the validation "nll" of
    token models, and exports the best weights. The z-loss is PaLM's (arXiv 2204.02311, sec. 5). ``accelerate launch
    --use_fsdp`` sets ``shard`` too. The end of a run always validates and leaves a checkpoint.
    """

    steps: PositiveInt | None = None
    epochs: Positive | None = None
    batch_size: PositiveInt
    accumulation: PositiveInt = 1
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"
    lr: Positive = 3e-4
    betas: tuple[Probability, Probability] = (0.9, 0.98)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    fused: bool | None = None
    schedule: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    warmup_steps: NonNegativeInt = 6250
    warmup_from: NonNegative = 1e-7
    final_lr: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    ema_decay: Probability = 0.0
    patience: NonNegativeInt = 0
    max_spike: NonNegative = 0.0
    z_loss: NonNegative = 0.0
    compile: bool = False
    shard: bool = False
    gradient_checkpointing: bool = False
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 50
    validate_every: NonNegativeInt = 1000
    checkpoint_every: NonNegativeInt = 1000
    sample_every: NonNegativeInt = 0
    keep_checkpoints: PositiveInt = 3
    workers: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError("schedule 'inverse_sqrt' needs warmup_steps > 0: lr * sqrt(warmup_steps / step)")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}")

    def total_steps(self, examples: int) -> int:
        """Steps of the run over a dataset of ``examples`` images; a last part of a batch counts as a step."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * examples / self.batch_size))

    def learning_rate(self, step: int, total: int) -> float:
        """The rate at ``step`` (from 0) of ``total``.

        The inverse square root is fairseq's, as the paper used it (section 4): ``warmup_from`` at step 0, ``lr`` at
        ``warmup_steps``, then ``lr * sqrt(warmup_steps / step)``.
        """
        warmup = self.warmup_steps
        if step < warmup:
            return self.warmup_from + (self.lr - self.warmup_from) * step / warmup
        if self.schedule == "inverse_sqrt":
            return self.lr * math.sqrt(warmup / step)
        if self.schedule == "cosine":
            progress = min(1.0, (step - warmup) / max(1, total - warmup))
            return self.final_lr + (self.lr - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr
