"""Fidelity against the length of a given prefix, the paper's figure 4b: real images' first tokens are kept, the prior
samples the rest.

It shows how errors of the prior build up: the shorter the prefix, the more of an image is the prior's own. At full
length only the decoders are left, the ceiling of the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation.metrics.fidelity import TITLES
from digit.evaluation.model_source import SamplingRun, describe_data, encode_all
from digit.evaluation.results import Result, Rows, lines_figure
from digit.evaluation.steps import Steps
from digit.evaluation.studies.points import SPACES, Point, Reference, measured, point_cells, point_notes
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class Prefix(Result):
    """``values``: of each model its ``name``, ``space`` and ``points`` (with ``share`` and ``given`` tokens)."""

    kind: str = "prefix"

    def rows(self) -> Rows:
        return [
            {"Model": curve["name"], "Given": f"{p['share']:.1%}", "Tokens": p["given"], **point_cells(p)}
            for curve in self.values
            for p in curve["points"]
        ]

    def figure(self) -> Any:
        shown = {
            TITLES[metric]: {
                f"{c['name']} ({SPACES[c['space']]})": [(100 * p["share"], p["values"][metric]) for p in c["points"]]
                for c in self.values
            }
            for metric in measured([point for curve in self.values for point in curve["points"]])
        }
        return lines_figure(shown, "given prefix, % of the tokens")


def prefix(
    runs: Mapping[str, SamplingRun],
    dataset: ImageDataset,
    reference: Reference,
    out: str | Path,
    shares: Sequence[float] = SHARES,
) -> Prefix:
    """Measure completions of real images by one or more models, going on where an earlier run into ``out`` stopped.

    Args:
        runs: name -> model, seed and settings, such as a model and the baseline over VQ tokens. The number of images
            and their labels follow from ``dataset``: every image is completed under its own class.
        dataset: the images whose first tokens are given.
        shares: of the tokens that are given, 0 to 1.

    Raises:
        DigitError: shares out of range, or a model that cannot tokenize and generate.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise DigitError(f"The shares {', '.join(map(str, shares))} were given; expected numbers from 0 to 1.")
    began, shares = time.monotonic(), sorted(shares)
    runs = {
        name: replace(run, num=len(dataset), labels=dataset.labels.tolist() if run.pipe.num_classes else None)
        for name, run in runs.items()
    }
    for run in runs.values():
        run.check()
    curves: list[dict[str, Any]] = [
        {"name": name, "space": run.pipe.space, "points": _points(run, dataset, reference, Path(out) / name, shares)}
        for name, run in runs.items()
    ]
    return Prefix(
        title="Fidelity against the length of the given prefix (figure 4b)",
        values=curves,
        settings={
            "shares": shares,
            "reference": reference.describe(),
            "runs": {name: run.describe() for name, run in runs.items()},
        },
        model={name: describe_model(run.pipe) for name, run in runs.items()},
        data=describe_data(dataset, *(run.pipe for run in runs.values())),
        notes=point_notes([point for curve in curves for point in curve["points"]]),
        seconds=time.monotonic() - began,
    )


def _points(
    run: SamplingRun, dataset: ImageDataset, reference: Reference, out: Path, shares: Sequence[float]
) -> list[Point]:
    """A point for each share."""
    inputs = {**run.identity(), **run.stages(), "model": describe_model(run.pipe)["parts"]}
    steps = Steps(out, {**inputs, "images": dataset.fingerprint, "reference": reference.describe()})

    @cache
    def tokens() -> torch.Tensor:
        return encode_all(run.pipe, dataset, run.batch_size)  # (n, N)

    def measure(given: int) -> dict[str, Any]:
        whole = torch.cat([part.cpu() for part in run.prior(tokens()[:, :given])])
        return reference.measure(run.batches(whole), run.num, f"{given} tokens given")

    points: list[Point] = []
    with bar(f"Prefixes of {SPACES[run.pipe.space]}", len(shares), "lengths") as progress:
        for share in shares:
            given = round(share * run.pipe.part("prior").config.length)
            step = steps.run("points", {"given": given}, lambda _, given=given: measure(given))  # type: ignore[misc]
            points.append({"share": share, "given": given, **step.value})
            progress.advance()
    return points


def as_runs(pipes: Sequence[DigitPipeline], **settings: Any) -> dict[str, SamplingRun]:
    """A run for each model by its name; names that repeat get a number."""
    runs: dict[str, SamplingRun] = {}
    for pipe in pipes:
        name = pipe.name if pipe.name not in runs else f"{pipe.name}-{len(runs) + 1}"
        runs[name] = SamplingRun(pipe, 1, **settings)
    return runs
