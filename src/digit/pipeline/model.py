"""A model: its components, as one mapping, and its folder.

Saving, loading, moving, hashing and describing are one loop over :attr:`Model.components`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Self

from digit import __version__
from digit.core.config import from_dict, to_dict
from digit.core.devices import pick_device, pick_dtype
from digit.core.errors import DigitError
from digit.core.files import write_bytes, write_folder, write_json
from digit.encoders.base import Encoder
from digit.encoders.loading import load_encoder
from digit.models.codebook import Codebook
from digit.models.component import load_component
from digit.models.feedforward import FeedForwardDecoder
from digit.models.rae import RAEDecoder
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.card import CardFacts, model_card
from digit.pipeline.index import CLASS_NAME, CODE, FORMAT, INDEX, PLAIN, read_index
from digit.pipeline.info import describe
from digit.sampling.request import SamplingParams

Decoder = TokenModel | FeedForwardDecoder | RAEDecoder
CLASSES: Mapping[str, tuple[Any, ...]] = {
    "encoder": (),
    "codebook": (Codebook,),
    "prior": (TokenModel,),
    "decoder": (TokenModel, FeedForwardDecoder, RAEDecoder),
    "vqgan": (VQGAN,),
}
"""Of each component, in the order in which images are made; an encoder is what :func:`load_encoder` loads."""


def load_part(folder: str | Path, name: str) -> Any:
    """A component from its folder; ``name`` is one of :data:`CLASSES`."""
    return load_encoder(folder) if name == "encoder" else load_component(folder, *CLASSES[name])


@dataclass
class Model:
    """The components of a generator of images, and what is known of it.

    Attributes:
        encoder, codebook: the semantic tokenizer; the codebook was fitted on features of the encoder.
        prior: stage 1.
        decoders: of stage 2 by kind: "ar", "masked", "onepass", "rae".
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
        """Neighbouring components must agree, or the first user would find out in a stack trace."""
        if self.encoder is not None and self.codebook is not None:
            self.codebook.check_encoder(self.encoder)
        if self.prior is not None and self.prior.config.prefix_length:
            raise DigitError("A decoder was given as the prior: it expects a semantic prefix.")
        if alone := [kind for kind, decoder in self.decoders.items() if not decoder.config.prefix_length]:
            raise DigitError(f"The decoder '{alone[0]}' is none: it reads no semantic tokens, as a prior does.")
        said: dict[str, tuple[str, int]] = {}
        for what, part, size in self._sizes():
            before, other = said.get(what, (part, size))
            if other != size:
                raise DigitError(f"The parts do not fit: {what} is {other} in the {before} and {size} in the {part}.")
            said[what] = part, size
        names, classes = len(self.class_names), self.num_classes
        if names and classes and names != classes:
            raise DigitError(f"{names} class names were given for a prior of {classes} classes.")

    def _sizes(self) -> Iterator[tuple[str, str, int]]:
        """Vocabularies and lengths: what it is, the component, its size."""
        semantic = ("the number of semantic tokens K", "semantic tokens an image N")
        vq, depth = ("the number of VQ codes V", "VQ tokens an image M"), "the number of semantic tokens a place"
        if self.codebook is not None:
            yield depth, "codebook", self.codebook.config.depth
            yield semantic[0], "codebook", len(self.codebook.centroids)
        if self.vqgan is not None:
            yield vq[0], "vqgan", self.vqgan.config.codes
            yield vq[1], "vqgan", self.vqgan.num_tokens
        if self.prior is not None:
            vocabulary, length = semantic if self.space == "semantic" else vq
            if self.space == "semantic":
                yield depth, "prior", self.prior.config.codebook_depth
            yield vocabulary, "prior", self.prior.config.vocab_size
            yield length, "prior", self.prior.config.length
        for kind, decoder in self.decoders.items():
            config, name = decoder.config, f"{kind} decoder"
            if config.head == "vq":
                yield vq[0], name, config.vocab_size
                yield vq[1], name, config.length
            yield semantic[0], name, config.prefix_vocab_size
            yield semantic[1], name, config.prefix_length

    @property
    def components(self) -> dict[str, Any]:
        """The components there are, by their place in the model folder, in the order in which images are made."""
        found: dict[str, Any] = {}
        for name in CLASSES:
            if name == "decoder":
                found |= {f"decoder/{kind}": model for kind, model in self.decoders.items()}
            elif getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found

    def part(self, name: str) -> Any:
        """One of "encoder", "codebook", "prior", "vqgan". DigitError: this model lacks it."""
        value = getattr(self, name)
        if value is None:
            raise DigitError(f"The model '{self.name}' has no {name}, which this needs.")
        return value

    @property
    def image_size(self) -> int:
        """Side of the images that it takes, in pixels; those it makes have the same, unless a decoder enlarges them."""
        if self.vqgan is None and self.encoder is not None:
            return self.encoder.preprocessing.image_size
        made = (getattr(decoder.config, "resolution", 0) for decoder in self.decoders.values())
        parts = [side for side in made if side and self.vqgan is None]
        return int(parts[0] if parts else self.part("vqgan").config.resolution)

    @property
    def device(self) -> torch.device:
        """Where the components are."""
        modules = [part for name, part in self.components.items() if name != "encoder"]
        return next(modules[0].parameters()).device if modules else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The number format in which prior and decoders compute; float32 where there are none."""
        models = [m for m in (self.prior, *self.decoders.values()) if m is not None]
        return next(models[0].parameters()).dtype if models else torch.float32

    @property
    def num_classes(self) -> int:
        """Classes C; 0 for an unconditional model."""
        return self.prior.config.num_classes if self.prior is not None else 0

    def to(
        self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Self:
        """Move every component to a device, or prior and decoders to a number format; tokenizing stays in float32.
        DigitError: no such device here.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        place = None if device is None else pick_device(str(device))
        kind = pick_dtype(dtype) if isinstance(dtype, str) else dtype
        for name, part in self.components.items():
            if name == "prior" or name.startswith("decoder/"):
                part.to(device=place, dtype=kind)
            elif place is not None:
                part.to(place)
        return self

    def with_parts(self, **parts: Any) -> Self:
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
        return describe(self)

    # -- files

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the model as a folder, whole or not at all; one that is there is replaced. Prior, decoders and VQGAN
        are stored in ``dtype``; float16 and bfloat16 halve their files.
        """
        with write_folder(folder) as aside:
            for place, part in self.components.items():
                part.save_pretrained(aside / place, *([] if place in ("encoder", "codebook") else [dtype]))
            self.write_index(aside)
        return Path(folder)

    def write_index(self, folder: str | Path) -> None:
        """Write index, card and the code for diffusers of a model whose components are in the folder already."""
        kinds = {place: getattr(part, "saved_as", type(part).__name__) for place, part in self.components.items()}
        index = {
            "_class_name": CLASS_NAME,
            "format": FORMAT,
            "digit_version": __version__,
            **{name: getattr(self, name) for name in PLAIN},
            "class_names": {str(number): name for number, name in enumerate(self.class_names)},
            "parts": {place: kind for place, kind in kinds.items() if "/" not in place},
            "decoders": {kind: kinds[f"decoder/{kind}"] for kind in self.decoders},
            "settings": {stage: to_dict(params) for stage, params in self.settings.items()},
            "card": to_dict(self.card),
        }
        write_json(Path(folder) / INDEX, index)
        write_bytes(Path(folder) / "README.md", model_card(self).encode())
        write_bytes(Path(folder) / f"{CLASS_NAME[0]}.py", CODE.encode())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Load a model folder."""
        folder, index = Path(folder), read_index(folder)
        where, settings = str(folder / INDEX), index["settings"].items()
        return cls(
            **{name: load_part(folder / name, name) for name in index["parts"]},
            decoders={kind: load_part(folder / "decoder" / kind, "decoder") for kind in index["decoders"]},
            settings={stage: from_dict(SamplingParams, v, f"{where}, settings of {stage}") for stage, v in settings},
            card=from_dict(CardFacts, index["card"], f"{where}, card"),
            **{name: index[name] for name in PLAIN},
        )
