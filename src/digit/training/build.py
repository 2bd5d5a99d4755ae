"""From a preset to a task: the sections of a YAML file become networks and data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.core.config import from_dict
from digit.core.errors import DigitError
from digit.data.token_cache import open_token_cache
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.training.auxiliary import Auxiliary, known_fields, load_centroids, neighbours, set_embeddings
from digit.training.config import TrainingConfig
from digit.training.engine import seed_everything
from digit.training.finetune import FineTune, start_model
from digit.training.task import Task
from digit.training.tasks import encoder, feedforward_build
from digit.training.tasks import vqgan as vqgan_task
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
        data: a dataset for an encoder, a VQGAN or a feed-forward decoder, a token cache for a prior or another decoder.
        where: the preset's name, for messages.
        vqgan: shows the samples of a token model as images.
        start: the saved part to begin with, instead of random weights.
        parts: a model, whose encoder, codebook and VQGAN a feed-forward decoder is trained with.

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
    task: Any
    if component == "encoder":
        task = encoder.build(preset, data, where, start)
    elif component == "vqgan":
        task = vqgan_task.build(preset, data, where, start)
    elif preset["model"].get("role") == "onepass":
        task = feedforward_build.build(preset, data, where, parts, start)
    else:
        task = _token_task(component, preset, data, where, config.z_loss, vqgan, start)
    return task, config


def _token_task(
    component: str,
    preset: Mapping[str, Any],
    folder: str | Path,
    where: str,
    z_loss: float,
    vqgan: VQGAN | None,
    start: FineTune | None,
) -> TokenTask:
    cache = open_token_cache(folder)
    if os.environ.get("RANK", "0") == "0":
        cache.verify()  # seconds a gigabyte, once; a flipped bit would be learnt without a word
    data = from_dict(TokenData, preset.get("data") or {}, f"{where}, data")
    objective = f"{where}, objective"
    auxiliary = from_dict(Auxiliary, known_fields(preset.get("objective") or {}, objective), objective)
    origin: dict[str, Any] = {}
    if start is None:
        model = TokenModel(token_model_config(preset["model"], cache, data, f"{where}, model"))
    else:
        model, origin = start_model(start, preset["model"], cache, data, f"{where}, model")
    if auxiliary.prefix_noise and not model.config.prefix_length:
        raise DigitError("objective.prefix_noise is for decoders; this model has no semantic prefix to disturb.")
    if auxiliary.centroid_embeddings and start is not None:
        raise DigitError(
            "objective.centroid_embeddings is for new models; one that starts from another has its own vectors."
        )
    kinds: set[str] = {data.target} if auxiliary.centroid_embeddings else set()
    kinds |= {data.prefix} if data.prefix and (auxiliary.prefix_noise or auxiliary.centroid_embeddings) else set()
    centroids = load_centroids(str(auxiliary.codebook), kinds, cache) if kinds else {}
    if auxiliary.centroid_embeddings:
        set_embeddings(model.token_embedding, centroids[data.target])
        if model.prefix_embedding is not None:
            set_embeddings(model.prefix_embedding, centroids["semantic"])
    near: Tensor | None = None
    if auxiliary.prefix_noise:
        near = neighbours(centroids["semantic"], auxiliary.prefix_neighbours)
    return TokenTask(model, cache, data, component, z_loss, vqgan, auxiliary, near, origin)
