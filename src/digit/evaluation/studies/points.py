"""Fidelity of sampling runs at points, against one reference that is measured once; and over a share of the tokens.

``prefix``, the paper's figure 4b: real images' first tokens are kept, the prior samples the rest. It shows how errors
of the prior build up; at full length only the decoders are left, the ceiling of the model. ``robustness``: the same
prior and tokens go through each decoder while a share of the tokens is replaced. The paper's section 3 says that
iterative decoders can correct what instability breaks; this measures it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation.metrics.features import Source, measure
from digit.evaluation.metrics.fidelity import TITLES, FidelityOptions, compare
from digit.evaluation.metrics.inception import TorchExtractor
from digit.evaluation.metrics.stability import SPACES
from digit.evaluation.metrics.statistics import FeatureSet
from digit.evaluation.model_source import SamplingRun, as_uint8, describe_data, encode_all
from digit.evaluation.results import Result, Rows, lines_figure, timed
from digit.evaluation.steps import Step, Steps
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokens import Tokens, load_tokens_file, save_tokens_file
from digit.sampling.rng import uniforms

Point = Mapping[str, Any]
"""What was measured at one point: what it is of, ``values``, ``not_measured``, ``notes`` and ``seconds``."""
Planned = tuple[dict[str, Any], dict[str, Any], Callable[[], dict[str, Any]]]
"""A point to measure: what it is of, what it depends on (plain JSON), and the work."""
SHOWN = {key: title for key, title in TITLES.items() if not key.endswith("_std") and key != "f_score"}
"""The metrics of a table or figure, and their titles."""


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


def measure_points(steps: Steps, title: str, planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Measure every point that an earlier, interrupted run has not finished."""
    points = []
    with bar(title, len(planned), "points") as progress:
        for facts, inputs, work in planned:
            value = steps.run("points", inputs, lambda _, work=work: work()).value  # type: ignore[misc]
            points.append({**facts, **value})
            known = {TITLES[key]: value["values"].get(key) for key in ("fid", "is_mean")}
            progress.advance(1, "  ".join(f"{title} {v:.2f}" for title, v in known.items() if v is not None))
    return points


def point_notes(points: Sequence[Point]) -> tuple[str, ...]:
    """Notes and reasons of all points, each once."""
    return tuple(dict.fromkeys(line for p in points for line in (*p["notes"], *p["not_measured"].values())))


def point_cells(point: Point) -> dict[str, Any]:
    """The cells of a point's row: its values, as far as it has them."""
    return {title: point["values"][key] for key, title in SHOWN.items() if key in point["values"]}


# ---- over a share of the tokens --------------------------------------------------------------------------------------

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True, kw_only=True)
class Curves(Result):
    """``values``: a curve for each model or decoder, with its ``points``.

    Of a prefix, curves have ``name`` and ``space``, points the ``share`` and the number of ``given`` tokens. Of
    robustness, curves have ``decoder``, points ``rate``, ``vq`` (the share of VQ tokens that are those of the undamaged
    decode; None where there are none) and ``pixels`` (the mean absolute change, of 255).
    """

    kinds: ClassVar[tuple[str, ...]] = ("prefix", "robustness")
    values: list[dict[str, Any]]

    def rows(self) -> Rows:
        return [{**_heads(curve, p), **_cells(p)} for curve in self.values for p in curve["points"]]

    def figure(self) -> Any:
        shown: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for curve in self.values:
            name = (
                f"{curve['decoder']} decoder" if "decoder" in curve else f"{curve['name']} ({SPACES[curve['space']]})"
            )
            for point in curve["points"]:
                x = 100 * point.get("rate", point.get("share"))
                for title, value in _cells(point).items():
                    shown.setdefault(title, {}).setdefault(name, []).append((x, value))
        what = "given prefix, % of the tokens" if self.kind == "prefix" else "replaced semantic tokens, %"
        return lines_figure(shown, what)


def _heads(curve: Mapping[str, Any], point: Point) -> dict[str, Any]:
    if "decoder" in curve:
        return {"Decoder": curve["decoder"], "Replaced tokens": f"{100 * point['rate']:g}%"}
    return {"Model": curve["name"], "Given": f"{point['share']:.1%}", "Tokens": point["given"]}


def _cells(point: Point) -> dict[str, Any]:
    vq, pixels = point.get("vq"), point.get("pixels")
    agreement = {"VQ tokens that stay, % ↑": vq and 100 * vq, "Mean change of pixels, of 255 ↓": pixels}
    return {**point_cells(point), **{title: value for title, value in agreement.items() if value is not None}}


def _check(shares: Sequence[float], what: str) -> list[float]:
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise DigitError(f"The {what} {', '.join(map(str, shares))} were given; expected numbers from 0 to 1.")
    return sorted(set(shares))


@timed
def prefix(
    runs: Mapping[str, SamplingRun],
    dataset: ImageDataset,
    reference: Reference,
    out: str | Path,
    shares: Sequence[float] = SHARES,
) -> Curves:
    """Measure completions of real images by one or more models, going on where an earlier run into ``out`` stopped.

    Args:
        runs: name -> model, seed and settings, such as a model and the baseline over VQ tokens. The number of images
            and their labels follow from ``dataset``: every image is completed under its own class.
        dataset: the images whose first tokens are given.
        shares: of the tokens that are given, 0 to 1.

    Raises:
        DigitError: shares out of range, or a model that cannot tokenize and generate.
    """
    shares, against, labels = _check(shares, "shares"), reference.describe(), dataset.labels.tolist()
    runs = {
        name: replace(run, num=len(dataset), labels=labels if run.pipe.num_classes else None).check()
        for name, run in runs.items()
    }
    curves: list[dict[str, Any]] = []
    for name, run in runs.items():
        encoded = cache(partial(encode_all, run.pipe, dataset, run.batch_size))  # (n, N), where a point needs it

        def complete(given: int, run: SamplingRun = run, encoded: Callable[[], Tensor] = encoded) -> dict[str, Any]:
            whole = torch.cat([part.cpu() for part in run.prior(encoded()[:, :given])])
            return reference.measure(run.batches(whole), run.num, f"{given} tokens given")

        shared = {**run.identity(), **run.stages(), "model": describe_model(run.pipe)["parts"]}
        steps = Steps(Path(out) / name, {**shared, "images": dataset.fingerprint, "reference": against})
        lengths = [(share, round(share * run.pipe.part("prior").config.length)) for share in shares]
        planned = [({"share": share, "given": n}, {"given": n}, partial(complete, n)) for share, n in lengths]
        points = measure_points(steps, f"Prefixes of {SPACES[run.pipe.space]}", planned)
        curves.append({"name": name, "space": run.pipe.space, "points": points})
    return Curves(
        kind="prefix",
        title="Fidelity against the length of the given prefix (figure 4b)",
        values=curves,
        settings={"shares": shares, "reference": against, "runs": {name: run.describe() for name, run in runs.items()}},
        model={name: describe_model(run.pipe) for name, run in runs.items()},
        data=describe_data(dataset, *(run.pipe for run in runs.values())),
        notes=point_notes([point for curve in curves for point in curve["points"]]),
    )


def as_runs(pipes: Sequence[DigitPipeline], **settings: Any) -> dict[str, SamplingRun]:
    """A run for each model by its name; names that repeat get a number."""
    runs: dict[str, SamplingRun] = {}
    for pipe in pipes:
        name = pipe.name if pipe.name not in runs else f"{pipe.name}-{len(runs) + 1}"
        runs[name] = SamplingRun(pipe, 1, **settings)
    return runs


def replaced(tokens: Tensor, rate: float, vocab: int, images: Sequence[int], seed: int) -> Tensor:
    """Tokens (B, N) of some images of a run, each replaced by another one of ``vocab`` with probability ``rate``. What
    is replaced at one rate is at every higher one, by the same token.
    """
    chosen, other = uniforms(seed, images, "robustness", (2, tokens.shape[1])).unbind(1)  # (B, N) each, in [0, 1)
    moved = (tokens + 1 + (other.to(tokens.device) * (vocab - 1)).long()) % vocab
    return torch.where(chosen.to(tokens.device) < rate, moved, tokens)


@timed
def robustness(
    run: SamplingRun,
    reference: Reference,
    out: str | Path,
    decoders: Sequence[str] = (),
    rates: Sequence[float] = RATES,
) -> Curves:
    """Measure every decoder at every rate, going on where an earlier run into the folder ``out`` stopped.

    Args:
        run: every decoder gets the tokens of its prior.
        decoders: kinds; all of the model's if there are none.
        rates: of the tokens that are replaced, 0 to 1; agreement is with the decode of undamaged tokens, by the same
            random numbers.

    Raises:
        DigitError: rates out of range, a decoder that the model lacks, or settings that it cannot do.
    """
    rates = _check(rates, "rates")
    if run.pipe.space == "vq":
        raise DigitError(f"The model '{run.pipe.name}' predicts VQ tokens itself; there is no decoder to compare.")
    runs = {kind: replace(run, decoder=kind).check() for kind in decoders or run.pipe.decoders}
    model, against = describe_model(run.pipe), reference.describe()
    shared = {"num": run.num, "seed": run.seed, "labels": run.identity()["labels"], "model": model["parts"]}
    steps = Steps(Path(out), shared)
    curves: list[dict[str, Any]] = []
    for kind, each in runs.items():
        inputs = {**each.stages(), "decoder_kind": kind, "reference": against}
        planned = [
            ({"rate": rate}, {**inputs, "rate": rate}, partial(_damaged, each, reference, steps, rate))
            for rate in rates
        ]
        points = measure_points(steps, f"Robustness of the {kind} decoder", planned)
        curves.append({"decoder": kind, "points": points})
    told = {f"{kind} decoder": each.describe() for kind, each in runs.items()}
    return Curves(
        kind="robustness",
        title="Decoders while tokens are replaced",
        values=curves,
        settings={"rates": rates, "reference": against, "runs": told},
        model=model,
        notes=(
            "A replaced token is any other one, with equal probability. Prior, tokens and random numbers are the same "
            "for all decoders and rates.",
            *point_notes([point for curve in curves for point in curve["points"]]),
        ),
    )


def _damaged(run: SamplingRun, reference: Reference, steps: Steps, rate: float) -> dict[str, Any]:
    """Fidelity of the prior's tokens with damage, and how far it is from the decode of whole ones."""
    pipe, vocab, (tokens, _) = run.pipe, run.pipe.part("prior").config.vocab_size, prior_step(steps, run)
    same, moved = [], []  # of each image: the share of equal VQ tokens, and the mean change of pixels

    @torch.inference_mode()
    def images() -> Iterator[Tensor]:
        for part in run.request.batches(run.batch_size):
            first = tokens[list(part.images)]
            whole = pipe.complete(first, part)
            broken = pipe.complete(replaced(first, rate, vocab, part.images, run.seed), part)
            ours, others = (as_uint8(pipe.to_pixels(each)) for each in (broken, whole))
            if whole.vq is not None and broken.vq is not None:
                same.append((whole.vq == broken.vq).float().mean(1).cpu())
            moved.append((ours.float() - others.float()).abs().mean((1, 2, 3)))
            yield ours

    found = reference.measure(images(), run.num, f"{run.decoder} at {rate:g}")
    return {**found, "vq": float(torch.cat(same).mean()) if same else None, "pixels": float(torch.cat(moved).mean())}
