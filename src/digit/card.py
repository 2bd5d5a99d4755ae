"""The card of a saved model: its README.md, made from its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from digit.pipeline import DigitPipeline


def count_parameters(part: Any) -> int:
    """Numbers in a network."""
    return sum(p.numel() for p in part.parameters())


def model_card(pipe: DigitPipeline) -> str:
    """The README of a saved model: what it is, how to use it, where it comes from."""
    lines = [
        "---",
        "library_name: digit",
        "tags: [image-generation, digit]",
        "---",
        f"# {pipe.name}",
        "",
        "A `digit` model: pictures from a GPT over semantic tokens (DiGIT, arXiv 2410.12490).",
        "",
        "```python",
        "from digit import DigitPipeline",
        'pipe = DigitPipeline.from_pretrained("PATH OR ID OF THIS MODEL")',
        f"pictures = pipe({'labels=[0, 1]' if pipe.num_classes else 'num=4'}, seed=0)",
        "```",
        "",
        "| part | parameters |",
        "|---|---|",
    ]
    parts = {"encoder": pipe.encoder, "codebook": pipe.codebook, "prior": pipe.prior, "vqgan": pipe.vqgan}
    for name, part in {**parts, **{f"decoder/{k}": d for k, d in pipe.decoders.items()}}.items():
        if part is not None:
            lines.append(f"| {name} | {count_parameters(part):,} |")
    if pipe.class_names:
        lines += ["", "Classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(pipe.class_names[:20])) + "."]
    if pipe.provenance:
        lines += ["", "## Provenance", ""] + [f"- {key}: {value}" for key, value in pipe.provenance.items()]
    return "\n".join(lines) + "\n"
