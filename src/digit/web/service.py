"""What can be asked of a model over the web, as plain functions: generate, look inside, shake, edit.

They know nothing of pages and requests. Everything that a stranger can choose is a field of a request class with limits
of its own. Nothing is kept between two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from digit.clustering.patches import Atlas
from digit.core.config import config, to_dict
from digit.core.errors import DigitError
from digit.core.grids import token_colors
from digit.core.images import to_pil, to_tensor
from digit.evaluation.metrics.noise import NoiseLaw, add_noise, realised_snr
from digit.evaluation.metrics.stability import token_spaces
from digit.evaluation.model_source import pipe_size
from digit.pipeline.editing import continue_rows, edit_region
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.sampling.request import SampleRequest, SamplingParams
from digit.web.limits import Limits, Refused, TooLarge, Visit

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FRAMES = 16
"""How many times a stage shows how far it is."""


@config
class Sampling:
    """How pictures are sampled; None takes the model's default.

    Attributes:
        seed: picture ``i`` of a seed is always the same picture.
        decoder: kind of the decoder.
        steps: iterations of a masked decoder.
        cfg_scale: classifier-free guidance; 1 is none.
        temperature, top_k, top_p: of the prior.
    """

    seed: Seed = 0
    decoder: str | None = None
    steps: Annotated[int, Field(ge=1, le=256)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None

    def knobs(self) -> dict[str, Any]:
        """Arguments of the pipeline."""
        names = ("steps", "cfg_scale", "temperature", "top_k", "top_p")
        asked = {name: getattr(self, name) for name in names}
        return {"seed": self.seed, "decoder": self.decoder, "settings": asked}


@config
class Generate(Sampling):
    """A wish for new pictures.

    Attributes:
        labels: classes by number or name, which the pictures take in turns; None for unconditional.
        num: how many; by default one a label.
    """

    labels: list[int | str] | None = None
    num: Count | None = None


@config
class Edit(Sampling):
    """A wish to change a picture; exactly one of ``cells`` and ``rows``.

    Attributes:
        cells: places on the grid of the prior's tokens, row by row from 0, that are sampled anew; or
        rows: first rows of tokens that are kept.
        keep_pixels: with ``rows``: keep the VQ tokens of these rows as well, and with them their pixels.
        label: class of the picture by number or name.
        num: how many results.
    """

    cells: list[int] | None = None
    rows: Annotated[int, Field(ge=0)] | None = None
    keep_pixels: bool = True
    label: int | str | None = None
    num: Count = 1


@config
class Look:
    """A wish to see what a picture looks like to the model.

    Attributes:
        seed: of the decoder.
        decoder: its kind.
    """

    seed: Seed = 0
    decoder: str | None = None


@config
class Shake:
    """A wish to see which tokens change under noise.

    Attributes:
        snr: signal-to-noise ratio in dB.
        seed: of the noise.
    """

    snr: Annotated[float, Field(ge=-10, le=60)]
    seed: Seed = 0


@dataclass(frozen=True)
class Frame:
    """How far sampling is.

    Attributes:
        stage: "prior" or the decoder's kind.
        space: which tokens: "semantic" or "vq".
        done, total: tokens, or iterations of a masked decoder.
        tokens: (B, length) int64, -1 where still open.
    """

    stage: str
    space: Literal["semantic", "vq"]
    done: int
    total: int
    tokens: Tensor


@dataclass(frozen=True)
class Pictures:
    """Finished pictures, their tokens, and the class of each (-1 for none)."""

    images: list[Image.Image]
    tokens: Tokens
    labels: list[int]


@dataclass(frozen=True)
class Inside:
    """What a picture looks like to the model; what the model lacks is None.

    Attributes:
        semantic, vq: its tokens (N,), (M,).
        vqgan: the picture through the VQGAN alone.
        full: the picture through semantic tokens, decoder and VQGAN.
    """

    semantic: Tensor | None
    vq: Tensor | None
    vqgan: Image.Image | None
    full: Image.Image | None


@dataclass(frozen=True)
class Flips:
    """Which tokens of a kind change under noise: ``before`` and ``after`` (n,)."""

    before: Tensor
    after: Tensor

    @property
    def places(self) -> list[int]:
        """Where they differ."""
        return [int(i) for i in (self.before != self.after).nonzero().flatten()]

    @property
    def share(self) -> float:
        """Of all tokens."""
        return len(self.places) / len(self.before)


@dataclass(frozen=True)
class Shaken:
    """A picture with noise, and what the noise does to its tokens, by kind."""

    picture: Image.Image
    realised_snr: float
    flips: dict[str, Flips]


class Service:
    """A loaded model and what can be asked of it. Call it from one thread at a time.

    Args:
        pipe: the model.
        limits: on pictures.
        atlas: what its clusters look like, where it has one.
    """

    def __init__(self, pipe: DigitPipeline, limits: Limits | None = None, atlas: Atlas | None = None) -> None:
        self.pipe, self.limits, self.atlas = pipe, limits or Limits(), atlas

    # -- what the model is
    # -------------------------------------------------------------------------------------------------

    @cached_property
    def image_size(self) -> int:
        """Side of the pictures that go in and out."""
        return pipe_size(self.pipe)

    @cached_property
    def grids(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of each kind of tokens."""
        pipe, grids = self.pipe, {}
        if pipe.encoder is not None and pipe.codebook is not None:
            grids["semantic"] = pipe.tokenizer.grid
        elif pipe.prior is not None and pipe.space == "semantic":  # a model that generates only: its grid is square
            side = round(pipe.prior.config.length**0.5)
            grids["semantic"] = (side, pipe.prior.config.length // side)
        if pipe.vqgan is not None:
            grids["vq"] = pipe.vqgan.config.grid
        return grids

    @cached_property
    def colors(self) -> dict[str, np.ndarray]:
        """A colour (vocabulary, 3) uint8 for each token, by kind."""
        pipe, sizes = self.pipe, {}
        if pipe.codebook is not None:
            sizes["semantic"] = pipe.codebook.config.clusters
        elif pipe.prior is not None and pipe.space == "semantic":
            sizes["semantic"] = pipe.prior.config.vocab_size
        if pipe.vqgan is not None:
            sizes["vq"] = pipe.vqgan.config.codes
        return {space: token_colors(size) for space, size in sizes.items()}

    @property
    def can_generate(self) -> bool:
        """Whether the model has all parts from a class to pixels."""
        pipe = self.pipe
        return pipe.can_generate

    @property
    def can_edit(self) -> bool:
        """Whether it can tokenize pictures as well."""
        try:
            return self.can_generate and bool(self.pipe.prior_tokenizer.grid)
        except DigitError:
            return False

    @property
    def can_guide(self) -> bool:
        """Whether classifier-free guidance works."""
        return self.pipe.prior is not None and self.pipe.prior.config.can_guide

    def defaults(self, stage: str) -> SamplingParams:
        """The model's sampling settings of "prior" or a decoder's kind."""
        return self.pipe.settings.get(stage, SamplingParams())

    def describe(self) -> dict[str, Any]:
        """Everything a client needs to know to ask well."""
        pipe = self.pipe
        return {
            "name": pipe.name,
            "space": pipe.space,
            "image_size": self.image_size,
            "grids": {space: list(grid) for space, grid in self.grids.items()},
            "vocabulary": {space: len(colors) for space, colors in self.colors.items()},
            "classes": pipe.class_names or pipe.num_classes,
            "decoders": list(pipe.decoders),
            "can": {
                "generate": self.can_generate,
                "edit": self.can_edit,
                "guide": self.can_guide,
                "clusters": self.atlas is not None,
            },
            "settings": {stage: to_dict(self.defaults(stage)) for stage in ("prior", *pipe.decoders)},
            "limits": to_dict(self.limits),
        }

    # -- what it does
    # ------------------------------------------------------------------------------------------------------

    def generate(self, wish: Generate, visit: Visit) -> Pictures:
        """New pictures; tells :class:`Frame` by frame how far they are.

        Raises:
            DigitError: labels, settings or parts that the model does not have.
            TooLarge: more pictures than are made at a time.
        """
        pipe = self.pipe
        self._check_count(max(wish.num or 0, len(wish.labels or [])))
        numbers = None if wish.labels is None else [self._label(label) for label in wish.labels]
        request = SampleRequest.of_run(wish.num, numbers, **wish.knobs()).validate(pipe)
        tokens = pipe.sample_tokens(request, self._watch(visit, wish))
        return self._finish(tokens, request.labels, len(request), visit)

    @torch.inference_mode()
    def look(self, picture: Image.Image, wish: Look, visit: Visit) -> Inside:
        """A picture of the model's size: its tokens, and the pictures made of them."""
        pipe, images = self.pipe, self._batch(picture)
        semantic = pipe.tokenizer.encode(images) if pipe.encoder is not None and pipe.codebook is not None else None
        visit.check()
        vq = None if pipe.vqgan is None else pipe.vqgan.encode(images)
        alone = None if vq is None else to_pil(pipe.to_pixels(Tokens(vq=vq))[0])
        full = None
        if semantic is not None and pipe.can_generate:
            watch = self._watch(visit, Sampling(seed=wish.seed, decoder=wish.decoder))
            request = SampleRequest(seed=wish.seed, decoder=wish.decoder).validate(pipe, prior=False)
            tokens = pipe.complete(semantic, request, watch)
            full = to_pil(pipe.to_pixels(tokens)[0])
        return Inside(None if semantic is None else semantic[0].cpu(), None if vq is None else vq[0].cpu(), alone, full)

    @torch.inference_mode()
    def shake(self, picture: Image.Image, wish: Shake, visit: Visit) -> Shaken:
        """Add white noise to a picture of the model's size and see which tokens change: the paper's Table 1, for one
        picture.
        """
        images, law = self._batch(picture), NoiseLaw(seed=wish.seed)
        noisy = add_noise(images, wish.snr, [0], law)
        flips = {}
        for name, space in token_spaces(self.pipe).items():
            visit.check()
            before, after = (space.assign(space.features(x))[0].cpu() for x in (images, noisy))
            flips[name] = Flips(before, after)
        return Shaken(to_pil(noisy[0]), float(realised_snr(images, noisy, law.signal)), flips)

    def edit(self, picture: Image.Image, wish: Edit, visit: Visit) -> Pictures:
        """Sample cells of a picture anew, or everything below its first rows.

        Raises:
            Refused: both or neither of cells and rows, or cells outside of the grid.
            DigitError: see :mod:`digit.pipeline.editing`.
        """
        if (wish.cells is None) == (wish.rows is None):
            raise Refused("Say what to sample anew: exactly one of 'cells' and 'rows'.")
        self._check_count(wish.num)
        pipe = self.pipe
        images = self._batch(picture).expand(wish.num, -1, -1, -1)  # (num, 3, S, S)
        classes = None if wish.label is None else torch.full((wish.num,), self._label(wish.label))
        request, watch = SampleRequest(range(wish.num), labels=classes, **wish.knobs()), self._watch(visit, wish)
        if wish.rows is not None:
            tokens = continue_rows(pipe, images, wish.rows, request, wish.keep_pixels, watch)
        else:
            assert wish.cells is not None
            tokens = edit_region(pipe, images, self.region(wish.cells), request, watch)
        return self._finish(tokens, classes, wish.num, visit)

    def cluster(self, number: int) -> np.ndarray:
        """Patches (n, side, side, 3) uint8 of the real pictures that are nearest to a cluster.

        Raises:
            DigitError: the model has no atlas, or no such cluster.
        """
        if self.atlas is None:
            raise DigitError(
                "This model has no patches of its clusters; its owner can add them: digit atlas MODEL --data D"
            )
        if not 0 <= number < len(self.colors["semantic"]):
            raise DigitError(f"There is no cluster {number}; expected 0 to {len(self.colors['semantic']) - 1}.")
        return self.atlas.patches(number)

    def region(self, cells: list[int]) -> Tensor:
        """The pixels (S, S), bool, that belong to these cells of the prior's grid and touch no other."""
        (rows, columns), size = self.grids[self.pipe.space], self.image_size
        marked = torch.zeros(size, size, dtype=torch.bool)
        for cell in cells:
            if not 0 <= cell < rows * columns:
                raise Refused(f"There is no cell {cell}; this model's grid has the cells 0 to {rows * columns - 1}.")
            row, column = divmod(cell, columns)
            top, left = -(-row * size // rows), -(-column * size // columns)
            marked[top : (row + 1) * size // rows, left : (column + 1) * size // columns] = True
        return marked

    # -- help
    # --------------------------------------------------------------------------------------------------------------

    def _check_count(self, count: int) -> None:
        if count > self.limits.pictures:
            raise TooLarge(f"{count} pictures were asked for; at most {self.limits.pictures} are made at a time here.")

    def _label(self, name: int | str) -> int:
        number = self.pipe.class_number(name)
        if not 0 <= number < self.pipe.num_classes:
            known = (
                f"knows 0 to {self.pipe.num_classes - 1}" if self.pipe.num_classes else "has no classes; leave it out"
            )
            raise Refused(f"The label {number} was given; this model {known}.")
        return number

    def _batch(self, picture: Image.Image) -> Tensor:
        return to_tensor(picture)[None].to(self.pipe.device)  # (1, 3, S, S)

    def _finish(self, tokens: Tokens, classes: Tensor | None, count: int, visit: Visit) -> Pictures:
        visit.check()
        images = [to_pil(image) for image in self.pipe.to_pixels(tokens)]
        return Pictures(images, tokens, [-1] * count if classes is None else classes.tolist())

    def _watch(self, visit: Visit, wish: Sampling) -> Callable[[str, int, Tensor], None]:
        """A callback for the pipeline: checks at every step, and tells some of them."""
        pipe = self.pipe

        def watch(stage: str, done: int, tokens: Tensor) -> None:
            visit.check()
            space: Literal["semantic", "vq"] = "vq" if stage != "prior" or pipe.space == "vq" else "semantic"
            role = "prior" if stage == "prior" else pipe.decoders[stage].config.role
            if role == "masked":
                total = wish.steps or self.defaults(stage).steps
                visit.news(Frame(stage, space, done, total, tokens.cpu()))
                return
            total = tokens.shape[1]
            if done % max(1, total // FRAMES) == 0 or done == total:
                known = tokens.cpu().clone()
                known[:, done:] = -1
                visit.news(Frame(stage, space, done, total, known))

        return watch
