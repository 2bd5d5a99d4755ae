"""What the training loop needs to know about a component: its networks, its batches and its losses.

A task owns the networks and the data; the loop owns optimizers, schedules, precision, processes, checkpoints and logs.
So that one process, several (DDP, FSDP2) and a resumed run all train alike:

* a task computes its losses by *calling* the modules in ``modules`` (``self.modules["model"](...)``, their
  ``forward``), never another method of a module that is trained: the loop may replace an entry by a wrapper;
* a batch depends on (seed, step) alone. What is random about data (order, crops, masks, dropped labels) is drawn in
  ``batches``; what is random about the network (dropout, noise) uses torch's global generator, which the loop seeds
  from (seed, step, rank) at every step. Neither is saved, and a resumed run is exact all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Named tensors on the CPU, each with the examples of this process in its first dimension, so that the loop can cut
them into ``accumulation`` equal parts and move them to the device. ``"index"`` (B,) int64 is always there: where in the
dataset the examples stand, for the message about a bad batch."""
Groups = dict[str, list[dict[str, Any]]]
"""The torch parameter groups of each optimizer. ``"model"`` is always there (EMA and validation belong to it); a GAN
adds ``"discriminator"``. A group may have ``weight_decay`` and ``lr_scale`` (a factor on the learning rate)."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Which batches a process is to see: those of the steps from ``start``, ``stop`` excluded, of ``batch_size``
    examples over all processes. ``seed`` is of the order and of every random choice; ``workers`` threads load data (0:
    this one), which changes the speed, never the batches.
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
