"""Whether a run is well: its speed and memory, a stop when the loss is lost, and how good counting alone would be."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.training import checkpoint
from digit.training.flops import forward_flops, peak_flops, token_model_in
from digit.training.task import Batch, Step

SPEED = ("examples_per_second", "tokens_per_second", "mfu", "memory_gib")
"""Metrics that say how fast, not how well: two equal runs differ in them."""
_WINDOW, _ENOUGH = 50, 20


class Meter:
    """Speed and memory of a run.

    Args:
        networks: what is trained.
        device, precision: where and how it is computed.
        world: how many processes share the work.
    """

    def __init__(self, networks: nn.Module, device: torch.device, precision: str, world: int) -> None:
        self._model, self._device, self._precision, self._world = token_model_in(networks), device, precision, world

    def read(self, examples_per_second: float) -> dict[str, float]:
        """``examples_per_second``, for token models ``tokens_per_second`` and ``mfu`` (0 to 1), and ``memory_gib``, the
        most so far.

        Memory is that of the GPU, or of the whole process on a CPU, in GiB.
        """
        found = {"examples_per_second": examples_per_second, "memory_gib": peak_memory(self._device) / 2**30}
        if self._model is not None:
            config = self._model.config
            # the backward pass is two products for each of the forward pass
            needed = 3 * forward_flops(config) * examples_per_second
            found["tokens_per_second"] = examples_per_second * config.length
            found["mfu"] = needed / (self._world * peak_flops(self._device, self._precision))
        return found


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Guard:
    """Stops a run when a loss is no longer finite, or jumps, before the weights are moved by it.

    Args:
        out: the run folder, where ``diverged.json`` goes.
        max_spike: a loss above this many times the median of the last 50 stops the run; 0 never does.
        scaled: fp16's loss scaling is on; it skips steps whose gradients overflow by itself.
    """

    def __init__(self, out: Path, max_spike: float = 0.0, scaled: bool = False) -> None:
        self.out, self.max_spike, self.scaled = out, max_spike, scaled
        self.recent: deque[float] = deque(maxlen=_WINDOW)

    def check(self, loss: float, norm: float, batch: Batch, step: Step, optimizer: str) -> None:
        """Look at the loss and the gradient norm of a step.

        Raises:
            DigitError: names the step, the images of its batch, and the last checkpoint.
        """
        trouble = self._trouble(loss, norm, optimizer)
        if trouble:
            indices = batch["index"].tolist()
            record = {"step": step.index, "loss": str(loss), "gradient_norm": str(norm), "images": indices}
            write_json(self.out / "diverged.json", record)
            last = checkpoint.latest(self.out)
            raise DigitError(
                f"The {trouble} at step {step.index}, on the images {', '.join(map(str, indices[:16]))}"
                f"{', ...' if len(indices) > 16 else ''} (all of them are in {self.out}/diverged.json). "
                + (f"The last checkpoint is {last}. " if last else "No checkpoint was saved before it. ")
                + "Look at those images; a lower training.lr, a longer warm-up or precision bf16 usually cures the rest."
            )
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
                    f"loss jumped to {loss:.4g}, more than training.max_spike={self.max_spike:g} times the median {median:.4g} of "
                    f"the last {len(self.recent)} steps,"
                )
        return ""


class Counts:
    """What frequencies alone know of token sequences: the baselines that a model must beat.

    Args:
        parts: training tokens (B, N) int64, in parts.
        vocab_size: how many ids there are.
    """

    def __init__(self, parts: Iterable[Tensor], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        ones = torch.zeros(vocab_size, dtype=torch.long)
        pairs: dict[str, list[Tensor]] = {"keys": [], "counts": []}
        for tokens in parts:
            ones += torch.bincount(tokens.flatten(), minlength=vocab_size)
            keys, counts = torch.unique(tokens[:, :-1] * vocab_size + tokens[:, 1:], return_counts=True)
            pairs["keys"].append(keys)
            pairs["counts"].append(counts)
        self.ones = ones
        self._keys, where = torch.unique(
            torch.cat(pairs["keys"]), return_inverse=True
        )  # the pairs that occur, ascending
        self._pairs = torch.zeros(len(self._keys), dtype=torch.long).index_add_(0, where, torch.cat(pairs["counts"]))

    @property
    def use(self) -> float:
        """The share of the ids that occur at all."""
        return float((self.ones > 0).float().mean())

    def unigram_nll(self, tokens: Tensor) -> float:
        """Mean negative log-likelihood in nats a token of sequences (B, N) under the frequencies, one added to every
        count.
        """
        return float(-self._log_frequencies()[tokens].mean())

    def bigram_nll(self, tokens: Tensor) -> float:
        """The same, where every token but the first is told by the one before it.

        The frequency after a token is drawn towards the overall frequency as if that had been seen ``vocab_size **
        0.5`` times (a Dirichlet prior; MacKay & Peto 1995): rare pairs need it.
        """
        before, after = tokens[:, :-1], tokens[:, 1:]
        keys = (before * self.vocab_size + after).flatten()
        if not len(self._keys):
            return self.unigram_nll(tokens)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        seen = torch.where(self._keys[place] == keys, self._pairs[place], 0).double()  # (B * (N - 1),)
        starts = torch.zeros_like(self.ones).index_add_(0, self._keys // self.vocab_size, self._pairs)
        weight, log_one = self.vocab_size**0.5, self._log_frequencies()
        p = (seen + weight * log_one[after.flatten()].exp()) / (starts[before.flatten()] + weight)
        return float(-(log_one[tokens[:, 0]].sum() + p.log().sum()) / tokens.numel())

    def _log_frequencies(self) -> Tensor:
        frequencies = (self.ones.double() + 1).log()
        return frequencies - frequencies.logsumexp(0)
