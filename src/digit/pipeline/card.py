"""The card of a saved model: its README.md with the Hub's metadata, made from its parts and from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from digit.core.config import config
from digit.core.errors import DigitError

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from digit.pipeline.pipeline import DigitPipeline

PAPER = "https://arxiv.org/abs/2410.12490"
BIBTEX = """@inproceedings{zhu2024stabilize,
  title     = {Stabilize the Latent Space for Image Autoregressive Modeling: A Unified Perspective},
  author    = {Zhu, Yongxin and Li, Bocheng and Zhang, Hang and Li, Xin and Xu, Linli and Bing, Lidong},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024}
}"""


@config
class Measured:
    """One measured number.

    Attributes:
        task: the Hub's name of the task that it belongs to.
        metric: the Hub's name of the metric, such as "fid".
        name: for people.
        value: as measured.
        data: name of the images that it was measured on or against.
        split: of them.
        how: what decides whether it may be compared: counts, settings, tool.
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
    """What a card says beside what the parts tell; kept in the model's index.

    Attributes:
        license: of the weights, by the Hub's identifier, such as "mit".
        data: Hub ids of the training data.
        results: what was measured.
    """

    license: str | None = None
    data: tuple[str, ...] = ()
    results: tuple[Measured, ...] = ()


def model_card(pipe: DigitPipeline) -> str:
    """The README of a saved model: what it is, how to use it, what was measured, where it comes from, whom to cite.

    The head is the Hub's metadata, with the results as a model index.
    """
    sections = [
        f"---\n{_metadata(pipe).to_yaml()}\n---",
        f"# {pipe.name}",
        f"A model of `digit` (the package digit-ar): {_what(pipe)} The method is DiGIT, {PAPER}.",
        _use(pipe),
        _parts(pipe),
        _training(pipe),
        _results(pipe.card.results),
        f"## Licence\n\n{_license(pipe.card.license)}",
        f"## Citing\n\nThe method is the work of the paper's authors:\n\n```bibtex\n{BIBTEX}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(pipe: DigitPipeline) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=one.task,
            dataset_type=one.data,
            dataset_name=one.data,
            dataset_split=one.split,
            metric_type=one.metric,
            metric_name=one.name,
            metric_value=one.value,
        )
        for one in pipe.card.results
    ]
    return ModelCardData(
        model_name=pipe.name,
        library_name="digit",
        license=pipe.card.license,
        datasets=list(pipe.card.data) or None,
        tags=["image-generation", "arxiv:2410.12490"],
        pipeline_tag="unconditional-image-generation" if pipe.prior is not None else None,
        eval_results=results or None,
    )


def _what(pipe: DigitPipeline) -> str:
    if pipe.prior is None:
        return "the tokenizers alone, without a prior."
    tokens = "semantic tokens" if pipe.space == "semantic" else "VQ tokens"
    classes = f" of {pipe.num_classes:,} classes" if pipe.num_classes else ""
    size = f" of {pipe.image_size} x {pipe.image_size}" if pipe.vqgan is not None else ""
    return f"pictures{size}{classes} from a GPT over {tokens}."


def _use(pipe: DigitPipeline) -> str:
    if pipe.prior is None:
        call = (
            "tokens = pipe.tokenizer.encode([picture])"
            if pipe.codebook is not None
            else "tokens = pipe.vqgan.encode(images)"
        )
    else:
        call = f"pictures = pipe({'labels=[0]' if pipe.num_classes else 'num=4'}, seed=0)"
    code = (
        f'from digit import DigitPipeline\n\npipe = DigitPipeline.from_pretrained("PATH OR ID OF THIS MODEL")\n{call}'
    )
    names = ", ".join(f"{i} {name}" for i, name in enumerate(pipe.class_names[:20]))
    more = f" and {len(pipe.class_names) - 20:,} more" if len(pipe.class_names) > 20 else ""
    return f"```python\n{code}\n```" + (f"\n\nClasses: {names}{more}." if names else "")


def _parts(pipe: DigitPipeline) -> str:
    from digit.pipeline.info import pipeline_parts

    rows = [f"| {part.place} | {part.summary()} | {part.parameters:,} |" for part in pipeline_parts(pipe)]
    return "\n".join(["| part | what | parameters |", "|---|---|---|", *rows])


def _training(pipe: DigitPipeline) -> str:
    """What it learnt from, as far as the parts say, and the rest of the provenance."""
    from digit.pipeline.info import pipeline_parts

    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in pipe.provenance.items()]
    for part in pipeline_parts(pipe):
        facts = [f"on {text}" for key in ("data", "source") if (text := _images(part.provenance.get(key)))]
        facts += [
            f"{part.provenance[key]:,} {key}"
            for key in ("steps", "updates")
            if isinstance(part.provenance.get(key), int)
        ]
        if isinstance(source := part.provenance.get("source"), str):
            facts.append(f"from {source}")
        if facts:
            lines.append(f"- {part.place}: {'; '.join(facts)}")
    return "\n".join(["## Training", "", *lines]) if lines else ""


def _images(facts: Any) -> str:
    """The images that a part has learnt from, where its provenance names them."""
    named = isinstance(facts, Mapping) and "name" in facts
    return f"{facts['name']}, split {facts.get('split')}" if named else ""


def _results(results: Sequence[Measured]) -> str:
    if not results:
        return ""
    rows = [f"| {one.name} | {one.value:.4g} | {one.how} |" for one in results]
    return "\n".join(["## Results", "", "| metric | value | how |", "|---|---|---|", *rows])


def _license(name: str | None) -> str:
    return f"The weights: {name}." if name else "Whoever made this model has not stated a licence of its weights."


def with_facts(
    pipe: DigitPipeline, results: Sequence[str | Path] = (), license: str | None = None, data: Sequence[str] = ()
) -> DigitPipeline:
    """A copy of a model whose card knows more; what is not given stays as it was.

    Args:
        pipe: the model; its parts are shared.
        results: see :func:`read_results`; they replace those that the card had.
        license: of the weights, by the Hub's identifier.
        data: Hub ids of the training data.

    Raises:
        DigitError: a path without a result of this model.
    """
    card = pipe.card
    found = read_results(results, pipe) if results else card.results
    facts = CardFacts(license=license or card.license, data=tuple(data) or card.data, results=found)
    return pipe.with_parts(card=facts)


# -- results -----------------------------------------------------------------------------------------------------------


def read_results(paths: Sequence[str | Path], pipe: DigitPipeline) -> tuple[Measured, ...]:
    """The numbers in measurements of this very model.

    Args:
        paths: JSON files written by ``digit evaluate``, or folders, in which every result of this model is taken.
        pipe: the model; a result counts if the parts that it depends on have the same weights.

    Raises:
        DigitError: a path without a result of this model.
    """
    from digit.core.files import read_json
    from digit.evaluation.report.collect import collect
    from digit.evaluation.result import describe_model

    mine = {name: part["sha256"] for name, part in describe_model(pipe)["parts"].items()}
    found: list[Measured] = []
    for path in map(Path, paths):
        results = [item.data for item in collect([path]).found] if path.is_dir() else [read_json(path)]
        numbers = [one for data in results if _is_of(data, mine) for one in _READERS[data["kind"]](data)]
        if not numbers:
            raise DigitError(
                f"{path} holds no measurement of the model '{pipe.name}' that a card shows ({', '.join(_READERS)}): "
                "a result belongs to the weights that it was measured with."
            )
        found += numbers
    return tuple(dict.fromkeys(found))


def _is_of(data: Any, mine: Mapping[str, str]) -> bool:
    """Whether a result was measured with these weights, in the parts that it depends on."""
    if not isinstance(data, Mapping) or data.get("kind") not in _READERS:
        return False
    theirs = (data.get("model") or {}).get("parts") or {}
    decoders = {name for name in theirs if name.startswith("decoder/")}
    if used := (data.get("sampling") or {}).get("decoder"):
        decoders = {f"decoder/{used}"}
    needed = {
        "fidelity": {"prior", "vqgan"} | decoders,
        "probe": {"encoder", "codebook", "prior"},
        "stability": {"encoder", "codebook", "vqgan"},
        "reconstruction": {"encoder", "codebook", "vqgan"} | decoders,
    }[data["kind"]] & theirs.keys()
    return bool(needed) and all(theirs[name]["sha256"] == mine.get(name) for name in needed)


_FIDELITY = {
    "fid": ("fid", "FID"),
    "kid_mean": ("kid", "KID"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "is_mean": ("inception_score", "Inception Score"),
}


def _fidelity(data: Mapping[str, Any]) -> list[Measured]:
    reference = data.get("reference") or {"name": "none", "images": None}
    count = f"{data['source']['images']:,} pictures"
    against = f" against {reference['name']}" + (f" ({reference['images']:,} images)" if reference["images"] else "")
    sampling = data.get("sampling") or {}
    chosen = ", ".join(f"{key} {value}" for key, value in (sampling.get("settings") or {}).items())
    decoder = f"{sampling['decoder']} decoder" if sampling.get("decoder") else ""
    how = "; ".join(part for part in (count + against, chosen, data.get("tool", "")) if part)
    return [
        Measured(
            task="unconditional-image-generation", metric=metric, name=f"{name}, {decoder}" if decoder else name,
            value=data["values"][key], data=reference["name"], how=how,
        )
        for key, (metric, name) in _FIDELITY.items()
        if key in data["values"]
    ]  # fmt: skip


def _probe(data: Mapping[str, Any]) -> list[Measured]:
    best = max(data["values"]["layers"], key=lambda layer: layer["accuracy"])
    test = data["data"]["test"]
    state = f"linear classifier on state {best['state']} of {data['values']['depth']}"
    how = f"{state}; {test['images']:,} images of {test['name']} {test['split']}"
    name = "top-1 accuracy of a linear probe of the prior"
    return [
        Measured(task="image-classification", metric="accuracy", name=name, value=best["accuracy"], data=test["name"],
                 split=test["split"], how=how)
    ]  # fmt: skip


def _stability(data: Mapping[str, Any]) -> list[Measured]:
    """The share of tokens that noise changes, at the level nearest to 20 dB."""
    noise = [row for row in data["values"] if row["kind"] == "noise"]
    level = min((row["level"] for row in noise), key=lambda db: abs(db - 20), default=None)
    images = data["data"]
    return [
        Measured(
            task="image-feature-extraction", metric="changed_tokens", value=row["changed"]["mean"], data=images["name"],
            name=f"{'semantic' if row['space'] == 'semantic' else 'VQ'} tokens changed by noise of {level:g} dB",
            split=images["split"], how=f"{images['images']:,} images of {images['name']} {images['split']}",
        )
        for row in noise
        if row["level"] == level
    ]  # fmt: skip


_RECONSTRUCTION = {
    "rfid": ("fid", "rFID"),
    "psnr": ("psnr", "PSNR, dB"),
    "ssim": ("ssim", "SSIM"),
    "lpips": ("lpips", "LPIPS"),
}


def _reconstruction(data: Mapping[str, Any]) -> list[Measured]:
    images = data["data"]
    return [
        Measured(
            task="image-to-image", metric=metric, name=f"{name} of reconstructions: {row['name']}", value=row["values"][key],
            data=images["name"], split=images["split"], how=f"{row['images']:,} images of {images['name']} {images['split']}",
        )
        for row in data["values"]
        for key, (metric, name) in _RECONSTRUCTION.items()
        if key in row["values"]
    ]  # fmt: skip


_READERS = {"fidelity": _fidelity, "probe": _probe, "stability": _stability, "reconstruction": _reconstruction}
