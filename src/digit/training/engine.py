"""Where the arithmetic runs: devices, processes and precision through Accelerate, optimizers, and the global random
state.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from digit.core.devices import pick_device
from digit.core.errors import DigitError, require
from digit.models.state_space import StateSpace
from digit.models.transformer import Transformer
from digit.training import sharding
from digit.training.task import Step, Task, TrainingConfig


def seed_everything(*key: int) -> None:
    """Set the global generators of torch (all devices), NumPy and Python from a few numbers."""
    words = np.random.SeedSequence(list(key)).generate_state(2, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    random.seed(int(words[1]))


def check_launch() -> None:
    """Raise DigitError where ``accelerate launch`` was asked for several processes on CPUs and, without MPI, began
    one.
    """
    several = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    mpi = any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if several and not mpi and "WORLD_SIZE" not in os.environ:
        raise DigitError(
            "accelerate launch --cpu was asked for several processes and started one process: without MPI it cannot do "
            "more. Write accelerate launch --multi_gpu --num_processes 2 -m digit train ... --device cpu (despite its "
            "name, that option serves CPUs too), or torchrun --nproc_per_node 2 -m digit train ... --device cpu."
        )


class EMA:
    """An exponential moving average of named parameters, on their device and in their dtype. Unlike torch's
    ``AveragedModel`` it keeps tensors alone, which may be shards (FSDP2), and no second module.

    After step k the average moves by ``1 - min(decay, (1 + k) / (10 + k))``, so that a short run is not dominated by
    its random start (the ramp of TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters as they are after ``step`` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        both = (self.averages, self.parameters)
        averages, parameters = ([sharding.local(t.detach()) for t in each.values()] for each in both)
        torch._foreach_lerp_(averages, parameters, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take averages that were saved."""
        for name, average in self.averages.items():
            average.copy_(sharding.like(averages[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        # values, not tensors: FSDP2 keeps its own reference to a parameter's memory
        for name, parameter in self.parameters.items():
            weight, average = sharding.local(parameter.detach()), sharding.local(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


class Engine:
    """The networks of a task on their device, with their optimizers and the average of the weights.

    Attributes:
        networks: the plain modules, whose names and tensors do not depend on how they are wrapped.
        trained: the parameters of each optimizer, by name.
        ema: the average of what the optimizer "model" trains, or None.
    """

    def __init__(self, task: Task, config: TrainingConfig, device: str | None) -> None:
        self.config = config
        check_launch()
        # Accelerate's own FSDP2 prepares a model together with its one optimizer; ours shards before there are any
        self._asked_to_shard = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.accelerator = _accelerator(config, device)
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        parts = self.world * config.accumulation
        if config.batch_size % parts:
            raise DigitError(
                f"batch_size={config.batch_size} does not divide into {self.world} processes x {config.accumulation} "
                f"parts; choose a multiple of {parts}."
            )
        task.to_device(str(self.device))
        self.networks = nn.ModuleDict(dict(task.modules.items()))
        for module in self.networks.modules():
            if isinstance(module, Transformer | StateSpace):
                module.checkpointing = config.gradient_checkpointing
        self._shard()
        fused = self.device.type == "cuda" if config.fused is None else config.fused
        adamw = partial(torch.optim.AdamW, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
        groups = task.parameters_by_optimizer()
        raw = {name: adamw(some, lr=config.lr, fused=fused) for name, some in groups.items()}
        names = {id(parameter): name for name, parameter in self.networks.named_parameters()}
        self.trained = {
            name: {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
            for name, optimizer in raw.items()
        }
        self.optimizers = {name: self.accelerator.prepare(optimizer) for name, optimizer in raw.items()}
        self.ema = EMA(self.trained["model"], config.ema_decay) if config.ema_decay else None
        self._wrap(task)

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over the processes."""
        if self.world == 1 or not metrics:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.device)
        return dict(zip(metrics, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def largest(self, value: int) -> int:
        """The largest of the processes' numbers, as when one of them got a signal."""
        if self.world == 1:
            return value
        return int(self.accelerator.gather(torch.tensor([value], device=self.device)).max())

    # -- a step

    def set_learning_rate(self, step: Step) -> float:
        """Set every optimizer's rate for a step; the rate of a group whose ``lr_scale`` is 1."""
        rate = self.config.learning_rate(step.index, step.total)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    @contextmanager
    def local_gradients(self, local: bool) -> Iterator[None]:
        """While more parts of a batch are to come, gradients stay in their process."""
        with ExitStack() as stack:
            for module in self._wrapped if local else ():
                stack.enter_context(self.accelerator.no_sync(module))
            for module in self._sharded:
                module.set_requires_gradient_sync(not local)
            yield

    def clip(self, name: str) -> Tensor:
        """Clip the gradients of an optimizer's parameters; their norm () before that."""
        self.accelerator.unscale_gradients(self.optimizers[name])
        limit = self.config.clip_norm or float("inf")
        return sharding.whole(nn.utils.clip_grad_norm_(self.trained[name].values(), limit))

    # -- state

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks hold the averaged weights, whole where they are sharded; all processes enter together."""
        with self.ema.applied() if self.ema else nullcontext(), sharding.assembled(self.networks):
            yield

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a checkpoint, whole and on the CPU, for the main process; all processes call this together."""
        parts = {"modules": self.networks.state_dict(), "optimizers": {}}
        for name, optimizer in self.optimizers.items():
            for parameter, weight in self.trained[name].items():
                for key, value in optimizer.state.get(weight, {}).items():
                    parts["optimizers"][f"{name}/{parameter}/{key}"] = torch.as_tensor(value)
        if self.ema:
            parts["ema"] = self.ema.averages
        return {file: self._whole(tensors) for file, tensors in parts.items()}

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = ((name, sharding.whole(tensor)) for name, tensor in tensors.items())
        return {name: tensor.detach().cpu() for name, tensor in found if self.accelerator.is_main_process}

    def load_state(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what :meth:`state` gave; a RuntimeError where names or shapes differ."""
        own, saved = self.networks.state_dict(), parts["modules"]
        fitting = {name for name, tensor in saved.items() if name in own and own[name].shape == tensor.shape}
        self.networks.load_state_dict(
            {name: sharding.like(t, own[name]) if name in fitting else t for name, t in saved.items()}
        )
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            numbers = {parameter: number for number, parameter in enumerate(self.trained[name])}
            for path, value in parts["optimizers"].items():
                if path.startswith(f"{name}/"):
                    parameter, _, key = path.removeprefix(f"{name}/").rpartition("/")
                    like = sharding.like(value, self.trained[name][parameter]) if value.dim() else value
                    state.setdefault(numbers[parameter], {})[key] = like
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.ema:
            self.ema.load(parts["ema"])

    # -- set-up

    def _shard(self) -> None:
        self._sharded: list[Any] = []
        alone = self.world == 1 and not torch.distributed.is_initialized()  # torchrun makes a group of one too
        if alone or not (self.config.shard or self._asked_to_shard):
            return
        if len(self.networks) > 1:
            raise DigitError(
                "training.shard cuts the weights of one network over the processes, and this component trains "
                f"{len(self.networks)} ({', '.join(self.networks)}); leave it out, they are small enough for DDP."
            )
        if self.config.precision == "fp16":
            raise DigitError("training.shard needs precision 'bf16' or 'no': the loss scaling of 'fp16' is for DDP.")
        self._sharded = list(self.networks.values())
        for network in self._sharded:
            sharding.shard(network, self.device)

    def _wrap(self, task: Task) -> None:
        ours = {id(p) for parameters in self.trained.values() for p in parameters.values()}
        self._wrapped: list[nn.Module] = []
        for name, module in self.networks.items():
            if not any(id(p) in ours for p in module.parameters()):
                continue
            if self.config.compile:
                module.compile()
            if self.world > 1 and not self._sharded:
                task.modules[name] = self.accelerator.prepare(module)
                self._wrapped.append(task.modules[name])


def _accelerator(config: TrainingConfig, device: str | None) -> Any:
    accelerate = require("accelerate", "train", "training")
    if config.precision == "fp16" and pick_device(device).type != "cuda":
        raise DigitError("precision 'fp16' needs a CUDA device; use 'bf16' or 'no' on a CPU.")
    # Accelerate keeps one state a process; a second run in this one may want another precision or device
    alone = "WORLD_SIZE" not in os.environ
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=alone)
    cpu = device is not None and pick_device(device).type == "cpu"
    chosen = {"ACCELERATE_TORCH_DEVICE": device} if alone and device and not cpu else {}
    with accelerate.utils.patch_environment(**chosen):
        return accelerate.Accelerator(cpu=cpu, mixed_precision=config.precision)
