"""What every measurement leaves behind: ``result.json`` with the values and all that decides whether they may be
compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from digit.core.environment import hardware, versions
from digit.core.errors import require
from digit.core.files import write_file, write_json
from digit.models.component import weights_checksum

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline

RESULT = "result.json"


@dataclass
class Record:
    """A finished measurement.

    Attributes:
        kind: which: "stability", "probe", "sweep" ...
        title: one line for people.
        values: what was measured, plain JSON.
        settings: everything that was chosen.
        model: :func:`describe_model`.
        data: which images, :func:`~digit.evaluation.model_source.describe_data`.
        paper: the paper's figures that these stand beside, and their source.
        notes: what a reader of the values should know.
        plots: file names of the pictures beside it.
        seconds: wall time.
    """

    kind: str
    title: str
    values: Any
    settings: Mapping[str, Any]
    model: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    paper: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    plots: Sequence[str] = ()
    seconds: float = 0.0
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def write(self, folder: str | Path) -> Path:
        """Write ``result.json`` into a folder, with hardware and versions."""
        values = {**vars(self), "seconds": round(self.seconds, 2), "notes": list(self.notes), "plots": list(self.plots)}
        return write_json(Path(folder) / RESULT, {**values, "hardware": hardware(), "versions": versions()})


def describe_model(pipe: DigitPipeline) -> dict[str, Any]:
    """A pipeline's name, and parameters and checksum of each of its parts."""
    parts: dict[str, Any] = {
        "encoder": pipe.encoder,
        "codebook": pipe.codebook,
        "prior": pipe.prior,
        "vqgan": pipe.vqgan,
    }
    parts |= {f"decoder/{kind}": model for kind, model in pipe.decoders.items()}
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {
        "name": pipe.name,
        "space": pipe.space,
        "parts": {
            name: {"parameters": sum(p.numel() for p in module.parameters()), "sha256": weights_checksum(module)}
            for name, module in modules.items()
        },
    }


@contextmanager
def figure(path: str | Path, columns: int = 1, size: tuple[float, float] = (5.6, 4.2)) -> Iterator[list[Any]]:
    """Draw a row of matplotlib axes into a PNG file, whole or not at all.

    Args:
        path: the file.
        columns: how many axes.
        size: inches of each.
    """
    matplotlib = require("matplotlib", "eval", "Drawing plots")
    canvas = require("matplotlib.backends.backend_agg", "eval", "Drawing plots").FigureCanvasAgg
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with matplotlib.rc_context(style):
        drawing = require("matplotlib.figure", "eval", "Drawing plots").Figure(
            (size[0] * columns, size[1]), layout="constrained"
        )
        canvas(drawing)  # no window system, no global state
        yield list(drawing.subplots(1, columns, squeeze=False)[0])
        write_file(path, lambda aside: drawing.savefig(aside, dpi=150, format="png"))


OURS, OTHER, PAPER = "#1f6feb", "#d1570b", "#8a8f98"
"""Line colours of every plot: semantic tokens, VQ tokens (or a second thing), what the paper reports."""
