"""From a preset to a task: the sections of a YAML file become networks and data."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from digit.core.config import config, from_dict, load_preset, override
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.data.token_cache import open_token_cache
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.training.auxiliary import Auxiliary, known_fields, load_centroids, neighbours, set_embeddings
from digit.training.engine import seed_everything
from digit.training.finetune import FineTune, start_model
from digit.training.loop import REQUEST
from digit.training.task import Task, TrainingConfig
from digit.training.tasks import encoder, feedforward
from digit.training.tasks import vqgan as vqgan_task
from digit.training.tasks.tokens import TokenData, TokenTask, token_model_config

_SECTIONS = {"component", "model", "objective", "data", "training"}


@config
class Request:
    """What ``digit train`` was asked for: everything a run needs to begin or to go on, but its folder and device. The
    fields are as for :func:`build_task`; ``settings`` are the sections of ``preset``, with the user's changes.
    """

    component: Literal["encoder", "vqgan", "prior", "decoder"]
    preset: str
    settings: dict[str, Any]
    data: str
    model: str | None = None
    start: FineTune | None = None

    def build(self) -> tuple[Task, TrainingConfig]:
        """The task and its training config; errors as of :func:`build_task`."""
        parts = None if self.model is None else DigitPipeline.from_pretrained(self.model)
        return build_task(self.component, self.settings, self.data, self.preset, self.start, parts)


def request_for(
    component: Literal["encoder", "vqgan", "prior", "decoder"],
    run: Path | None,
    preset: str | None,
    data: str | None,
    model: str | None,
    start: FineTune | None,
    changes: Sequence[str],
) -> Request:
    """What the user asks for; what is left out is as the run that is resumed in the folder ``run`` has it. ``changes``
    are ``a.b=c``. A DigitError where something is not known, or the run is another component's or preset's.
    """
    path = None if run is None else run / REQUEST
    if path is not None and path.is_file():
        begun: Request = from_dict(Request, read_json(path), str(path))
        for what, asked, known in (("component", component, begun.component), ("preset", preset, begun.preset)):
            if asked not in (None, known):
                raise DigitError(f"The run in {run} is of the {what} '{known}', but '{asked}' was given with --resume.")
        known_or = replace(begun, data=data or begun.data, model=model or begun.model, start=start or begun.start)
        return replace(known_or, settings=change(begun.settings, changes, begun.preset))
    if preset is None or data is None:
        found = "" if run is None else f"; {run} holds no {REQUEST}, from which --resume could take them"
        raise DigitError(f"A training needs --preset and --data{found}.")
    settings = change(load_preset(preset), changes, preset)
    return Request(component=component, preset=preset, settings=settings, data=data, model=model, start=start)


def change(settings: Mapping[str, Any], changes: Sequence[str], preset: str) -> dict[str, Any]:
    """Sections of a preset with ``a.b=c`` applied. Steps take the place of epochs, and the other way round."""
    changed = copy.deepcopy(dict(settings))
    other = {"training.steps": "epochs", "training.epochs": "steps"}
    for item in changes:
        override(changed, item, preset)
        name, _, value = item.partition("=")
        if name in other and value != "null":
            changed["training"][other[name]] = None
    return changed


def build_task(
    component: str,
    preset: Mapping[str, Any],
    data: str | Path,
    where: str,
    start: FineTune | None = None,
    parts: DigitPipeline | None = None,
) -> tuple[Task, TrainingConfig]:
    """Everything that :func:`digit.training.loop.train` needs, with fresh weights from the preset's seed, or those of a
    saved model.

    Args:
        preset: its sections; see :func:`digit.core.config.load_preset`. ``where`` is its name, for messages.
        data: a dataset for an encoder, a VQGAN or a feed-forward decoder, a token cache for a prior or another decoder.
        parts: a model. A feed-forward decoder is trained with its encoder, codebook and VQGAN; of a token model, its
            VQGAN shows the samples as images.

    Raises:
        DigitError: the preset is not one of the ``component``, or a section is wrong.
    """
    where = f"preset {where}"
    if preset.get("component") != component:
        raise DigitError(
            f"The {where} is for the component '{preset.get('component')}', but '{component}' is to be trained."
        )
    unknown = set(preset) - _SECTIONS
    if unknown or "training" not in preset or "model" not in preset:
        problem = f"unknown sections: {', '.join(sorted(unknown))}" if unknown else "'model' and 'training' are needed"
        raise DigitError(
            f"{where} is not a training preset ({problem}); the sections are {', '.join(sorted(_SECTIONS))}."
        )
    objective = known_fields(preset.get("objective") or {}, f"{where}, objective")
    preset = {**preset, "objective": objective, "data": preset.get("data") or {}}
    settings: TrainingConfig = from_dict(TrainingConfig, preset["training"], f"{where}, training")
    seed_everything(settings.seed)
    task: Any
    if component == "encoder":
        task = encoder.build(preset, data, where, start)
    elif component == "vqgan":
        task = vqgan_task.build(preset, data, where, start)
    elif preset["model"].get("role") == "onepass":
        task = feedforward.build(preset, data, where, parts, start)
    else:
        vqgan = None if parts is None else parts.vqgan
        task = _token_task(component, preset, data, where, settings.z_loss, vqgan, start)
    return task, settings


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
    data = from_dict(TokenData, preset["data"], f"{where}, data")
    auxiliary = from_dict(Auxiliary, preset["objective"], f"{where}, objective")
    origin: dict[str, Any] = {}
    if start is None:
        model = TokenModel(token_model_config(preset["model"], cache, data, f"{where}, model"))
    else:
        model, origin = start_model(start, preset["model"], cache, data, f"{where}, model")
    if auxiliary.prefix_noise and not model.config.prefix_length:
        raise DigitError("objective.prefix_noise is for decoders; this model has no semantic prefix to disturb.")
    if auxiliary.order_annealing and model.config.role != "random":
        raise DigitError(f"objective.order_annealing is for role 'random'; this model's is '{model.config.role}'.")
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
        near = neighbours(centroids["semantic"], auxiliary.prefix_neighbours, cache.space("semantic").depth)
    return TokenTask(model, cache, data, component, z_loss, vqgan, auxiliary, near, origin)
