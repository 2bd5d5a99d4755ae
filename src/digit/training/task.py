"""What the training loop needs to know: how a component is trained, its networks, its batches and its losses.

A task owns the networks and the data; the loop owns optimizers, schedules, precision, processes, checkpoints and logs.
So that one process, several (DDP, FSDP2) and a resumed run all train alike:

* a task computes its losses by *calling* the modules in ``modules`` (``self.modules["model"](...)``, their
  ``forward``), never another method of a module that is trained: the loop may replace an entry by a wrapper;
* a batch depends on (seed, step) alone. What is random about data (order, crops, masks, dropped labels) is drawn in
  ``batches``; what is random about the network (dropout, noise) uses torch's global generator, which the loop seeds
  from (seed, step, rank) at every step. Neither is saved, and a resumed run is exact all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor, nn

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, config

Batch = dict[str, Tensor]
"""Named tensors on the CPU, each with the examples of this process in its first dimension, so that the loop can cut
them into ``accumulation`` equal parts and move them to the device. ``"index"`` (B,) int64 is always there: where in the
dataset the examples stand, for the message about a bad batch."""
Groups = dict[str, list[dict[str, Any]]]
"""The torch parameter groups of each optimizer. ``"model"`` is always there (EMA and validation belong to it); a GAN
adds ``"discriminator"``. A group may have ``weight_decay`` and ``lr_scale`` (a factor on the learning rate)."""


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


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The batches of the steps from ``start`` to ``stop``, of ``batch_size`` examples over all processes, in an order
    by ``seed``. ``workers`` threads load data (0: this one), which changes the speed, never the batches.
    """

    start: int
    stop: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 0

    @property
    def rows(self) -> slice:
        """The rows of the global batch that this process computes."""
        share = self.batch_size // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Step:
    """Number ``index`` (from 0) of the ``total`` steps of a run."""

    index: int
    total: int

    @property
    def progress(self) -> float:
        """The part of the run that is over, 0 at the first step and below 1 at the last."""
        return self.index / self.total


class Loss(NamedTuple):
    """One thing to minimise in a step.

    Attributes:
        optimizer: whose parameters move; see :data:`Groups`.
        value: () a mean over the examples of the batch that was given, logged as "loss" ("discriminator/loss").
        metrics: () tensors worth logging, without gradients, which are averaged over accumulation, processes and
            steps.
    """

    optimizer: str
    value: Tensor
    metrics: Mapping[str, Tensor]


class Task:
    """A component in training.

    Attributes:
        modules: every network a checkpoint must keep: what is trained, and EMA teachers and codebook buffers too.
            Frozen networks that only serve a loss (LPIPS, a tokenizer) are kept elsewhere and moved by ``to_device``.
        description: plain JSON values that make the run what it is: ``component``, ``model`` (its config), ``data`` (a
            fingerprint). A checkpoint is resumed only under the same description and training config.
        examples: how many training examples an epoch has.
        device: where the networks are.
        score: the metric of :meth:`validate` by which the best weights are known, lower is better; "" for none.
    """

    modules: nn.ModuleDict
    description: Mapping[str, Any]
    examples: int
    device: str = "cpu"
    score: str = ""

    def parameters_by_optimizer(self) -> Groups:
        """What is trained; here, by one optimizer, every parameter that learns (the paper decays norms and biases)."""
        return {"model": [{"params": [p for p in self.modules.parameters() if p.requires_grad]}]}

    def to_device(self, device: str) -> None:
        """Move ``modules`` and whatever else the task computes with."""
        self.modules.to(device)
        self.device = device

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """One batch a step, for the steps and the process that ``stream`` names."""
        raise NotImplementedError

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """Yield the losses of a step, in order.

        The loop runs backward, clips and steps the optimizer of a loss before it resumes the generator: what is
        computed after a ``yield`` sees the updated parameters. With accumulation one generator runs for each part of
        the batch, side by side.
        """
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """Called when all optimizers of a step have moved: EMA teachers, dead codes."""

    def validate(self) -> dict[str, float]:
        """Metrics over held-out examples, the same ones every time, in eval mode and without gradients."""
        return {}

    def sample(self, step: Step) -> Image.Image | None:  # noqa: ARG002
        """An image for the log, made from the same seed every time; None where there is nothing to show."""
        return None

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the finished component as its class's ``save_pretrained`` does, with ``provenance`` in its config."""
        raise NotImplementedError
