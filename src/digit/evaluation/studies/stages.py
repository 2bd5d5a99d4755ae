"""What ablations and the ranking of tokenizers have in common: a prior is trained on tokens and probed, stage by stage.

A stage is named by all that it depends on (:class:`~.steps.Steps`): variants that agree up to a stage share it, what
is finished is not done again, and a training that was interrupted goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from digit.clustering.discretisers import Discretisation
from digit.clustering.kmeans import describe_encoder, fit_codebook
from digit.core.config import to_dict
from digit.core.devices import pick_device
from digit.core.files import read_json
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset
from digit.data.sampling import Batches, OrderedSampler
from digit.data.token_cache import Views, build_token_cache
from digit.evaluation import paper
from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, score_features
from digit.evaluation.model_source import spread
from digit.evaluation.results import COLORS, OURS, PAPER, Result, Rows, legend, panels, provenance, shown
from digit.evaluation.steps import Step, Steps
from digit.models.codebook import Codebook
from digit.models.token_model import TokenModel
from digit.pipeline.assembly import part_folder
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.build import build_task
from digit.training.loop import train

Line = Mapping[str, Any]
"""What was measured of one variant, plain JSON."""


@dataclass(frozen=True)
class Stages:
    """The stages of a comparison in one folder.

    Attributes:
        train_images: whose tokens are learnt.
        test_images: which the probe is tested on.
        batch_size: images at a time; does not change the values.
        seed: of k-means.
        given_device: where everything runs, as the user gave it.
    """

    out: Path
    train_images: ImageDataset
    test_images: ImageDataset
    batch_size: int = 64
    seed: int = 0
    given_device: str | None = None

    @cached_property
    def device(self) -> str:
        """Where everything runs."""
        return str(pick_device(self.given_device))

    @cached_property
    def steps(self) -> Steps:
        """The finished ones."""
        return Steps(self.out)

    def train(self, component: str, name: str, preset: dict[str, Any], data: str | Path, source: str) -> Step:
        """Train by a preset called ``name`` over ``data``, which ``source`` identifies; the value holds the number of
        ``parameters`` and the held-out ``metrics``.
        """

        def work(folder: Path) -> dict[str, Any]:
            task, settings = build_task(component, preset, data, name)
            network = getattr(task, "model", None)
            count = sum(p.numel() for p in network.parameters()) if isinstance(network, TokenModel) else None
            model = train(task, settings, folder, resume=True, device=self.given_device)
            return {"parameters": count, "metrics": read_json(model / "config.json")["provenance"].get("metrics", {})}

        return self.steps.run(component, {"preset": preset, "data": source}, work)

    def token_model(self, component: str, name: str, preset: dict[str, Any], tokens: Step) -> tuple[TokenModel, Step]:
        """Train a prior or a decoder on cached tokens."""
        step = self.train(component, name, preset, tokens.folder, tokens.folder.name)
        return TokenModel.from_pretrained(part_folder(step.folder)).to(self.device), step

    def codebook(
        self, encoder: Any, clusters: int, images: int | None = None, crops: bool = False,
        kind: Discretisation | None = None,
    ) -> Codebook:  # fmt: skip
        """Fit a codebook to some of the training images (all of them if None); ``crops`` cuts and mirrors at random."""
        dataset = spread(self.train_images, images)
        inputs = {
            "encoder": describe_encoder(encoder), "preprocessing": to_dict(encoder.preprocessing), "clusters": clusters,
            "crops": crops, "seed": self.seed, "data": dataset.fingerprint,
            **({"kind": to_dict(kind)} if kind and kind != Discretisation() else {}),
        }  # fmt: skip

        def fit(folder: Path) -> None:
            size = encoder.preprocessing.image_size
            cut = Transform(size=size, crop="random" if crops else "center", flip=crops)
            batches = Batches(dataset, OrderedSampler(len(dataset), self.batch_size), cut, seed=self.seed)
            facts: dict[str, Any] = {"seed": self.seed, "device": self.device, "total": len(dataset)}
            fit_codebook(encoder, batches, clusters, discretiser=kind, **facts).save_pretrained(folder)

        return Codebook.from_pretrained(self.steps.run("codebook", inputs, fit).folder)

    @staticmethod
    def tokenizer(pipe: DigitPipeline) -> dict[str, Any]:
        """What tokens depend on beside the images."""
        settings = getattr(pipe.encoder, "config", None)
        return {"weights": pipe.fingerprint(), "encoder": None if settings is None else to_dict(settings)}

    def tokens(self, pipe: DigitPipeline, views: Views) -> Step:
        """The token cache of the training images."""
        inputs = {**self.tokenizer(pipe), "data": self.train_images.fingerprint, "views": to_dict(views)}

        def cache(folder: Path) -> None:
            build_token_cache(pipe, self.train_images, folder, views, batch_size=self.batch_size)

        return self.steps.run("tokens", inputs, cache)

    def probe(self, pipe: DigitPipeline, prior: Step, options: ProbeOptions) -> dict[str, Any]:
        """``probe``: accuracy of a linear probe on each state of the prior; ``middle``, ``best`` and ``best_state`` of
        them.
        """
        data = ProbeData(self.train_images, self.test_images, batch_size=self.batch_size)
        inputs = {
            "prior": prior.folder.name, "options": to_dict(options),
            "images": [self.train_images.fingerprint, self.test_images.fingerprint],
        }  # fmt: skip

        def measure(_: Path) -> list[float]:
            features = data.features(pipe, "prior", describe_model(pipe))
            return [score.accuracy for score in score_features(*features, data.classes, options, self.device)[0]]

        found: list[float] = self.steps.run("probe", inputs, measure).value
        best = max(found)
        return {"probe": found, "middle": found[len(found) // 2], "best": best, "best_state": found.index(best)}


def predictability(nll: float, prior: TokenModel) -> dict[str, float]:
    """Held-out ``nats_per_token``, ``bits_per_image``, and ``saved``: the part of log K that they take less."""
    length, codes = prior.config.length, prior.config.vocab_size
    return {"nats_per_token": nll, "bits_per_image": nll * length / math.log(2), "saved": 1 - nll / math.log(codes)}


COLUMNS = {
    "vocabulary": ("Codes", 1),
    "tokens": ("Tokens", 1),
    "prior_parameters": ("Prior, M", 1e-6),
    "middle": ("Middle layer, %", 100),
    "best": ("Best layer, %", 100),
    "nats_per_token": ("Nats/token", 1),
    "bits_per_image": ("Bits/image", 1),
    "saved": ("Saved of log K, %", 100),
    "decoder_nats": ("Decoder, nats/token", 1),
    "fid": ("FID ↓", 1),
    "usage": ("Used, %", 100),
    "entropy": ("Entropy, bits/token", 1),
    "changed": ("Changed, % ↓", 100),
    "knn": ("k-NN, % ↑", 100),
    "psnr": ("Ridge PSNR, dB ↑", 1),
    "worth": ("Bits saved/spent ↑", 1),
}
"""Headings and scales of the measured values."""

_PANELS = {
    "middle": ("linear probe of the prior's middle layer, %", "What the prior knows"),
    "best": ("linear probe of the prior's best layer, %", "What the prior knows"),
    "saved": ("saved of log K, % (higher: easier to predict)", "How predictable the tokens are"),
    "decoder_nats": ("held-out nats a token (lower is better)", "The decoder"),
    "fid": ("FID (lower is better)", "The images"),
    "psnr": ("PSNR, dB", "What ridge regression decodes"),
    "worth": ("bits saved per bit spent", "What the bits buy"),
}
_PAPER = {"best": "probe", "fid": "fid"}
_THEIRS = "Paper (ImageNet, no classes):"


def cells(line: Line) -> dict[str, Any]:
    """The measured values of a line by their headings."""
    return {title: scale * line[key] for key, (title, scale) in COLUMNS.items() if line.get(key) is not None}


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """``values``: a line for each variant in the order of the ablation, or for each candidate, the best first."""

    kinds: ClassVar[tuple[str, ...]] = ("ablation", "screen")

    def rows(self) -> Rows:
        """Of an ablation also what FID was measured against, how images were sampled, and the paper's values, none of
        which were sampled with classes.
        """
        rows = []
        for rank, line in enumerate(self.values, 1):
            head = {"Variant": line["name"]} if self.kind == "ablation" else {"Rank": rank, "Candidate": line["name"]}
            row = {**head, **cells(line)}
            if "against" in line:
                stages = ", ".join(f"{stage}: {text}" for stage, text in line["sampling"].items())
                row |= {"FID against": line["against"], "Classes": line["classes"] or "none", "Sampling": stages}
            theirs = line.get("paper") or {}
            row |= {f"{_THEIRS} {key}": theirs[key] for key in ("probe", "fid") if theirs.get(key)}
            rows.append(row)
        return rows

    def provenance(self) -> str:
        if self.kind == "screen":
            return super().provenance()
        measured, s = any("fid" in line for line in self.values), self.settings
        reference = {"name": s["fid_reference"], "weights": s.get("fid_weights")} if measured else None
        count = f"; {shown(s['fid_images'])} generated images per variant" if measured else ""
        return provenance(data=self.data, reference=reference) + count

    def figure(self) -> Any:
        """Bars for what was measured, the paper's values beside them, and the probe by layer."""
        lines, what = self.values, self.settings.get("what", self.kind)
        sets = {"screen": ("middle", "saved", "worth", "psnr"), "decoder": ("decoder_nats", "fid")}
        keys = sets.get(what, ("best", "saved", "fid"))
        drawn = [key for key in keys if any(key in line for line in lines)]
        probed = [line for line in lines if "probe" in line and what != "decoder"]
        if not drawn and not probed:
            return None
        figure, places = panels(len(drawn) + bool(probed), (5.4, 0.42 * len(lines) + 2.6))
        rows, names = range(len(lines)), [line["name"] for line in lines]
        for index, (key, axes) in enumerate(zip(drawn, places, strict=False)):
            scale = COLUMNS[key][1]
            axes.barh(rows, [scale * line.get(key, math.nan) for line in lines], color=OURS, label="here")
            theirs = [(line.get("paper", {}).get(_PAPER.get(key)), row) for row, line in zip(rows, lines, strict=True)]
            if known := [(value, row) for value, row in theirs if value is not None]:
                axes.plot(*zip(*known, strict=True), "D", color=PAPER, label="the paper, at its scale", markersize=6)
            axes.set_yticks(rows, ["" for _ in names] if index else names)
            axes.invert_yaxis()
            axes.set(xlabel=_PANELS[key][0], title=_PANELS[key][1])
            axes.grid(visible=False, axis="y")
        for index, line in enumerate(probed):
            color, values = COLORS[1 + index % (len(COLORS) - 1)], [100 * value for value in line["probe"]]
            places[-1].plot(values, "o-", color=color, label=line["name"], markersize=4)
        if probed:
            places[-1].set(xlabel="state of the prior (0: embedding)", ylabel="linear probe, %", title="Layer by layer")
            places[-1].xaxis.get_major_locator().set_params(integer=True)
        legend(places)
        return figure


def result_notes(what: str, lines: Sequence[Line], named: bool) -> list[str]:
    """What a reader of the table should know; ``named``: it holds values of the paper."""
    decoders = {line.get("decoder") for line in lines if "decoder_nats" in line}
    notes = {
        "Nats a token of other vocabularies are not comparable; bits an image and the saved part of log K are.": True,
        "A masked decoder's loss is of hidden tokens at random, an AR decoder's of all in order: not one scale.": (
            len(decoders) > 1
        ),
        "The variants have different numbers of tokens an image, so they differ in more than what is varied.": (
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
