"""Putting trained parts together to a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digit.convert.rae import convert_rae
from digit.core.config import from_dict, read_value, to_dict
from digit.core.errors import DigitError
from digit.pipeline.model import load_part
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling.request import SamplingParams


def part_folder(path: str | Path) -> Path:
    """The folder of a component, given that or the folder of the training run that made it. DigitError: neither."""
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise DigitError(f"{path} is not a saved part: there is no config.json in it or in {path / 'model'}.")


def assemble(
    encoder: str | Path | None = None,
    codebook: str | Path | None = None,
    vqgan: str | Path | None = None,
    prior: str | Path | None = None,
    decoders: Sequence[str | Path] = (),
    base: str | None = None,
    name: str | None = None,
    class_names: list[str] | None = None,
) -> DigitPipeline:
    """Load parts and put them into one pipeline; what ``base`` has and is not given is taken over.

    A prior that was trained on VQ tokens makes a baseline in VQ space. A decoder ``rae:SOURCE`` is that of an RAE of
    diffusers, which needs encoder and codebook; see :func:`~digit.convert.rae.convert_rae`.
    """
    given = {"encoder": encoder, "codebook": codebook, "vqgan": vqgan, "prior": prior}
    parts: dict[str, Any] = {
        name: load_part(part_folder(path), name) for name, path in given.items() if path is not None
    }
    if prior is not None:
        facts = parts["prior"].provenance
        parts |= {"class_names": list(facts.get("class_names", [])), "space": facts.get("space", "semantic")}
    parts |= {key: value for key, value in {"class_names": class_names, "name": name}.items() if value is not None}
    start = DigitPipeline() if base is None else DigitPipeline.from_pretrained(base)
    whole = start.with_parts(**parts, decoders={})
    models = []
    for path in map(str, decoders):
        if path.startswith("rae:"):
            models.append(convert_rae(path.removeprefix("rae:"), whole.part("encoder"), whole.part("codebook")))
        else:
            models.append(load_part(part_folder(path), "decoder"))
    return whole.with_parts(decoders={**start.decoders, **{model.config.role: model for model in models}})


def with_defaults(pipe: DigitPipeline, items: Sequence[str] = (), decoder: str | None = None) -> DigitPipeline:
    """A copy of a model that samples differently when nothing is asked for: by items ``STAGE.NAME=VALUE``, such as
    "prior.cfg_scale=1.5" or "ar.top_p=0.9" (a DigitError for others), and by a default kind of decoder. What is not
    given stays as it was.
    """
    settings = {stage: to_dict(params) for stage, params in pipe.settings.items()}
    stages = ["prior", *pipe.decoders]
    for item in items:
        place, separator, value = item.partition("=")
        stage, dot, name = place.partition(".")
        if not (separator and dot and name) or stage not in stages:
            raise DigitError(
                f"--default {item} was given; expected STAGE.NAME=VALUE, such as prior.cfg_scale=1.5; the stages of "
                f"this model are: {', '.join(stages)}."
            )
        settings.setdefault(stage, {})[name] = read_value(value)
    chosen = {stage: from_dict(SamplingParams, v, f"The defaults of {stage}") for stage, v in settings.items()}
    default = pipe.pick_decoder(decoder) if decoder else pipe.default_decoder
    return pipe.with_parts(settings=chosen, default_decoder=default)
