"""What is asked of a model: :class:`SampleRequest`, with the :class:`SamplingParams` of each stage.

Options of the command line are made from :func:`sampling_settings`. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field

from digit.core.config import config, from_dict, to_dict
from digit.core.errors import DigitError

if TYPE_CHECKING:
    from torch import Tensor

_OF_STEPS = ("steps", "mask_schedule", "choice_temperature", "order")
_READ = {"masked": _OF_STEPS[:3], "random": (*_OF_STEPS[:2], "order")}  # by the role of the model
_DECODER = "decoder_"

SETTINGS = (
    "cfg_scale", "cfg_schedule", "temperature", "top_k", "top_p", "steps",
    "decoder_temperature", "decoder_top_k", "decoder_top_p", "decoder_steps",
)  # fmt: skip
"""Of a run, as the command line and the JSON API offer them."""

Sampled = Callable[..., Any]
"""Told (tokens known or steps done, tokens (B, length)), and by a model that takes steps which of them are open (B,
length).
"""


@config
class SamplingParams:
    """How one stage samples; an engine reads what it knows. The paper's values: top-k 200 (base), 400 (large) and 300
    (class-conditional) of the prior, top-p 0.8 of the AR decoder, choice temperature 4.5 of the masked one.
    """

    temperature: Annotated[float, Field(ge=0, description="Divides the logits; 0 takes the most likely token.")] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Keep the k most likely tokens; 0 keeps all.")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the most likely tokens up to probability p.")] = 1.0
    cfg_scale: Annotated[float, Field(ge=0, description="Classifier-free guidance; 1 is none.")] = 1.0
    cfg_schedule: Annotated[
        Literal["constant", "linear", "cosine", "power-cosine"],
        Field(description="How guidance grows from 1: constant, linear, cosine or power-cosine."),
    ] = "constant"
    cfg_power: Annotated[float, Field(gt=0, description="Exponent of the power-cosine schedule.")] = 2.0
    cfg_interval: Annotated[
        tuple[float, float], Field(description="Fractions of the sequence between which guidance is on.")
    ] = (0.0, 1.0)
    steps: Annotated[
        int | None, Field(gt=0, description="Steps of a masked or random-order prior, or else of a masked decoder.")
    ] = None
    mask_schedule: Annotated[
        Literal["cosine", "linear", "sqrt"], Field(description="How many tokens stay masked after each iteration.")
    ] = "cosine"
    choice_temperature: Annotated[
        float | None, Field(ge=0, description="Noise in a masked model's choice of tokens to keep; it falls to 0.")
    ] = None
    order: Annotated[
        Literal["random", "raster"], Field(description="Order of a random-order prior's tokens; raster: row by row.")
    ] = "random"

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"cfg_interval={self.cfg_interval}: expected two fractions 0 <= low < high <= 1")

    def of(self, role: str, tokens: int) -> SamplingParams:
        """With steps and choice temperature filled in, where a model of this role reads them, for images of so many
        tokens.

        A masked model takes 8 steps at temperature 4.5 for 16 x 16 tokens, as MaskGIT does. A token is told by its
        neighbours, and each step carries what is known a few tokens further, so the steps go with the side of the grid,
        and the temperature with the cube root of the tokens: the published pair for 32 x 32 is 15 and 7 (Besnier & Chen
        2023, arXiv 2310.14400). It gives 4 and 2.8 for 8 x 8, which a sweep found no worse than 8 and 4.5
        (experiments/LOG.md). A random-order model draws four tokens a step (RandAR: 256 in 88 steps).
        """
        if role not in _READ:
            return self
        share = tokens / 256
        steps = max(1, round(8 * share**0.5) if role == "masked" else tokens // 4)
        noise = 4.5 * share ** (1 / 3) if self.choice_temperature is None else self.choice_temperature
        return replace(self, steps=self.steps or steps, choice_temperature=noise)


SamplingSettings = SamplingParams  # its name in the first edition


def sampling_settings(*names: str) -> Iterator[tuple[str, type, str]]:
    """Settings as options of the command line: their name, such as "top_k", or "decoder_top_k" for the decoder's; int,
    float or str; and what they are for, in one sentence.
    """
    hints = get_type_hints(SamplingParams, include_extras=True)
    for name in names:
        plain, info = get_args(hints[name.removeprefix(_DECODER)])
        stage = " Of the decoder." if name.startswith(_DECODER) else ""
        kind = str if get_origin(plain) is Literal else next(iter(get_args(plain)), plain)  # int of int | None
        yield name, kind, f"{info.description}{stage}"


@dataclass(frozen=True)
class SampleRequest:
    """Images to sample. Image ``i`` depends on the model, the seed, ``i``, its label and the settings alone.

    Attributes:
        images: numbers (B,) of the images within the run.
        seed: of the run; or (B,) one of each image.
        labels: (B,) int64 classes, -1 for none; None: no image has a class.
        decoder: its kind: "ar", "masked" or "onepass"; None: the model's default.
        settings: what was asked for, by the names of :class:`SamplingParams` (``guidance_scale`` is ``cfg_scale``); it
            goes before the model's defaults. Names that begin with ``decoder_`` are the decoder's, the others the
            prior's; ``steps`` and its like are the decoder's too where the prior takes no steps.
        params: all settings of "prior" and of the decoder's kind; filled in by :meth:`validate`.
    """

    images: Sequence[int] = (0,)
    seed: int | Sequence[int] = 0
    labels: Tensor | None = None
    decoder: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, SamplingParams] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls,
        num: int | None = None,
        labels: Sequence[int] | int | None = None,
        seed: int | Sequence[int] = 0,
        decoder: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> SampleRequest:
        """The images 0, 1, ... of a run, which take the given labels in turns; by default one image a label.

        With a seed for each image, each is the image 0 of its seed. DigitError: no image, or an empty list of labels.
        """
        import torch

        if num is not None and num < 1:
            raise DigitError(f"num = {num} images were asked for; expected at least 1.")
        given = [labels] if isinstance(labels, int) else None if labels is None else list(labels)
        if given == []:
            raise DigitError("The list of labels is empty; leave it out for unconditional images.")
        num = num or max(len(given or ()), 1 if isinstance(seed, int) else len(seed))
        classes = None if given is None else torch.tensor(given).repeat(-(-num // len(given)))[:num]  # (num,)
        asked = {name: value for name, value in (settings or {}).items() if value is not None}
        return cls(range(num) if isinstance(seed, int) else [0] * num, seed, classes, decoder, asked)

    def __len__(self) -> int:
        """Images, B."""
        return len(self.images)

    def take(self, rows: Sequence[int]) -> SampleRequest:
        """The same for some of the images, by their places in this request."""
        labels = None if self.labels is None else self.labels[list(rows)]
        seed = self.seed if isinstance(self.seed, int) else [self.seed[row] for row in rows]
        return replace(self, images=[self.images[row] for row in rows], seed=seed, labels=labels)

    def batches(self, size: int) -> list[SampleRequest]:
        """The request in pieces of at most ``size`` images."""
        return [self.take(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)]

    def validate(self, model: Any, prior: bool = True, pixels: bool = True) -> SampleRequest:
        """The request with the decoder named and every setting filled in, after all checks. Nothing is sampled.

        Args:
            model: the :class:`~digit.pipeline.pipeline.DigitPipeline`.
            prior: False where the prior's tokens are given, so that only the decoder runs.
            pixels: whether images are wanted, or only their tokens.

        Raises:
            DigitError: labels out of range, guidance without classes, unknown settings or ones that nothing reads, no
                such decoder, or a part that the model lacks.
        """
        seeds = [self.seed] if isinstance(self.seed, int) else list(self.seed)
        if bad := [seed for seed in seeds if not isinstance(seed, int) or seed < 0]:
            raise DigitError(f"The seed {bad[0]} was given; expected a number from 0 up.")
        if not isinstance(self.seed, int) and len(seeds) != len(self.images):
            raise DigitError(f"{len(seeds)} seeds were given for {len(self.images)} images; expected one for each.")
        if self.labels is not None and len(self.labels) != len(self.images):
            raise DigitError(f"{len(self.labels)} labels were given for {len(self.images)} images.")
        first = model.part("prior") if prior else None
        second = model.stage2(self.decoder)
        if pixels:
            second.check_parts()
        asked, later = self._divided(
            second.config is not None and not (model.prior and takes_steps(model.prior.config))
        )
        if second.config is None and (later or self.decoder is not None):
            raise DigitError(
                f"The model '{model.name}' predicts VQ tokens itself; it has no decoder to choose or to set."
            )
        stages = [("prior", first and first.config, asked), (second.kind, second.config, later)]
        params = {
            stage: self._params(stage, config, model.settings.get(stage, SamplingParams()), given)
            for stage, config, given in stages
            if config is not None
        }
        return replace(self, decoder=second.kind, params=params)

    def _divided(self, decoder_steps: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was asked of the prior, and of the decoder; whose ``steps`` and its like are is said."""
        asked = {name: value for name, value in self.settings.items() if value is not None}
        for prefix in ("", _DECODER):
            other, name = f"{prefix}guidance_scale", f"{prefix}cfg_scale"
            if other in asked and name in asked:
                raise DigitError(f"{other} and {name} are the same setting; give one of them.")
            if other in asked:
                asked[name] = asked.pop(other)
        later = {name.removeprefix(_DECODER): asked.pop(name) for name in list(asked) if name.startswith(_DECODER)}
        if decoder_steps:
            later |= {name: asked.pop(name) for name in _OF_STEPS if name in asked}
        return asked, later

    def _params(self, stage: str, config: Any, default: SamplingParams, asked: Mapping[str, Any]) -> SamplingParams:
        """All settings of a stage. A *default* of guidance is for images with a class alone."""
        labels = self.labels if config.num_classes or stage == "prior" else None
        if labels is not None and bool((labels == -1).all()):
            labels = None
        unguided = {"cfg_scale": 1.0} if labels is None else {}
        params = from_dict(SamplingParams, {**to_dict(default), **unguided, **asked}, "Sampling settings")
        check_model(config, params, labels)
        if unread := [name for name in _OF_STEPS if name in asked and name not in _READ.get(config.role, ())]:
            what = "the prior" if stage == "prior" else f"the {stage} decoder"
            lacks = "does not read it" if takes_steps(config) else "has no steps"
            raise DigitError(
                f"{unread[0]} = {asked[unread[0]]} was given, but {what} {lacks}; leave it out, or choose a masked "
                "decoder."
            )
        return params.of(config.role, config.length)


def takes_steps(config: Any) -> bool:
    """Whether a token model or decoder samples several tokens a step, so that ``steps`` and its like count."""
    return config.role in _READ


def check_model(config: Any, params: SamplingParams, labels: Tensor | None) -> None:
    """Refuse labels (B,) that a token model or decoder does not know, and guidance that it was not trained for."""
    if labels is not None and len(bad := labels[(labels >= config.num_classes) | (labels < -1)]):
        raise DigitError(
            f"The label {bad[0]} was given; this model knows 0 to {config.num_classes - 1}."
            if config.num_classes
            else f"The label {bad[0]} was given, but this model is unconditional; leave labels out."
        )
    if params.cfg_scale == 1:
        return
    if not config.can_guide:
        reason = "has no classes" if not config.num_classes else "was trained without label dropout"
        raise DigitError(
            f"cfg_scale {params.cfg_scale} was given, but this model {reason}; guidance needs both. Use 1."
        )
    if labels is None:
        raise DigitError(f"cfg_scale {params.cfg_scale} needs class labels; give --labels, or use a scale of 1.")
