"""Sections about reconstruction, ranked tokens, the toy figure, and whatever has no section of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from digit.evaluation import paper
from digit.evaluation.report.collect import Found
from digit.evaluation.report.html import DASH, Html, flatten, number, table, tag
from digit.evaluation.report.parts import Context, card, grid, section
from digit.evaluation.report.svg import Series, line_chart

# ---- reconstruction --------------------------------------------------------------------------------------------------

_RECONSTRUCTION = {"rfid": "rFID ↓", "psnr": "PSNR, dB ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}


def reconstruction(context: Context) -> Html | None:
    """Every way from an image through a model and back, beside the ceiling rows of Tables 3 and 4."""
    items = context.collection.of("reconstruction")
    cards = context.each(items, _reconstruction)
    intro = "The best that generation could reach with these tokens: real images, encoded and decoded."
    return section("reconstruction", "Reconstruction", intro, cards) if cards else None


def _reconstruction(item: Found) -> Html:
    values = item.data["values"]
    rows = [_reconstruction_row(one) for one in (values if isinstance(values, list) else [{**item.data, "name": DASH}])]
    theirs = [[row.method, f"{row.fid:.2f}", DASH, DASH, DASH, "50,000"] for row in paper.CEILING]
    perturbed = (item.data.get("settings") or {}).get("perturbation") or []
    return card(
        item,
        item.data["title"],
        table(
            ["", *_RECONSTRUCTION.values(), "Images"],
            {"*Measured here": rows, "Paper, ImageNet validation images": theirs},
        ),
        tag("h4", "FID when tokens are replaced by near ones") if perturbed else None,
        grid([_perturbed(row) for row in perturbed]) if perturbed else None,
    )


def _reconstruction_row(one: Mapping[str, Any]) -> list[Any]:
    found, errors, missing = one["values"], one.get("errors") or {}, one.get("not_measured") or {}
    cells = []
    for key in _RECONSTRUCTION:
        error = tag("small", f" ±{number(errors[key], 2)}") if key in errors else None
        cells.append(tag("span", number(found.get(key)) if key not in missing else "not measured", error))
    return [one["name"], *cells, number(one["images"])]


def _perturbed(row: Mapping[str, Any]) -> Html:
    sizes = list(dict.fromkeys(point["neighbours"] for point in row["points"]))
    series = []
    for color, size in enumerate(sizes, 1):
        mine = [point for point in row["points"] if point["neighbours"] == size]
        name = f"{size} nearest of {number(row['codes'])} codes"
        series.append(Series(name, [100 * p["share"] for p in mine], [p["fid"] for p in mine], color))
    title = f"{'Semantic' if row['space'] == 'semantic' else 'VQ'} tokens: pFID {number(row['pfid'])}"
    return line_chart(title, series, "replaced tokens, %", "FID against the originals, lower is better")


# ---- ranked tokens ---------------------------------------------------------------------------------------------------


def screens(context: Context) -> Html | None:
    """Tokens ranked by a short training of a small prior."""
    cards = context.each(context.collection.of("screen"), _screen)
    intro = "Each candidate's tokens were learnt briefly by the same small prior, which was then probed. Best first."
    return section("screen", "Which tokens to train on", intro, cards) if cards else None


def _screen(item: Found) -> Html:
    lines = item.data["values"]
    rows = [
        [
            line["name"],
            *(f"{100 * line[key]:.1f}" for key in ("middle", "best")),
            line["best_state"],
            number(line["nats_per_token"]),
            number(line["bits_per_image"]),
            f"{100 * line['saved']:.1f}",
        ]
        for line in lines
    ]
    head = [
        "Tokens",
        "Middle layer, % ↑",
        "Best layer, % ↑",
        "its state",
        "Nats a token",
        "Bits an image",
        "Saved of log K, % ↑",
    ]
    states = [list(range(len(line["probe"]))) for line in lines]
    series = [
        Series(line["name"], x, [100 * v for v in line["probe"]], color)
        for color, (line, x) in enumerate(zip(lines[:6], states, strict=False), 1)
    ]
    chart = line_chart("What each layer of the small prior knows", series, "state", "linear probe, top-1 in %")
    return card(item, item.data["title"], table(head, rows), grid(chart))


# ---- everything else -------------------------------------------------------------------------------------------------


def toy(context: Context) -> Html | None:
    """The toy figure."""
    cards = context.each(context.collection.of("toy"), lambda item: _toy(context, item))
    return section("toy", "Toy figure: PCA and LDA", None, cards) if cards else None


_METHODS = {"LDA": 1, "PCA": 2}  # the colours of the picture


def _toy(context: Context, item: Found) -> Html:
    values = item.data["values"]
    series = []
    for method, mean in values["accuracy"].items():
        errors = values["deviation"][method]
        low, high = ([100 * (m + sign * d) for m, d in zip(mean, errors, strict=True)] for sign in (-1, 1))
        series.append(Series(method, values["noise"], [100 * m for m in mean], _METHODS[method], band=(low, high)))
    chart = line_chart(
        "Accuracy under noise", series, "standard deviation of the noise", "accuracy, %", levels=[("chance", 50, 0)]
    )
    rows = [[method, *(f"{v:.1%}" for v in mean)] for method, mean in values["accuracy"].items()]
    pictures = plots(context, item)
    return card(
        item, item.data["title"], pictures, grid(chart), table(["Noise", *(f"{v:g}" for v in values["noise"])], rows)
    )


def plots(context: Context, item: Found) -> Html | None:
    """The pictures beside a result."""
    found = [context.picture(item, name, f"{item.data['title']}: {name}") for name in item.data.get("plots") or []]
    shown = [tag("div", picture, class_="picture") for picture in found if picture]
    return Html("".join(shown)) if shown else None


def others(context: Context, known: set[str]) -> Html | None:
    """Results of kinds that have no section of their own: their pictures and values as they are."""
    items = [item for item in context.collection.found if item.kind not in known]
    cards = context.each(
        items, lambda item: card(item, item.data["title"], plots(context, item), values_table(item.data["values"]))
    )
    return section("others", "Other measurements", None, cards) if cards else None


def values_table(values: Any) -> Html:
    """Any values as a table: a list of records gets a column for each field."""
    if isinstance(values, list) and values and all(isinstance(v, Mapping) for v in values):
        records = [dict(flatten(v)) for v in values]
        head = list(dict.fromkeys(name for record in records for name in record))
        return table(head, [[record.get(name, DASH) for name in head] for record in records])
    return table(["", ""], [[name, text] for name, text in flatten(values)], {1})
