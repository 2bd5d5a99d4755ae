"""The pipeline: labels -> semantic tokens -> VQ tokens -> images. This file is the map of the house.

    prior     labels                     -> semantic tokens (B, N)        stage 1
    decoder   semantic tokens            -> VQ tokens (B, M)              stage 2: ar | masked
    vqgan     VQ tokens                  -> images (B, 3, S, S)
    decoder   semantic tokens            -> images                        stage 2, both at once: onepass
    tokenizer images                     -> semantic tokens               encoder + codebook

A model is a folder: ``model_index.json``, ``encoder/``, ``codebook/``, ``prior/``, ``decoder/<kind>/``, ``vqgan/``,
    ``README.md``.
Parts may be missing; what needs a missing part says so. A baseline whose prior predicts VQ tokens directly has
``space`` "vq" and no decoder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from digit.core.config import from_dict, to_dict
from digit.core.devices import quick_pixels
from digit.core.errors import DigitError
from digit.core.files import read_json, write_bytes, write_folder, write_json
from digit.encoders.base import Encoder
from digit.models.codebook import Codebook
from digit.models.component import load_component, save_component
from digit.models.feedforward import OnePassDecoder, StageTwo, load_decoder
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.models.vqgan import VQGAN
from digit.pipeline.card import CardFacts, model_card
from digit.pipeline.fit import check_fit
from digit.pipeline.tokenizer import SemanticTokenizer, prepare
from digit.pipeline.tokens import Paint, Tokens
from digit.sampling.engine import check_request, sample
from digit.sampling.feedforward import noise
from digit.sampling.settings import SamplingSettings

__all__ = ["DigitPipeline", "Tokens", "for_stage", "read_index"]

INDEX = "model_index.json"
FORMAT = 1


@dataclass
class DigitPipeline:
    """A generator of images, and its parts.

    Attributes:
        encoder: of the semantic tokenizer.
        codebook: of the semantic tokenizer, fitted on features of the encoder.
        prior: stage 1.
        decoders: stage 2 by kind: "ar", "masked", "onepass".
        vqgan: VQ tokens to images.
        space: what the prior predicts, "semantic" or (baseline) "vq".
        class_names: of the labels 0..C-1; may be empty.
        settings: default sampling settings by stage: "prior" and each decoder's kind.
        default_decoder: the kind used when none is asked for; by default the first.
        provenance: where it comes from; kept in the index.
        card: what its card says beside that: licence, data, results; see :func:`digit.pipeline.card.with_facts`.
        exact_pixels: compute pixels in float32 everywhere; see :func:`digit.core.devices.quick_pixels`.
    """

    encoder: Encoder | None = None
    codebook: Codebook | None = None
    prior: TokenModel | None = None
    decoders: Mapping[str, StageTwo] = field(default_factory=dict)
    vqgan: VQGAN | None = None
    space: Literal["semantic", "vq"] = "semantic"
    class_names: list[str] = field(default_factory=list)
    settings: dict[str, SamplingSettings] = field(default_factory=dict)
    default_decoder: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    card: CardFacts = field(default_factory=CardFacts)
    name: str = "digit"
    exact_pixels: bool = False

    def __post_init__(self) -> None:
        check_fit(self)

    # -- generation
    # --------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        labels: Sequence[int] | int | None = None,
        num: int | None = None,
        seed: int = 0,
        decoder: str | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Generate pictures.

        Args:
            labels: a class per picture, or classes to take turns; None for unconditional.
            num: how many; by default one a label.
            seed: picture ``i`` of a seed is always the same picture.
            decoder: "ar", "masked" or "onepass"; see :attr:`decoders`.
            batch_size: how many at a time; has no influence on the pictures.
            settings: ``temperature=``, ``top_k=``, ``top_p=``, ``cfg_scale=`` ... of the prior, and ``steps=`` of a
                masked decoder; see :class:`SamplingSettings`.

        Raises:
            DigitError: labels out of range, unknown settings, or a part that this model lacks.
        """
        from digit.core.images import to_pil

        count, classes = self.expand_labels(labels, num)
        size = batch_size or min(count, 64)
        pictures: list[Image.Image] = []
        for start in range(0, count, size):
            images = range(start, min(start + size, count))
            part = None if classes is None else classes[start : start + size]
            tokens = self.sample_tokens(images, part, seed, decoder, **settings)
            pictures += [to_pil(image) for image in self.to_pixels(tokens)]
        return pictures

    def class_number(self, name: int | str) -> int:
        """A class by its number, or by its name where the model's classes have names.

        Raises:
            DigitError: neither.
        """
        if isinstance(name, int) or name.lstrip("-").isdecimal():
            return int(name)
        if name in self.class_names:
            return self.class_names.index(name)
        known = f"its classes: {', '.join(self.class_names[:20])}" if self.class_names else "its classes have no names"
        raise DigitError(f"The label '{name}' is neither a number nor a class of this model; {known}.")

    def expand_labels(self, labels: Sequence[int] | int | None, num: int | None) -> tuple[int, Tensor | None]:
        """How many pictures, and the label (num,) of each: the given labels in turns."""
        if num is not None and num < 1:
            raise DigitError(f"num = {num} pictures were asked for; expected at least 1.")
        if labels is None:
            return num or 1, None
        given = torch.as_tensor([labels] if isinstance(labels, int) else list(labels), dtype=torch.long)
        if len(given) == 0:
            raise DigitError("The list of labels is empty; leave it out for unconditional pictures.")
        count = num or len(given)
        return count, given.repeat(-(-count // len(given)))[:count]

    def sample_tokens(
        self,
        images: Sequence[int],
        labels: Tensor | None = None,
        seed: int = 0,
        decoder: str | None = None,
        callback: Callable[[str, int, Tensor], None] | None = None,
        **settings: Any,
    ) -> Tokens:
        """Run the prior and a decoder for some pictures of a run.

        Args:
            images: (B,) their numbers within the run.
            labels: (B,) classes or -1; None for unconditional.
            seed: of the run.
            decoder: its kind; None takes the default.
            callback: called with (stage, done, tokens (B, length)) while sampling, stage being "prior" or the decoder's
                kind: after each token, or after each iteration of a masked decoder, whose open tokens are -1. It may
                    raise to stop.
            settings: see :meth:`__call__`.
        """
        prior = self.part("prior")
        chosen, own = self.settings_for("prior", settings, labels is not None)
        first = sample(prior, images, seed, chosen, labels, callback=for_stage("prior", callback))
        if self.space == "vq":
            return Tokens(None, first)
        return self.complete(first, images, seed, decoder, labels, callback, **own)

    @torch.inference_mode()
    def complete(
        self,
        semantic: Tensor,
        images: Sequence[int] | None = None,
        seed: int = 0,
        decoder: str | None = None,
        labels: Tensor | None = None,
        callback: Callable[[str, int, Tensor], None] | None = None,
        **settings: Any,
    ) -> Tokens:
        """Stage 2: semantic tokens (B, N) to all that pixels are made of.

        A decoder that goes straight to pixels does its work in :meth:`to_pixels`; here it only gets the noise of each
        picture, whose standard deviation is the decoder's ``temperature``.

        Args:
            semantic: as the prior or the tokenizer gives them.
            images: (B,) numbers of the pictures within the run; 0, 1, ... if left out.
            seed: of the run.
            decoder: its kind; None takes the default.
            labels: (B,) classes or -1, for decoders that know classes.
            callback: see :meth:`sample_tokens`; a decoder that goes straight to pixels never calls it.
            settings: of the decoder; see :class:`SamplingSettings`.
        """
        kind = self.pick_decoder(decoder)
        model = self.decoders[kind]
        semantic = self._checked(semantic, model.config.prefix_length, model.config.prefix_vocab_size, "semantic")
        chosen, _ = self.settings_for(kind, settings)
        numbers = range(len(semantic)) if images is None else images
        known = labels if model.config.num_classes else None
        if isinstance(model, OnePassDecoder) and model.config.head == "pixels":
            check_request(model, chosen, known)
            own = noise(model.config, numbers, seed, chosen.temperature)
            return Tokens(semantic, None, Paint(kind, own, known))
        on_step = for_stage(kind, callback)
        return Tokens(semantic, sample(model, numbers, seed, chosen, known, prefix=semantic, callback=on_step))

    def decode_tokens(
        self,
        semantic: Tensor,
        images: Sequence[int] | None = None,
        seed: int = 0,
        decoder: str | None = None,
        callback: Callable[[str, int, Tensor], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Stage 2: semantic tokens (B, N) to VQ tokens (B, M).

        Raises:
            DigitError: the decoder goes straight to pixels.
        """
        if self.paints(decoder):
            raise DigitError(
                f"The {self.pick_decoder(decoder)} decoder of '{self.name}' goes from semantic tokens straight to pixels; there are "
                "no VQ tokens in between. Decode to pixels, or choose another decoder."
            )
        vq = self.complete(semantic, images, seed, decoder, None, callback, **settings).vq
        assert vq is not None
        return vq

    def decode(self, semantic: Tensor, seed: int = 0, decoder: str | None = None, **settings: Any) -> Tensor:
        """Semantic tokens (B, N) to images (B, 3, S, S) in 0..1."""
        return self.to_pixels(self.complete(semantic, None, seed, decoder, **settings))

    @torch.inference_mode()
    def to_pixels(self, tokens: Tokens) -> Tensor:
        """Finished tokens to images (B, 3, S, S) in 0..1: VQ tokens through the VQGAN, others through the decoder that
        paints.

        Raises:
            DigitError: there are semantic tokens alone; :meth:`complete` finishes them.
        """
        if tokens.paint is not None:
            return self._painted(tokens, tokens.paint)
        if tokens.vq is None:
            raise DigitError("Semantic tokens alone say no pixels; let a decoder finish them: pipe.decode(semantic).")
        vqgan = self.part("vqgan")
        vq = self._checked(tokens.vq, vqgan.num_tokens, vqgan.config.codes, "VQ")
        with self._pixels():
            pixels: Tensor = vqgan.decode(vq)
        return pixels.float().clamp(0, 1)

    def reconstruct(self, images: Tensor | Sequence[Image.Image], seed: int = 0, decoder: str | None = None) -> Tensor:
        """Images through the whole path: semantic tokens, decoder, pixels (B, 3, S, S) in 0..1."""
        if self.space == "vq":
            vqgan = self.part("vqgan")
            ready = prepare(images, vqgan.config.resolution).to(self.device)
            with torch.inference_mode():
                return self.to_pixels(Tokens(None, vqgan.encode(ready)))
        return self.decode(self.tokenizer.encode(images), seed, decoder)

    # -- parts
    # -------------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> SemanticTokenizer:
        """Encoder and codebook.

        Raises:
            DigitError: this model lacks one of them.
        """
        return SemanticTokenizer(self.part("encoder"), self.part("codebook"))

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        for part in (self.vqgan, self.prior, self.codebook, *self.decoders.values()):
            if part is not None:
                return next(part.parameters()).device
        return torch.device("cpu")

    @property
    def num_classes(self) -> int:
        """Classes C; 0 for an unconditional model."""
        return self.prior.config.num_classes if self.prior is not None else 0

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels; those it makes have the same, unless a one-pass decoder enlarges
        them.
        """
        return (
            self.tokenizer.image_size
            if self.vqgan is None and self.encoder is not None
            else int(self.part("vqgan").config.resolution)
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> DigitPipeline:
        """Move every part to a device; ``dtype`` is for prior and decoders only, tokenizing stays in float32."""
        for part in (self.prior, *self.decoders.values()):
            if part is not None:
                part.to(device=device, dtype=dtype)
        for other in (self.encoder, self.codebook, self.vqgan):
            if other is not None and device is not None:
                other.to(device)
        return self

    def pick_decoder(self, kind: str | None) -> str:
        """The kind of decoder to use: the asked one, else the default, else the first."""
        if not self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder; train one with: digit train decoder")
        chosen = kind or self.default_decoder or next(iter(self.decoders))
        if chosen not in self.decoders:
            raise DigitError(f"The model '{self.name}' has no decoder '{chosen}'; it has: {', '.join(self.decoders)}.")
        return chosen

    def paints(self, kind: str | None = None) -> bool:
        """Whether a decoder (None: the default one) goes straight to pixels, without VQ tokens and a VQGAN."""
        if self.space == "vq":
            return False
        config = self.decoders[self.pick_decoder(kind)].config
        return config.role == "onepass" and config.head == "pixels"

    def check_pixels(self, decoder: str | None = None) -> None:
        """See that there is a way from the prior's tokens to pixels.

        Raises:
            DigitError: the decoder or the VQGAN is missing.
        """
        if not self.paints(decoder):
            self.part("vqgan")

    def part(self, name: str) -> Any:
        """One of "encoder", "codebook", "prior", "vqgan".

        Raises:
            DigitError: this model lacks it.
        """
        value = getattr(self, name)
        if value is None:
            raise DigitError(f"The model '{self.name}' has no {name}, which this needs.")
        return value

    def settings_for(
        self, stage: str, given: Mapping[str, Any], labelled: bool = True
    ) -> tuple[SamplingSettings, dict[str, Any]]:
        """The settings that a stage samples with, and what of ``given`` is left for the decoder.

        Args:
            stage: "prior", or a decoder's kind.
            given: what was asked for; it goes before the model's defaults. The prior leaves ``steps`` and every name
                ``decoder_*`` to the decoder, the latter without that beginning.
            labelled: whether the pictures have a class. A *default* of guidance is for those alone: without a class
                there is nothing to guide to.

        Raises:
            DigitError: unknown settings, or values out of range.
        """
        base = self.settings.get(stage, SamplingSettings())
        mine = {k: v for k, v in given.items() if v is not None}
        later = {k.removeprefix("decoder_"): mine.pop(k) for k in list(mine) if k.startswith("decoder_")}
        if stage == "prior" and self.space == "semantic":
            later |= {k: mine.pop(k) for k in ("steps", "mask_schedule", "choice_temperature") if k in mine}
        defaults = to_dict(base) if labelled else {**to_dict(base), "cfg_scale": 1.0}
        return from_dict(SamplingSettings, {**defaults, **mine}, "The sampling settings"), later

    def _painted(self, tokens: Tokens, paint: Paint) -> Tensor:
        model = self.decoders[self.pick_decoder(paint.decoder)]
        assert tokens.semantic is not None
        labels = None if paint.labels is None else paint.labels.to(self.device)
        semantic = self._checked(
            tokens.semantic, model.config.prefix_length, model.config.prefix_vocab_size, "semantic"
        )
        with self._pixels():
            pixels: Tensor = model(semantic, paint.noise.to(model.start), labels)
        pixels = pixels.float().clamp(0, 1)
        if paint.kept is not None and paint.anew is not None:
            pixels = torch.where(paint.anew.to(self.device), pixels, paint.kept.to(self.device))
        return pixels

    def _pixels(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.exact_pixels else quick_pixels(self.device)

    def _checked(self, tokens: Tensor, length: int, vocab: int, kind: str) -> Tensor:
        if tokens.ndim != 2 or tokens.shape[1] != length:
            raise DigitError(
                f"{kind} tokens of shape {tuple(tokens.shape)} were given; this model takes (B, {length})."
            )
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
            raise DigitError(
                f"{kind} tokens range from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {vocab - 1}."
            )
        return tokens.to(self.device)

    # -- files
    # -------------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the model as a folder, whole or not at all.

        Args:
            folder: replaced if it exists.
            dtype: store prior, decoders and VQGAN in it; float16 and bfloat16 halve their files.
        """
        with write_folder(folder) as aside:
            if self.encoder is not None:
                self.encoder.save_pretrained(aside / "encoder")
            if self.codebook is not None:
                self.codebook.save_pretrained(aside / "codebook")
            if self.vqgan is not None:
                self.vqgan.save_pretrained(aside / "vqgan", dtype)
            models = {"prior": self.prior, **{f"decoder/{kind}": model for kind, model in self.decoders.items()}}
            for place, model in models.items():
                if model is not None:
                    save_component(aside / place, model, model.config, getattr(model, "provenance", None), dtype)
            self.write_index(aside)
        return Path(folder)

    def write_index(self, folder: str | Path) -> None:
        """Write the index and the card of a model whose parts are in the folder already."""
        write_json(Path(folder) / INDEX, self._index())
        write_bytes(Path(folder) / "README.md", model_card(self).encode())

    def _index(self) -> dict[str, Any]:
        from digit import __version__

        parts = [p for p in ("encoder", "codebook", "prior", "vqgan") if getattr(self, p) is not None]
        return {
            "format": FORMAT,
            "digit_version": __version__,
            "name": self.name,
            "space": self.space,
            "parts": parts,
            "decoders": list(self.decoders),
            "default_decoder": self.default_decoder,
            "class_names": self.class_names,
            "settings": {stage: to_dict(settings) for stage, settings in self.settings.items()},
            "provenance": self.provenance,
            "card": to_dict(self.card),
        }

    def push_to_hub(
        self,
        repository: str,
        private: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> str:
        """Publish the model on the Hub, with its card.

        Args:
            repository: ``owner/name``; made if it does not exist.
            private: make it readable by its owner alone.
            token: see huggingface_hub; None: what ``hf auth login`` or ``$HF_TOKEN`` has left.
            revision: the branch to write to, made if it does not exist; None: main.
            dtype: as for :meth:`save_pretrained`.
            options: ``variant=``, ``message=``, ``create_pr=``; see :func:`digit.pipeline.hub.push_folder`.

        Returns:
            The address of the commit.

        Raises:
            DigitError: no such place, or the Hub refuses.
        """
        from digit.pipeline.hub import push_folder

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
        from digit.pipeline.hub import resolve_model

        return cls.from_folder(resolve_model(model, variant=variant, revision=revision, token=token))

    @classmethod
    def from_folder(cls, folder: str | Path) -> DigitPipeline:
        """Load a model folder."""
        folder = Path(folder)
        index = read_index(folder)
        from digit.encoders import load_encoder

        parts = index["parts"]
        return cls(
            encoder=load_encoder(folder / "encoder") if "encoder" in parts else None,
            codebook=Codebook.from_pretrained(folder / "codebook") if "codebook" in parts else None,
            prior=load_component(folder / "prior", TokenModel, TokenModelConfig) if "prior" in parts else None,
            decoders={k: load_decoder(folder / "decoder" / k) for k in index["decoders"]},
            vqgan=VQGAN.from_pretrained(folder / "vqgan") if "vqgan" in parts else None,
            space=index["space"],
            class_names=list(index["class_names"]),
            settings={
                k: from_dict(SamplingSettings, v, f"{folder / INDEX}, settings of {k}")
                for k, v in index["settings"].items()
            },
            default_decoder=index["default_decoder"],
            provenance=index["provenance"],
            card=from_dict(CardFacts, index.get("card", {}), f"{folder / INDEX}, card"),
            name=index["name"],
        )

    def with_parts(self, **parts: Any) -> DigitPipeline:
        """A copy with some parts replaced or added; the rest is shared."""
        return replace(self, **parts)

    def fingerprint(self) -> str:
        """A checksum of what determines tokens: encoder, codebook and VQGAN weights. Token caches are keyed by it."""
        digest = hashlib.sha256()
        for part in (self.encoder, self.codebook, self.vqgan):
            if part is not None:
                for name, value in part.state_dict().items():  # type: ignore[union-attr]
                    digest.update(name.encode())
                    digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        from digit.pipeline.info import describe

        return describe(self)


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


def for_stage(stage: str, callback: Callable[[str, int, Tensor], None] | None) -> Callable[..., None] | None:
    """An engine's callback that tells ``callback`` the stage too, see :meth:`DigitPipeline.sample_tokens`."""

    def tell(done: int, tokens: Tensor, masked: Tensor | None = None) -> None:
        assert callback is not None
        callback(stage, done, tokens if masked is None else tokens.masked_fill(masked, -1))

    return None if callback is None else tell
