"""``digit toy``: the paper's toy figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli.options import out_option

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _toy() -> None:
    """The paper's toy figure."""


@app.command("pca-lda")
def pca_lda(
    out: Annotated[Path, out_option("Folder for pca-lda.png and result.json.")],
    samples: Annotated[int, typer.Option(min=2, help="Points a class.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Fresh draws to average over.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of all draws.")] = 0,
) -> None:
    """Draw two overlapping classes and their PCA and LDA projections, and the accuracy of each under growing noise."""
    from digit.evaluation.metrics.toy import ToyConfig, toy

    toy(ToyConfig(samples=samples, repeats=repeats, seed=seed)).save(out).show(out)
