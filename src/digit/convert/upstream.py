"""The DiGIT authors' published files to one model folder of ours.

Every checkpoint of theirs carries the frozen parts it was trained with (encoder, centroids, VQGAN), so one or two files
make a whole model. A part that is in several files must be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from digit.convert.encoders import encoder_component, read_backbone
from digit.convert.fairseq import Checkpoint, centroids, linear_probe, read_checkpoint, token_model
from digit.convert.keys import Keys
from digit.convert.stream import Component, release, short_name, write_component
from digit.convert.vqgan import vqgan_component, vqgan_keys
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.files import write_folder
from digit.encoders import TransformersEncoder
from digit.models.codebook import Codebook, CodebookConfig
from digit.models.component import without_weights
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling.request import SamplingParams

Role = Literal["prior", "ar", "masked"]
_OPTION: dict[Role, str] = {"prior": "--stage1", "ar": "--stage2", "masked": "--stage2-masked"}
_ROLE_OF_KIND: dict[str, Role] = {"stage 1": "prior", "VQ-only": "prior", "stage 2": "ar", "masked stage 2": "masked"}

# A run in half precision rounds the frozen parts; saved again, they differ from their own files by that much.
_HALF_STEP, _HALF_TINY = 2.0**-10, 1e-7
_RESOLUTION = 256  # of the authors' VQGAN; no tensor tells


def convert_upstream(
    out: str | Path,
    stage1: str | Path | None = None,
    stage2: str | Path | None = None,
    stage2_masked: str | Path | None = None,
    codebook: str | Path | None = None,
    vqgan: str | Path | None = None,
    encoder: str | Path | None = None,
    heads: int | None = None,
    half_precision_tokens: bool = False,
    name: str | None = None,
) -> Path:
    """Convert the authors' files. At least one is needed; a part that is in none of them is missing in the model too.

    Args:
        out: the model folder; replaced if it exists, left as it was if anything fails.
        stage1: fairseq checkpoint of the prior: unconditional, class-conditional, linear probe, or the VQ-only
            baseline.
        stage2, stage2_masked: of the AR and of the masked decoder.
        codebook: ``km_*.npy``; None takes the one inside the checkpoints.
        vqgan: MAGE's ``vqgan_jax_strongaug.ckpt``; None takes the one inside the checkpoints.
        encoder: DINOv2's ``.pth`` with registers; None takes the one inside the checkpoints.
        heads: attention heads of the encoder, which no file tells; None: its width / 64, as all published ones have.
        half_precision_tokens: assign semantic tokens in half precision, as the authors' runs did; see
            ``docs/converting.md``.
        name: of the model; None takes the folder's.

    Raises:
        DigitError: a file is not what it is given as, its keys do not fit, or two files disagree; the message names
            them.
    """
    found = _Found(heads, half_precision_tokens)
    found.add_separate(codebook, vqgan, encoder)
    given: list[tuple[str | Path | None, Role]] = [(stage1, "prior"), (stage2, "ar"), (stage2_masked, "masked")]
    for path, role in given:
        if path is not None:
            found.add_checkpoint(_open(path, role), role)
    if not found.offers:
        raise DigitError(
            "No file to convert was given; expected --stage1, --stage2, --stage2-masked, --codebook, --vqgan or "
            "--encoder."
        )
    found.check()
    parts = {place: offers[0] for place, offers in found.offers.items()}
    model = _weightless(parts, "vq" if found.vq_only else "semantic", name or Path(out).name)
    with write_folder(out) as aside:
        for place, component in parts.items():
            write_component(aside / place, component)
        model.write_index(aside)
    return Path(out)


class _Found:
    """What the given files offer, by place in the model folder. Where several offer the same part, the first is
    written.
    """

    def __init__(self, heads: int | None, half: bool) -> None:
        self.heads, self.half = heads, half
        self.offers: dict[str, list[Component]] = {}
        self.keys: list[Keys] = []
        self.vq_only = False

    def add_separate(self, codebook: str | Path | None, vqgan: str | Path | None, encoder: str | Path | None) -> None:
        if codebook is not None:
            self._offer("codebook", codebook_component(read_centroids(codebook), self.half, Path(codebook)))
        if vqgan is not None:
            self.keys.append(vqgan_keys(vqgan))
            self._offer("vqgan", vqgan_component(self.keys[-1], _RESOLUTION))
        if encoder is not None:
            self.keys.append(read_backbone(encoder)[0])
            self._offer("encoder", encoder_component(self.keys[-1], self.heads))

    def add_checkpoint(self, file: Checkpoint, role: Role) -> None:
        self.keys.append(file.keys)
        self.vq_only |= file.kind == "VQ-only"
        model = token_model(file, role)
        self._offer("prior" if role == "prior" else f"decoder/{role}", model)
        self._offer("probe", linear_probe(file))
        table = centroids(file)
        if table is not None:
            vocab = model.config.vocab_size if role == "prior" else model.config.prefix_vocab_size
            if len(table) != vocab:
                raise DigitError(f"{file.path} contradicts itself: {len(table)} centroids for {vocab} semantic tokens.")
            self._offer("codebook", codebook_component(table, self.half, file.path))
        encoder, vqgan = (file.keys.under(prefix) for prefix in ("pretrained_encoder.", "vqgan."))
        if encoder.names():
            self._offer("encoder", encoder_component(encoder, self.heads))
        if vqgan.names():
            self._offer("vqgan", vqgan_component(vqgan, _RESOLUTION))

    def _offer(self, place: str, component: Component | None) -> None:
        if component is not None:
            self.offers.setdefault(place, []).append(component)

    def check(self) -> None:
        """Refuse files with missing, extra or misshapen keys, and files that disagree about a part."""
        for keys in self.keys:
            keys.check()
        for place, offers in self.offers.items():
            for other in offers[1:]:
                self._check_same(place, offers[0], other)

    def _check_same(self, place: str, a: Component, b: Component) -> None:
        sentence = f"{a.file} and {b.file} hold different parts for '{place}'"
        advice = "They do not belong together: leave one out, or convert them to two models."
        x, y = to_dict(a.config), to_dict(b.config)
        if x != y:
            name = next(key for key in x if x[key] != y[key])
            raise DigitError(f"{sentence}: '{name}' is {x[name]} in the one and {y[name]} in the other. {advice}")
        for name in a.parts:
            for piece, other in zip(a.parts[name], b.parts[name], strict=True):
                if not torch.allclose(piece.float(), other.float(), rtol=_HALF_STEP, atol=_HALF_TINY):
                    raise DigitError(f"{sentence}: the values of '{name}' differ. {advice}")
                release(piece)
                release(other)


def _open(path: str | Path, role: Role) -> Checkpoint:
    file = read_checkpoint(path)
    right = _ROLE_OF_KIND.get(file.kind or "", role if role != "prior" else "ar")
    if right != role:
        raise DigitError(
            f"{path} was given as {_OPTION[role]}, but it is a {file.kind or 'stage 2'} checkpoint; give it as "
            f"{_OPTION[right]}."
        )
    return file


def _weightless(parts: Mapping[str, Component], space: Literal["semantic", "vq"], name: str) -> DigitPipeline:
    """The model without its numbers: checks that the parts fit each other, and knows the index and the card."""
    classes = {"encoder": TransformersEncoder, "codebook": Codebook, "vqgan": VQGAN}
    with without_weights():
        built: dict[str, Any] = {
            place: classes.get(place, TokenModel)(part.config) for place, part in parts.items() if place != "probe"
        }
        decoders = {kind: built.pop(f"decoder/{kind}", None) for kind in ("ar", "masked")}
        pipe = DigitPipeline(
            **built,
            decoders={kind: decoder for kind, decoder in decoders.items() if decoder is not None},
            space=space,
            name=name,
            provenance={"converted_from": sorted({short_name(part.file) for part in parts.values() if part.file})},
        )
    pipe.settings = _paper_settings(pipe)
    return pipe


def _paper_settings(pipe: DigitPipeline) -> dict[str, SamplingParams]:
    """Sampling as the authors' scripts have it (scripts/infer_*.sh; top-k 400 for the large prior is in their
    README).
    """
    settings = {"ar": SamplingParams(top_p=0.8), "masked": SamplingParams(steps=8, choice_temperature=4.5)}
    chosen = {kind: settings[kind] for kind in pipe.decoders}
    if pipe.prior is not None:
        large = pipe.prior.config.vocab_size > 8192
        top_k = 300 if pipe.num_classes or pipe.space == "vq" else 400 if large else 200
        chosen["prior"] = SamplingParams(top_k=min(top_k, pipe.prior.config.vocab_size))
    return chosen


def read_centroids(path: str | Path) -> Tensor:
    """Centroids (K, D) float32 of a ``.npy`` file; K is what the file has, whatever its name says.

    Raises:
        DigitError: no such file, not an array of this shape, truncated, or one that carries Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"There is no codebook file {path}.")
    with open(path, "rb") as handle:
        if handle.read(6) != b"\x93NUMPY":
            raise DigitError(
                f"{path} is not a NumPy array (.npy); a codebook of k-means centroids (K, D) was expected."
            )
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DigitError(
            f"{path} cannot be read as a codebook: it is truncated or holds Python objects ({error})."
        ) from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        raise DigitError(
            f"{path} holds {values.dtype} of shape {values.shape}; expected centroids (K, D) in floating point."
        )
    return torch.from_numpy(values.astype(np.float32))


def codebook_component(centroids: Tensor, half_precision: bool, file: Path) -> Component:
    """The authors' centroids (K, D) as a codebook."""
    clusters, dim = centroids.shape
    config = CodebookConfig(clusters=clusters, dim=dim, half_precision=half_precision, positions="dinov2-offset")
    return Component("Codebook", config, {"centroids": [centroids]}, file=file)
