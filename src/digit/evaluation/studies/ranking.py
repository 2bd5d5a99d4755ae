"""Which tokens to train on, before anybody trains for days: a small prior is trained briefly on each, and probed.

Source: Xiong et al. 2025, arXiv 2504.08736 (GigaTok), whose AR probing finds that loss and probe accuracy of a small
model foretell those of large ones. They train 111M parameters for 50 epochs; here the size and the length are options,
and the ranking is only as good as they allow. Loss is given per image too: tokens of different number and vocabulary
cannot be compared by theirs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from digit.clustering.discretisers import Discretisation
from digit.core.config import Positive, PositiveInt, config, to_dict
from digit.core.errors import DigitError
from digit.data.token_cache import Views
from digit.evaluation.metrics.probe import ProbeOptions
from digit.evaluation.model_source import describe_data
from digit.evaluation.results import Result, Rows
from digit.evaluation.studies.stages import Stages, cells, comparison, predictability
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline


@config
class RankingOptions:
    """The small prior and its short training.

    Attributes:
        steps, batch_size, lr: of the training; AdamW, cosine after a tenth of warm-up.
        dim, depth, heads: of the prior.
        probe: how its layers are probed.
        seed: of everything random.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 64
    lr: Positive = 1e-3
    dim: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    probe: ProbeOptions = ProbeOptions(epochs=30, lrs=(0.4, 4.0), standardize=True, neighbours=0)
    seed: int = 0

    def preset(self, space: str) -> dict[str, Any]:
        """The training preset of the small prior over "semantic" or "vq" tokens."""
        return {
            "component": "prior",
            "model": {"role": "prior", "transformer": {"dim": self.dim, "depth": self.depth, "heads": self.heads}},
            "data": {"target": space},
            "training": {
                "steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "schedule": "cosine",
                "warmup_steps": self.steps // 10, "seed": self.seed, "validate_every": 0,
            },
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ranking(Result):
    """``values``: a line for each candidate, the best first."""

    kind: str = "screen"

    def rows(self) -> Rows:
        return [{"Rank": rank, "Candidate": line["name"], **cells(line)} for rank, line in enumerate(self.values, 1)]

    def figure(self) -> Any:
        """The middle layer's probe, how predictable the tokens are, and the probe by layer; or what the bits buy."""
        return comparison(self.values, ("middle", "saved", "worth", "psnr"))


def candidates(
    models: Mapping[str, DigitPipeline],
    clusters: Sequence[int],
    stages: Stages,
    kinds: Sequence[Discretisation] = (Discretisation(),),
) -> dict[str, DigitPipeline]:
    """The tokenizers of some models by name; one without encoder and codebook stands for its VQ tokens.

    ``clusters``: sizes K of codebooks to fit for each encoder, of each of ``kinds``; none keeps the models' own.

    Raises:
        DigitError: a model that makes no tokens, or codebooks were asked for and a model has no encoder.
    """
    found = {}
    for name, pipe in models.items():
        if clusters:
            encoder = pipe.part("encoder")
            for kind, count in product(kinds, clusters):
                codebook = stages.codebook(encoder, count, kind=kind).to(pipe.device)
                label = f"{name}, K = {codebook.config.clusters:,}" + (f", {kind}" if len(kinds) > 1 else "")
                found[label] = DigitPipeline(encoder=encoder, codebook=codebook, name=pipe.name)
        elif pipe.encoder is not None and pipe.codebook is not None:
            tokenizer = DigitPipeline(encoder=pipe.encoder, codebook=pipe.codebook, name=pipe.name)
            found[f"{name}, K = {pipe.codebook.config.clusters:,}"] = tokenizer
        elif pipe.vqgan is not None:
            tokenizer = DigitPipeline(vqgan=pipe.vqgan, space="vq", name=pipe.name)
            found[f"{name}, {pipe.vqgan.config.codes:,} VQ codes"] = tokenizer
        else:
            raise DigitError(f"The model '{name}' makes no tokens: it needs an encoder with a codebook, or a VQGAN.")
    return found


def rank(entries: Mapping[str, DigitPipeline], stages: Stages, options: RankingOptions | None = None) -> Ranking:
    """Train a small prior on the tokens of each candidate and probe it; what is finished is not done again.

    A tenth of the training images, at most 512, is held out for the loss. All images need classes, for the probe.
    """
    options, began = options or RankingOptions(), time.monotonic()
    lines = []
    for name, tokenizer in entries.items():
        preset = options.preset(tokenizer.space)
        prior, step = stages.token_model("prior", "of the ranking", preset, stages.tokens(tokenizer, Views()))
        lines.append(
            {
                "name": name,
                "vocabulary": prior.config.vocab_size,
                "tokens": prior.config.length,
                **predictability(float(step.value["metrics"]["nll"]), prior),
                **stages.probe(tokenizer.with_parts(prior=prior), step, options.probe),
            }
        )
    lines.sort(key=lambda line: -line["middle"])
    return Ranking(
        title="Tokens ranked by a short training of a small prior",
        values=lines,
        settings=to_dict(options),
        model={name: describe_model(tokenizer) for name, tokenizer in entries.items()},
        data={
            "train": describe_data(stages.train_images, *entries.values()),
            "test": describe_data(stages.test_images, *entries.values()),
        },
        notes=(
            f"A prior of {options.depth} blocks of width {options.dim} was trained for {options.steps} steps of "
            f"{options.batch_size} images; ranked by the probe of its middle layer (state {(options.depth + 1) // 2}).",
            "So short a training ranks what is learnt first. Differences of one or two points are within its noise.",
        ),
        seconds=time.monotonic() - began,
    )
