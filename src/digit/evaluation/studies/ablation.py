"""Ablations: one thing is varied, everything else is shared; every variant is trained and measured.

The packaged ones are in ``digit/presets/ablations``. The paper's own: figure 3b (K), figure 4a (encoder), Table 3
(decoder), figure 3a (size of the prior, and the additive ladder). Each variant goes through the stages encoder, VQGAN,
codebook, tokens, prior, decoder, probe and FID.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console

from digit.core.config import NonNegativeInt, PositiveInt, config, from_dict, load_preset, preset_names, to_dict
from digit.core.devices import pick_device
from digit.core.errors import DigitError
from digit.core.hub import is_repository
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.token_cache import Views
from digit.encoders import load_encoder
from digit.evaluation import paper
from digit.evaluation.metrics.fidelity import FidelityOptions
from digit.evaluation.metrics.inception import TorchExtractor, open_extractor
from digit.evaluation.metrics.probe import ProbeOptions
from digit.evaluation.model_source import SamplingRun, describe_data, image_batches, pipe_size
from digit.evaluation.results import shown, stage_text, timed
from digit.evaluation.studies.points import Reference
from digit.evaluation.studies.stages import Comparison, Stages, predictability, result_notes
from digit.models.vqgan import VQGAN
from digit.pipeline.assembly import part_folder
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline

METRICS = ("nll", "probe", "fid")
_FREE = {
    "clusters": {"clusters"},
    "encoder": {"encoder", "encoder_set", "layer", "prior", "prior_set", "decoder", "sampling"},
    "layer": {"layer"},
    "decoder": {"decoder", "decoder_set", "sampling"},
    "prior-size": {"prior", "prior_set", "sampling"},
    "additive": None,
}
"""The fields that the variants of an ablation may change; None: any."""
_FROM_CACHE = ("vocab_size", "length", "prefix_vocab_size", "prefix_length", "num_classes")
"""Fields of a token model that follow from the tokens, which an ablation may change."""


# ---- what is compared ------------------------------------------------------------------------------------------------


@config
class Recipe:
    """How a model is made. ``digit/presets/bases/ablation-cifar10.yaml`` explains every field."""

    encoder: str | None
    encoder_set: tuple[str, ...] = ()
    layer: int | None = None
    clusters: PositiveInt = 256
    fit_images: PositiveInt | None = None
    random_crops: bool = False
    vqgan: str
    vqgan_set: tuple[str, ...] = ()
    views: Views = Views()
    prior: str
    prior_set: tuple[str, ...] = ()
    decoder: str | None = None
    decoder_set: tuple[str, ...] = ()
    sampling: dict[str, Any] = Field(default_factory=dict)


@config
class Ablation:
    """What is varied, what the variants have in common, and how they are measured; see the same file.

    A variant is a ``name``, fields of :class:`Recipe` to replace (those ending in ``_set`` are added), and where the
    paper has the same, ``paper``: its row.
    """

    what: Literal["clusters", "encoder", "layer", "decoder", "prior-size", "additive"]
    base: Recipe
    variants: Annotated[tuple[dict[str, Any], ...], Field(min_length=2)]
    probe: ProbeOptions = ProbeOptions()
    fid_images: Annotated[int, Field(ge=2)] = 10_000
    batch_size: PositiveInt = 64
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Variant:
    """One model of an ablation, and its row of the paper: FID, Inception Score, and the probe in percent."""

    name: str
    recipe: Recipe
    paper: Mapping[str, float | None]

    def preset(self, part: Literal["prior", "decoder"]) -> dict[str, Any]:
        """The training preset of a token model, without the fields that follow from the tokens."""
        name = getattr(self.recipe, part)
        values = load_preset(name, getattr(self.recipe, f"{part}_set"))
        if values.get("component") != part:
            raise DigitError(
                f"'{self.name}': {name} is a preset of the component '{values.get('component')}', not {part}."
            )
        return {**values, "model": {k: v for k, v in values["model"].items() if k not in _FROM_CACHE}}

    def check(self) -> None:
        """Try all presets."""
        recipe = self.recipe
        target = (self.preset("prior").get("data") or {}).get("target", "semantic")
        wanted = "vq" if recipe.encoder is None else "semantic"
        if target != wanted:
            given = "has no encoder" if wanted == "vq" else "has an encoder"
            raise DigitError(
                f"The variant '{self.name}' {given}, so its prior must predict {wanted} tokens; {recipe.prior} "
                f"predicts {target}."
            )
        if recipe.decoder is not None and wanted == "semantic":
            self.preset("decoder")
        for source, changes in ((recipe.encoder, recipe.encoder_set), (recipe.vqgan, recipe.vqgan_set)):
            if source is not None and is_preset(source):
                load_preset(source, changes)


def is_preset(source: str) -> bool:
    """Whether a part is given by a training preset, and not as it is."""
    return source.endswith((".yaml", ".yml")) or source in preset_names()


def load_ablation(name: str, overrides: Sequence[str] = ()) -> Ablation:
    """Read a packaged ablation or a YAML file; ``overrides`` are changes ``a.b=c``."""
    return from_dict(Ablation, load_preset(name, overrides, "ablations"), f"ablation {name}")


def paper_rows() -> dict[str, dict[str, float | None]]:
    """The paper's rows that a variant may name as its own."""
    rows: dict[str, Any] = {f"{row.method} {row.parameters:g}M": row for row in paper.UNCONDITIONAL if row.parameters}
    rows |= {row.method: row for row in paper.ADDITIVE} | {row.encoder: row for row in paper.ENCODERS}
    kept = ("fid", "inception", "probe")
    return {name: {key: getattr(row, key) for key in kept if hasattr(row, key)} for name, row in rows.items()}


def plan(ablation: Ablation) -> list[Variant]:
    """The variants, each complete, tried before anything is trained.

    Raises:
        DigitError: a name that is missing or there twice, a field that this ablation does not vary, or a preset that
            does not fit.
    """
    rows, found, base = paper_rows(), {}, to_dict(ablation.base)
    for number, values in enumerate(ablation.variants, 1):
        changes = dict(values)
        name, row = str(changes.pop("name", "")), changes.pop("paper", None)
        if not name or name in found:
            raise DigitError(f"Variant {number} needs a 'name' of its own; {values.get('name')!r} was given.")
        free = _FREE[ablation.what] or set(changes)
        if extra := sorted(set(changes) - free):
            raise DigitError(
                f"The variant '{name}' changes {', '.join(extra)}, but this ablation varies {ablation.what}; its "
                f"variants may change {', '.join(sorted(free))}. What all have in common belongs to 'base'."
            )
        if row is not None and row not in rows:
            raise DigitError(f"The variant '{name}' names the paper's row '{row}'; known are: {', '.join(rows)}.")
        added = {key: [*base[key], *changes[key]] for key in changes if key.endswith("_set")}
        if "encoder" in changes and changes["encoder"] is None:  # VQ tokens, by the filters of everyone's prior
            changes.setdefault("sampling", {k: v for k, v in base["sampling"].items() if not k.startswith("decoder_")})
        variant = Variant(name, from_dict(Recipe, {**base, **changes, **added}, f"variant '{name}'"), rows.get(row, {}))
        variant.check()
        found[name] = variant
    return list(found.values())


def check_parts(variants: Sequence[Variant]) -> None:
    """See that every part that is not trained here exists, for the last of them may be needed days later."""
    for recipe in (variant.recipe for variant in variants):
        if not is_preset(recipe.vqgan):
            part_folder(recipe.vqgan)
        source = recipe.encoder
        if source is not None and not (is_preset(source) or Path(source).exists() or is_repository(source)):
            raise DigitError(
                f"There is no encoder '{source}': no such file, folder or preset, and it is not a Hub id (owner/name)."
            )


# ---- the whole measurement -------------------------------------------------------------------------------------------


@timed
def run_ablation(
    ablation: Ablation,
    data: str | Path,
    train_images: ImageDataset,
    test_images: ImageDataset,
    out: str | Path,
    metrics: Sequence[str] = METRICS,
    reference: str | None = None,
    weights: str | TorchExtractor = "auto",
    device: str | None = None,
) -> Comparison:
    """Make and measure every variant; a run that was interrupted goes on.

    Args:
        data: the dataset that encoder and VQGAN are trained on, where the ablation trains them.
        train_images: whose tokens prior and decoder learn; a part is held out for the loss, as their presets say.
        test_images: which the probe is tested on, and FID is measured against.
        metrics: some of "nll", "probe" and "fid".
        reference: images or their ``.npz`` for FID; None: ``test_images``.
        weights: of the FID network, see :func:`~digit.evaluation.metrics.inception.load_inception`, or the network
            itself. Without them FID is not measured, and the result says why.

    Raises:
        DigitError: before anything is trained: an unknown metric, a variant that does not fit, a part that is not
            there, images without labels for the probe.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise DigitError(f"The metrics {', '.join(unknown)} were asked for; known are {', '.join(METRICS)}.")
    variants, reasons = plan(ablation), {}
    check_parts(variants)
    if "probe" in metrics and min(int(train_images.labels.min()), int(test_images.labels.min())) < 0:
        raise DigitError("The images have no classes, which the probe needs; leave it out with --metrics nll,fid.")
    extractor = None if isinstance(weights, str) else weights
    if "fid" in metrics and isinstance(weights, str):
        try:
            extractor = open_extractor(weights, device=str(pick_device(device)))
        except DigitError as error:
            reasons["fid"] = f"not measured: {error}"
    stages = Stages(Path(out), train_images, test_images, ablation.batch_size, ablation.seed, device)

    @cache
    def measured_reference(size: int) -> Reference:
        """When it is first needed; images are brought to the models' size."""
        assert extractor is not None
        batches = (b.images for b in image_batches(test_images, size, ablation.batch_size, torch.uint8))
        return Reference.of(reference or batches, extractor, FidelityOptions(batch_size=ablation.batch_size))

    against = reference or f"{test_images.name} {test_images.split}"
    chosen = [metric for metric in metrics if metric not in reasons]
    lines = []
    for variant in variants:
        Console(stderr=True, highlight=False).print(variant.name, markup=False)
        line = _line(stages, ablation, variant, str(data), chosen, measured_reference)
        line |= {"against": f"{against}, {shown(line['against'])} images"} if "fid" in line else {}
        lines.append({**line, "not_measured": {**reasons, **line["not_measured"]}})
    theirs = {
        "source": paper.SOURCE, "reference": paper.FID_REFERENCE, "rows": {v.name: dict(v.paper) for v in variants}
    }  # fmt: skip
    named = any(variant.paper for variant in variants)
    weights_used = extractor.weights.sha256 if extractor else None
    return Comparison(
        kind="ablation",
        title=f"Ablation: {ablation.what}",
        values=lines,
        settings={**to_dict(ablation), "metrics": list(metrics), "fid_reference": against, "fid_weights": weights_used},
        data={"train": describe_data(train_images, path=data), "test": describe_data(test_images)},
        paper=theirs if named else None,
        notes=(*reasons.values(), *result_notes(ablation.what, lines, named)),
    )


def _line(
    stages: Stages,
    ablation: Ablation,
    variant: Variant,
    data: str,
    metrics: Sequence[str],
    reference: Callable[[int], Reference],
) -> dict[str, Any]:
    """Make one variant, and measure it."""
    recipe, reasons = variant.recipe, {}
    pipe = _tokenizers(stages, recipe, data)
    tokens = stages.tokens(pipe, recipe.views)
    prior, step = stages.token_model("prior", recipe.prior, variant.preset("prior"), tokens)
    pipe = pipe.with_parts(prior=prior)
    line: dict[str, Any] = {
        "name": variant.name, "vocabulary": prior.config.vocab_size, "tokens": prior.config.length,
        "prior_parameters": step.value["parameters"], "paper": dict(variant.paper),
    }  # fmt: skip
    nll = step.value["metrics"].get("nll")
    if "nll" in metrics and nll is None:
        reasons["nll"] = "not measured: no images are held out; see data.held_out of the prior's preset."
    elif "nll" in metrics:
        line |= predictability(nll, prior)
    if "probe" in metrics:
        line |= stages.probe(pipe, step, ablation.probe)
    if pipe.space == "semantic" and ("fid" in metrics or ablation.what == "decoder"):
        if recipe.decoder is None:
            reasons["fid"] = "not measured: there is no decoder."
        else:
            decoder, step = stages.token_model("decoder", recipe.decoder, variant.preset("decoder"), tokens)
            pipe = pipe.with_parts(decoders={decoder.config.role: decoder})
            line |= {"decoder": decoder.config.role, "decoder_parameters": step.value["parameters"]}
            line |= {"decoder_nats": step.value["metrics"]["nll"]} if "nats_per_token" in line else {}
    if "fid" in metrics and "fid" not in reasons:
        how = {"batch_size": ablation.batch_size, "settings": recipe.sampling}
        run = SamplingRun(pipe, ablation.fid_images, ablation.seed, **how).check()  # type: ignore[arg-type]
        real, model = reference(pipe_size(pipe)), describe_model(pipe)["parts"]
        inputs = {**run.identity(), **run.stages(), "model": model, "reference": real.describe()}
        found = stages.steps.run(
            "fid", inputs, lambda _: real.measure(run.batches(), run.num, variant.name)["values"]["fid"]
        )
        filters = {stage: stage_text(to_dict(params)) for stage, params in run.request.params.items()}
        line |= {"fid": found.value, "against": real.features.statistics.n}
        line |= {"classes": pipe.num_classes, "sampling": filters}
    return {**line, "not_measured": reasons}


def _tokenizers(stages: Stages, recipe: Recipe, data: str) -> DigitPipeline:
    """Encoder, codebook and VQGAN, or the VQGAN alone, as given or as trained here."""

    def part(component: str, source: str, changes: Sequence[str]) -> str | Path:
        if is_preset(source):
            preset = load_preset(source, changes)
            split = (preset.get("data") or {}).get("split", "train")
            made = stages.train(component, source, preset, data, open_dataset(data, split).fingerprint)
            return part_folder(made.folder)
        return part_folder(source) if component == "vqgan" or Path(source, "model").is_dir() else source

    vqgan = VQGAN.from_pretrained(part("vqgan", recipe.vqgan, recipe.vqgan_set))
    if recipe.encoder is None:
        return DigitPipeline(vqgan=vqgan, space="vq", name="ablation").to(stages.device)
    encoder: Any = load_encoder(part("encoder", recipe.encoder, recipe.encoder_set), layer=recipe.layer)
    codebook = stages.codebook(encoder, recipe.clusters, recipe.fit_images, recipe.random_crops)
    return DigitPipeline(encoder=encoder, codebook=codebook, vqgan=vqgan, name="ablation").to(stages.device)
