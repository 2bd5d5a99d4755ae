"""The pipeline: labels to images, in two stages. This file is the map of the package.

    prior      labels              -> semantic tokens (B, N)        stage 1
    stage 2    semantic tokens     -> images (B, 3, S, S)           a decoder and the VQGAN; see digit.pipeline.stage2
    tokenizer  images              -> semantic tokens               encoder and codebook

A model is a folder: ``model_index.json``, ``README.md`` and a folder for each component: ``encoder/``, ``codebook/``,
``prior/``, ``decoder/<kind>/``, ``vqgan/``. Components may be missing; what needs a missing one says so. The prior of a
baseline predicts VQ tokens: its ``space`` is "vq", and it has no decoder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from digit import __version__
from digit.core.config import from_dict, to_dict
from digit.core.devices import quick_pixels
from digit.core.errors import DigitError
from digit.core.files import read_json, write_bytes, write_folder, write_json
from digit.core.images import to_pil
from digit.encoders.base import Encoder
from digit.encoders.loading import load_encoder
from digit.models.codebook import Codebook
from digit.models.feedforward import FeedForwardDecoder, load_decoder
from digit.models.token_model import NO_LABEL, TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.card import CardFacts, model_card
from digit.pipeline.fit import check_fit
from digit.pipeline.hub import push_folder, resolve_model
from digit.pipeline.stage2 import STAGES, Callback, Stage2, VQBaseline, for_stage
from digit.pipeline.tokenizer import Images, SemanticTokenizer, Tokenizer, VQTokenizer
from digit.pipeline.tokens import Tokens
from digit.sampling.engine import sample
from digit.sampling.request import SampleRequest, SamplingParams

__all__ = ["DigitPipeline", "Tokens", "read_index"]

INDEX = "model_index.json"
FORMAT = 1
Decoder = TokenModel | FeedForwardDecoder
_LOADERS: Mapping[str, Callable[[Path], Any]] = {
    "encoder": load_encoder,
    "codebook": Codebook.from_pretrained,
    "prior": TokenModel.from_pretrained,
    "decoder": load_decoder,
    "vqgan": VQGAN.from_pretrained,
}
"""Of each component, in the order in which images are made."""


@dataclass
class DigitPipeline:
    """A generator of images, and its components.

    Attributes:
        encoder, codebook: the semantic tokenizer; the codebook was fitted on features of the encoder.
        prior: stage 1.
        decoders: of stage 2 by kind: "ar", "masked", "onepass".
        vqgan: VQ tokens to images and back.
        space: what the prior predicts, "semantic" or (baseline) "vq".
        class_names: of the labels 0..C-1; may be empty.
        settings: default sampling parameters by stage: "prior" and each decoder's kind.
        default_decoder: the kind used when none is asked for; by default the first.
        provenance: where it comes from; kept in the index.
        card: what its card says beside that: licence, data, results; see :func:`digit.pipeline.card.with_facts`.
        exact_pixels: compute pixels in float32 everywhere; see :func:`digit.core.devices.quick_pixels`.
    """

    encoder: Encoder | None = None
    codebook: Codebook | None = None
    prior: TokenModel | None = None
    decoders: Mapping[str, Decoder] = field(default_factory=dict)
    vqgan: VQGAN | None = None
    space: Literal["semantic", "vq"] = "semantic"
    class_names: list[str] = field(default_factory=list)
    settings: dict[str, SamplingParams] = field(default_factory=dict)
    default_decoder: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    card: CardFacts = field(default_factory=CardFacts)
    name: str = "digit"
    exact_pixels: bool = False

    def __post_init__(self) -> None:
        check_fit(self)

    # -- generation

    def __call__(
        self,
        labels: Sequence[int] | int | None = None,
        num: int | None = None,
        seed: int = 0,
        decoder: str | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate images.

        Args:
            labels: a class per image, or classes to take turns, -1 for none; None for unconditional.
            num: how many; by default one a label.
            seed, decoder, settings: see :class:`~digit.sampling.request.SampleRequest`.
            batch_size: how many at a time; has no influence on the images.

        Raises:
            DigitError: see :meth:`~digit.sampling.request.SampleRequest.validate`.
        """
        request = SampleRequest.of_run(num, labels, seed, decoder, settings).validate(self)
        parts = request.batches(batch_size or min(len(request), 64))
        return [to_pil(image) for part in parts for image in self.to_pixels(self.sample_tokens(part))]

    def class_number(self, name: int | str) -> int:
        """A class by its number, or by its name where the model's classes have names; "none" is -1.

        Raises:
            DigitError: neither.
        """
        if isinstance(name, int) or name.isdecimal():
            return int(name)
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
        model, params, told = self.part("prior"), request.params["prior"], for_stage("prior", callback)
        return sample(model, request.images, request.seed, params, request.labels, None, given, free, told)

    @torch.inference_mode()
    def complete(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """Stage 2 up to all that pixels are made of, from the prior's tokens (B, N), or the tokenizer's."""
        if not request.params:
            request = request.validate(self, prior=False, pixels=False)
        return self.stage2(request.decoder).sample(first, request, callback)

    def decode(
        self,
        first: Tensor,
        seed: int = 0,
        decoder: str | None = None,
        labels: Tensor | None = None,
        images: Sequence[int] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Semantic tokens (B, N) to images (B, 3, S, S) in 0..1.

        Args:
            first: as the prior or the tokenizer gives them.
            seed, decoder, labels: see :class:`~digit.sampling.request.SampleRequest`.
            images: numbers within the run; 0, 1, ... if left out.
            settings: of the decoder, without ``decoder_`` in front.
        """
        return self.to_pixels(
            self.complete(first, self.decode_request(first, seed, decoder, labels, images, **settings))
        )

    def decode_tokens(self, first: Tensor, seed: int = 0, decoder: str | None = None, **settings: Any) -> Tensor:
        """As :meth:`decode`, but to VQ tokens (B, M).

        Raises:
            DigitError: the decoder makes pixels itself.
        """
        vq = self.complete(first, self.decode_request(first, seed, decoder, **settings)).vq
        if vq is None:
            raise DigitError(
                f"The {self.pick_decoder(decoder)} decoder of '{self.name}' goes from semantic tokens straight to "
                "pixels; there are no VQ tokens in between. Decode to pixels, or choose another decoder."
            )
        return vq

    def decode_request(
        self,
        first: Tensor,
        seed: int = 0,
        decoder: str | None = None,
        labels: Tensor | None = None,
        images: Sequence[int] | None = None,
        **settings: Any,
    ) -> SampleRequest:
        """The request of :meth:`decode`, checked."""
        asked = {f"decoder_{name}": value for name, value in settings.items()}
        request = SampleRequest(range(len(first)) if images is None else images, seed, labels, decoder, asked)
        return request.validate(self, prior=False, pixels=False)

    @torch.inference_mode()
    def to_pixels(self, tokens: Tokens) -> Tensor:
        """Finished tokens to images (B, 3, S, S) in 0..1.

        Raises:
            DigitError: there are semantic tokens alone; :meth:`decode` finishes them.
        """
        if tokens.latents is None and tokens.vq is None:
            raise DigitError("Semantic tokens alone say no pixels; let a decoder finish them: pipe.decode(semantic).")
        stage = VQBaseline(self) if tokens.latents is None else self.stage2(tokens.latents.decoder)
        with nullcontext() if self.exact_pixels else quick_pixels(self.device):
            return stage.pixels(tokens).float().clamp(0, 1)

    def reconstruct(self, images: Images, seed: int = 0, decoder: str | None = None) -> Tensor:
        """Images through the whole path: tokens, decoder, pixels (B, 3, S, S) in 0..1."""
        return self.decode(self.prior_tokenizer.encode(images), seed, decoder)

    # -- components

    @property
    def components(self) -> dict[str, Any]:
        """The components there are, by their place in the model folder, in the order in which images are made."""
        found: dict[str, Any] = {}
        for name in _LOADERS:
            if name == "decoder":
                found |= {f"decoder/{kind}": model for kind, model in self.decoders.items()}
            elif getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def part(self, name: str) -> Any:
        """One of "encoder", "codebook", "prior", "vqgan".

        Raises:
            DigitError: this model lacks it.
        """
        value = getattr(self, name)
        if value is None:
            raise DigitError(f"The model '{self.name}' has no {name}, which this needs.")
        return value

    @property
    def tokenizer(self) -> SemanticTokenizer:
        """Encoder and codebook.

        Raises:
            DigitError: this model lacks one of them.
        """
        return SemanticTokenizer(self.part("encoder"), self.part("codebook"))

    @property
    def prior_tokenizer(self) -> Tokenizer:
        """From images to the tokens that the prior predicts: the semantic tokenizer, or that of the VQGAN."""
        return self.tokenizer if self.space == "semantic" else VQTokenizer(self.part("vqgan"))

    def stage2(self, kind: str | None = None) -> Stage2:
        """What comes after the prior; ``kind`` of decoder, None: the default.

        Raises:
            DigitError: no such decoder.
        """
        if self.space == "vq":
            return VQBaseline(self)
        kind = self.pick_decoder(kind)
        config = self.decoders[kind].config
        if (config.role, config.head) not in STAGES:
            raise DigitError(f"The decoder '{kind}' of the model '{self.name}' has the role of a {config.role}.")
        return STAGES[config.role, config.head](self, kind)

    def pick_decoder(self, kind: str | None) -> str:
        """The kind of decoder to use: the asked one, else the default, else the first."""
        if not self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder; train one with: digit train decoder")
        chosen = kind or self.default_decoder or next(iter(self.decoders))
        if chosen not in self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder '{chosen}'; it has: {', '.join(self.decoders)}.")
        return chosen

    @property
    def can_generate(self) -> bool:
        """Whether the model has all components from a class to pixels."""
        try:
            self.part("prior")
            self.stage2().check_parts()
        except DigitError:
            return False
        return True

    @property
    def device(self) -> torch.device:
        """Where the components are."""
        modules = [part for name, part in self.components.items() if name != "encoder"]
        return next(modules[0].parameters()).device if modules else torch.device("cpu")

    @property
    def num_classes(self) -> int:
        """Classes C; 0 for an unconditional model."""
        return self.prior.config.num_classes if self.prior is not None else 0

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels; those it makes have the same, unless a decoder enlarges them."""
        if self.vqgan is None and self.encoder is not None:
            return self.tokenizer.image_size
        return int(self.part("vqgan").config.resolution)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DigitPipeline:
        """Move every component to a device; ``dtype`` is for prior and decoders only, tokenizing stays in float32."""
        for name, part in self.components.items():
            if name == "prior" or name.startswith("decoder/"):
                part.to(device=device, dtype=dtype)
            elif device is not None:
                part.to(device)
        return self

    def with_parts(self, **parts: Any) -> DigitPipeline:
        """A copy with some components or other attributes replaced or added; the rest is shared."""
        return replace(self, **parts)

    def fingerprint(self) -> str:
        """A checksum of what determines tokens: encoder, codebook and VQGAN weights. Token caches are keyed by it, so
        its value is that of the first edition.
        """
        digest = hashlib.sha256()
        for place, part in self.components.items():
            if place in ("encoder", "codebook", "vqgan"):
                for name, value in part.state_dict().items():
                    digest.update(name.encode())
                    digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        from digit.pipeline.info import describe

        return describe(self)

    # -- files

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the model as a folder, whole or not at all.

        Args:
            folder: replaced if it exists.
            dtype: store prior, decoders and VQGAN in it; float16 and bfloat16 halve their files.
        """
        with write_folder(folder) as aside:
            for place, part in self.components.items():
                part.save_pretrained(aside / place, *([] if place in ("encoder", "codebook") else [dtype]))
            self.write_index(aside)
        return Path(folder)

    def write_index(self, folder: str | Path) -> None:
        """Write the index and the card of a model whose components are in the folder already."""
        index = {
            "format": FORMAT,
            "digit_version": __version__,
            "name": self.name,
            "space": self.space,
            "parts": [place for place in self.components if "/" not in place],
            "decoders": list(self.decoders),
            "default_decoder": self.default_decoder,
            "class_names": self.class_names,
            "settings": {stage: to_dict(params) for stage, params in self.settings.items()},
            "provenance": self.provenance,
            "card": to_dict(self.card),
        }
        write_json(Path(folder) / INDEX, index)
        write_bytes(Path(folder) / "README.md", model_card(self).encode())

    def push_to_hub(
        self,
        repository: str,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str:
        """Publish the model on the Hub, with its card; the address of the commit.

        Args:
            repository, private, token, revision, options: see :func:`digit.pipeline.hub.push_folder`.
            dtype: as for :meth:`save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as aside:
            folder = self.save_pretrained(Path(aside) / "model", dtype)
            return push_folder(folder, repository, private, token, revision, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> DigitPipeline:
        """Load a model: a folder, the name of a packaged model, or a Hub id; with none, the packaged one.

        Args:
            model: where.
            variant: which of the models that a Hub repository holds, such as "base-cond" of "DAMO-NLP-SG/DiGIT".
            revision: branch, tag or commit on the Hub.
            token: for private repositories; see huggingface_hub.

        Raises:
            DigitError: nothing there; says what was tried.
        """
        return cls.from_folder(resolve_model(model, variant=variant, revision=revision, token=token))

    @classmethod
    def from_folder(cls, folder: str | Path) -> DigitPipeline:
        """Load a model folder."""
        folder = Path(folder)
        index = read_index(folder)
        where = str(folder / INDEX)
        return cls(
            **{name: _LOADERS[name](folder / name) for name in index["parts"]},
            decoders={kind: load_decoder(folder / "decoder" / kind) for kind in index["decoders"]},
            settings={
                k: from_dict(SamplingParams, v, f"{where}, settings of {k}") for k, v in index["settings"].items()
            },
            card=from_dict(CardFacts, index.get("card", {}), f"{where}, card"),
            **{name: index[name] for name in ("space", "class_names", "default_decoder", "provenance", "name")},
        )


def read_index(folder: str | Path) -> dict[str, Any]:
    """The index of a model folder.

    Raises:
        DigitError: not a model folder, or one of a later format.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise DigitError(
            f"{folder} is not a model: it has no {INDEX}. Models are made by: digit assemble, digit convert."
        )
    index = read_json(path)
    wanted = {
        "format",
        "space",
        "parts",
        "decoders",
        "default_decoder",
        "class_names",
        "settings",
        "provenance",
        "name",
    }
    if not isinstance(index, dict) or not wanted <= index.keys():
        raise DigitError(f"{path} is not the index of a model: it lacks {', '.join(sorted(wanted - set(index)))}.")
    if index["format"] != FORMAT:
        raise DigitError(
            f"{path} has format {index['format']}; this version of digit reads format {FORMAT}. Update digit."
        )
    return index
