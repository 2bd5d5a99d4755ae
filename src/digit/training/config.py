"""How a component is trained: the ``training`` section of a preset, and its learning rate."""

from __future__ import annotations

import math
from typing import Literal

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, config


@config
class TrainingConfig:
    """Everything about a run that is not the model or the data. The defaults are the paper's stage 1 (section 4;
    DAMO-NLP-SG/DiGIT at cd6d8ca, config/stage1), except for the length.

    Attributes:
        steps, epochs: the length of the run; exactly one of them.
        batch_size: examples a step over all processes and accumulation.
        accumulation: parts that a process cuts its share of the batch into, one after the other: less memory, same
            gradient.
        precision: "no" is float32; "bf16" and "fp16" compute in 16 bits and keep the weights in float32; "auto" is bf16
            where the device has instructions for it, else float32. A run keeps what it began with.
        lr: the highest learning rate.
        betas, eps, weight_decay, fused: of AdamW; ``fused`` None uses the fused kernel on CUDA.
        schedule: "inverse_sqrt" (lr * sqrt(warmup / step)), "cosine" (to ``final_lr``) or "constant", after a linear
            warm-up.
        warmup_steps, warmup_from: length and first value of the warm-up.
        final_lr: where the cosine ends.
        clip_norm: largest norm of the gradient; 0 does not clip.
        ema_decay: of the exponential moving average of the weights, which then is what is validated and exported; 0 is
            off.
        patience: after so many validations without a better one the run ends, and the best is what is exported; 0
            runs to the end and exports that. For token models, by their validation "nll".
        max_spike: a loss of the model above this many times the median of the last ones stops the run; 0 never does.
        z_loss: weight of mean(log Z ^ 2), which keeps the logits of token models from drifting (PaLM, arXiv 2204.02311,
            sec. 5).
        compile: use torch.compile.
        shard: with several processes, cut weights, gradients and optimizer state over them (FSDP2) instead of keeping
            all of it in each (DDP). For token models; ``accelerate launch --use_fsdp`` sets it too.
        gradient_checkpointing: recompute activations of transformers in the backward pass: less memory, a third more
            time.
        seed: of initial weights, data order and every random choice.
        log_every, validate_every, checkpoint_every, sample_every: in steps; 0 is never (the end of a run always
            validates and leaves a checkpoint). Between two log lines the loop never waits for the device.
        keep_checkpoints: how many of the newest to keep.
        workers: data loading threads.
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
