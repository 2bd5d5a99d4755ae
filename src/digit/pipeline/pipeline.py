"""The pipeline: labels to images, in two stages. This file is the map of the package.

    prior      labels              -> semantic tokens (B, N)        stage 1
    stage 2    semantic tokens     -> images (B, 3, S, S)           a decoder and the VQGAN; see digit.pipeline.stage2
    tokenizer  images              -> semantic tokens               encoder and codebook

A model is a folder: ``model_index.json``, ``README.md``, ``pipeline.py`` (for diffusers) and one for each component:
``encoder/``, ``codebook/``, ``prior/``, ``decoder/<kind>/``, ``vqgan/``. Components may be missing; what needs a
missing one says so. The prior of a baseline predicts VQ tokens: its ``space`` is "vq", and it has no decoder.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Self

from digit.core.config import to_dict
from digit.core.devices import quick_pixels
from digit.core.errors import DigitError
from digit.core.images import to_pil
from digit.models.token_model import NO_LABEL
from digit.pipeline.hub import push_folder, resolve_model
from digit.pipeline.model import Model
from digit.pipeline.stage2 import STAGES, Callback, Stage2, for_stage
from digit.pipeline.tokenizer import Images, SemanticTokenizer, Tokenizer, VQTokenizer
from digit.pipeline.tokens import Tokens
from digit.sampling.request import SampleRequest, SamplingParams
from digit.sampling.sampler import sample

__all__ = ["DigitPipeline", "Tokens"]

Label = int | str
"""A class by its number or by its name; -1 or "none" for none."""
StepCallback = Any
"""``function(pipe, step, timestep, {"stage": ..., "tokens": ...})``, in diffusers' form: step counts over all stages,
timestep within one. It may raise to stop; what it returns is not read."""


class DigitPipeline(Model):
    """A model that generates images, and takes images apart into tokens."""

    def __call__(
        self,
        labels: Sequence[Label] | Label | Tensor | None = None,
        num: int | None = None,
        seed: int | Sequence[int] = 0,
        decoder: str | None = None,
        batch_size: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_scale: float | None = None,
        guidance_scale: float | None = None,
        cfg_schedule: str | None = None,
        cfg_power: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        steps: int | None = None,
        mask_schedule: str | None = None,
        choice_temperature: float | None = None,
        order: str | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        callback_on_step_end: StepCallback | None = None,
        **decoder_settings: Any,
    ) -> Any:
        """Generate images.

        Args:
            labels: a class per image, or classes to take turns, by number or name, "none" for none; None for
                unconditional.
            num: how many; by default one a label, or one a seed.
            seed: of the run, or one for each image, which is then the first image of that seed's run.
            decoder: its kind; None: the model's default.
            batch_size: how many at a time; has no influence on the images.
            temperature, ..., order, decoder_settings: see :class:`~digit.sampling.request.SamplingParams`, and
                :class:`~digit.sampling.request.SampleRequest` for which stage reads them; ``guidance_scale`` is
                ``cfg_scale``.
            generator: draws the seed, instead of ``seed``; or one for each image.
            output_type: "pil" for Pillow images, "np" for (B, S, S, 3) float32 in 0..1, "pt" for a tensor (B, 3, S, S).
            callback_on_step_end: see :data:`StepCallback`.
        """
        given = {name: value for name, value in locals().items() if name in _SETTINGS} | decoder_settings
        if output_type not in ("pil", "np", "pt"):
            raise DigitError(f"output_type '{output_type}' was given; expected pil, np or pt.")
        if generator is not None:
            several = [generator] if isinstance(generator, torch.Generator) else list(generator)
            drawn = [int(torch.randint(2**62, (), generator=one, device=one.device)) for one in several]
            seed = drawn[0] if isinstance(generator, torch.Generator) else drawn
        numbers = None if labels is None else self.class_numbers(labels)
        request = SampleRequest.of_run(num, numbers, seed, decoder, given).validate(self)
        steps_done = itertools.count()

        def told(stage: str, done: int, tokens: Tensor) -> None:
            assert callback_on_step_end is not None
            callback_on_step_end(self, next(steps_done), done, {"stage": stage, "tokens": tokens})

        tell = None if callback_on_step_end is None else told
        made = []
        for part in request.batches(batch_size or min(len(request), 64)):
            tokens = self.sample_tokens(part, tell)
            if tell is not None and tokens.latents is not None and tokens.semantic is not None:
                tell(tokens.latents.decoder, tokens.semantic.shape[1], tokens.semantic)
            made.append(self.to_pixels(tokens).cpu())
        pixels = torch.cat(made)
        if output_type == "pil":
            return [to_pil(image) for image in pixels]
        return pixels if output_type == "pt" else pixels.movedim(1, -1).numpy()

    def class_numbers(self, labels: Sequence[Label] | Label | Tensor) -> list[int]:
        """Classes by number or name, one or several, as numbers; errors as of :meth:`class_number`."""
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.tolist()
        return [self.class_number(label) for label in ([labels] if isinstance(labels, (int, str)) else list(labels))]

    def class_number(self, name: Label) -> int:
        """A class by its number, or by its name where the model's classes have names; "none" is -1.

        Raises:
            DigitError: neither.
        """
        number = isinstance(name, (int, np.integer)) and not isinstance(name, bool)
        if number or (isinstance(name, str) and name.isdecimal()):
            return int(name)
        if not isinstance(name, str):
            raise DigitError(f"The label {name!r} was given; expected a class by its number or its name.")
        if name in self.class_names:
            return self.class_names.index(name)
        if name == "none":
            return NO_LABEL
        if name.lstrip("-").isdecimal():
            raise DigitError(f"The label {name} was given; classes are numbered from 0. For no class, give: none")
        known = f"its classes: {', '.join(self.class_names[:20])}" if self.class_names else "its classes have no names"
        raise DigitError(f"The label '{name}' is neither a number nor a class of this model; {known}.")

    def sample_tokens(self, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """Run both stages, up to all that pixels are made of; for ``callback`` see there."""
        if "prior" not in request.params:
            request = request.validate(self, pixels=False)
        return self.complete(self.sample_prior(request, callback=callback), request, callback)

    def sample_prior(
        self,
        request: SampleRequest,
        given: Tensor | None = None,
        free: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Stage 1 alone: tokens (B, N). ``given`` are first tokens (B, n); or, with ``free`` (B, N) bool, tokens (B, N)
        of which those stay where ``free`` is False.
        """
        if "prior" not in request.params:
            request = request.validate(self, pixels=False)
        params, told = request.params["prior"], for_stage("prior", callback)
        stage = "prior" if self.space == "semantic" else None  # a masked decoder's random numbers are others
        inputs = (request.labels, None, given, free)
        return sample(self.part("prior"), request.images, request.seed, params, *inputs, told, stage)

    @torch.inference_mode()
    def complete(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """Stage 2 up to all that pixels are made of, from the prior's tokens (B, N), or the tokenizer's."""
        if not request.params:
            request = request.validate(self, prior=False, pixels=False)
        return self.stage2(request.decoder).sample(first, request, callback)

    def decode(
        self,
        first: Tensor | np.ndarray[Any, Any] | Sequence[Sequence[int]],
        seed: int = 0,
        decoder: str | None = None,
        labels: Tensor | None = None,
        images: Sequence[int] | None = None,
        **settings: Any,
    ) -> Float[Tensor, "B 3 S S"]:
        """Semantic tokens (B, N), as the prior or the tokenizer gives them, to images in 0..1; the images are 0, 1, ...
        of the run if nothing else is said. For the others see :class:`~digit.sampling.request.SampleRequest`; settings
        are the decoder's, without ``decoder_`` in front.
        """
        first = torch.as_tensor(first)
        asked = {f"decoder_{name}": value for name, value in settings.items()}
        request = SampleRequest(range(len(first)) if images is None else images, seed, labels, decoder, asked)
        return self.to_pixels(self.complete(first, request))

    def decode_tokens(
        self, first: Tensor, seed: int = 0, decoder: str | None = None, **settings: Any
    ) -> Int[Tensor, "B M"]:
        """As :meth:`decode`, but to VQ tokens. DigitError: the decoder makes pixels itself."""
        asked = {f"decoder_{name}": value for name, value in settings.items()}
        vq = self.complete(first, SampleRequest(range(len(first)), seed, None, decoder, asked)).vq
        if vq is None:
            raise DigitError(
                f"The {self.pick_decoder(decoder)} decoder of '{self.name}' goes from semantic tokens straight to "
                "pixels; there are no VQ tokens in between. Decode to pixels, or choose another decoder."
            )
        return vq

    @torch.inference_mode()
    def to_pixels(self, tokens: Tokens) -> Float[Tensor, "B 3 S S"]:
        """Finished tokens to images in 0..1. DigitError: they are semantic alone; :meth:`decode` finishes them."""
        if tokens.latents is None and tokens.vq is None:
            raise DigitError("Semantic tokens alone say no pixels; let a decoder finish them: pipe.decode(semantic).")
        stage = Stage2(self) if tokens.latents is None else self.stage2(tokens.latents.decoder)
        with nullcontext() if self.exact_pixels else quick_pixels(self.device):
            return stage.pixels(tokens).float().clamp(0, 1)

    def reconstruct(self, images: Images, seed: int = 0, decoder: str | None = None) -> Float[Tensor, "B 3 S S"]:
        """Images through the whole path: tokens, decoder, pixels in 0..1."""
        return self.decode(self.prior_tokenizer.encode(images), seed, decoder)

    @property
    def tokenizer(self) -> SemanticTokenizer:
        """Encoder and codebook. DigitError: this model lacks one of them."""
        return SemanticTokenizer(self.part("encoder"), self.part("codebook"))

    @property
    def prior_tokenizer(self) -> Tokenizer:
        """From images to the tokens that the prior predicts: the semantic tokenizer, or that of the VQGAN."""
        return self.tokenizer if self.space == "semantic" else VQTokenizer(self.part("vqgan"))

    def stage2(self, kind: str | None = None) -> Stage2:
        """What comes after the prior; ``kind`` of decoder, None: the default. DigitError: no such decoder."""
        if self.space == "vq":
            return Stage2(self)
        kind = self.pick_decoder(kind)
        return STAGES[self.decoders[kind].config.head](self, kind)

    def pick_decoder(self, kind: str | None) -> str:
        """The kind of decoder to use: the asked one, else the default, else the first."""
        if not self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder; train one with: digit train decoder")
        chosen = kind or self.default_decoder or next(iter(self.decoders))
        if chosen not in self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder '{chosen}'; it has: {', '.join(self.decoders)}.")
        return chosen

    def push_to_hub(self, repository: str, *, dtype: torch.dtype | None = None, **options: Any) -> str:
        """Publish the model on the Hub: :meth:`save_pretrained`, and :func:`digit.pipeline.hub.push_folder`."""
        with tempfile.TemporaryDirectory() as aside:
            return push_folder(self.save_pretrained(Path(aside) / "model", dtype), repository, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load a model: a folder, the name of a packaged model, or a Hub id; with none, the packaged one.

        Args:
            model, variant, revision, token: see :func:`digit.pipeline.hub.resolve_model`.
            torch_dtype, device: see :meth:`to`; None: float32 on the CPU.
        """
        found = resolve_model(model, variant=variant, revision=revision, token=token)
        return cls.from_folder(found).to(device, torch_dtype)

    @property
    def can_generate(self) -> bool:
        """Whether the model has all components from a class to pixels."""
        try:
            self.part("prior")
            self.stage2().check_parts()
        except DigitError:
            return False
        return True


_SETTINGS = {*to_dict(SamplingParams()), "guidance_scale"}
