"""Ablations: every variant of a plan is trained and measured; what variants share is made once.

Each variant goes through the stages encoder, VQGAN, codebook, tokens, prior, decoder, probe and FID. A stage is named
by all that it depends on, so variants that agree up to a stage share it, what is finished is not done again, and a
training that was interrupted goes on. :mod:`digit.evaluation.studies.ablation_plan` says what is compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from digit.clustering.kmeans import describe_encoder, fit_codebook
from digit.core.config import load_preset, to_dict
from digit.core.devices import pick_device
from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.sampling import Batches, OrderedSampler
from digit.data.token_cache import Views, build_token_cache
from digit.encoders import load_encoder
from digit.encoders.hub import looks_like_repository
from digit.evaluation import paper
from digit.evaluation.metrics.fidelity import FidelityOptions
from digit.evaluation.metrics.inception import FeatureExtractor, open_extractor
from digit.evaluation.metrics.probe import ProbeData, score_features
from digit.evaluation.model_source import SamplingRun, describe_data, image_batches, pipe_size
from digit.evaluation.result import OURS, PAPER, Record, describe_model, figure
from digit.evaluation.studies.ablation_plan import Ablation, Recipe, Variant, is_preset, plan
from digit.evaluation.studies.points import key_of
from digit.evaluation.studies.sweep import Reference
from digit.models.codebook import Codebook
from digit.models.component import load_component
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.models.vqgan import VQGAN
from digit.pipeline.assembly import part_folder
from digit.pipeline.pipeline import DigitPipeline
from digit.training.build import build_task
from digit.training.loop import train
from digit.training.tasks.tokens import TokenTask

METRICS = ("nll", "probe", "fid")

# ---- stages ----------------------------------------------------------------------------------------------------------


class Stages:
    """The stages of an ablation in one folder; each is done once for all that it depends on.

    Args:
        out: the folder; a stage is ``out/KIND/KEY``, and ``out/KIND/KEY.json`` says what it depends on, once it is
            finished.
        data: the dataset as the user gave it, which encoder and VQGAN are trained on.
        train_images, test_images: whose tokens are learnt, and which the probe is judged on.
        ablation: seeds and sizes.
        device: where everything runs.
    """

    def __init__(
        self,
        out: str | Path,
        data: str,
        train_images: ImageDataset,
        test_images: ImageDataset,
        ablation: Ablation,
        device: str | None = None,
    ) -> None:
        self.out, self.data, self.ablation = Path(out), data, ablation
        self.train_images, self.test_images = train_images, test_images
        self.given_device, self.device = device, pick_device(device)

    def stage(self, kind: str, depends: Mapping[str, Any], work: Callable[[Path], object]) -> tuple[Path, Any]:
        """The folder of a stage, and what its ``work`` returned, now or when it was done."""
        folder = self.out / kind / key_of(depends)
        done = folder.with_name(f"{folder.name}.json")
        if not done.is_file():
            _say(f"  {kind}: {folder}")
            began = time.monotonic()
            value = work(folder)
            write_json(done, {"depends": depends, "value": value, "seconds": round(time.monotonic() - began, 2)})
        return folder, read_json(done)["value"]

    def _train(
        self, component: str, name: str, preset: dict[str, Any], data: str | Path, source: str
    ) -> tuple[Path, Any]:
        """Train by a preset over ``data``, which ``source`` identifies; the part's folder, and facts of a token
        model.
        """

        def work(folder: Path) -> dict[str, Any]:
            task, settings = build_task(component, preset, data, name)
            count = sum(p.numel() for p in task.model.parameters()) if isinstance(task, TokenTask) else None
            model = train(task, settings, folder, resume=True, device=self.given_device)
            return {"parameters": count, "metrics": read_json(model / "config.json")["provenance"].get("metrics", {})}

        folder, facts = self.stage(component, {"preset": preset, "data": source}, work)
        return part_folder(folder), facts

    def _part(self, component: str, source: str, changes: Sequence[str]) -> str | Path:
        """An encoder's or a VQGAN's folder, or Hub id, as given or as trained here."""
        if is_preset(source):
            preset = load_preset(source, changes)
            split = (preset.get("data") or {}).get("split", "train")
            return self._train(component, source, preset, self.data, open_dataset(self.data, split).fingerprint)[0]
        return part_folder(source) if component == "vqgan" or Path(source, "model").is_dir() else source

    def tokenizers(self, recipe: Recipe) -> DigitPipeline:
        """Encoder, codebook and VQGAN, or the VQGAN alone."""
        vqgan = VQGAN.from_pretrained(self._part("vqgan", recipe.vqgan, recipe.vqgan_set))
        if recipe.encoder is None:
            return DigitPipeline(vqgan=vqgan, space="vq", name="ablation").to(self.device)
        network: Any = load_encoder(self._part("encoder", recipe.encoder, recipe.encoder_set), layer=recipe.layer)
        images = self.train_images
        if recipe.fit_images is not None and recipe.fit_images < len(images):
            images = images.subset([i * len(images) // recipe.fit_images for i in range(recipe.fit_images)])
        depends = {
            "encoder": describe_encoder(network), "preprocessing": to_dict(network.preprocessing), "clusters": recipe.clusters,
            "crops": recipe.random_crops, "seed": self.ablation.seed, "data": images.fingerprint,
        }  # fmt: skip

        def fit(folder: Path) -> None:
            size, crops = network.preprocessing.image_size, recipe.random_crops
            cut = Transform(size=size, crop="random" if crops else "center", flip=crops)
            order = OrderedSampler(len(images), self.ablation.batch_size)
            batches = Batches(images, order, cut, seed=self.ablation.seed)
            facts: dict[str, Any] = {"seed": self.ablation.seed, "device": self.device, "total": len(images)}
            fit_codebook(network, batches, recipe.clusters, **facts).save_pretrained(folder)

        codebook = Codebook.from_pretrained(self.stage("codebook", depends, fit)[0])
        return DigitPipeline(encoder=network, codebook=codebook, vqgan=vqgan, name="ablation").to(self.device)

    def tokens(self, pipe: DigitPipeline, views: Views) -> Path:
        """The token cache of the training images."""
        settings = getattr(pipe.encoder, "config", None)
        depends = {
            "weights": pipe.fingerprint(), "encoder": to_dict(settings) if settings is not None else None,
            "data": self.train_images.fingerprint, "views": to_dict(views),
        }  # fmt: skip

        def cache(folder: Path) -> None:
            build_token_cache(pipe, self.train_images, folder, views, batch_size=self.ablation.batch_size)

        return self.stage("tokens", depends, cache)[0]

    def token_model(
        self, variant: Variant, part: Literal["prior", "decoder"], tokens: Path
    ) -> tuple[TokenModel, Path, Any]:
        """A prior or a decoder, its folder, and its size and held-out loss."""
        name = getattr(variant.recipe, part)
        folder, facts = self._train(part, name, variant.preset(part), tokens, tokens.name)
        return load_component(folder, TokenModel, TokenModelConfig).to(self.device), folder, facts

    def probe(self, pipe: DigitPipeline, prior: Path) -> list[float]:
        """Accuracy of a linear probe on each state of the prior."""
        train_images, test_images = self.train_images, self.test_images
        depends = {
            "prior": prior.parent.name, "options": to_dict(self.ablation.probe),
            "images": [train_images.fingerprint, test_images.fingerprint],
        }  # fmt: skip

        def measure(_: Path) -> list[float]:
            data = ProbeData(train_images, test_images, batch_size=self.ablation.batch_size)
            classes = len(train_images.classes) or int(train_images.labels.max()) + 1
            features = data.features(pipe, "prior", describe_model(pipe))
            scores = score_features(*features, classes, self.ablation.probe, self.device)[0]
            return [score.accuracy for score in scores]

        found: list[float] = self.stage("probe", depends, measure)[1]
        return found

    def fid(self, run: SamplingRun, reference: Reference) -> float:
        """FID of a sampling run."""
        parts = {name: part["sha256"] for name, part in describe_model(run.pipe)["parts"].items()}
        depends = {"model": parts, "run": run.describe() | {"batch_size": None}, "reference": reference.describe()}
        value = self.stage("fid", depends, lambda _: reference.judge(run, None, "ablation")["values"]["fid"])[1]
        return float(value)


# ---- the whole measurement -------------------------------------------------------------------------------------------


def run_ablation(
    ablation: Ablation,
    data: str | Path,
    train_images: ImageDataset,
    test_images: ImageDataset,
    out: str | Path,
    metrics: Sequence[str] = METRICS,
    reference: str | None = None,
    weights: str | FeatureExtractor = "auto",
    device: str | None = None,
) -> tuple[Record, list[dict[str, Any]]]:
    """Make and measure every variant, and write ``result.json`` and ``ablation.png`` into ``out``.

    Args:
        ablation: see :func:`load_ablation`.
        data: the dataset that encoder and VQGAN are trained on, where the ablation trains them.
        train_images: whose tokens prior and decoder learn; a part is held out for the loss, as their presets say.
        test_images: which the probe is judged on.
        out: a folder; a run that was interrupted goes on.
        metrics: some of "nll", "probe" and "fid".
        reference: images or their ``.npz`` for FID; None: the training images.
        weights: of the FID network, see :func:`~digit.evaluation.metrics.inception.load_inception`, or the network
            itself. Without them FID is not measured, and the result says why.
        device: where everything runs.

    Returns:
        The record, and a line for each variant in the order of the ablation.

    Raises:
        DigitError: before anything is trained: an unknown metric, a variant that does not fit, a part that is not
            there, images without labels for the probe.
    """
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise DigitError(f"The metrics {', '.join(unknown)} were asked for; known are {', '.join(METRICS)}.")
    variants, began = plan(ablation), time.monotonic()
    reasons: dict[str, str] = {}
    _check_sources(variants)
    if "probe" in metrics and min(int(train_images.labels.min()), int(test_images.labels.min())) < 0:
        raise DigitError("The images have no classes, which the probe needs; leave it out with --metrics nll,fid.")
    extractor = None
    if "fid" in metrics:
        try:
            extractor = (
                open_extractor(weights, device=str(pick_device(device))) if isinstance(weights, str) else weights
            )
        except DigitError as error:
            reasons["fid"] = f"not measured: {error}"
    stages = Stages(out, str(data), train_images, test_images, ablation, device)
    chosen = [metric for metric in metrics if metric not in reasons]
    judge = _Judge(stages, reference, extractor)
    lines = [_line(stages, variant, chosen, judge, reasons) for variant in variants]
    _plot(ablation.what, lines, Path(out) / "ablation.png")
    named = any(variant.paper for variant in variants)
    record = Record(
        kind="ablation",
        title=f"Ablation: {ablation.what}",
        values=lines,
        settings={**to_dict(ablation), "metrics": list(metrics), "reference": reference or "the training images"},
        data={"train": describe_data(train_images, data), "test": describe_data(test_images)},
        paper={"source": paper.SOURCE, "reference": paper.FID_REFERENCE, "rows": {v.name: v.paper for v in variants}}
        if named
        else None,
        notes=[*reasons.values(), *_notes(ablation.what, lines, named)],
        plots=["ablation.png"],
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, lines


def _check_sources(variants: Sequence[Variant]) -> None:
    """See that every part that is not trained here exists, for the last of them may be needed days later."""
    for recipe in (variant.recipe for variant in variants):
        if not is_preset(recipe.vqgan):
            part_folder(recipe.vqgan)
        source = recipe.encoder
        if source is not None and not (is_preset(source) or Path(source).exists() or looks_like_repository(source)):
            raise DigitError(
                f"There is no encoder '{source}': no such file, folder or preset, and it is not a Hub id (owner/name)."
            )


class _Judge:
    """The reference of FID, measured when it is first needed."""

    def __init__(self, stages: Stages, reference: str | None, extractor: FeatureExtractor | None) -> None:
        self.stages, self.source, self.extractor = stages, reference, extractor
        self._made: Reference | None = None

    def reference(self, pipe: DigitPipeline) -> Reference:
        if self._made is None:
            assert self.extractor is not None
            size, stages = self.stages.ablation.batch_size, self.stages
            real = self.source
            batches = (batch.images for batch in image_batches(stages.train_images, pipe_size(pipe), size, torch.uint8))
            self._made = Reference.of(real or batches, self.extractor, FidelityOptions(batch_size=size))
        return self._made


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False)


def _line(
    stages: Stages, variant: Variant, metrics: Sequence[str], judge: _Judge, missing: Mapping[str, str]
) -> dict[str, Any]:
    """Make one variant, and measure it."""
    _say(variant.name)
    ablation, recipe, reasons = stages.ablation, variant.recipe, dict(missing)
    pipe = stages.tokenizers(recipe)
    tokens = stages.tokens(pipe, recipe.views)
    prior, place, facts = stages.token_model(variant, "prior", tokens)
    pipe = pipe.with_parts(prior=prior)
    line: dict[str, Any] = {
        "name": variant.name, "vocabulary": prior.config.vocab_size, "tokens": prior.config.length,
        "prior_parameters": facts["parameters"], "paper": dict(variant.paper),
    }  # fmt: skip
    nll = facts["metrics"].get("nll")
    if "nll" in metrics and nll is None:
        reasons["nll"] = "not measured: no images are held out; see data.held_out of the prior's preset."
    elif "nll" in metrics:
        line |= {"nats_per_token": nll, "bits_per_image": nll * prior.config.length / math.log(2)}
        line["saved"] = 1 - nll / math.log(prior.config.vocab_size)
    if "probe" in metrics:
        scores = stages.probe(pipe, place)
        line |= {"probe": scores, "middle": scores[len(scores) // 2], "best": max(scores)}
    if pipe.space == "semantic" and ("fid" in metrics or ablation.what == "decoder"):
        if recipe.decoder is None:
            reasons["fid"] = "not measured: there is no decoder."
        else:
            decoder, _, facts = stages.token_model(variant, "decoder", tokens)
            pipe = pipe.with_parts(decoders={decoder.config.role: decoder})
            line |= {"decoder": decoder.config.role, "decoder_parameters": facts["parameters"]}
            line |= {"decoder_nats": facts["metrics"]["nll"]} if "nats_per_token" in line else {}
    if "fid" in metrics and "fid" not in reasons:
        run = SamplingRun(
            pipe, ablation.fid_images, ablation.seed, batch_size=ablation.batch_size, settings=recipe.sampling
        )
        run.check()
        line["fid"] = stages.fid(run, judge.reference(pipe))
    return {**line, "not_measured": reasons}


def _notes(what: str, lines: Sequence[Mapping[str, Any]], named: bool) -> list[str]:
    notes = [
        "nats a token of different vocabularies say nothing side by side; bits an image and the saved part of log K say more."
    ]
    if len({line.get("decoder") for line in lines}) > 1 and any("decoder_nats" in line for line in lines):
        notes.append(
            "A masked decoder's loss is that of hidden tokens at random shares, an AR decoder's of all in order: not one scale."
        )
    if len({line["tokens"] for line in lines}) > 1:
        notes.append(
            "The variants have different numbers of tokens an image, so they differ in more than the thing that is varied."
        )
    if named:
        notes.append(
            f"The paper's values ({paper.SOURCE}) are of ImageNet 256 x 256, class-unconditional, at its scale."
        )
    if what == "prior-size":
        notes.append("The paper's step from 219M to 732M changes the encoder and K too; here the prior alone changes.")
    return notes


_PANELS = {
    "best": ("linear probe of the prior's best layer, %", "What the prior knows", 100, "probe"),
    "saved": ("saved of log K, % (higher: easier to predict)", "How predictable the tokens are", 100, None),
    "decoder_nats": ("held-out nats a token (lower is better)", "The decoder", 1, None),
    "fid": ("FID (lower is better)", "The images", 1, "fid"),
}
"""What is drawn: the axis, the title, its scale, and the paper's value beside it."""


def _plot(what: str, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of what was measured, and the probe by layer where priors differ."""
    hidden = {"best", "saved"} if what == "decoder" else {"decoder_nats"}
    panels = [key for key in _PANELS if key not in hidden and any(key in line for line in lines)]
    curves = what != "decoder" and any("probe" in line for line in lines)
    with figure(path, max(1, len(panels) + curves), (5.4, 0.42 * len(lines) + 2.6)) as axes:
        for index, (key, panel) in enumerate(zip(panels, axes, strict=False)):
            _bars(panel, key, lines, names=index == 0)
        if curves:
            for index, line in enumerate(lines):
                shade = ("#1f6feb", "#d1570b", "#2e8b57", "#8e44ad", "#b8860b", "#555555")[index % 6]
                axes[-1].plot(
                    [100 * value for value in line.get("probe", [])],
                    "o-",
                    color=shade,
                    label=line["name"],
                    markersize=4,
                )
            axes[-1].set(xlabel="state of the prior (0: embedding)", ylabel="linear probe, %", title="Layer by layer")
            axes[-1].set_xticks(range(max(len(line.get("probe", [])) for line in lines)))
            axes[-1].legend(fontsize=9)


def _bars(panel: Any, key: str, lines: Sequence[Mapping[str, Any]], names: bool) -> None:
    label, title, scale, row = _PANELS[key]
    places = range(len(lines))
    panel.barh(places, [scale * line.get(key, float("nan")) for line in lines], color=OURS, label="here")
    theirs = [(line["paper"].get(row), place) for place, line in zip(places, lines, strict=True)]
    if shown := [(value, place) for value, place in theirs if value is not None]:
        panel.plot(*zip(*shown, strict=True), "D", color=PAPER, label="the paper, at its scale", markersize=6)
        panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2)
    panel.set_yticks(places, [line["name"] if names else "" for line in lines])
    panel.invert_yaxis()
    panel.set(xlabel=label, title=title)
    panel.grid(visible=False, axis="y")
