"""``digit report``: one page about everything under some run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli import options


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run folders; everything below them is looked at.")
    ],
    out: Annotated[Path, options.out("The HTML page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "digit report",
    curves: Annotated[
        list[Path] | None, typer.Option(help="A folder with more reference curves; may be repeated.")
    ] = None,
    save_curve: Annotated[
        Path | None, typer.Option(help="Write the one training run under DIR as a reference curve here, and no page.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: results beside the paper's figures, loss curves, images, settings,
    hardware.

    Example:  digit report runs --out report.html
    """
    from digit.evaluation.report import save_only_run, write_report

    if save_curve is not None:
        typer.echo(f"Reference curve written to {save_only_run(folders, save_curve)}")
        return
    made = write_report(folders, out, title, curves or [])
    for problem in made.problems:
        typer.echo(f"Not readable: {problem.place.rstrip('/')}: {problem.reason}")
    typer.echo(f"{len(made.found)} results in {made.path} ({made.path.stat().st_size / 1e6:.1f} MB)")
