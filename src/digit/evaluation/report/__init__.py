"""One page of everything found under run folders, in one file that asks the network for nothing.

Every result gives its rows and its figure; ``page.html.jinja`` lays them out, and nothing else is drawn or written
here.
"""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from digit import __version__
from digit.core.errors import DigitError, MissingPackageError, require
from digit.core.files import write_bytes, write_json
from digit.evaluation.paper import SOURCE
from digit.evaluation.report import beside
from digit.evaluation.report.runs import Collection, Found, Training, collect, known_curves
from digit.evaluation.results import COLORS, Result, Rows, columns, flatten, is_numeric, shown

_LARGEST_FILE, _LARGEST_SIDE = 1_500_000, 1600  # bytes and pixels that go into the page as they are
_SECTIONS: tuple[tuple[str, str, str, tuple[Callable[[Collection], Result | None], ...], str], ...] = (
    ("samples", "Generated images", "generation", (), ""),
    ("fidelity", "Fidelity", "fidelity", (beside.fidelity,), ""),
    ("understanding", "Understanding and generation", "", (beside.understanding, beside.conditional),
     "The area of a circle is the number of the prior's parameters."),
    ("stability", "Stability of tokens", "stability", (),
     "Share of an image's tokens that change, and cosine before and after; means over images with 95% intervals."),
    ("probe", "Linear probes", "probe", (beside.probes,), ""),
    ("sweeps", "Sweeps of sampling settings", "sweep", (), "The paper's figure 6 shows curves without their values."),
    ("prefix", "Fidelity against the given prefix", "prefix", (),
     "Real tokens are given, the prior continues. The paper's figure 4b shows curves without their values."),
    ("robustness", "Robustness of decoders", "robustness", (),
     "The same prior and tokens through each decoder, while a share of the tokens is replaced."),
    ("reconstruction", "Reconstruction", "reconstruction", (),
     "The best that generation could reach with these tokens: real images, encoded and decoded."),
    ("ablations", "Ablations", "ablation", (), "One thing is varied, everything else is shared."),
    ("screen", "Which tokens to train on", "screen", (),
     "Each candidate's tokens were learnt briefly by the same small prior and probed, or ridge regression decoded "
     "them."),
    ("toy", "Toy figure: PCA and LDA", "toy", (), ""),
    ("others", "Other measurements", "", (), ""),
    ("training", "Training runs", "training", (),
     "Dashed grey: the reference run of the same preset, where there is one."),
    ("paper", "The paper's ablations", "", (beside.additive, beside.encoders), ""),
)  # fmt: skip
"""Anchor, title, kind of results, comparisons with the paper and introduction, in the order of the page."""


@dataclass(frozen=True)
class Item:
    """A result as the template shows it: ``charts`` are SVG, ``images`` are (address, width, height, alt)."""

    result: Result
    place: str
    rows: Rows
    charts: list[Markup]
    images: list[tuple[str, int, int, str]]
    provenance: str


def write_report(
    folders: Sequence[str | Path],
    out: str | Path = "report.html",
    title: str = "digit report",
    curves: Sequence[str | Path] = (),
) -> Collection:
    """Write one self-contained HTML page about runs: measurements beside the paper's, training curves, images.

    Args:
        folders: run folders; everything below them is looked at.
        curves: folders with more reference curves than the packaged ones.

    Returns:
        What went into the page; it lists the problems too.

    Raises:
        DigitError: a folder does not exist, or there is nothing to report.
    """
    collection, references = collect(folders), known_curves(curves)
    if not collection.found and not collection.problems:
        where = ", ".join(map(str, folders))
        raise DigitError(
            f"Nothing to report under {where}; expected what digit generate, train, evaluate or toy write: "
            "generation.json, metrics.jsonl or result.json."
        )
    collection.found = [
        replace(item, result=item.result.beside(references)) if isinstance(item.result, Training) else item
        for item in collection.found
    ]
    write_bytes(out, page(collection, title).encode())
    return collection


def save_only_run(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Make the only training run under some folders a reference.

    Raises:
        DigitError: there is none, or more than one, or it is not finished.
    """
    runs = collect(folders).of("training")
    if len(runs) != 1:
        names = ", ".join(item.place for item in runs) or "none"
        raise DigitError(f"A reference curve is made from one training run; found: {names}.")
    run = runs[0].result
    if not (isinstance(run, Training) and run.settings and run.finished and run.values):
        raise DigitError(f"{runs[0].place} is not a finished training run, so it cannot be a reference.")
    made = {"software": run.versions, "hardware": run.hardware}
    return write_json(path, {"config": run.settings, "metrics": run.values, **made})


def page(collection: Collection, title: str) -> str:
    """The whole document."""
    known, sections = {kind for _, _, kind, _, _ in _SECTIONS}, []
    for anchor, name, kind, comparisons, intro in _SECTIONS:
        kinds = {kind} if anchor != "others" else {found.result.kind for found in collection.found} - known
        given: tuple[Any, ...] = (*comparisons, *(found for found in collection.found if found.result.kind in kinds))
        if items := [item for item in (_item(collection, one) for one in given) if item is not None]:
            sections.append((anchor, name, intro, items))
    template = Path(__file__).with_name("page.html.jinja").read_text("utf-8")
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    return page.render(
        title=title, sections=sections, found=collection.found, problems=collection.problems, here=beside.HERE,
        about=f"Made {made} with digit {__version__}. Grey and unmarked figures are those of {SOURCE}.",
        columns=columns, is_numeric=is_numeric, shown=shown, flatten=flatten,
    )  # fmt: skip


def _item(collection: Collection, given: Found | Callable[[Collection], Result | None]) -> Item | None:
    """A result made ready; one that does not hold what it should becomes a problem."""
    found = given if isinstance(given, Found) else None
    try:
        result = given.result if isinstance(given, Found) else given(collection)
        if result is None:
            return None
        rows, told, drawn = result.rows(), result.provenance(), charts(result)
    except Exception as error:  # whatever a damaged file may hold
        if found is not None:
            reason = f"this {found.result.kind} result is not as expected: {type(error).__name__}, {error}."
            said = str(error) if isinstance(error, MissingPackageError) else reason
            collection.problem(found.place, said, found.folder)
        elif not collection.problems:
            raise
        return None  # a comparison fails with the result that it is made of, which is named
    names = result.plots if found and (not drawn or result.kind in ("generation", "training")) else ()
    images = [image for name in names if found and (image := _image(collection, found, name))]
    return Item(result, found.place if found else "", rows, drawn, images, told)


def charts(result: Result) -> list[Markup]:
    """Each axes of a result's figure as an SVG of its own, so that they find room on narrow screens; the colours that
    all figures share become those of the reader's scheme.
    """
    matplotlib = require("matplotlib", "eval", "Drawing figures")
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "digit", "font.size": 12}
    ):
        figure = result.figure()
        if figure is None:
            return []
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # what was laid out stays while others are hidden
        return [_svg(figure, axes) for axes in figure.axes]


def _svg(figure: Any, axes: Any) -> Markup:
    for each in figure.axes:
        each.set_visible(each is axes)
    box = axes.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).padded(0.06)
    file = io.BytesIO()
    unnamed = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", bbox_inches=box, transparent=True, metadata=unnamed)
    text = file.getvalue().decode()
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text[text.index("<svg") :])  # many figures share the page
    size = (
        f'viewBox="0 0 {72 * box.width:.4g} {72 * box.height:.4g}" width="{76 * box.width:.0f}"'  # so text has one size
    )
    text = re.sub(r"<svg [^>]*>", f'<svg {size} role="img">', text, count=1)
    for number, color in enumerate(COLORS):
        text = text.replace(color, f"var(--c{number})")
    return Markup(text.replace("#000000", "currentColor").replace("#b0b0b0", "var(--line)"))


def _image(collection: Collection, found: Found, name: Any) -> tuple[str, int, int, str] | None:
    """An image file beside a result, as a part of the page; None, and a problem, where that cannot be."""
    try:
        own = found.result.kind == "training"  # whose names are made here; others come from files
        if not isinstance(name, str) or (not own and (name in ("", ".", "..") or "/" in name or "\\" in name)):
            raise DigitError("an image's name is expected, without folders.")
        data = (found.folder / name).read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()
            kind = str(image.format).lower()
            if len(data) > _LARGEST_FILE or max(image.size) > _LARGEST_SIDE:
                image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "WEBP", quality=88)
                data, kind = smaller.getvalue(), "webp"
            url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            return url, *image.size, f"{found.result.title}: {name}"
    except (DigitError, OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        collection.problem(f"{found.place}/{name}", f"the image cannot be shown: {reason}")
        return None
