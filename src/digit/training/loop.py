"""The one training loop. See :mod:`digit.training.task` for what it asks of a component.

A run folder: ``config.yaml`` (what is trained and how), ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
    ``checkpoints/``, and
at the end ``model/``, the finished component.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.core.progress import bar
from digit.evaluation.result import hardware
from digit.training import checkpoint, sharding
from digit.training.checkpoint import Checkpoint
from digit.training.config import TrainingConfig
from digit.training.ema import EMA
from digit.training.engine import Engine, seed_everything
from digit.training.health import Guard, Meter
from digit.training.logs import Averages, Log
from digit.training.signals import Interrupted, caught_signals
from digit.training.task import Batch, Loss, Step, Stream, Task

__all__ = ["Interrupted", "train"]

_VALIDATION, _SAMPLE = 1 << 62, (1 << 62) + 1  # keys of the random state that no step has


def train(
    task: Task,
    config: TrainingConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    show: bool = True,
) -> Path:
    """Train a component to the end of its run.

    Interrupted and resumed, a run ends in the same weights as one that was left alone (on one device, bit for bit).

    Args:
        task: what is trained.
        config: how.
        out: the run folder.
        resume: go on from the newest checkpoint in ``out``; from the start if there is none yet.
        device: "cpu", "cuda", or None for the best there is.
        show: show a progress bar.

    Returns:
        The folder of the finished component, ``out/model``.

    Raises:
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved.
        DigitError: ``out`` holds a run and ``resume`` is False, or it is another run's; the loss is no longer finite,
            or jumped; a file cannot be written.
    """
    run = _Run(task, config, Path(out), device)
    run.begin(resume)
    what = f"Training {task.description.get('component', 'a component')}" + (
        f" from step {run.done}" if run.done else ""
    )
    stream = Stream(
        start=run.done,
        stop=run.total,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=run.engine.rank,
        world=run.engine.world,
        workers=config.workers,
    )
    with caught_signals() as caught, bar(what, run.total - run.done, "steps", show and run.engine.is_main) as progress:
        for batch in task.batches(stream):
            loss = run.step(batch)
            progress.advance(1, f"loss {loss:.4g}")
            signum = run.engine.largest(caught.signum)
            if signum and run.done < run.total:
                raise Interrupted(signum, run.done, run.total, run.save())
    if run.done < run.total:
        raise RuntimeError(f"{type(task).__name__}.batches ended after step {run.done} of {run.total}")
    return run.finish()


class _Run:
    """The state of a run between two steps."""

    def __init__(self, task: Task, config: TrainingConfig, out: Path, device: str | None) -> None:
        self.task, self.config, self.out = task, config, out
        self.total = config.total_steps(task.examples)
        self.done = 0
        self.engine = Engine(task, config, device)
        self.ema = EMA(self.engine.trained["model"], config.ema_decay) if config.ema_decay else None
        # through JSON, so that it compares equal to what a checkpoint holds
        self.description = json.loads(json.dumps({**task.description, "training": to_dict(config)}))
        self.averages = Averages()
        self.guard = Guard(out, config.max_spike, self.engine.scaler is not None)
        self.meter = Meter(self.engine.networks, self.engine.device, config.precision, self.engine.world)
        self.validated: dict[str, float] = {}
        self._since = (0, time.perf_counter())

    # -- begin and end
    # -------------------------------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Prepare the folder, or go on from its newest checkpoint."""
        last = checkpoint.latest(self.out)
        if last is not None and not resume:
            raise DigitError(f"{self.out} already holds a run (the newest checkpoint is {last.name}). Go on with --resume, "
                             "or choose another --out.")  # fmt: skip
        if last is not None:
            self._restore(checkpoint.load(last), last)
        if self.engine.is_main:
            checkpoint.remove_unfinished(self.out)
            text = yaml.safe_dump(self.description, sort_keys=False, allow_unicode=True)
            write_bytes(self.out / "config.yaml", text.encode())
            self.log = Log(self.out, self.done, self.description)
        self.engine.wait()
        self.engine.networks.train()
        self._since = (self.done, time.perf_counter())

    def finish(self) -> Path:
        """Save the last checkpoint and the component."""
        self.save()
        folder = self.out / "model"
        with self._averaged(), self.engine.assembled():
            if self.engine.is_main:
                self.task.export(folder, self._provenance())
                self.log.close()
        self.engine.wait()
        return folder

    def _provenance(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.description.items() if name != "model"},
            "steps": self.done,
            "examples_seen": self.done * self.config.batch_size,
            "metrics": self.validated,
            "hardware": hardware(),
            "software": {
                "digit-ar": metadata.version("digit-ar"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    # -- a step
    # --------------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """Make the next step, and log, validate, sample and save if it is time; the loss."""
        step = Step(self.done, self.total)
        seed_everything(self.config.seed, step.index, self.engine.rank)
        rate = self.engine.set_learning_rate(step)
        parts = _split(batch, self.config.accumulation, self.engine.device)
        generators = [self.task.losses(part, step) for part in parts]
        losses = []
        while (loss := self._minimise(generators, batch, step)) is not None:
            losses.append(loss)
        self.task.after_step(step)
        if self.ema:
            self.ema.update(step.index)
        self.done += 1
        if self._due(self.config.log_every):
            self._log(rate)
        if self._due(self.config.validate_every):
            self._validate()
        if self.config.sample_every and self.done % self.config.sample_every == 0:
            self._sample(step)
        if self.config.checkpoint_every and self.done % self.config.checkpoint_every == 0:
            self.save()
        return losses[0]

    def _minimise(self, generators: Sequence[Iterator[Loss]], batch: Batch, step: Step) -> float | None:
        """Backward of the next loss of every part, then one optimizer step; None when there is no further loss."""
        name = ""
        values: list[Tensor] = []
        for number, generator in enumerate(generators):
            with self.engine.local_gradients(number + 1 < len(generators)):
                with self.engine.autocast():
                    loss = next(generator, None)
                if loss is None:
                    continue  # every generator is run to its end
                if not values:
                    name = loss.optimizer
                    self.engine.zero_gradients(name)
                self.engine.backward(loss.value / len(generators))
            values.append(loss.value.detach())
            self.averages.add({_metric(name, "loss"): loss.value, **loss.metrics})
        if not values:
            return None
        norm = self.engine.clip(name)
        mean, length = torch.stack([torch.stack(values).float().mean(), norm.float()]).tolist()
        self.guard.check(mean, length, batch, step, name)
        self.averages.add({_metric(name, "gradient_norm"): norm})
        self.engine.step(name)
        return float(mean)

    def _due(self, every: int) -> bool:
        return self.done == self.total or (every > 0 and self.done % every == 0)

    # -- what is written
    # -----------------------------------------------------------------------------------------------------

    def _log(self, rate: float) -> None:
        metrics = self.engine.mean(self.averages.take())
        since, began = self._since
        seconds = time.perf_counter() - began
        metrics |= {"lr": rate, **self.meter.read((self.done - since) * self.config.batch_size / seconds)}
        self._since = (self.done, time.perf_counter())
        if self.engine.is_main:
            self.log.write(self.done, metrics)

    def _validate(self) -> None:
        with self._judged(_VALIDATION):
            found = self.task.validate()
        self.validated = self.engine.mean(found)
        if self.engine.is_main:
            self.log.write(self.done, {f"validation/{name}": value for name, value in self.validated.items()})

    def _sample(self, step: Step) -> None:
        with self._judged(_SAMPLE):
            picture = self.task.sample(step)
        if picture is not None and self.engine.is_main:
            self.log.picture(self.done, picture)

    @contextmanager
    def _judged(self, key: int) -> Iterator[None]:
        """Averaged weights, eval mode, no gradients and a random state that is the same every time."""
        began = time.perf_counter()
        seed_everything(self.config.seed, key)
        self.engine.networks.eval()
        with self._averaged(), torch.no_grad(), self.engine.assembled(), self.engine.autocast():
            yield
        self.engine.networks.train()
        # the time is not the training's
        self._since = (self._since[0], self._since[1] + time.perf_counter() - began)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.ema is None:
            yield
        else:
            with self.ema.applied():
                yield

    # -- checkpoints
    # ---------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        parts = {"modules": self.engine.networks.state_dict(), "optimizers": self.engine.optimizer_tensors()}
        if self.ema:
            parts["ema"] = self.ema.averages
        tensors = {name: self.engine.whole(part) for name, part in parts.items()}
        sums = self.averages.state()
        totals = self.engine.mean({name: total for name, (total, _) in sums.items()})
        averages = {name: [totals[name], count] for name, (_, count) in sums.items()}
        if self.engine.is_main:
            numbers = {"averages": averages, "validated": self.validated, "recent": list(self.guard.recent)}
            if self.engine.scaler is not None:
                numbers["scaler"] = self.engine.scaler.state_dict()
            state = Checkpoint(self.done, tensors, self.description, numbers)
            checkpoint.save(self.out, state, self.config.keep_checkpoints)
        self.engine.wait()
        return checkpoint.path_of(self.out, self.done)

    def _restore(self, saved: Checkpoint, where: Path) -> None:
        checkpoint.check_same_run(saved.run, self.description, where)
        if saved.step > self.total:
            raise DigitError(
                f"{where} is {saved.step} steps into a run that is now asked to take {self.total}; give more steps."
            )
        _fill(self.engine.networks, saved.tensors["modules"], where)
        self.engine.load_optimizers(saved.tensors["optimizers"])
        if self.ema:
            self.ema.load(saved.tensors["ema"])
        if self.engine.scaler is not None and "scaler" in saved.numbers:
            self.engine.scaler.load_state_dict(saved.numbers["scaler"])
        self.averages = Averages(saved.numbers["averages"])
        self.validated = saved.numbers["validated"]
        self.guard.recent.extend(saved.numbers.get("recent", ()))
        self.done = saved.step


def _metric(optimizer: str, name: str) -> str:
    return name if optimizer == "model" else f"{optimizer}/{name}"


def _split(batch: Batch, parts: int, device: torch.device) -> list[Batch]:
    """Equal parts of a batch, on the device."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    pieces = {name: tensor.chunk(parts) for name, tensor in moved.items()}
    return [{name: chunks[number] for name, chunks in pieces.items()} for number in range(parts)]


def _fill(networks: torch.nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy saved values into the parameters that the optimizers hold."""
    try:
        sharding.load(networks, tensors)
    except RuntimeError as error:
        raise DigitError(f"The tensors of {where} do not fit this model: {error}") from error
