"""What the paper reports (arXiv 2410.12490), for results to stand beside, and the command behind each table, figure and
claim; all of it is data in ``paper.yaml``.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, NamedTuple

import yaml

SOURCE = "arXiv 2410.12490"
FID_REFERENCE = "the 50,000 ImageNet validation images, short side to 256, center crop; 50,000 samples; torch-fidelity"
"""How the paper's own FID and IS were measured; rows of other papers in its tables used their own references."""


class ProbeRow(NamedTuple):
    """A row of Table 2: parameters in millions, top-1 accuracy on ImageNet in percent."""

    method: str
    tokens: str
    width: int
    parameters: float
    accuracy: float


class FidelityRow(NamedTuple):
    """A row of Table 3 or 4: GAN, diffusion, masked (MIM) or autoregressive (AR); parameters in millions; epochs as the
    paper has them; FID and Inception Score. None where the paper has none.
    """

    family: str
    method: str
    parameters: float | None
    epochs: str
    fid: float
    inception: float | None


class EncoderRow(NamedTuple):
    """A row of figure 4a: FID and Inception Score of generation, top-1 in percent of a small prior (39M, 100 epochs) on
    the encoder's tokens, and of the encoder itself.
    """

    encoder: str
    kind: str
    fid: float
    inception: float
    probe: float | None
    own: float | None


class Bubble(NamedTuple):
    """A model in figure 1: linear probe in percent, class-unconditional FID, parameters in millions."""

    name: str
    accuracy: float
    fid: float
    parameters: float | None
    read_off: bool


class Claim(NamedTuple):
    """A table, figure or claim, and the command that measures it at the paper's scale and at a small one."""

    part: str
    says: str
    command: str
    small: str = ""
    note: str = ""


_DATA: dict[str, Any] = yaml.safe_load((resources.files("digit.evaluation") / "paper.yaml").read_text("utf-8"))
SNRS = tuple(_DATA["snrs"])
STABILITY: dict[str, dict[str, tuple[float, ...]]] = {
    space: {name: tuple(values) for name, values in measures.items()} for space, measures in _DATA["stability"].items()
}
PROBE = tuple(ProbeRow(*row) for row in _DATA["probe"])
UNCONDITIONAL, CONDITIONAL, CEILING, ADDITIVE = (
    tuple(FidelityRow(*row) for row in _DATA[name]) for name in ("unconditional", "conditional", "ceiling", "additive")
)
ENCODERS = tuple(EncoderRow(*row) for row in _DATA["encoders"])
BUBBLES = tuple(Bubble(*row) for row in _DATA["bubbles"])
CLAIMS = tuple(Claim(**row) for row in _DATA["claims"])


def claims_table() -> str:
    """Every table, figure and claim with its commands, as the Markdown table of ``docs/paper.md``."""
    lines = ["| part | says | at the paper's scale | small |", "|---|---|---|---|"]
    for claim in CLAIMS:
        small = f"`{claim.small}`" if claim.small else "the same" if "models/" not in claim.command else ""
        says = f"{claim.says} ({claim.note})" if claim.note else claim.says
        lines.append(f"| {claim.part} | {says} | `{claim.command}` | {small} |")
    return "\n".join(lines) + "\n"
