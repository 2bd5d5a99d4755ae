"""Measured values beside the paper's: Tables 2 to 4, figure 1, and the tables of its ablations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from digit.core.errors import require
from digit.evaluation import paper
from digit.evaluation.metrics.fidelity import TITLES
from digit.evaluation.report.runs import Collection, Found
from digit.evaluation.results import DASH, OURS, PAPER, Result, Rows, legend, millions, panels, shown

HERE = "Measured here"
"""The origin of our own rows, in the column "From" by which the page groups rows."""


@dataclass(frozen=True, kw_only=True)
class Beside(Result):
    """``values``: the cells of each row under ``head``; ``about``: the line below. ``notes`` say what must not
    be compared.
    """

    kind: str = "beside"
    head: tuple[str, ...] = ()
    about: str = f"The paper's values are those of {paper.SOURCE}."

    def rows(self) -> Rows:
        return [dict(zip(self.head, row, strict=True)) for row in self.values]

    def provenance(self) -> str:
        return self.about


# ---- tables 2 to 4 ---------------------------------------------------------------------------------------------------


def fidelity(collection: Collection) -> Beside | None:
    """Our values above the rows of Tables 3 and 4, and whatever forbids comparing them."""
    results = [item.result for item in collection.of("fidelity")]
    if not results:
        return None
    known = {key for result in results for key in result.values}
    extra = [key for key in ("fid_infinity", "sfid", "kid_mean", "precision", "recall") if key in known]
    rows: list[tuple[Any, ...]] = []
    for result in results:
        values, reference = result.values, result.reference
        scores = [
            _two(values.get(key)) if metric not in result.not_measured else "not measured"
            for key, metric in (("fid", "fid"), ("is_mean", "isc"))
        ]
        where = f"{reference['name']}, {shown(reference['images'])} images" if reference else "none"
        labels = str((result.sampling or {}).get("labels") or DASH)
        cells = (str(result.source["name"]), millions(_size(result)), *scores, shown(result.source.get("images")))
        rows.append((*cells, where, labels, HERE, *(shown(values.get(key)) for key in extra)))
    for title, part, labels in (
        ("Paper, Table 3: class-unconditional", paper.UNCONDITIONAL, "none"),
        ("Paper, Table 4: class-conditional", paper.CONDITIONAL, "classes"),
        ("Paper, Tables 3 and 4: validation images through the decoders", paper.CEILING, DASH),
    ):
        for row in part:
            own = row.method.startswith(("DiGIT", "VQ only"))
            how = ("50,000", "ImageNet validation") if own else (DASH, "its own paper's")
            cells = (f"{row.method} ({row.family})", millions(row.parameters), _two(row.fid), _two(row.inception), *how)
            rows.append((*cells, labels, title, *(None for _ in extra)))
    return Beside(
        title="Beside Tables 3 and 4",
        head=(*_HEAD, *(TITLES[key] for key in extra)),
        values=rows,
        notes=tuple(warnings(results)),
        about=f"The paper's own rows: {paper.FID_REFERENCE}. Rows of other methods are copied from their papers.",
    )


_HEAD = ("Model", "Parameters", "FID ↓", "IS ↑", "Images", "Reference", "Labels", "From")


def _two(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else DASH


def _size(result: Result) -> float | None:
    """Parameters of the prior in millions, where they are known."""
    prior = ((result.model or {}).get("parts") or {}).get("prior")
    return prior["parameters"] / 1e6 if prior else None


def warnings(results: Sequence[Any]) -> list[str]:
    """Sentences about values that must not be compared, with the paper or among themselves."""
    against, ways, lines = {}, set(), []
    for result in (result for result in results if "fid" in result.values and result.reference):
        reference, count = result.reference or {}, result.source.get("images")
        name = str(reference.get("name")).lower()
        ways.add((name, reference.get("images"), count, result.preprocessing, result.weights.get("sha256")))
        if not ("imagenet" in name and "val" in name and reference.get("images") == 50_000 and count == 50_000):
            known = reference.get("images")
            real = "an unknown number of" if known is None else shown(known)
            against[result.source["name"]] = f"{shown(count)} images against {reference['name']} ({real} images)"
    if against:
        which = "; ".join(f"{name}: {how}" for name, how in against.items())
        lines.append(f"Not comparable with the paper, which measured {paper.FID_REFERENCE}. Here: {which}.")
    if len(ways) > 1:
        lines.append(
            "The FIDs measured here were not all made in the same way (reference, number of images, weights or "
            "preprocessing differ), so they may not be compared with each other either."
        )
    return lines


def probes(collection: Collection) -> Beside | None:
    """The best layer of each probe above the rows of Table 2."""
    results = [item.result for item in collection.of("probe")]
    if not results:
        return None
    head = ("Model", "Tokens", "Width", "Parameters", "Top-1, % ↑", "Images", "From")
    rows: list[tuple[Any, ...]] = []
    for result in results:
        name, data = (result.model or {})["name"], result.data or {}
        where = f"{data['train']['name']}, {shown(data['classes'])} classes"
        rows.append((name, DASH, DASH, millions(_size(result)), shown(100 * result.best.accuracy, 3), where, HERE))
    for r in paper.PROBE:
        cells = (r.method, r.tokens, r.width, millions(r.parameters), shown(r.accuracy, 3))
        rows.append((*cells, "ImageNet", "Paper, Table 2"))
    return Beside(title="Beside Table 2, best layer", head=head, values=rows, notes=_foreign(results))


def _foreign(results: Sequence[Any]) -> tuple[str, ...]:
    if all("imagenet" in str((result.data or {})["train"]["name"]).lower() for result in results):
        return ()
    return (
        "The paper probes on ImageNet's 1,000 classes. Accuracies on other images and classes are no match for it.",
    )


# ---- figure 1 --------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A bubble of figure 1: a model, its place, its parameters in millions, where its values come from, and whether
    they were measured here.
    """

    name: str
    x: float
    y: float
    parameters: float | None
    source: str
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class Bubbles(Beside):
    """One half of figure 1: ``values`` are the bubbles, ``axes`` what x and y are."""

    kind: str = "bubbles"
    values: Sequence[Model]
    axes: tuple[str, str]

    def rows(self) -> Rows:
        head = ("Model", *self.axes, "Parameters", "Source", "From")
        ours_first = sorted(self.values, key=lambda m: not m.here)
        rows = [
            (m.name, shown(m.x), shown(m.y), millions(m.parameters), m.source, HERE if m.here else "Paper")
            for m in ours_first
        ]
        return [dict(zip(head, row, strict=True)) for row in rows]

    def figure(self) -> Any:
        figure, (axes,) = panels(1, (5.2, 4.2))
        largest = max(model.parameters or 0 for model in self.values) or 1
        areas = [900 * (model.parameters or 0) / largest + 12 for model in self.values]  # square points, a marker's box
        for model, area in zip(self.values, areas, strict=True):
            color = OURS if model.here else PAPER
            axes.scatter(model.x, model.y, area, color if model.parameters else "none", alpha=0.6, edgecolors=color)
        for label, color in (("measured here", OURS), ("the paper, ImageNet", PAPER)):
            axes.scatter([], [], 40, color, label=label)
        values = [model.y for model in self.values]
        if max(values) > 15 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set(xlabel=self.axes[0], ylabel=self.axes[1])
        axes.margins(0.18)
        legend([axes])
        _label(axes, self.values, areas)
        return figure


def _label(axes: Any, models: Sequence[Model], areas: Sequence[float]) -> None:
    """Names beside circles of some areas in square points, ours and DiGIT's first; one that finds no room is left to
    the table.
    """
    axes.figure.draw_without_rendering()  # now places are known
    pixel, bounds = axes.figure.dpi / 72, require("matplotlib.transforms", "eval", "Drawing figures").Bbox.from_bounds
    taken, circles = [], []
    for model, area in zip(models, areas, strict=True):
        (x, y), r = axes.transData.transform((model.x, model.y)), math.sqrt(area) / 2  # pixels, points
        taken.append(bounds(x - r * pixel, y - r * pixel, 2 * r * pixel, 2 * r * pixel))
        circles.append((model, r))
    for model, r in sorted(circles, key=lambda circle: (not circle[0].here, "DiGIT" not in circle[0].name)):
        for dx, dy, ha, va in ((0, 1, "center", "bottom"), (0, -1, "center", "top"), (1, 0, "left", "center"),
                               (-1, 0, "right", "center")):  # fmt: skip
            place = {"xytext": (dx * (r + 2), dy * (r + 2)), "textcoords": "offset points", "ha": ha, "va": va}
            name = axes.annotate(model.name, (model.x, model.y), fontsize="small", **place)
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            name.remove()


def understanding(collection: Collection) -> Bubbles | None:
    """Figure 1a: FID against probe accuracy of one model; None where no model has both."""
    pairs = [(probe, fid) for probe in collection.of("probe") if (fid := _fid_of(collection, probe)) is not None]
    ours = [
        Model(
            (probe.result.model or {})["name"], 100 * probe.result.best.accuracy, fid.result.values["fid"],
            _size(probe.result), f"{probe.place}; {fid.place}", here=True,
        )
        for probe, fid in pairs
    ]  # fmt: skip
    theirs = [
        Model(b.name, b.accuracy, b.fid, b.parameters, "read off figure 1" if b.read_off else "Tables 2 and 3")
        for b in paper.BUBBLES
    ]
    return (
        Bubbles(
            title="FID against linear probe (figure 1a)",
            values=(*theirs, *ours),
            axes=("linear probe, top-1 in %", "FID, lower is better"),
            notes=(*warnings([fid.result for _, fid in pairs]), *_foreign([probe.result for probe, _ in pairs])),
        )
        if ours
        else None
    )


def conditional(collection: Collection) -> Bubbles | None:
    """Figure 1b: Inception Score against FID, class-conditional; None where no model with labels has both."""
    labelled = [
        item for item in collection.of("fidelity") if (item.result.sampling or {}).get("labels") not in (None, "none")
    ]
    ours = [
        Model(
            _model_of(collection, item) or item.place, item.result.values["fid"], item.result.values["is_mean"],
            _size(item.result), item.place, here=True,
        )
        for item in labelled
        if {"fid", "is_mean"} <= item.result.values.keys()
    ]  # fmt: skip
    theirs = [
        Model(f"{row.method} {millions(row.parameters)}", row.fid, row.inception, row.parameters, "Table 4")
        for row in paper.CONDITIONAL
        if row.inception is not None and row.method.startswith(("DiGIT", "VQGAN", "MaskGIT", "VAR", "ADM", "DiT"))
    ]
    return (
        Bubbles(
            title="Inception Score against FID (figure 1b)",
            values=(*theirs, *ours),
            axes=("class-conditional FID, lower is better", "Inception Score, higher is better"),
            notes=tuple(warnings([item.result for item in labelled])),
        )
        if ours
        else None
    )


def _fid_of(collection: Collection, probe: Found) -> Found | None:
    """The FID of the model of a probe: by its name, else the only one of an unknown model in the same given folder."""
    name = (probe.result.model or {}).get("name")
    fids = [item for item in collection.of("fidelity") if "fid" in item.result.values]
    same = [item for item in fids if _model_of(collection, item) == name]
    beside = [item for item in fids if item.root == probe.root and _model_of(collection, item) is None]
    return same[0] if same else beside[0] if len(beside) == 1 else None


def _model_of(collection: Collection, item: Found) -> str | None:
    """Which model made the images of a fidelity result, as far as it is known."""
    if name := (item.result.model or {}).get("name") or (getattr(item.result, "sampling", None) or {}).get("model"):
        return str(name)
    source = str(getattr(item.result, "source", {}).get("name", "")).rstrip("/")
    for run in collection.of("generation"):
        if source and any(path == source or path.endswith(f"/{source}") for path in (str(run.folder), run.place)):
            return str(run.result.values["model"])
    return None


# ---- the paper's ablations -------------------------------------------------------------------------------------------


def additive(_: Collection) -> Beside:
    """Figure 3a, which own ablations stand beside."""
    head = ("", "Parameters", "Epochs", "FID ↓", "IS ↑")
    rows = [(r.method, millions(r.parameters), r.epochs, _two(r.fid), _two(r.inception)) for r in paper.ADDITIVE]
    return Beside(title="Figure 3a: what each step adds, class-unconditional", head=head, values=rows)


def encoders(_: Collection) -> Beside:
    """Figure 4a, likewise."""
    head = ("Encoder", "Kind", "FID ↓", "IS ↑", "Probe of the prior, %", "Probe of the encoder, %")
    rows = [(r.encoder, r.kind or DASH, *map(_two, (r.fid, r.inception, r.probe, r.own))) for r in paper.ENCODERS]
    kinds = "P patch, R reconstructive, G global, D discriminative."
    return Beside(title="Figure 4a: which encoder, class-unconditional", head=head, values=rows, about=kinds)
