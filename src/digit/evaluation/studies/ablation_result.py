"""The result of an ablation: its table, figure and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from digit.evaluation import paper
from digit.evaluation.results import Result, Rows, provenance, shown
from digit.evaluation.studies.stages import Line, cells, comparison

_THEIRS = "Paper (ImageNet, no classes):"


@dataclass(frozen=True, kw_only=True)
class AblationResult(Result):
    """``values``: a line for each variant in the order of the ablation."""

    kind: str = "ablation"

    def rows(self) -> Rows:
        """A row for each variant: what its FID was measured against, how it was sampled, and the paper's values, none of
        which were sampled with classes.
        """
        rows = []
        for line in self.values:
            row = {"Variant": line["name"], **cells(line)}
            if "against" in line:
                stages = ", ".join(f"{stage}: {text}" for stage, text in line["sampling"].items())
                row |= {"FID against": line["against"], "Classes": line["classes"] or "none", "Sampling": stages}
            row |= {f"{_THEIRS} {key}": line["paper"][key] for key in ("probe", "fid") if line["paper"].get(key)}
            rows.append(row)
        return rows

    def provenance(self) -> str:
        measured, s = any("fid" in line for line in self.values), self.settings
        reference = {"name": s["fid_reference"], "weights": s.get("fid_weights")} if measured else None
        count = f"; {shown(s['fid_images'])} generated images per variant" if measured else ""
        return provenance(data=self.data, reference=reference) + count

    def figure(self) -> Any:
        if self.settings["what"] == "decoder":
            return comparison(self.values, ("decoder_nats", "fid"), layers=False)
        return comparison(self.values, ("best", "saved", "fid"))


def result_notes(what: str, lines: Sequence[Line], named: bool) -> list[str]:
    """What a reader of the table should know; ``named``: it holds values of the paper."""
    decoders = {line.get("decoder") for line in lines if "decoder_nats" in line}
    notes = {
        "Nats a token of different vocabularies cannot be compared; bits an image and the saved part of log K can.": True,
        "A masked decoder's loss is that of hidden tokens at random shares, an AR decoder's of all in order: not one scale.": (
            len(decoders) > 1
        ),
        "The variants have different numbers of tokens an image, so they differ in more than the thing that is varied.": (
            len({line["tokens"] for line in lines}) > 1
        ),
        f"The paper's values ({paper.SOURCE}) are of ImageNet 256 x 256, class-unconditional, at its scale.": named,
        "The models here are sampled with classes, those of the paper were not.": (
            named and any(line.get("classes") for line in lines)
        ),
        "Not all variants are sampled with the same filters; the column Sampling has them.": (
            len({line["sampling"]["prior"] for line in lines if "sampling" in line}) > 1
        ),
        "The paper's step from 219M to 732M changes the encoder and K too; here the prior alone changes.": (
            what == "prior-size"
        ),
    }
    return [note for note, applies in notes.items() if applies]
