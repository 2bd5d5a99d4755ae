"""Whether a run is well: a stop when the loss is lost, how good counting alone would be, and how fast it is.

MFU, model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the multiplications and additions
that the model's matrix products need, over what the processors could do in that time. Recomputed activations do not
count as work.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from digit.core.devices import bf16_is_fast
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.training import checkpoint
from digit.training.task import Batch, Step, TrainingConfig

log = logging.getLogger("digit")

SPEED = ("examples_per_second", "tokens_per_second", "mfu", "memory_gib")
"""Metrics that say how fast, not how well: two equal runs differ in them."""
# FLOP/s of dense 16-bit products, from the makers' data sheets; the first name that a device's name contains counts
_SHEETS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "L4": 121e12,
}
_WINDOW, _ENOUGH = 50, 20


class Guard:
    """Stops the run in ``out`` when a loss is no longer finite, or is above ``max_spike`` times the median of the last
    50. fp16's loss scaling (``scaled``) skips steps whose gradients overflow by itself. Losses stay on their device
    until :meth:`check`, which the loop calls before it logs, validates or saves: nothing is written after a step that
    went wrong.
    """

    def __init__(self, out: Path, max_spike: float = 0.0, scaled: bool = False) -> None:
        self.out, self.max_spike, self.scaled = out, max_spike, scaled
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self._noted: list[tuple[Tensor, Tensor, Step, str]] = []

    def note(self, loss: Tensor, norm: Tensor, batch: Batch, step: Step, optimizer: str) -> None:
        """Take the loss () and the gradient norm () of a step."""
        self._noted.append((torch.stack([loss.float(), norm.float()]), batch["index"], step, optimizer))

    def check(self) -> None:
        """Look at what was noted since the last check; a DigitError names the first step that went wrong, and its
        images.
        """
        noted, self._noted = self._noted, []
        values = torch.stack([value for value, *_ in noted]).tolist() if noted else []
        for (loss, norm), (_, index, step, optimizer) in zip(values, noted, strict=True):
            trouble = self._trouble(loss, norm, optimizer)
            if trouble:
                self._stop(trouble, loss, norm, index.tolist(), step)
            if optimizer == "model":
                self.recent.append(loss)

    def _trouble(self, loss: float, norm: float, optimizer: str) -> str:
        if not abs(loss) < float("inf"):
            return f"loss became {loss}"
        if not abs(norm) < float("inf") and not self.scaled:
            return f"gradient became {norm}"
        if self.max_spike and optimizer == "model" and len(self.recent) >= _ENOUGH:
            median = statistics.median(self.recent)
            if loss > self.max_spike * median > 0:
                return (
                    f"loss jumped to {loss:.4g}, more than training.max_spike={self.max_spike:g} times the median "
                    f"{median:.4g} of the last {len(self.recent)} steps,"
                )
        return ""

    def _stop(self, trouble: str, loss: float, norm: float, images: list[int], step: Step) -> None:
        record = {"step": step.index, "loss": str(loss), "gradient_norm": str(norm), "images": images}
        write_json(self.out / "diverged.json", record)
        last = checkpoint.latest(self.out)
        raise DigitError(
            f"The {trouble} at step {step.index}, on the images {', '.join(map(str, images[:16]))}"
            f"{', ...' if len(images) > 16 else ''} (all of them are in {self.out}/diverged.json). "
            + (f"The last checkpoint is {last}. " if last else "No checkpoint was saved before it. ")
            + "Look at those images; a lower training.lr, a longer warm-up or precision bf16 usually cures the rest."
        )


class Counts:
    """What frequencies alone know of token sequences, the baselines of a model: of training tokens (B, N) int64."""

    def __init__(self, parts: Iterable[Tensor], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.ones = torch.zeros(vocab_size, dtype=torch.long)
        pairs = []
        for tokens in parts:
            self.ones += torch.bincount(tokens.flatten(), minlength=vocab_size)
            pairs.append(torch.unique(tokens[:, :-1] * vocab_size + tokens[:, 1:], return_counts=True))
        keys, counts = map(torch.cat, zip(*pairs, strict=True))
        self._keys, where = torch.unique(keys, return_inverse=True)  # the pairs that occur, ascending
        self._pairs = torch.zeros(len(self._keys), dtype=torch.long).index_add_(0, where, counts)
        self._log_share = (self.ones.double() + 1).log() - (self.ones.double() + 1).sum().log()  # one added to each

    @property
    def use(self) -> float:
        """The share of the ids that occur at all."""
        return float((self.ones > 0).float().mean())

    def unigram_nll(self, tokens: Tensor) -> float:
        """Mean negative log-likelihood, in nats a token, of sequences (B, N) under the frequencies."""
        return float(-self._log_share[tokens].mean())

    def bigram_nll(self, tokens: Tensor) -> float:
        """The same, where every token but the first is told by the one before it. Its frequency is drawn towards the
        overall one as if that had been seen ``vocab_size ** 0.5`` times (a Dirichlet prior; MacKay & Peto 1995).
        """
        before, after = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
        if not len(self._keys):
            return self.unigram_nll(tokens)
        keys = before * self.vocab_size + after
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        seen = torch.where(self._keys[place] == keys, self._pairs[place], 0).double()  # (B * (N - 1),)
        starts = torch.zeros_like(self.ones).index_add_(0, self._keys // self.vocab_size, self._pairs)
        weight = self.vocab_size**0.5
        p = (seen + weight * self._log_share[after].exp()) / (starts[before] + weight)
        return float(-(self._log_share[tokens[:, 0]].sum() + p.log().sum()) / tokens.numel())


class Meter:
    """Speed and memory of a run of ``networks`` on ``device``, whose work ``world`` processes share."""

    def __init__(self, networks: nn.Module, device: torch.device, precision: str, world: int) -> None:
        self._model = token_model_in(networks)
        self._device, self._precision, self._world = device, precision, world

    def read(self, examples_per_second: float) -> dict[str, float]:
        """``examples_per_second``, for token models ``tokens_per_second`` and ``mfu`` (0 to 1), and ``memory_gib``."""
        found = {"examples_per_second": examples_per_second, "memory_gib": peak_memory(self._device) / 2**30}
        if self._model is not None:
            # the backward pass is two products for each of the forward pass
            needed = 3 * forward_flops(self._model.config) * examples_per_second
            found["tokens_per_second"] = examples_per_second * self._model.config.length
            found["mfu"] = needed / (self._world * peak_flops(self._device, self._precision))
        return found


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, of the GPU or of this process, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forward_flops(config: TokenModelConfig) -> int:
    """FLOPs of the matrix products of one image's forward pass in training; causal attention counts half."""
    # a causal model is not shown the last token, a masked one sees the start position too, a random-order one is told
    # the place of each token
    shown = config.length * (2 if config.role == "random" else 1) + (1 if config.role == "masked" else 0)
    head = config.length * 2 * config.backbone.dim * config.vocab_size
    return config.backbone.flops(config.prefix_length + shown) + head


def token_model_in(networks: nn.Module) -> TokenModel | None:
    """The token model among networks; of others the FLOPs are not counted."""
    return next((module for module in networks.modules() if isinstance(module, TokenModel)), None)


def with_precision(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The same with the precision that "auto" means on ``device``; warns where bfloat16 was asked for and is slow."""
    fast = bf16_is_fast(device)
    if config.precision == "auto":
        return replace(config, precision="bf16" if fast else "no")
    if config.precision == "bf16" and not fast:
        half, single = (measured_flops(device, dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
        log.warning(
            "training.precision is bf16, which is slow on this processor: it multiplies matrices at %.1f GFLOP/s in "
            "bfloat16 and %.1f in float32. Use --set training.precision=auto.", half, single,
        )  # fmt: skip
    return config


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that a device can do: the maker's figure for 16 bits on known GPUs, else measured."""
    if device.type == "cuda" and precision != "no":
        name = torch.cuda.get_device_name(device)
        for known, flops in _SHEETS.items():
            if known in name:
                return flops
    return measured_flops(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))


@cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a few square matrix products, on as many threads as torch has now."""
    size = 512 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first is slow
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
