"""What the paper reports (arXiv 2410.12490), for results to stand beside, and the command behind each table, figure and
claim; all of it is data in ``paper.yaml``.
"""

from __future__ import annotations

from collections import namedtuple
from importlib import resources
from typing import Any

import yaml

SOURCE = "arXiv 2410.12490"
FID_REFERENCE = "the 50,000 ImageNet validation images, short side to 256, center crop; 50,000 samples; torch-fidelity"
"""How the paper's own FID and IS were measured; rows of other papers in its tables used their own references."""


# paper.yaml explains the columns; None where the paper has no value
ProbeRow = namedtuple("ProbeRow", "method tokens width parameters accuracy")
FidelityRow = namedtuple("FidelityRow", "family method parameters epochs fid inception")
EncoderRow = namedtuple("EncoderRow", "encoder kind fid inception probe own")
Bubble = namedtuple("Bubble", "name accuracy fid parameters read_off")
Claim = namedtuple("Claim", "part says command small note", defaults=("", ""))

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
