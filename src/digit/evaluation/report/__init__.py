"""One page of everything found under run folders, in one file that asks the network for nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from digit import __version__
from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.evaluation.paper import SOURCE
from digit.evaluation.report import measures, others, overview, runs, sweeps
from digit.evaluation.report.collect import GENERATION, TRAINING, Found, Problem, collect
from digit.evaluation.report.curves import known_curves
from digit.evaluation.report.html import Html, join, tag
from digit.evaluation.report.parts import Context
from digit.evaluation.report.style import CSS

KNOWN = {"fidelity", "stability", "probe", "sweep", "prefix", "reconstruction", "screen", "toy", GENERATION, TRAINING}
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 2 2'%3E"
    "%3Cpath fill='%231f6feb' d='M0 0h1v1H0zM1 1h1v1H1z'/%3E%3C/svg%3E"
)


@dataclass(frozen=True)
class Report:
    """What went into a page.

    Attributes:
        path: of the page.
        found: everything that was reported.
        problems: files that are missing, broken or not as expected; the page lists them too.
    """

    path: Path
    found: list[Found]
    problems: list[Problem]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path = "report.html",
    title: str = "digit report",
    curves: Sequence[str | Path] = (),
) -> Report:
    """Write one self-contained HTML page about runs: measurements beside the paper's figures, training curves,
    pictures.

    Args:
        folders: run folders; everything below them is looked at.
        out: the page.
        title: its heading.
        curves: folders with more reference curves than the packaged ones.

    Raises:
        DigitError: a folder does not exist, or there is nothing to report.
    """
    context = Context(collect(folders), known_curves(curves))
    if not context.collection.found and not context.collection.problems:
        where = ", ".join(map(str, folders))
        raise DigitError(
            f"Nothing to report under {where}; expected what digit generate, train, evaluate or toy write: generation.json, "
            "metrics.jsonl or result.json."
        )
    write_bytes(out, page(context, title).encode())
    problems = list(dict.fromkeys(context.collection.problems))
    return Report(Path(out), context.collection.found, problems)


def page(context: Context, title: str) -> str:
    """The whole document."""
    body = [
        overview.overview(context),
        runs.samples(context),
        measures.fidelity(context),
        overview.bubbles(context),
        measures.stability(context),
        measures.probe(context),
        sweeps.sweeps(context),
        sweeps.prefixes(context),
        others.reconstruction(context),
        others.screens(context),
        others.toy(context),
        others.others(context, KNOWN),
        runs.trainings(context),
        overview.ablations(),
    ]
    body.append(overview.problems(context.collection.problems))  # last, for the others find some
    sections = [part for part in body if part]
    menu = [tag("li", tag("a", Html(name), href=f"#{anchor}")) for anchor, name in map(_heading, sections)]
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    count = len({*context.collection.problems})
    trouble = (
        tag("p", tag("a", f"{count} file{'s' * (count > 1)} could not be read", href="#problems")) if count else None
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("link", rel="icon", href=_ICON),
        tag("style", Html(CSS)),
    )
    about = f"Made {made} with digit {__version__}. Grey and unmarked figures are those of {SOURCE}."
    content = [tag("header", tag("h1", title), tag("p", about, class_="small"), trouble, tag("nav", tag("ul", menu)))]
    return "<!doctype html>\n" + tag("html", head, tag("body", content, tag("main", join(sections))), lang="en") + "\n"


def _heading(part: Html) -> tuple[str, str]:
    """Anchor and title of a section."""
    match = re.match(r'<section id="([^"]*)"><h2>(.*?)</h2>', part)
    assert match is not None
    return match[1], match[2]
