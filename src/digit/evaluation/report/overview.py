"""Sections about everything together: what was found, FID against probe accuracy, and the paper's other tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from digit.evaluation import paper
from digit.evaluation.report.collect import GENERATION, TRAINING, Found, Problem
from digit.evaluation.report.html import DASH, Child, Html, details, millions, number, seconds, table, tag
from digit.evaluation.report.measures import fidelity_warnings
from digit.evaluation.report.parts import Context, grid, section, warn
from digit.evaluation.report.svg import Circle, bubble_chart


def overview(context: Context) -> Html:
    """A line for everything that was found."""
    rows = context.each(context.collection.found, _overview_row)
    return section("overview", "What is here", None, table(["Where", "What", "Made", "Took"], rows, {1, 2}))


def _overview_row(item: Found) -> Any:
    data = item.data
    if item.kind == TRAINING:
        what = f"training of {data['config'].get('component', 'an unknown component')}"
    elif item.kind == GENERATION:
        what = f"{number(data['num'])} pictures of {data['model']}"
    else:
        what = str(data["title"])
    took, made = data.get("seconds"), data.get("made")
    return [
        item.place,
        what,
        made if isinstance(made, str) else DASH,
        seconds(took) if isinstance(took, (int, float)) else DASH,
    ]


def problems(found: Sequence[Problem]) -> Html | None:
    """What could not be used, by name."""
    rows = [[p.place.rstrip("/"), p.reason] for p in dict.fromkeys(found)]
    return (
        section("problems", "Not readable", "These files are left out of this page.", table(["File", "Why"], rows, {1}))
        if rows
        else None
    )


# ---- knowing and making ----------------------------------------------------------------------------------------------


def bubbles(context: Context) -> Html | None:
    """Figure 1: FID against probe accuracy, the area stands for parameters; the paper's models and those measured
    here.
    """
    pairs = [pair for pair in map(lambda p: _pair(context, p), context.collection.of("probe")) if pair]  # noqa: C417
    if not pairs:
        return None
    theirs = [Circle(b.name, b.accuracy, b.fid, b.parameters, ours=False) for b in paper.BUBBLES]
    ours = [circle for circle, _, _ in pairs]
    chart = bubble_chart(
        "FID against linear probe", [*theirs, *ours], "linear probe, top-1 in %", "FID, lower is better"
    )
    rows: list[list[Child]] = [
        [c.name, number(c.x, 3), number(c.y), millions(c.size), f"{probe.place}; {fid.place}"]
        for c, probe, fid in pairs
    ]
    known = [
        [
            b.name,
            number(b.accuracy, 3),
            number(b.fid),
            millions(b.parameters),
            "read off figure 1" if b.read_off else "Tables 2, 3",
        ]
        for b in paper.BUBBLES
    ]
    groups: dict[str, Any] = {"*Measured here": rows, "Paper": known}
    foreign = [probe for _, probe, _ in pairs if "imagenet" not in str(probe.data["data"]["train"]["name"]).lower()]
    lines = fidelity_warnings([fid for _, _, fid in pairs])
    lines += ["The paper's probes are of ImageNet's 1,000 classes, those here are not."] if foreign else []
    intro = "A model that knows what it draws stands low and right. The area of a circle is the number of parameters of the prior."
    body = table(["", "Top-1, %", "FID", "Parameters", "From"], groups, {4})
    return section("bubbles", "Knowing and making", intro, warn(lines), grid(chart), body)


def _pair(context: Context, probe: Found) -> tuple[Circle, Found, Found] | None:
    """The best layer of a probe, with the FID of the same model: by its name, else the only one in the same given
    folder.
    """
    try:
        name = probe.data["model"]["name"]
        accuracy = 100 * max(layer["accuracy"] for layer in probe.data["values"]["layers"])
        prior = probe.data["model"]["parts"].get("prior")
        candidates = [f for f in context.collection.of("fidelity") if "fid" in f.data["values"]]
        same = [f for f in candidates if _model_of(context, f) == name]
        beside = [f for f in candidates if f.root == probe.root and _model_of(context, f) is None]
        fid = same[0] if same else beside[0] if len(beside) == 1 else None
        if fid is None:
            return None
        size = prior["parameters"] / 1e6 if prior else None
        return Circle(name, accuracy, float(fid.data["values"]["fid"]), size, ours=True), probe, fid
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # its own section says what is wrong with it


def _model_of(context: Context, item: Found) -> str | None:
    """Which model made the pictures of a fidelity result, as far as it is known."""
    model = item.data.get("model")
    if isinstance(model, dict) and "name" in model:
        return str(model["name"])
    source = str((item.data.get("source") or {}).get("name", "")).rstrip("/")
    for run in context.collection.of(GENERATION):
        if source and (
            source == str(run.folder) or run.place.endswith(source) or str(run.folder).endswith("/" + source)
        ):
            return str(run.data["model"])
    return None


# ---- the paper's ablations -------------------------------------------------------------------------------------------


def ablations() -> Html:
    """Figures 3a and 4a, which own ablations stand beside."""
    steps = [[r.method, millions(r.parameters), r.epochs, number(r.fid), number(r.inception)] for r in paper.ADDITIVE]
    encoders = [
        [r.encoder, r.kind or DASH, number(r.fid), number(r.inception), number(r.probe), number(r.own)]
        for r in paper.ENCODERS
    ]
    return section(
        "paper",
        "The paper's ablations",
        None,
        details("Figure 3a: what each step brings", table(["", "Parameters", "Epochs", "FID ↓", "IS ↑"], steps)),
        details(
            "Figure 4a: which encoder",
            table(["Encoder", "Kind", "FID ↓", "IS ↑", "Probe of the prior, %", "Probe of the encoder, %"], encoders),
            tag("p", "P patch, R reconstructive, G global, D discriminative.", class_="small"),
        ),
    )
