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
from digit.pipeline.model import Model
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
        codebook, vqgan, encoder: ``km_*.npy``, MAGE's ``vqgan_jax_strongaug.ckpt`` and DINOv2's ``.pth`` with
            registers; None takes the one inside the checkpoints.
        heads: attention heads of the encoder, which no file tells; None: its width / 64, as all published ones have.
        half_precision_tokens: assign semantic tokens in half precision, as the authors' runs did; see
            ``docs/converting.md``.
        name: of the model; None takes the folder's.

    Raises:
        DigitError: a file is not what it is given as, its keys do not fit, or two files disagree; the message names
            them.
    """
    opened: list[Keys] = []
    offers: dict[str, list[Component]] = {}  # by place; where several files hold a part, the first is written
    space: Literal["semantic", "vq"] = "semantic"

    def offer(place: str, component: Component | None) -> None:
        if component is not None:
            offers.setdefault(place, []).append(component)

    if codebook is not None:
        offer("codebook", codebook_component(read_centroids(codebook), half_precision_tokens, Path(codebook)))
    if vqgan is not None:
        opened.append(vqgan_keys(vqgan))
        offer("vqgan", vqgan_component(opened[-1], _RESOLUTION))
    if encoder is not None:
        opened.append(read_backbone(encoder)[0])
        offer("encoder", encoder_component(opened[-1], heads))
    given: list[tuple[Role, str | Path | None]] = [("prior", stage1), ("ar", stage2), ("masked", stage2_masked)]
    for role, path in given:
        if path is None:
            continue
        file = _open(path, role)
        opened.append(file.keys)
        space = "vq" if file.kind == "VQ-only" else space
        model = token_model(file, role)
        offer("prior" if role == "prior" else f"decoder/{role}", model)
        offer("probe", linear_probe(file))
        if (table := centroids(file)) is not None:
            vocab = model.config.vocab_size if role == "prior" else model.config.prefix_vocab_size
            if len(table) != vocab:
                raise DigitError(f"{path} contradicts itself: {len(table)} centroids for {vocab} semantic tokens.")
            offer("codebook", codebook_component(table, half_precision_tokens, file.path))
        inner = {place: file.keys.under(prefix) for place, prefix in _INSIDE.items()}
        if inner["encoder"].names():
            offer("encoder", encoder_component(inner["encoder"], heads))
        if inner["vqgan"].names():
            offer("vqgan", vqgan_component(inner["vqgan"], _RESOLUTION))
    if not offers:
        options = ", ".join((*_OPTION.values(), "--codebook", "--vqgan"))
        raise DigitError(f"No file to convert was given; expected {options} or --encoder.")
    for keys in opened:
        keys.check()
    for place, (first, *others) in offers.items():
        for other in others:
            _check_same(place, first, other)
    parts = {place: components[0] for place, components in offers.items()}
    pipe = _weightless(parts, space, name or Path(out).name)
    with write_folder(out) as aside:
        for place, component in parts.items():
            write_component(aside / place, component)
        pipe.write_index(aside)
    return Path(out)


_INSIDE = {"encoder": "pretrained_encoder.", "vqgan": "vqgan."}
"""Where a checkpoint has the frozen parts."""


def _check_same(place: str, a: Component, b: Component) -> None:
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


def _weightless(parts: Mapping[str, Component], space: Literal["semantic", "vq"], name: str) -> Model:
    """The model without its numbers: checks that the parts fit each other, and knows the index and the card. It samples
    as the authors' scripts do (scripts/infer_*.sh; top-k 400 for the large prior is in their README).
    """
    classes = {"encoder": TransformersEncoder, "codebook": Codebook, "vqgan": VQGAN}
    with without_weights():
        built: dict[str, Any] = {
            place: classes.get(place, TokenModel)(part.config) for place, part in parts.items() if place != "probe"
        }
    decoders = {kind: built.pop(f"decoder/{kind}") for kind in ("ar", "masked") if f"decoder/{kind}" in built}
    files = sorted({short_name(part.file) for part in parts.values() if part.file})
    pipe = Model(**built, decoders=decoders, space=space, name=name, provenance={"converted_from": files})
    settings = {"ar": SamplingParams(top_p=0.8), "masked": SamplingParams(steps=8, choice_temperature=4.5)}
    pipe.settings = {kind: settings[kind] for kind in decoders}
    if pipe.prior is not None:
        vocab = pipe.prior.config.vocab_size
        top_k = 300 if pipe.num_classes or space == "vq" else 400 if vocab > 8192 else 200
        pipe.settings["prior"] = SamplingParams(top_k=min(top_k, vocab))
    return pipe


def read_centroids(path: str | Path) -> Tensor:
    """Centroids (K, D) float32 of a ``.npy`` file; K is what the file has, whatever its name says. DigitError: no such
    file, not an array of this shape, truncated, or one that carries Python objects.
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
