"""Measured values beside the paper's: Tables 2 to 4, figure 1, and the tables of its ablations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from digit.core.errors import require
from digit.evaluation import paper
from digit.evaluation.metrics.fidelity import TITLES, Fidelity
from digit.evaluation.metrics.probe import Probe
from digit.evaluation.report.collect import Collection, Found
from digit.evaluation.results import DASH, OURS, PAPER, Result, Rows, legend, millions, panels, shown

HERE = "Measured here"
"""The origin of our own rows, in the column "From" by which the page groups rows."""


@dataclass(frozen=True, kw_only=True)
class Beside(Result):
    """``values``: the rows as shown; ``about``: the line under them. ``notes`` say what must not be compared."""

    kind: str = "beside"
    values: Rows
    about: str = f"The paper's values are those of {paper.SOURCE}."

    def rows(self) -> Rows:
        return self.values

    def provenance(self) -> str:
        return self.about


# ---- tables 2 to 4 ---------------------------------------------------------------------------------------------------


def fidelity(collection: Collection) -> Beside | None:
    """Our values above the rows of Tables 3 and 4, and whatever forbids comparing them."""
    results = [item.result for item in collection.found if isinstance(item.result, Fidelity)]
    if not results:
        return None
    extra = [key for key in _EXTRA if any(key in r.values for r in results)]
    rows: Rows = [_fidelity_row(result, extra) for result in results]
    for title, part, labels in (
        ("Paper, Table 3: class-unconditional", paper.UNCONDITIONAL, "none"),
        ("Paper, Table 4: class-conditional", paper.CONDITIONAL, "classes"),
        ("Paper, Tables 3 and 4: validation images through the decoders", paper.CEILING, DASH),
    ):
        for row in part:
            own = row.method.startswith(("DiGIT", "VQ only"))
            how = ("50,000", "ImageNet validation") if own else (DASH, "its own paper's")
            values = (f"{row.method} ({row.family})", millions(row.parameters), _two(row.fid), _two(row.inception))
            rows.append(dict(zip(_HEAD, (*values, *how, labels, title), strict=True)))
    about = f"The paper's own rows: {paper.FID_REFERENCE}. Rows of other methods are copied from their papers."
    return Beside(title="Beside Tables 3 and 4", values=rows, notes=tuple(warnings(results)), about=about)


_EXTRA = ("fid_infinity", "sfid", "kid_mean", "precision", "recall")
_HEAD = ("Model", "Parameters", "FID ↓", "IS ↑", "Images", "Reference", "Labels", "From")


def _two(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else DASH


def _fidelity_row(result: Fidelity, extra: Sequence[str]) -> dict[str, Any]:
    values, reference, missing = result.values, result.reference, result.not_measured
    where = f"{reference['name']}, {shown(reference['images'])} images" if reference else "none"
    cells = [
        _two(values[key]) if key in values else "not measured" if metric in missing else DASH
        for key, metric in (("fid", "fid"), ("is_mean", "isc"))
    ]
    count = result.source.get("images")
    labels = (result.sampling or {}).get("labels") or DASH
    row = (str(result.source["name"]), millions(_size(result)), *cells, shown(count), where, str(labels), HERE)
    return {**dict(zip(_HEAD, row, strict=True)), **{TITLES[key]: shown(values.get(key)) for key in extra}}


def _size(result: Result) -> float | None:
    """Parameters of the prior in millions, where they are known."""
    prior = ((result.model or {}).get("parts") or {}).get("prior")
    return prior["parameters"] / 1e6 if prior else None


def warnings(results: Sequence[Fidelity]) -> list[str]:
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
    results = [item.result for item in collection.found if isinstance(item.result, Probe)]
    if not results:
        return None
    head = ("Model", "Tokens", "Width", "Parameters", "Top-1, % ↑", "Images", "From")
    rows: list[tuple[Any, ...]] = []
    for result in results:
        data = result.data or {}
        where = f"{data['train']['name']}, {shown(data['classes'])} classes"
        name, best = (result.model or {})["name"], 100 * result.best.accuracy
        rows.append((name, DASH, DASH, millions(_size(result)), shown(best, 3), where, HERE))
    rows += [
        (r.method, r.tokens, r.width, millions(r.parameters), shown(r.accuracy, 3), "ImageNet", "Paper, Table 2")
        for r in paper.PROBE
    ]
    foreign = [_FOREIGN] if any(not _of_imagenet(result) for result in results) else []
    values = [dict(zip(head, row, strict=True)) for row in rows]
    return Beside(title="Beside Table 2, best layer", values=values, notes=tuple(foreign))


_FOREIGN = "The paper probes on ImageNet's 1,000 classes. Accuracies on other images and classes are no match for it."


def _of_imagenet(result: Result) -> bool:
    return "imagenet" in str((result.data or {})["train"]["name"]).lower()


# ---- figure 1 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
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
    """One half of figure 1.

    Attributes:
        models: the bubbles.
        axes: what x and y are.
    """

    kind: str = "bubbles"
    models: tuple[Model, ...]
    axes: tuple[str, str]

    def rows(self) -> Rows:
        return [
            {
                "Model": m.name,
                self.axes[0]: shown(m.x),
                self.axes[1]: shown(m.y),
                "Parameters": millions(m.parameters),
                "Source": m.source,
                "From": HERE if m.here else "Paper",
            }
            for m in sorted(self.models, key=lambda m: not m.here)
        ]

    def figure(self) -> Any:
        figure, (axes,) = panels(1, (5.2, 4.2))
        largest = max((model.parameters or 0 for model in self.models), default=0) or 1
        areas = [
            900 * (model.parameters or 0) / largest + 12 for model in self.models
        ]  # square points, the marker's box
        for model, area in zip(self.models, areas, strict=True):
            color = OURS if model.here else PAPER
            axes.scatter(model.x, model.y, area, color if model.parameters else "none", alpha=0.6, edgecolors=color)
        for label, color in (("measured here", OURS), ("the paper, ImageNet", PAPER)):
            axes.scatter([], [], 40, color, label=label)
        values = [model.y for model in self.models]
        if max(values) > 15 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set(xlabel=self.axes[0], ylabel=self.axes[1])
        axes.margins(0.18)
        legend([axes])
        _label(axes, self.models, areas)
        return figure


def _label(axes: Any, models: Sequence[Model], areas: Sequence[float]) -> None:
    """Names beside circles of some areas in square points, ours and DiGIT's first; one that finds no room is left to
    the table.
    """
    axes.figure.draw_without_rendering()  # now places are known
    pixel, bounds = axes.figure.dpi / 72, require("matplotlib.transforms", "eval", "Drawing figures").Bbox.from_bounds
    centers = [axes.transData.transform((model.x, model.y)) for model in models]
    radii = [math.sqrt(area) / 2 for area in areas]  # points
    taken = [
        bounds(x - r * pixel, y - r * pixel, 2 * r * pixel, 2 * r * pixel)
        for (x, y), r in zip(centers, radii, strict=True)
    ]
    for model, r in sorted(
        zip(models, radii, strict=True), key=lambda pair: (not pair[0].here, "DiGIT" not in pair[0].name)
    ):
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
    ours: list[Model] = []
    paired: list[Fidelity] = []
    foreign = False
    for probe in collection.of("probe"):
        fid, result = _fid_of(collection, probe), probe.result
        if fid is not None and isinstance(result, Probe) and isinstance(fid.result, Fidelity):
            name, place = str((result.model or {})["name"]), f"{probe.place}; {fid.place}"
            x, y = 100 * result.best.accuracy, fid.result.values["fid"]
            ours.append(Model(name, x, y, _size(result), place, here=True))
            foreign = foreign or not _of_imagenet(result)
            paired.append(fid.result)
    if not ours:
        return None
    theirs = [
        Model(b.name, b.accuracy, b.fid, b.parameters, "read off figure 1" if b.read_off else "Tables 2 and 3")
        for b in paper.BUBBLES
    ]
    return Bubbles(
        title="FID against linear probe (figure 1a)",
        values=[],
        models=(*theirs, *ours),
        axes=("linear probe, top-1 in %", "FID, lower is better"),
        notes=(*warnings(paired), *([_FOREIGN] if foreign else [])),
    )


def conditional(collection: Collection) -> Bubbles | None:
    """Figure 1b: Inception Score against FID, class-conditional; None where no model with labels has both."""
    ours: list[Model] = []
    labelled: list[Fidelity] = []
    for item in collection.of("fidelity"):
        result = item.result
        if isinstance(result, Fidelity) and (result.sampling or {}).get("labels") not in (None, "none"):
            labelled.append(result)
            if {"fid", "is_mean"} <= result.values.keys():
                name, values = _model_of(collection, item) or item.place, result.values
                ours.append(Model(name, values["fid"], values["is_mean"], _size(result), item.place, here=True))
    if not ours:
        return None
    theirs = [
        Model(f"{row.method} {millions(row.parameters)}", row.fid, row.inception, row.parameters, "Table 4")
        for row in paper.CONDITIONAL
        if row.inception is not None and row.method.startswith(("DiGIT", "VQGAN", "MaskGIT", "VAR", "ADM", "DiT"))
    ]
    return Bubbles(
        title="Inception Score against FID (figure 1b)",
        values=[],
        models=(*theirs, *ours),
        axes=("class-conditional FID, lower is better", "Inception Score, higher is better"),
        notes=tuple(warnings(labelled)),
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
    rows: Rows = [
        {
            "": r.method,
            "Parameters": millions(r.parameters),
            "Epochs": r.epochs,
            "FID ↓": _two(r.fid),
            "IS ↑": _two(r.inception),
        }
        for r in paper.ADDITIVE
    ]
    return Beside(title="Figure 3a: what each step adds, class-unconditional", values=rows)


def encoders(_: Collection) -> Beside:
    """Figure 4a, likewise."""
    rows: Rows = [
        {"Encoder": r.encoder, "Kind": r.kind or DASH, "FID ↓": _two(r.fid), "IS ↑": _two(r.inception),
         "Probe of the prior, %": _two(r.probe), "Probe of the encoder, %": _two(r.own)}
        for r in paper.ENCODERS
    ]  # fmt: skip
    kinds = "P patch, R reconstructive, G global, D discriminative."
    return Beside(title="Figure 4a: which encoder, class-unconditional", values=rows, about=kinds)
