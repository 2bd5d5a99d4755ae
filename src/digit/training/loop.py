"""The one training loop. See :mod:`digit.training.task` for what it asks of a component.

A run folder: ``config.yaml`` (what is trained and how), ``metrics.jsonl``, ``tensorboard/``, ``samples/``,
``checkpoints/``, and at the end ``model/``, the finished component.

Between two log lines the loop waits for nothing and lets processes exchange gradients alone: losses, gradient norms and
metrics stay where they were computed until the next line is due. What a loss needs comes on top: lightly's losses of
encoders pick by masks, which waits once a step, and a VQGAN's codebook and contrastive losses are of the global batch.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import yaml
from torch import Tensor

from digit.core.config import to_dict
from digit.core.devices import pick_device
from digit.core.environment import hardware, versions
from digit.core.errors import DigitError
from digit.core.files import write_bytes, write_folder, write_json
from digit.core.progress import bar
from digit.training import checkpoint
from digit.training.checkpoint import Checkpoint
from digit.training.engine import Engine, seed_everything
from digit.training.health import Guard, Meter, with_precision
from digit.training.logs import Averages, Log
from digit.training.task import Batch, Loss, Step, Stream, Task, TrainingConfig

REQUEST = "request.json"
_VALIDATION, _SAMPLE = 1 << 62, (1 << 62) + 1  # keys of the random state that no step has


class Interrupted(DigitError):
    """A signal stopped a run, which has saved ``checkpoint``; ``exit_code`` is what a shell expects, 128 + the
    signal.
    """

    def __init__(self, signum: int, step: int, total: int, checkpoint: Path) -> None:
        self.exit_code, self.checkpoint = 128 + signum, checkpoint
        name = signal.Signals(signum).name
        super().__init__(f"Stopped by {name} after step {step} of {total}; the checkpoint is {checkpoint}.")


def train(
    task: Task,
    config: TrainingConfig,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    show: bool = True,
    request: object = None,
    extend: bool = False,
) -> Path:
    """Train a component to the end of its run; the folder of the finished component, ``out/model``.

    Interrupted and resumed, a run ends in the same weights as one that was left alone (on one device, bit for bit).

    Args:
        resume: go on from the newest checkpoint in the run folder ``out``; from the start if there is none yet.
        device: "cpu", "cuda", or None for the best there is.
        request: a config of what the user asked for, kept as ``request.json``; ``digit train --resume`` reads it.
        extend: the length of the run may change though its learning rates depend on it (schedule "cosine").

    Raises:
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved. Several processes agree on it at log lines.
        DigitError: ``out`` holds a run and ``resume`` is False, or it is another run's; the loss is no longer finite,
            or jumped; a file cannot be written.
    """
    run = _Run(task, config, Path(out), device)
    run.begin(resume, extend)
    if request is not None and run.is_main:
        write_json(run.out / REQUEST, to_dict(request))
    engine = run.engine
    rank = engine.accelerator.process_index
    what = f"Training {task.description.get('component', 'a component')}"
    what += f" from step {run.done}" if run.done else ""
    stream = Stream(
        start=run.done,
        stop=run.total,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=rank,
        world=engine.world,
        workers=config.workers,
    )
    with _caught_signals() as caught, bar(what, run.total - run.done, "steps", show and rank == 0) as progress:
        for batch in () if run.is_over else task.batches(stream):
            logged = run.step(batch)
            progress.advance(1, f"loss {logged['loss']:.4g}" if "loss" in logged else "")
            if run.is_over:
                break
            signum = engine.largest(max(caught, default=0)) if logged or engine.world == 1 else 0
            if signum and run.done < run.total:
                raise Interrupted(signum, run.done, run.total, run.save())
    if not run.is_over:
        raise RuntimeError(f"{type(task).__name__}.batches ended after step {run.done} of {run.total}")
    return run.finish()


@contextmanager
def _caught_signals() -> Iterator[set[int]]:
    """Note SIGTERM and SIGINT while the block runs, in the main thread; the second SIGINT raises KeyboardInterrupt."""
    caught: set[int] = set()

    def note(signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.add(signum)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Run:
    """The state of a run between two steps."""

    def __init__(self, task: Task, config: TrainingConfig, out: Path, device: str | None) -> None:
        begun = out / "config.yaml"
        if config.precision == "auto" and checkpoint.latest(out) is not None and begun.is_file():
            config = replace(config, precision=yaml.safe_load(begun.read_text("utf-8"))["training"]["precision"])
        config = with_precision(config, pick_device(device))
        self.task, self.config, self.out = task, config, out
        self.total = config.total_steps(task.examples)
        self.done = 0
        self.engine = Engine(task, config, device)
        self.is_main: bool = self.engine.accelerator.is_main_process
        # through JSON, so that it compares equal to what a checkpoint holds
        self.description = json.loads(json.dumps({**task.description, "training": to_dict(config)}))
        self.averages = Averages()
        self.guard = Guard(out, config.max_spike, self.engine.accelerator.scaler is not None)
        self.meter = Meter(self.engine.networks, self.engine.device, config.precision, self.engine.world)
        self.validated: dict[str, float] = {}
        self.best: tuple[float, int] = (math.inf, 0)  # the score, and how many validations were not better since
        if config.patience and not task.score:
            raise DigitError(
                "training.patience is for token models, whose validation has one figure to go by; set it to 0."
            )
        self._since = (0, time.perf_counter())

    @property
    def is_over(self) -> bool:
        """Whether all steps were made, or further ones did not help for as long as was allowed."""
        return self.done >= self.total or 0 < self.config.patience <= self.best[1]

    # -- begin and end

    def begin(self, resume: bool, extend: bool) -> None:
        """Prepare the folder, or go on from its newest checkpoint."""
        last = checkpoint.latest(self.out)
        if last is not None and not resume:
            raise DigitError(
                f"{self.out} already holds a run (the newest checkpoint is {last.name}). Go on with --resume, "
                "or choose another --out."
            )
        if last is not None:
            self._restore(checkpoint.load(last), last, extend)
        if self.is_main:
            checkpoint.remove_unfinished(self.out)
            text = yaml.safe_dump(self.description, sort_keys=False, allow_unicode=True)
            write_bytes(self.out / "config.yaml", text.encode())
            self.log = Log(self.out, self.done, self.description)
        self.engine.accelerator.wait_for_everyone()
        self.engine.networks.train()
        self._since = (self.done, time.perf_counter())

    def finish(self) -> Path:
        """Save the last checkpoint and the component."""
        self.save()
        folder = self.out / "model"
        if not self.config.patience:
            self._export(folder)
        if self.is_main:
            if self.config.patience:
                with write_folder(folder) as aside:
                    shutil.copytree(self.out / "best", aside, dirs_exist_ok=True)
            self.log.close()
        self.engine.accelerator.wait_for_everyone()
        return folder

    def _export(self, folder: Path) -> None:
        provenance = {
            **{name: value for name, value in self.description.items() if name != "model"},
            "steps": self.done,
            "examples_seen": self.done * self.config.batch_size,
            "metrics": self.validated,
            "hardware": hardware(),
            "software": versions(),
        }
        with self.engine.averaged():
            if self.is_main:
                self.task.export(folder, provenance)

    # -- a step

    def step(self, batch: Batch) -> dict[str, float]:
        """Make the next step, and log, validate, sample and save if it is time; what was logged."""
        config, step = self.config, Step(self.done, self.total)
        seed_everything(config.seed, step.index, self.engine.accelerator.process_index)
        rate = self.engine.set_learning_rate(step)
        generators = [self.task.losses(part, step) for part in _split(batch, config.accumulation, self.engine.device)]
        while self._minimise(generators, batch, step):
            pass
        self.task.after_step(step)
        if self.engine.ema:
            self.engine.ema.update(step.index)
        self.done += 1
        logged = {}
        if self._due(config.log_every) or self.done == self.total:
            logged = self._log(rate)
        if self._due(config.validate_every) or self.done == self.total:
            self._validate()
        if self._due(config.sample_every):
            with self._evaluating(_SAMPLE):
                image = self.task.sample(step)
            if image is not None and self.is_main:
                self.log.image(self.done, image)
        if self._due(config.checkpoint_every):
            self.save()
        return logged

    def _minimise(self, generators: Sequence[Iterator[Loss]], batch: Batch, step: Step) -> bool:
        """Backward of the next loss of every part, then one optimizer step; whether there was a further loss."""
        engine, name = self.engine, ""
        values: list[Tensor] = []
        for number, generator in enumerate(generators):
            with engine.local_gradients(number + 1 < len(generators)):
                with engine.accelerator.autocast():
                    loss = next(generator, None)
                if loss is None:
                    continue  # every generator is run to its end
                if not values:
                    name = loss.optimizer
                    engine.optimizers[name].zero_grad(set_to_none=True)  # those that other losses left behind too
                engine.accelerator.backward(loss.value / len(generators))
            values.append(loss.value.detach())
            self.averages.add({_metric(name, "loss"): loss.value, **loss.metrics})
        if not values:
            return False
        norm = engine.clip(name)
        self.guard.note(torch.stack(values).float().mean(), norm, batch, step, name)
        self.averages.add({_metric(name, "gradient_norm"): norm})
        engine.optimizers[name].step()
        return True

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    # -- what is written

    def _log(self, rate: float) -> dict[str, float]:
        self.guard.check()
        metrics = self.engine.mean(self.averages.take())
        since, began = self._since
        seconds = time.perf_counter() - began
        metrics |= {"lr": rate, **self.meter.read((self.done - since) * self.config.batch_size / seconds)}
        self._since = (self.done, time.perf_counter())
        if self.is_main:
            self.log.write(self.done, metrics)
        return metrics

    def _validate(self) -> None:
        with self._evaluating(_VALIDATION):
            found = self.task.validate()
        self.validated = self.engine.mean(found)
        if self.config.patience:
            if self.task.score not in self.validated:
                raise DigitError("training.patience needs held-out images to measure: set data.held_out above 0.")
            score = self.validated[self.task.score]
            better = score < self.best[0]
            self.best = (score, 0) if better else (self.best[0], self.best[1] + 1)
            if better or not (self.out / "best").exists():
                self._export(self.out / "best")
        if self.is_main:
            self.log.write(self.done, {f"validation/{name}": value for name, value in self.validated.items()})

    @contextmanager
    def _evaluating(self, key: int) -> Iterator[None]:
        """Averaged weights, eval mode, no gradients and a random state that is the same every time."""
        self.guard.check()
        began = time.perf_counter()
        seed_everything(self.config.seed, key)
        self.engine.networks.eval()
        with torch.no_grad(), self.engine.averaged(), self.engine.accelerator.autocast():
            yield
        self.engine.networks.train()
        # the time is not the training's
        self._since = (self._since[0], self._since[1] + time.perf_counter() - began)

    # -- checkpoints

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        self.guard.check()
        tensors, sums = self.engine.state(), self.averages.state()
        totals = self.engine.mean({name: total for name, (total, _) in sums.items()})
        if self.is_main:
            numbers = {
                "averages": {name: [totals[name], count] for name, (_, count) in sums.items()},
                "validated": self.validated,
                "best": list(self.best),
                "recent": list(self.guard.recent),
            }
            if self.engine.accelerator.scaler is not None:
                numbers["scaler"] = self.engine.accelerator.scaler.state_dict()
            state = Checkpoint(self.done, tensors, self.description, numbers)
            checkpoint.save(self.out, state, self.config.keep_checkpoints)
        self.engine.accelerator.wait_for_everyone()
        return checkpoint.path_of(self.out, self.done)

    def _restore(self, saved: Checkpoint, where: Path, extend: bool) -> None:
        checkpoint.check_same_run(saved.run, self.description, where, extend)
        if saved.step > self.total:
            raise DigitError(
                f"{where} is {saved.step} steps into a run that is now asked to take {self.total}; give more steps."
            )
        try:
            self.engine.load_state(saved.tensors)
        except RuntimeError as error:
            raise DigitError(f"The tensors of {where} do not fit this model: {error}") from error
        scaler = self.engine.accelerator.scaler
        if scaler is not None and "scaler" in saved.numbers:
            scaler.load_state_dict(saved.numbers["scaler"])
        self.averages = Averages(saved.numbers["averages"], self.engine.device)
        self.validated = saved.numbers["validated"]
        score, since = saved.numbers.get("best", self.best)
        self.best = float(score), int(since)
        self.guard.recent.extend(saved.numbers.get("recent", ()))
        self.done = saved.step


def _metric(optimizer: str, name: str) -> str:
    return name if optimizer == "model" else f"{optimizer}/{name}"


def _split(batch: Batch, parts: int, device: torch.device) -> list[Batch]:
    """Equal parts of a batch, on the device."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}  # a copy from other memory waits
    pieces = {name: tensor.to(device, non_blocking=True).chunk(parts) for name, tensor in batch.items()}
    return [{name: chunks[number] for name, chunks in pieces.items()} for number in range(parts)]
