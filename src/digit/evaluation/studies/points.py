"""Points of a study: fidelity of one sampling run each, against one reference that is measured once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.core.config import to_dict
from digit.core.progress import bar
from digit.evaluation.metrics.features import Source, measure
from digit.evaluation.metrics.fidelity import TITLES, FidelityOptions, compare
from digit.evaluation.metrics.inception import TorchExtractor
from digit.evaluation.metrics.statistics import FeatureSet
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.steps import Step, Steps
from digit.pipeline.tokens import Tokens, load_tokens_file, save_tokens_file

Point = Mapping[str, Any]
"""What was measured at one point: its settings, ``values``, ``not_measured``, ``notes`` and ``seconds``."""
SHOWN = {key: title for key, title in TITLES.items() if not key.endswith("_std") and key != "f_score"}
"""The metrics of a table or figure, and their titles."""
SPACES = {"semantic": "semantic tokens", "vq": "VQ tokens"}


@dataclass
class Reference:
    """What generated images are compared with, measured once, and how."""

    features: FeatureSet
    extractor: TorchExtractor
    options: FidelityOptions

    @classmethod
    def of(
        cls, source: Source, extractor: TorchExtractor, options: FidelityOptions, split: str | None = None
    ) -> Reference:
        """Measure real images, or read their statistics."""
        features = measure(source, extractor, options.metrics, batch_size=options.batch_size, split=split)
        return cls(features, extractor, options)

    def describe(self) -> dict[str, Any]:
        """What decides whether two values may be compared."""
        side = self.features
        return {
            "name": side.name,
            "images": side.statistics.n,
            **({"filter": resized} if (resized := side.statistics.metadata.get("filter")) else {}),
            "trace": f"{side.statistics.sigma.trace():.6g}",  # tells references of one name apart
            "weights": self.extractor.weights.sha256,
            "options": {k: v for k, v in to_dict(self.options).items() if k != "batch_size"},
        }

    def measure(self, batches: Iterable[Tensor], total: int, name: str) -> dict[str, Any]:
        """Fidelity of images, given as batches (B, 3, S, S) uint8, as the values of a :data:`Point`."""
        began, batch_size = time.monotonic(), self.options.batch_size
        images = measure(batches, self.extractor, self.options.metrics, batch_size=batch_size, name=name, total=total)
        found = compare(images, self.features, self.options)
        seconds = round(time.monotonic() - began, 2)
        return {
            "values": found.values, "not_measured": found.not_measured, "notes": list(found.notes), "seconds": seconds
        }  # fmt: skip


def prior_step(steps: Steps, run: SamplingRun) -> tuple[Tensor, Step]:
    """The prior's tokens (num, N) of a run, which points that differ in the decoder alone share."""

    def work(folder: Path) -> None:
        parts = []
        with bar("Sampling the prior", run.num) as progress:
            for part in run.prior():
                parts.append(part.cpu())
                progress.advance(len(part))
        save_tokens_file(folder / "tokens.npz", Tokens.of({run.pipe.space: torch.cat(parts)}))

    step = steps.run("tokens", {"prior": run.stages()["prior"]}, work)
    tokens: Tensor = getattr(load_tokens_file(step.folder / "tokens.npz"), run.pipe.space)
    return tokens, step


# ---- what is shown ---------------------------------------------------------------------------------------------------


def point_notes(points: Sequence[Point]) -> tuple[str, ...]:
    """Notes and reasons of all points, each once."""
    return tuple(dict.fromkeys(line for p in points for line in (*p["notes"], *p["not_measured"].values())))


def measured(points: Sequence[Point]) -> list[str]:
    """The metrics that every point has."""
    return [key for key in SHOWN if points and all(key in point["values"] for point in points)]


def point_cells(point: Point) -> dict[str, Any]:
    """The cells of a point's row: its values, as far as it has them."""
    return {title: point["values"][key] for key, title in SHOWN.items() if key in point["values"]}
