"""Vector quantisation in training: a codebook that follows the latents by moving averages, and codes that are never
dead.

Sources: [0] van den Oord et al. 2017, arXiv 1711.00937, appendix A.1 (moving averages). [1] Dhariwal et al. 2020, arXiv
2005.00341, section 3.1 (codes that fall out of use are put on a random latent). [2] Fifty et al. 2024, arXiv 2410.06424
(rotation). [3] Yu et al. 2022, arXiv 2110.04627, section 3.2 (unit vectors).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.clustering.streams import summed, together
from digit.models.codebook import nearest

_KMEANS_STEPS = 5
_SMOOTH = 1e-5
_SETTLED = 10_000  # updates after which the averages move at their final speed


class EmaQuantizer(nn.Module):
    """Snaps latents to a codebook, which it moves. Its state is all in buffers, so a checkpoint resumes it exactly.

    Attributes:
        codebook: (V, D), the VQGAN's own parameter.
        uses, sums: (V,), (V, D) moving averages of how many latents of a batch take each code, and of their sums.
        updates: () int64, how often the codebook has been moved; 0 until it is put on data.
    """

    updates: Tensor
    uses: Tensor
    sums: Tensor
    _batch_uses: Tensor
    _batch_sums: Tensor

    def __init__(
        self,
        codebook: nn.Parameter,
        decay: float,
        dead_below: float,
        gradient: Literal["straight-through", "rotation"],
        normalize: bool = False,
    ) -> None:
        """Take a codebook (V, D) without gradients.

        Args:
            decay: of the moving averages; less at first, min(decay, (1 + k) / (10 + k)) at update k, while latents move
                fast.
            dead_below: a code whose average use falls below this share of the mean use is put on a recent latent.
            gradient: "straight-through" copies it; "rotation" turns and scales it as a latent is turned to its code
                [2].
            normalize: latents and codes are unit vectors [3].
        """
        super().__init__()
        self.codebook = codebook
        self.decay, self.dead_below, self.gradient, self.normalize = decay, dead_below, gradient, normalize
        codes, dim = codebook.shape
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("uses", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))
        # of the step under way: zero between steps, so they need not be saved
        self.register_buffer("_batch_uses", torch.zeros(codes), persistent=False)
        self.register_buffer("_batch_sums", torch.zeros(codes, dim), persistent=False)
        self._recent: list[Tensor] = []
        self._begun = False  # whether the codes are on data, known without asking the device at every step

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise latents (B, D, h, w): codes of that shape through which gradients pass, tokens (B, h * w) int64, and
        the commitment loss (), the mean squared distance of a latent's elements from its code's.
        """
        with torch.autocast(latents.device.type, enabled=False):
            z = self._scaled(latents.float().flatten(2).transpose(1, 2))  # (B, M, D)
            flat = z.detach().flatten(0, 1)  # (B M, D)
            if self.training and not self._begun:
                self._start(flat)
            tokens = nearest(z.detach(), self.codebook)  # (B, M)
            codes = F.embedding(tokens, self.codebook)  # (B, M, D)
            if self.training:
                uses, sums = _totals(flat, tokens.flatten(), len(self.codebook))
                self._batch_uses += uses
                self._batch_sums += sums
                self._recent.append(flat)
            commitment = F.mse_loss(z, codes)
            passed = z + (codes - z).detach() if self.gradient == "straight-through" else rotate(z, codes)
            return passed.transpose(1, 2).reshape(latents.shape), tokens, commitment

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def _start(self, latents: Tensor) -> None:
        """Put the codes on latents (n, D) of the first batch, by a few steps of k-means, unless a checkpoint brought
        some.
        """
        self._begun = True
        if self.updates:
            return
        codes = len(self.codebook)
        order = torch.cat([torch.randperm(len(latents)) for _ in range(-(-codes // len(latents)))])[:codes]
        centres = latents[order.to(latents.device)].clone()
        for _ in range(_KMEANS_STEPS):
            uses, sums = _totals(latents, nearest(latents, centres), codes)
            centres = self._scaled(torch.where(uses[:, None] > 0, sums / uses.clamp(min=1)[:, None], centres))
        self.codebook.copy_(_from_first_process(centres))
        self._reset(torch.ones_like(self.uses, dtype=torch.bool), len(latents) / codes)

    @torch.no_grad()
    def go_on(self) -> None:
        """Begin with the codebook as it is, instead of putting it on the first batch."""
        self._reset(torch.ones_like(self.uses, dtype=torch.bool), 1.0)
        self.updates.fill_(_SETTLED)

    def _reset(self, which: Tensor, uses: float | Tensor) -> None:
        """Give codes (V,) bool the averages of ones that have long been used so often."""
        self.uses.copy_(torch.where(which, uses, self.uses))
        self.sums.copy_(torch.where(which[:, None], self.codebook * uses, self.sums))

    @torch.no_grad()
    def update(self) -> None:
        """Move the codebook by what the step's batch took, and revive dead codes. Once a step, on every process."""
        uses, sums = summed(self._batch_uses), summed(self._batch_sums)
        weight = 1 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        self.updates += 1
        self.uses.lerp_(uses, weight)
        self.sums.lerp_(sums, weight)
        total = self.uses.sum()
        # additive smoothing, as in [0]'s code: a code that is hardly used does not jump
        smoothed = (self.uses + _SMOOTH) / (total + len(self.uses) * _SMOOTH) * total
        self.codebook.copy_(self._scaled(self.sums / smoothed[:, None]))
        self._revive(torch.cat(self._recent))
        self._batch_uses.zero_()
        self._batch_sums.zero_()
        self._recent.clear()

    def _revive(self, latents: Tensor) -> None:
        mean = self.uses.mean()
        dead = self.uses < self.dead_below * mean  # (V,)
        chosen = latents[torch.randint(len(latents), (len(dead),), device=latents.device)]  # (V, D)
        self.codebook.copy_(torch.where(dead[:, None], _from_first_process(chosen), self.codebook))
        self._reset(dead, mean)

    def statistics(self) -> dict[str, Tensor]:
        """Share of the codes in use, and the perplexity of their average use (V if all are used alike)."""
        share = self.uses / self.uses.sum().clamp(min=_SMOOTH)
        perplexity = torch.exp(-(share * (share + 1e-10).log()).sum())
        used = self.uses >= self.dead_below * self.uses.mean()
        return {"codebook_use": used.float().mean(), "perplexity": perplexity}


def rotate(z: Tensor, codes: Tensor) -> Tensor:
    """The codes (..., D), as rotation and scaling of the latents (..., D), held constant [2]."""
    with torch.no_grad():
        length = z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        scale = codes.norm(dim=-1, keepdim=True) / length
        start, end = z / length, F.normalize(codes, dim=-1, eps=1e-6)
        middle = F.normalize(start + end, dim=-1, eps=1e-6)

    def along(axis: Tensor) -> Tensor:
        return (z * axis).sum(-1, keepdim=True)

    turned: Tensor = z - 2 * along(middle) * middle + 2 * along(start) * end
    scaled: Tensor = scale * turned
    return scaled


def _totals(latents: Tensor, tokens: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """How many latents (n, D) took each code (V,), and their sums (V, D)."""
    # not bincount, which waits for the device to learn how long its result is
    uses = torch.zeros(codes, device=latents.device).index_add_(0, tokens, torch.ones_like(latents[:, 0]))
    sums = torch.zeros(codes, latents.shape[1], device=latents.device).index_add_(0, tokens, latents)
    return uses, sums


def _from_first_process(value: Tensor) -> Tensor:
    value = value.contiguous()
    if together():
        torch.distributed.broadcast(value, 0)
    return value
