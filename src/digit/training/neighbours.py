"""The weighted nearest-neighbour classifier: what features are worth, without training anything on them.

Source: Wu et al. 2018, arXiv 1805.01978, section 3.4: cosine similarity, votes weighted by exp(similarity / 0.07); DINO
(arXiv 2104.14294, section 4.1) found 20 neighbours best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1000


def neighbour_accuracy(
    memory: Tensor,
    memory_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the queries (m, D), of classes ``labels`` (m,), whose class wins the vote of their nearest neighbours
    among the features ``memory`` (n, D), of classes ``memory_labels`` (n,). A vote counts exp(cosine / temperature).
    """
    with torch.autocast(memory.device.type, enabled=False):
        memory = F.normalize(memory.float(), dim=1).T.contiguous()  # (D, n)
        classes = int(torch.cat([memory_labels, labels]).max()) + 1
        right = 0
        for chunk, expected in zip(torch.split(queries, _CHUNK), torch.split(labels, _CHUNK), strict=True):
            similar, nearest = (F.normalize(chunk.float(), dim=1) @ memory).topk(min(neighbours, memory.shape[1]))
            votes = similar.new_zeros(len(chunk), classes)
            votes.scatter_add_(1, memory_labels[nearest], (similar / temperature).exp())
            right += int((votes.argmax(1) == expected).sum())
    return right / len(queries)
