"""Sections about measurements, each beside the paper's own figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from digit.evaluation import paper
from digit.evaluation.report.collect import Found
from digit.evaluation.report.html import DASH, Child, Html, details, flatten, millions, number, table, tag
from digit.evaluation.report.parts import Context, card, grid, section, warn
from digit.evaluation.report.svg import Series, line_chart

_SPACES = {"semantic": "semantic tokens", "vq": "VQ tokens"}
_COLORS = {"semantic": 1, "vq": 2}

# ---- fidelity --------------------------------------------------------------------------------------------------------


def fidelity(context: Context) -> Html | None:
    """Our values above the paper's rows, with everything that forbids comparing them."""
    items = [item for item in context.collection.of("fidelity") if isinstance(item.data.get("values"), dict)]
    if not items:
        return None
    extra = [(key, name) for key, name in _EXTRA.items() if any(key in item.data["values"] for item in items)]
    rows = context.each(items, lambda item: _fidelity_row(item, extra))
    ours = [row for row in rows if row]
    groups: dict[str, Sequence[Sequence[Child]]] = {"*Measured here": ours}
    for title, part in (
        ("Paper, Table 3: class-unconditional", paper.UNCONDITIONAL),
        ("Paper, Table 4: class-conditional", paper.CONDITIONAL),
        ("Paper, Tables 3 and 4: validation images through the decoders", paper.CEILING),
    ):
        groups[title] = [_paper_row(row, len(extra)) for row in part]
    head = ["", "Parameters", "FID ↓", "IS ↑", *(name for _, name in extra), "Images", "Reference"]
    cards = context.each(items, _fidelity_card)
    about = f"The paper's own rows: {paper.FID_REFERENCE}. Rows of other methods are copied from their papers, which used other references."
    return section(
        "fidelity",
        "Fidelity",
        None,
        warn(fidelity_warnings(items)),
        table(head, groups, {len(head) - 1}),
        tag("p", about, class_="small"),
        cards,
    )


_EXTRA = {"kid_mean": "KID ↓", "precision": "Precision ↑", "recall": "Recall ↑"}


def _fidelity_row(item: Found, extra: Sequence[tuple[str, str]]) -> Any:
    data, values = item.data, item.data["values"]
    reference = data.get("reference")
    where = f"{reference['name']}, {number(reference['images'])} images" if reference else "none"
    missing = data.get("not_measured") or {}
    score = _two(values["is_mean"]) if "is_mean" in values else "not measured" if "isc" in missing else DASH
    fid = _two(values["fid"]) if "fid" in values else "not measured" if "fid" in missing else DASH
    others = [number(values.get(key)) for key, _ in extra]
    count = number(data["source"]["images"]) if data["source"].get("images") is not None else "unknown"
    return [data["source"]["name"], _parameters(data), fid, score, *others, count, where]


def _two(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def _paper_row(row: paper.FidelityRow, extra: int) -> list[Child]:
    """Images and reference are those of the authors' own rows; others were copied from papers with their own."""
    own = row.method.startswith(("DiGIT", "VQ only"))
    how = ["50,000", "ImageNet validation, 50,000 images"] if own else [DASH, "its own paper's"]
    name = f"{row.method} ({row.family})"
    return [name, millions(row.parameters), _two(row.fid), _two(row.inception), *[DASH] * extra, *how]


def _parameters(data: Mapping[str, Any]) -> str:
    parts = (data.get("model") or {}).get("parts") or {}
    return millions(parts["prior"]["parameters"] / 1e6) if "prior" in parts else DASH


def _fidelity_card(item: Found) -> Html:
    data = item.data
    rows = [[name, number(value, 5)] for name, value in data["values"].items()]
    rows += [[name, reason] for name, reason in (data.get("not_measured") or {}).items()]
    rows += [
        [name, text]
        for name, text in flatten({k: data[k] for k in ("tool", "backend", "weights", "preprocessing") if k in data})
    ]
    return card(item, data["title"], details("All values, tool and weights", table(["", ""], rows, {1})))


def fidelity_warnings(items: Sequence[Found]) -> list[str]:
    """Sentences about values that must not be compared, with the paper or among themselves."""
    against = {}
    for item in items:
        reference, count = item.data.get("reference"), item.data["source"].get("images")
        if not reference or "fid" not in item.data["values"]:
            continue
        name = str(reference.get("name")).lower()
        if not ("imagenet" in name and "val" in name and reference.get("images") == 50_000 and count == 50_000):
            shown = "an unknown number of" if reference.get("images") is None else number(reference["images"])
            against[item.data["source"]["name"]] = (
                f"{number(count)} images against {reference['name']} ({shown} images)"
            )
    lines = []
    if against:
        which = "; ".join(f"{name}: {how}" for name, how in against.items())
        lines.append(f"Not comparable with the paper, which measured {paper.FID_REFERENCE}. Here: {which}.")
    kinds = {_how(item) for item in items if "fid" in item.data["values"]}
    if len(kinds) > 1:
        lines.append(
            "The FIDs measured here were not all made in the same way (reference, number of images, weights or preprocessing "
            "differ), so they may not be compared with each other either; the details stand with each result."
        )
    return lines


def _how(item: Found) -> tuple[str, ...]:
    data = item.data
    reference = data.get("reference") or {}
    parts = (reference.get("name"), reference.get("images"), data["source"].get("images"), data.get("preprocessing"))
    return tuple(map(str, (*parts, (data.get("weights") or {}).get("sha256"))))


# ---- stability -------------------------------------------------------------------------------------------------------

_MEASURES = {
    "changed": "Tokens that change ↓",
    "cosine_features": "Cosine of features ↑",
    "cosine_codes": "Cosine of codes ↑",
    "cosine_centred": "Cosine of centred codes ↑",
}


def stability(context: Context) -> Html | None:
    """Table 1, and the same under other changes."""
    cards = context.each(context.collection.of("stability"), _stability)
    intro = "Share of an image's tokens that change, and cosine similarity before and after; mean over images with 95% intervals."
    return section("stability", "Stability of tokens", intro, cards) if cards else None


def _stability(item: Found) -> Html:
    rows = item.data["values"]
    noise = sorted((r for r in rows if r["kind"] == "noise"), key=lambda r: -r["level"])
    others = [row for row in rows if row["kind"] != "noise"]
    return card(
        item,
        item.data["title"],
        grid(_noise_chart(noise, "changed"), _noise_chart(noise, "cosine_features")) if noise else None,
        _noise_table(noise) if noise else None,
        _changes_table(others) if others else None,
    )


def _spaces(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["space"] for row in rows))


def _noise_chart(rows: Sequence[Mapping[str, Any]], measure: str) -> Html:
    series = []
    for space in _spaces(rows):
        mine = [row for row in rows if row["space"] == space]
        shown = [measure] if measure == "changed" else ["cosine_features", "cosine_codes"]
        for key in shown:
            name = _SPACES[space] + ({"cosine_features": ", features", "cosine_codes": ", codes"}.get(key, ""))
            band = ([row[key]["low"] for row in mine], [row[key]["high"] for row in mine])
            x, y = [row["level"] for row in mine], [row[key]["mean"] for row in mine]
            series.append(Series(name, x, y, _COLORS[space] + (2 if key == "cosine_codes" else 0), band=band))
    for space in _spaces(rows):
        values = paper.STABILITY[space][measure.partition("_")[0]]
        series.append(Series(f"{_SPACES[space]}, paper (ImageNet)", paper.SNRS, values, 0, dash=space == "vq"))
    title = "Tokens that change under noise" if measure == "changed" else "Cosine similarity under noise"
    return line_chart(
        title, series, "signal-to-noise ratio of the pixels, dB", "", reverse=True, zero=measure == "changed"
    )


def _noise_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    levels = list(dict.fromkeys(row["level"] for row in rows))
    groups: dict[str, list[list[Child]]] = {}
    for space in _spaces(rows):
        by_level = {row["level"]: row for row in rows if row["space"] == space}
        ours: list[list[Child]] = [
            [name, *(_estimate(by_level[v][key]) for v in levels)] for key, name in _MEASURES.items()
        ]
        groups[f"*{_SPACES[space]}, measured here"] = ours
        table_1 = [dict(zip(paper.SNRS, paper.STABILITY[space][key], strict=True)) for key in ("changed", "cosine")]
        names = (_MEASURES["changed"], "Cosine similarity ↑")
        groups[f"{_SPACES[space]}, paper"] = [
            [name, *(f"{row[v]:.3f}" if v in row else DASH for v in levels)]
            for name, row in zip(names, table_1, strict=True)
        ]
    return table(["SNR, dB", *(f"{v:g}" for v in levels)], groups)


def _changes_table(rows: Sequence[Mapping[str, Any]]) -> Html:
    changes = list(dict.fromkeys((row["kind"], row["level"]) for row in rows))
    at = {(row["space"], row["kind"], row["level"]): row for row in rows}
    spaces = _spaces(rows)
    head = ["Change", *(f"{_SPACES[s]}: {name.lower()}" for s in spaces for name in _MEASURES.values())]
    lines = [
        [_change(*change), *(_estimate(at[(space, *change)][key]) for space in spaces for key in _MEASURES)]
        for change in changes
    ]
    return table(head, lines)


def _change(kind: str, level: float) -> str:
    from digit.evaluation.metrics.noise import Change

    return str(Change(kind=kind, level=level))  # type: ignore[arg-type]


def _estimate(value: Mapping[str, float]) -> Html:
    error = value["high"] - value["mean"]
    return tag("span", f"{value['mean']:.3f}", tag("small", f" ±{error:.3f}"))


# ---- probe -----------------------------------------------------------------------------------------------------------


def probe(context: Context) -> Html | None:
    """Accuracy of each layer, and Table 2."""
    items = context.collection.of("probe")
    cards = context.each(items, _probe)
    if not cards:
        return None
    ours = context.each(items, _probe_row)
    rows = [
        [r.method, r.tokens, r.width, millions(r.parameters), number(r.accuracy, 3), "ImageNet"] for r in paper.PROBE
    ]
    head = ["", "Tokens", "Width", "Parameters", "Top-1, % ↑", "Images"]
    groups: dict[str, Any] = {"*Measured here, best layer": ours, "Paper, Table 2": rows}
    lines = [
        "The paper probes on ImageNet's 1,000 classes. Accuracies on other images and numbers of classes are no match for it."
    ]
    foreign = any("imagenet" not in str(item.data["data"]["train"]["name"]).lower() for item in items)
    return section("probe", "Linear probes", None, warn(lines) if foreign else None, table(head, groups, {5}), cards)


def _probe_row(item: Found) -> Any:
    data = item.data
    best = max(layer["accuracy"] for layer in data["values"]["layers"])
    name = data["model"]["name"]
    where = f"{data['data']['train']['name']}, {data['data']['classes']} classes"
    return [name, DASH, DASH, _parameters(data), number(100 * best, 3), where]


def _probe(item: Found) -> Html:
    values = item.data["values"]
    layers = values["layers"]
    x = [layer["state"] for layer in layers]
    series = [Series("linear probe of the prior", x, [100 * layer["accuracy"] for layer in layers])]
    if all(layer.get("knn") is not None for layer in layers):
        series.append(Series("k-NN", x, [100 * layer["knn"] for layer in layers], 2))
    levels = [("chance", 100 * values["chance"], 0)]
    if values.get("encoder"):
        levels.insert(0, ("linear probe of the encoder itself", 100 * values["encoder"]["accuracy"], 3))
    chart = line_chart(
        "Accuracy by layer", series, "state (0: embedding, n: output of block n)", "top-1, %", levels=levels, zero=True
    )
    rows = [
        [
            layer["state"],
            number(100 * layer["accuracy"]),
            number(layer["lr"]),
            number(None if layer.get("knn") is None else 100 * layer["knn"]),
        ]
        for layer in layers
    ]
    head = ["State", "Top-1, %", "Best learning rate", "k-NN, %"]
    return card(item, item.data["title"], grid(chart), details("Every layer", table(head, rows)))
