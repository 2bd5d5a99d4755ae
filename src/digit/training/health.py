"""Whether a run is well: a stop when the loss is lost, and how good counting alone would be."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.training import checkpoint
from digit.training.task import Batch, Step

_WINDOW, _ENOUGH = 50, 20


class Guard:
    """Stops the run in ``out`` when a loss is no longer finite, or is above ``max_spike`` times the median of the last
    50; ``scaled``: fp16's loss scaling skips steps whose gradients overflow by itself.

    Losses stay on their device until :meth:`check`, which the loop calls before it logs, validates or saves: so no
    step waits for the device, and nothing is written after a step that went wrong.
    """

    def __init__(self, out: Path, max_spike: float = 0.0, scaled: bool = False) -> None:
        self.out, self.max_spike, self.scaled = out, max_spike, scaled
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self._noted: list[tuple[Tensor, Tensor, Step, str]] = []

    def note(self, loss: Tensor, norm: Tensor, batch: Batch, step: Step, optimizer: str) -> None:
        """Take the loss () and the gradient norm () of a step."""
        self._noted.append((torch.stack([loss.float(), norm.float()]), batch["index"], step, optimizer))

    def check(self) -> None:
        """Look at all that was noted since the last check; a DigitError names the first step that went wrong, the
        images of its batch, and the last checkpoint.
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
    """What frequencies alone know of token sequences, the baselines that a model must beat. ``parts`` are training
    tokens (B, N) int64 below ``vocab_size``.
    """

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
        """The same, where every token but the first is told by the one before it.

        The frequency after a token is drawn towards the overall frequency as if that had been seen ``vocab_size **
        0.5`` times (a Dirichlet prior; MacKay & Peto 1995): rare pairs need it.
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
