"""Fidelity against the length of a given prefix, the paper's figure 4b: real images' first tokens are kept, the prior
samples the rest.

It shows how errors of the prior build up: the shorter the prefix, the more of an image is the prior's own. At full
    length only the
decoders are left, the ceiling of the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation.model_source import SamplingRun, describe_data, encode_all
from digit.evaluation.result import OTHER, OURS, Record, describe_model, figure
from digit.evaluation.studies.points import Points
from digit.evaluation.studies.sweep import TITLES, Reference, fidelity_notes, measured
from digit.pipeline.pipeline import DigitPipeline

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
_SPACE = {"semantic": "semantic tokens", "vq": "VQ tokens"}


def prefix_fidelity(
    run: SamplingRun, dataset: ImageDataset, reference: Reference, out: str | Path, shares: Sequence[float] = SHARES
) -> list[dict[str, Any]]:
    """Measure completions of real images, going on where an earlier run into ``out`` stopped.

    Args:
        run: model, seed and settings; ``num`` and ``labels`` follow from the images: every image is completed under its
            own class.
        dataset: the images whose first tokens are given.
        reference: what completions are compared with.
        out: a folder.
        shares: of the N tokens that are given, 0 to 1.

    Returns:
        A record for each share: ``share``, ``given`` tokens, and values as
            :func:`~digit.evaluation.studies.sweep.sweep` has them.

    Raises:
        DigitError: shares out of range, or a model that cannot tokenize and generate.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise DigitError(f"The shares {', '.join(map(str, shares))} were given; expected numbers from 0 to 1.")
    run = _over(run, dataset)
    run.check()
    common = {
        "model": describe_model(run.pipe)["parts"],
        "reference": reference.describe(),
        "images": dataset.fingerprint,
    }
    identity = {**run.describe(), **common}
    del identity["batch_size"]  # it has no influence
    store = Points(Path(out) / "points", identity)
    tokens, found = None, []
    with bar(f"Prefixes of {_SPACE[run.pipe.space]}", len(shares), "lengths") as progress:
        for share in shares:
            given = round(share * run.pipe.part("prior").config.length)
            value = store.get({"given": given})
            if value is None:
                if tokens is None:
                    tokens = encode_all(run.pipe, dataset, run.batch_size)  # (n, N)
                whole = torch.cat([part.cpu() for part in run.prior(tokens[:, :given])])
                value = store.put({"given": given}, reference.judge(run, whole, f"{given} tokens given"))
            found.append({"share": share, "given": given, **value})
            progress.advance()
    return found


def prefix_record(
    runs: Mapping[str, SamplingRun],
    dataset: ImageDataset,
    reference: Reference,
    out: str | Path,
    shares: Sequence[float] = SHARES,
) -> tuple[Record, dict[str, list[dict[str, Any]]]]:
    """Measure one or more models, and write ``result.json`` and ``prefix.png`` into ``out``.

    Args:
        runs: name -> model and settings, such as a model and the baseline over VQ tokens.
        dataset, reference, shares: see :func:`prefix_fidelity`.
        out: a folder.
    """
    out, began = Path(out), time.monotonic()
    curves = {name: prefix_fidelity(run, dataset, reference, out / name, sorted(shares)) for name, run in runs.items()}
    spaces = {name: run.pipe.space for name, run in runs.items()}
    _plot(curves, spaces, out / "prefix.png")
    record = Record(
        kind="prefix",
        title="Fidelity against the length of the given prefix (figure 4b)",
        values=[{"name": name, "space": spaces[name], "points": points} for name, points in curves.items()],
        settings={
            "shares": sorted(shares),
            "reference": reference.describe(),
            "runs": {n: _over(r, dataset).describe() for n, r in runs.items()},
        },
        model={name: describe_model(run.pipe) for name, run in runs.items()},
        data=describe_data(dataset),
        notes=fidelity_notes([point for points in curves.values() for point in points]),
        plots=["prefix.png"],
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, curves


def _over(run: SamplingRun, dataset: ImageDataset) -> SamplingRun:
    """The run that completes every image of a data set, each under its own class."""
    return replace(run, num=len(dataset), labels=dataset.labels.tolist() if run.pipe.num_classes else None)


def _plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], spaces: Mapping[str, str], path: Path) -> None:
    metrics = [
        m for m in measured([point for points in curves.values() for point in points]) if m in ("fid", "is_mean")
    ]
    with figure(path, max(1, len(metrics)), (5.4, 4.0)) as panels:
        for panel, metric in zip(panels, metrics, strict=False):
            for name, points in curves.items():
                color = OURS if spaces[name] == "semantic" else OTHER
                label = f"{name} ({_SPACE[spaces[name]]})"
                panel.plot(
                    [100 * p["share"] for p in points],
                    [p["values"][metric] for p in points],
                    "o-",
                    color=color,
                    label=label,
                )
            better = "lower" if metric == "fid" else "higher"
            panel.set(xlabel="given prefix, % of the tokens", ylabel=f"{TITLES[metric]} ({better} is better)")
            panel.margins(y=0.12)
            panel.legend(fontsize=9)


def as_runs(pipes: Sequence[DigitPipeline], **settings: Any) -> dict[str, SamplingRun]:
    """A run for each model by its name; names that repeat get a number."""
    runs: dict[str, SamplingRun] = {}
    for pipe in pipes:
        name = pipe.name if pipe.name not in runs else f"{pipe.name}-{len(runs) + 1}"
        runs[name] = SamplingRun(pipe, 1, **settings)
    return runs
