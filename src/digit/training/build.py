"""From a preset to a task: the sections of a YAML file become networks and data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from digit.config import from_dict
from digit.data.token_cache import open_token_cache
from digit.errors import DigitError
from digit.models.token_model import TokenModel
from digit.tokenizers.vqgan import VQGAN
from digit.training.config import TrainingConfig
from digit.training.engine import seed_everything
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
        raise DigitError(f"{where} is not a training preset ({problem}); the sections are {', '.join(sorted(_SECTIONS))}.")
    return from_dict(TrainingConfig, preset["training"], f"{where}, training")


def build_task(
    component: str, preset: Mapping[str, Any], data: str | Path, where: str, vqgan: VQGAN | None = None
) -> tuple[Task, TrainingConfig]:
    """Everything that :func:`digit.training.loop.train` needs, with fresh weights from the preset's seed.

    Args:
        component: "encoder", "vqgan", "prior" or "decoder".
        preset: its sections; see :func:`digit.config.load_preset`.
        data: a dataset for an encoder or a VQGAN, a token cache for a prior or a decoder.
        where: the preset's name, for messages.
        vqgan: shows the samples of a token model as pictures.

    Raises:
        DigitError: the preset is another component's, or a section is wrong.
    """
    where = f"preset {where}"
    if preset.get("component") != component:
        raise DigitError(f"The {where} is for the component '{preset.get('component')}', but '{component}' is to be trained.")
    config = training_config(preset, where)
    seed_everything(config.seed)
    if component in ("prior", "decoder"):
        return _tokens(component, preset, data, where, config, vqgan), config
    if component == "encoder":
        from digit.training.tasks import encoder

        return encoder.build(preset, data, where), config
    from digit.training.tasks import vqgan as autoencoder

    return autoencoder.build(preset, data, where), config


def _tokens(
    component: str, preset: Mapping[str, Any], folder: str | Path, where: str, config: TrainingConfig, vqgan: VQGAN | None
) -> Task:
    cache = open_token_cache(folder)
    data = from_dict(TokenData, preset.get("data") or {}, f"{where}, data")
    model = TokenModel(token_model_config(preset["model"], cache, data, f"{where}, model"))
    return TokenTask(model, cache, data, component, config.z_loss, vqgan)
