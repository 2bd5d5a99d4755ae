"""What the API takes and gives. Fields for sampling settings are made from those of :mod:`digit.sampling.request`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, Field

from digit.core.config import PositiveInt, config
from digit.sampling.request import SETTINGS, SamplingParams

T = TypeVar("T")
Image = Annotated[str, Field(description="Base64 of a PNG, JPEG, WebP, GIF or BMP file, or a data URL of it.")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Image i of a seed is always the same image.")]
Decoder = Annotated[str | None, Field(description="Kind of decoder; by default the model's.")]
Png = Annotated[str, Field(description="Base64 of a PNG file.")]
Grids = list[list[int]] | None

MAX_STEPS = 256


@config
class Limits:
    """What a server accepts.

    Attributes:
        waiting: requests in the queue, beside the one that runs.
        pictures: images per request.
        seconds: a request may run, without its time in the queue.
        upload_mb: MiB of an uploaded file.
        megapixels: of an uploaded image; a small file can unpack into gigabytes.
        memory_mb: MiB that the bodies of all requests may hold together.
    """

    waiting: Annotated[int, Field(ge=0)] = 64
    pictures: PositiveInt = 16
    seconds: Annotated[float, Field(gt=0)] = 120.0
    upload_mb: PositiveInt = 10
    megapixels: PositiveInt = 40
    memory_mb: PositiveInt = 256

    @property
    def body_bytes(self) -> int:
        """Bytes of a request: base64 makes a file larger by a third, and other fields stand beside it."""
        return (self.upload_mb << 20) * 4 // 3 + 64 * 1024


# ---- requests


def with_settings(cls: type[T]) -> type[T]:
    """Class decorator: a config with a field for each sampling setting; None takes the model's default."""
    hints = get_type_hints(SamplingParams, include_extras=True)
    for name in SETTINGS:
        given = hints[name.removeprefix("decoder_")]
        number = get_args(given)[0] is float
        limits = {"le": MAX_STEPS} if name.endswith("steps") else {"allow_inf_nan": False} if number else {}
        cls.__annotations__[name] = Annotated[given, Field(**limits)] | None
        setattr(cls, name, None)
    return config(cls)


@with_settings
class Sampling:
    """Seed, decoder and sampling settings of a request."""

    seed: Seed = 0
    decoder: Decoder = None

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings that were given."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}


@config
class Generate(Sampling):
    """New images."""

    labels: Annotated[
        list[int | str] | None, Field(description="Classes by number or name, taken in turns; null: no class.")
    ] = None
    num: Annotated[PositiveInt | None, Field(description="How many images; by default one per label.")] = None


@config
class Edit(Sampling):
    """Results that keep a part of an image; exactly one of ``cells`` and ``rows``."""

    image: Image
    cells: Annotated[list[int] | None, Field(description="Cells of the prior's grid to resample, row by row.")] = None
    rows: Annotated[int | None, Field(ge=0, description="First rows of tokens to keep.")] = None
    keep_pixels: Annotated[bool, Field(description="With rows: keep their VQ tokens too, thus their pixels.")] = True
    label: Annotated[int | str | None, Field(description="Class by number or name.")] = None
    num: Annotated[PositiveInt, Field(description="How many results.")] = 1


@config
class Tokenize:
    """An image as the model sees it."""

    image: Image
    seed: Seed = 0
    decoder: Decoder = None


@config
class Stability:
    """Which tokens of an image change under white noise."""

    image: Image
    snr: Annotated[float, Field(ge=-10, le=60, description="Signal-to-noise ratio in dB.")]
    seed: Seed = 0


# ---- answers


class Problem(BaseModel):
    """Any answer that is not 200."""

    error: Annotated[str, Field(description="Sentences that say what to change.")]


class About(BaseModel):
    """The model, and what can be asked of it."""

    name: str
    space: Annotated[Literal["semantic", "vq"], Field(description="Which tokens the prior predicts.")]
    image_size: int
    grids: Annotated[dict[str, tuple[int, int]], Field(description="(rows, columns) per kind of tokens.")]
    vocabulary: Annotated[dict[str, int], Field(description="Number of tokens per kind.")]
    classes: Annotated[list[str] | int, Field(description="Names of the classes, or their number.")]
    decoders: list[str]
    default_decoder: str | None
    stepped: Annotated[list[str], Field(description="Stages that take a number of steps: prior, or a decoder.")]
    can: dict[str, bool]
    clusters_from: Annotated[str | None, Field(description="Where the patches of the clusters come from.")]
    settings: Annotated[dict[str, dict[str, Any]], Field(description="Default settings of the prior and decoders.")]
    limits: dict[str, float]
    waiting: Annotated[int, Field(description="Requests that wait or run.")] = 0


class Images(BaseModel):
    """Images and their tokens."""

    pictures: list[Png]
    labels: list[int | None]
    semantic: Grids
    vq: Grids
    sha256: Annotated[str, Field(description="Of the tokens.")]
    decoder: str | None
    settings: Annotated[dict[str, dict[str, Any]], Field(description="What the stages sampled with.")]


class Tokenization(BaseModel):
    """What an image becomes; what the model lacks is null."""

    semantic: list[int] | None
    vq: list[int] | None
    grids: dict[str, tuple[int, int]]
    picture: Annotated[Png, Field(description="The image as the model sees it.")]
    vqgan: Annotated[Png | None, Field(description="Through the VQGAN alone.")]
    full: Annotated[Png | None, Field(description="Through semantic tokens and the decoder.")]


class Changes(BaseModel):
    """Which tokens of one kind change."""

    count: int
    of: int
    share: float
    places: list[int]
    after: Annotated[list[int], Field(description="All tokens of the noisy image.")]


class Changed(BaseModel):
    """What noise does to an image and its tokens."""

    realised_snr: Annotated[float | None, Field(description="In dB, after clipping; null where nothing changed.")]
    picture: Annotated[Png, Field(description="The image with noise.")]
    flips: dict[str, Changes]


class Cluster(BaseModel):
    """What a cluster looks like."""

    cluster: int
    patches: Annotated[list[Png], Field(description="Of real images, the nearest first.")]


class Progress(BaseModel):
    """How far sampling is."""

    stage: Annotated[str, Field(description='"prior" or the kind of decoder.')]
    space: Literal["semantic", "vq"]
    done: int
    total: Annotated[int, Field(description="Tokens, or steps of a stage that takes some.")]
    tokens: Annotated[list[list[int]], Field(description="Per image; -1 where still open.")]
