"""The card of a saved model: its README.md with the Hub's metadata, made from its parts and from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.core.config import config
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.models.component import weights_checksum
from digit.pipeline.info import model_parts

if TYPE_CHECKING:
    from digit.pipeline.model import Model
    from digit.pipeline.pipeline import DigitPipeline

PAPER = "https://arxiv.org/abs/2410.12490"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


@config
class Measured:
    """One measured number: task and metric by the Hub's names ("fid"), a name for people, the images that it was
    measured on or against, and ``how``: what decides whether it may be compared (counts, settings, tool).
    """

    task: str
    metric: str
    name: str
    value: float
    data: str
    split: str | None = None
    how: str = ""


@config
class CardFacts:
    """What a card says beside what the parts tell; kept in the model's index: the license of the weights by the Hub's
    identifier, such as "mit", the Hub ids of the training data, and what was measured.
    """

    license: str | None = None
    data: tuple[str, ...] = ()
    results: tuple[Measured, ...] = ()


def model_card(pipe: Model) -> str:
    """The README of a saved model, by the template beside this file; the head is the Hub's metadata, with the results
    as a model index.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # slow to import, and a loaded model has no use

    parts = model_parts(pipe)
    training = [f"{key.replace('_', ' ')}: {value}" for key, value in pipe.provenance.items()]
    training += [f"{part.place}: {'; '.join(told)}" for part in parts if (told := part.origin())]
    if pipe.prior is None:
        what = "the tokenizers alone, without a prior."
        tokens = "tokenizer.encode([image])" if pipe.codebook is not None else "vqgan.encode(images)"
        call = f"tokens = pipe.{tokens}"
    else:
        size = f" of {pipe.image_size} x {pipe.image_size}" if pipe.vqgan is not None else ""
        classes = f" of {pipe.num_classes:,} classes" if pipe.num_classes else ""
        tokens = "semantic tokens" if pipe.space == "semantic" else "VQ tokens"
        what = f"images{size}{classes} from a GPT over {tokens}."
        call = f"images = pipe({'labels=[0]' if pipe.num_classes else 'num=4'}, seed=0)"
    results = [
        EvalResult(
            task_type=one.task, dataset_type=one.data, dataset_name=one.data, dataset_split=one.split,
            metric_type=one.metric, metric_name=one.name, metric_value=one.value,
        )
        for one in pipe.card.results
    ]  # fmt: skip
    head = ModelCardData(
        model_name=pipe.name,
        library_name="digit",
        license=pipe.card.license,
        datasets=list(pipe.card.data) or None,
        tags=["image-generation", "arxiv:2410.12490"],
        pipeline_tag="unconditional-image-generation" if pipe.prior is not None else None,
        eval_results=results or None,
    )
    facts: dict[str, Any] = {"what": what, "call": call, "parts": parts, "training": training}
    card = ModelCard.from_template(head, template_path=str(TEMPLATE), pipe=pipe, paper=PAPER, **facts)
    return f"{str(card).rstrip()}\n"


def with_facts(
    pipe: DigitPipeline, results: Sequence[str | Path] = (), license: str | None = None, data: Sequence[str] = ()
) -> DigitPipeline:
    """A copy of a model, with the same parts, whose card knows more (:class:`CardFacts`); what is not given stays as it
    was. ``results`` are for :func:`read_results`, and replace those that the card had.
    """
    card = pipe.card
    found = read_results(results, pipe) if results else card.results
    facts = CardFacts(license=license or card.license, data=tuple(data) or card.data, results=found)
    return pipe.with_parts(card=facts)


# ---- results ---------------------------------------------------------------------------------------------------------


def describe_model(pipe: Model) -> dict[str, Any]:
    """A pipeline's name, and parameters and checksum of each of its parts, as results keep them."""
    parts = {
        place: {"parameters": sum(p.numel() for p in part.parameters()), "sha256": weights_checksum(part)}
        for place, part in pipe.components.items()
    }
    return {"name": pipe.name, "space": pipe.space, "parts": parts}


_NEEDED = {
    "fidelity": {"prior", "vqgan"},
    "probe": {"encoder", "codebook", "prior"},
    "stability": {"encoder", "codebook", "vqgan"},
    "reconstruction": {"encoder", "codebook", "vqgan"},
}
"""The parts that results of a kind depend on, beside decoders."""
_FIDELITY = {
    "fid": ("fid", "FID"),
    "kid_mean": ("kid", "KID"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "is_mean": ("inception_score", "Inception Score"),
}
_RECONSTRUCTION = {
    "rfid": ("fid", "rFID"),
    "psnr": ("psnr", "PSNR, dB"),
    "ssim": ("ssim", "SSIM"),
    "lpips": ("lpips", "LPIPS"),
}


def read_results(paths: Sequence[str | Path], pipe: DigitPipeline) -> tuple[Measured, ...]:
    """The numbers in measurements of this very model: a result counts if the parts that it depends on have the same
    weights. Paths are JSON files written by ``digit evaluate``, or folders, in which every result of this model is
    taken. DigitError: a path without one.
    """
    mine = {name: part["sha256"] for name, part in describe_model(pipe)["parts"].items()}
    found: list[Measured] = []
    for path in map(Path, paths):
        results = [] if path.is_dir() else [read_json(path)]
        for file in sorted(path.rglob("*.json")):
            with suppress(DigitError, OSError):  # the other files need not suffer for a broken one
                results.append(read_json(file))
        numbers = [one for data in results if _is_of(data, mine) for one in _numbers(data)]
        if not numbers:
            raise DigitError(
                f"{path} holds no measurement of the model '{pipe.name}' that a card shows ({', '.join(_NEEDED)}): "
                "a result belongs to the weights that it was measured with."
            )
        found += numbers
    return tuple(dict.fromkeys(found))


def _is_of(data: Any, mine: Mapping[str, str]) -> bool:
    """Whether a result was measured with these weights, in the parts that it depends on."""
    if not isinstance(data, Mapping) or data.get("kind") not in _NEEDED:
        return False
    theirs = (data.get("model") or {}).get("parts") or {}
    needed = _NEEDED[data["kind"]] & theirs.keys()
    if data["kind"] in ("fidelity", "reconstruction"):
        used = (data.get("sampling") or {}).get("decoder")
        needed |= {f"decoder/{used}"} if used else {name for name in theirs if name.startswith("decoder/")}
    return bool(needed) and all(theirs[name]["sha256"] == mine.get(name) for name in needed)


def _numbers(data: Mapping[str, Any]) -> list[Measured]:
    """What a card shows of a result."""
    kind, values, images = data["kind"], data["values"], data.get("data") or {}
    if kind == "fidelity":
        task, images = "unconditional-image-generation", data.get("reference") or {"name": "none"}
        decoder = (data.get("sampling") or {}).get("decoder")
        suffix = f", {decoder} decoder" if decoder else ""
        found = [(m, name + suffix, values[key]) for key, (m, name) in _FIDELITY.items() if key in values]
    elif kind == "probe":
        task, images = "image-classification", images["test"]
        best = max(values["layers"], key=lambda layer: layer["accuracy"])
        name = f"top-1 accuracy of a linear probe of the prior, state {best['state']} of {values['depth']}"
        found = [("accuracy", name, best["accuracy"])]
    elif kind == "stability":
        task, names = "image-feature-extraction", {"semantic": "semantic", "vq": "VQ"}
        noise = [row for row in values if row["kind"] == "noise"]
        level = min((row["level"] for row in noise), key=lambda db: abs(db - 20), default=None)
        found = [
            ("changed_tokens", f"{names[r['space']]} tokens changed by noise of {level:g} dB", r["changed"]["mean"])
            for r in noise
            if r["level"] == level
        ]
    else:
        task = "image-to-image"
        found = [
            (metric, f"{name} of reconstructions: {row['name']}", row["values"][key])
            for row in values
            for key, (metric, name) in _RECONSTRUCTION.items()
            if key in row["values"]
        ]
    count = f"{images['images']:,} images" if images.get("images") else ""
    how = data.get("provenance") or " ".join(filter(None, (images["name"], images.get("split"), count)))
    return [
        Measured(task=task, metric=m, name=name, value=value, data=images["name"], split=images.get("split"), how=how)
        for m, name, value in found
    ]
