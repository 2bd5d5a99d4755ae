"""What decoders make of damaged tokens: the same prior and tokens go through each decoder while a share of the tokens
is replaced. The paper's section 3 says that iterative decoders can correct what instability breaks; this measures it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.evaluation.metrics.fidelity import TITLES
from digit.evaluation.model_source import SamplingRun, as_uint8
from digit.evaluation.results import Result, Rows, lines_figure
from digit.evaluation.steps import Steps
from digit.evaluation.studies.points import (
    Point,
    Reference,
    measured,
    point_cells,
    point_notes,
    prior_step,
)
from digit.pipeline.card import describe_model
from digit.sampling.rng import uniforms

RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
_AGREEMENT = {"vq": "VQ tokens that stay, % ↑", "pixels": "Mean change of pixels, of 255 ↓"}


@dataclass(frozen=True, kw_only=True)
class Robustness(Result):
    """``values``: of each decoder its ``decoder`` and ``points``, with ``rate``, ``vq`` (the share of VQ tokens that
    are those of the undamaged decode; None where there are none) and ``pixels`` (the mean absolute change, of 255).
    """

    kind: str = "robustness"

    def rows(self) -> Rows:
        return [
            {"Decoder": curve["decoder"], "Replaced tokens": f"{100 * p['rate']:g}%", **point_cells(p), **_agreement(p)}
            for curve in self.values
            for p in curve["points"]
        ]

    def figure(self) -> Any:
        points = [point for curve in self.values for point in curve["points"]]
        titles = [*(TITLES[metric] for metric in measured(points)), *_AGREEMENT.values()]
        shown: dict[str, dict[str, list[tuple[float, float]]]] = {title: {} for title in titles}
        for curve in self.values:
            for point in curve["points"]:
                for title, value in {**point_cells(point), **_agreement(point)}.items():
                    if title in shown:
                        line = shown[title].setdefault(f"{curve['decoder']} decoder", [])
                        line.append((100 * point["rate"], value))
        return lines_figure({title: lines for title, lines in shown.items() if lines}, "replaced semantic tokens, %")


def _agreement(point: Point) -> dict[str, float]:
    values = {"vq": point["vq"] and 100 * point["vq"], "pixels": point["pixels"]}
    return {_AGREEMENT[key]: value for key, value in values.items() if value is not None}


def replaced(tokens: Tensor, rate: float, vocab: int, images: Sequence[int], seed: int) -> Tensor:
    """Tokens (B, N) of some images of a run, each replaced by another one of ``vocab`` with probability ``rate``. What
    is replaced at one rate is at every higher one, by the same token.
    """
    chosen, other = uniforms(seed, images, "robustness", (2, tokens.shape[1])).unbind(1)  # (B, N) each, in [0, 1)
    moved = (tokens + 1 + (other.to(tokens.device) * (vocab - 1)).long()) % vocab
    return torch.where(chosen.to(tokens.device) < rate, moved, tokens)


def robustness(
    run: SamplingRun,
    reference: Reference,
    out: str | Path,
    decoders: Sequence[str] = (),
    rates: Sequence[float] = RATES,
) -> Robustness:
    """Measure every decoder at every rate, going on where an earlier run into the folder ``out`` stopped.

    Args:
        run: every decoder gets the tokens of its prior.
        decoders: kinds; all of the model's if there are none.
        rates: of the tokens that are replaced, 0 to 1; agreement is with the decode of undamaged tokens, by the same
            random numbers.

    Raises:
        DigitError: rates out of range, a decoder that the model lacks, or settings that it cannot do.
    """
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise DigitError(f"The rates {', '.join(map(str, rates))} were given; expected numbers from 0 to 1.")
    began, rates = time.monotonic(), sorted(set(rates))
    if run.pipe.space == "vq":
        raise DigitError(f"The model '{run.pipe.name}' predicts VQ tokens itself; there is no decoder to compare.")
    runs = {kind: replace(run, decoder=kind) for kind in decoders or run.pipe.decoders}
    for each in runs.values():
        each.check()
    model, against = describe_model(run.pipe), reference.describe()
    steps = Steps(
        Path(out), {"num": run.num, "seed": run.seed, "labels": run.identity()["labels"], "model": model["parts"]}
    )
    curves: list[dict[str, Any]] = []
    with bar("Robustness", len(runs) * len(rates), "points") as progress:
        for kind, each in runs.items():
            tokens, _ = prior_step(steps, each)
            points = []
            for rate in rates:
                inputs = {**each.stages(), "decoder_kind": kind, "rate": rate, "reference": against}
                step = steps.run("points", inputs, lambda _, e=each, t=tokens, r=rate: _point(e, t, r, reference))  # type: ignore[misc]
                points.append({"rate": rate, **step.value})
                progress.advance(1, f"FID {step.value['values'].get('fid', float('nan')):.2f}")
            curves.append({"decoder": kind, "points": points})
    return Robustness(
        title="Decoders while tokens are replaced",
        values=curves,
        settings={
            "rates": rates,
            "reference": against,
            "runs": {f"{kind} decoder": r.describe() for kind, r in runs.items()},
        },
        model=model,
        notes=(
            "A replaced token is any other one, with equal probability. Prior, tokens and random numbers are the same "
            "for all decoders and rates.",
            *point_notes([point for curve in curves for point in curve["points"]]),
        ),
        seconds=time.monotonic() - began,
    )


def _point(run: SamplingRun, tokens: Tensor, rate: float, reference: Reference) -> dict[str, Any]:
    """Fidelity of the prior's ``tokens`` (num, N) with damage, and how far it is from the decode of whole ones."""
    pipe, vocab = run.pipe, run.pipe.part("prior").config.vocab_size
    same, moved = [], []  # of each image: the share of equal VQ tokens, and the mean change of pixels

    @torch.inference_mode()
    def damaged() -> Iterator[Tensor]:
        for part in run.request.batches(run.batch_size):
            first = tokens[list(part.images)]
            whole = pipe.complete(first, part)
            broken = pipe.complete(replaced(first, rate, vocab, part.images, run.seed), part)
            images, others = (as_uint8(pipe.to_pixels(each)) for each in (broken, whole))
            if whole.vq is not None and broken.vq is not None:
                same.append((whole.vq == broken.vq).float().mean(1).cpu())
            moved.append((images.float() - others.float()).abs().mean((1, 2, 3)))
            yield images

    found = reference.measure(damaged(), run.num, f"{run.decoder} at {rate:g}")
    return {**found, "vq": float(torch.cat(same).mean()) if same else None, "pixels": float(torch.cat(moved).mean())}
