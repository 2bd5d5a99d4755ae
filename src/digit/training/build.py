"""From a preset to a task: the sections of a YAML file become networks and data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.data.token_cache import TokenCache, open_token_cache
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.training.auxiliary import Extras, load_centroids, set_embeddings
from digit.training.config import TrainingConfig
from digit.training.engine import seed_everything
from digit.training.finetune import FineTune, start_model
from digit.training.task import Task
from digit.training.tasks.tokens import TokenData, TokenTask, token_model_config

_SECTIONS = {"component", "model", "objective", "data", "training"}


def training_config(preset: Mapping[str, Any], where: str) -> TrainingConfig:
    """The ``training`` section.

    Raises:
        DigitError: it is missing or wrong.
    """
    unknown = set(preset) - _SECTIONS
    if unknown or "training" not in preset or "model" not in preset:
        problem = f"unknown sections: {', '.join(sorted(unknown))}" if unknown else "'model' and 'training' are needed"
        raise DigitError(
            f"{where} is not a training preset ({problem}); the sections are {', '.join(sorted(_SECTIONS))}."
        )
    return from_dict(TrainingConfig, preset["training"], f"{where}, training")


def build_task(
    component: str,
    preset: Mapping[str, Any],
    data: str | Path,
    where: str,
    vqgan: VQGAN | None = None,
    start: FineTune | None = None,
    parts: DigitPipeline | None = None,
) -> tuple[Task, TrainingConfig]:
    """Everything that :func:`digit.training.loop.train` needs, with fresh weights from the preset's seed, or those of a
    saved model.

    Args:
        component: "encoder", "vqgan", "prior" or "decoder".
        preset: its sections; see :func:`digit.core.config.load_preset`.
        data: a dataset for an encoder, a VQGAN or a one-pass decoder, a token cache for a prior or another decoder.
        where: the preset's name, for messages.
        vqgan: shows the samples of a token model as pictures.
        start: the saved part to begin with, instead of random weights.
        parts: a model, whose encoder, codebook and VQGAN a one-pass decoder is trained with.

    Raises:
        DigitError: the preset is another component's, or a section is wrong.
    """
    where = f"preset {where}"
    if preset.get("component") != component:
        raise DigitError(
            f"The {where} is for the component '{preset.get('component')}', but '{component}' is to be trained."
        )
    config = training_config(preset, where)
    seed_everything(config.seed)
    if component == "decoder" and preset["model"].get("role") == "onepass":
        from digit.training.tasks import feedforward_build

        return feedforward_build.build(preset, data, where, parts, start), config
    if component in ("prior", "decoder"):
        return _tokens(component, preset, data, where, config, vqgan, start), config
    if component == "encoder":
        from digit.training.tasks import encoder

        return encoder.build(preset, data, where, start), config
    from digit.training.tasks import vqgan as autoencoder

    return autoencoder.build(preset, data, where, start), config


def _tokens(
    component: str,
    preset: Mapping[str, Any],
    folder: str | Path,
    where: str,
    config: TrainingConfig,
    vqgan: VQGAN | None,
    start: FineTune | None,
) -> Task:
    cache = open_token_cache(folder)
    if os.environ.get("RANK", "0") == "0":
        cache.verify()  # seconds a gigabyte, once; a flipped bit would be learnt without a word
    data = from_dict(TokenData, preset.get("data") or {}, f"{where}, data")
    extras = from_dict(Extras, preset.get("objective") or {}, f"{where}, objective")
    origin: dict[str, Any] = {}
    if start is None:
        model = TokenModel(token_model_config(preset["model"], cache, data, f"{where}, model"))
    else:
        model, origin = start_model(start, preset["model"], cache, data, f"{where}, model")
    if not extras.chosen:
        return TokenTask(model, cache, data, component, config.z_loss, vqgan, start=origin)
    extras.check(model.config)
    centroids = _centroids(extras, cache, data)
    if extras.centroid_embeddings:
        if start is not None:
            raise DigitError(
                "objective.centroid_embeddings is for new models; one that starts from another has its own vectors."
            )
        set_embeddings(model.token_embedding, centroids[data.target])
        if model.prefix_embedding is not None:
            set_embeddings(model.prefix_embedding, centroids["semantic"])
    return TokenTask(model, cache, data, component, config.z_loss, vqgan, extras, centroids, origin)


def _centroids(extras: Extras, cache: TokenCache, data: TokenData) -> dict[str, Tensor]:
    """Those that the extras need."""
    kinds: set[str] = set()
    if extras.alignment or extras.soft_targets or extras.centroid_embeddings:
        kinds.add(data.target)
    if data.prefix and (extras.prefix_noise or extras.centroid_embeddings):
        kinds.add(data.prefix)
    return load_centroids(str(extras.codebook), kinds, cache) if kinds else {}
