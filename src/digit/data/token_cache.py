"""The token cache: encoder and VQGAN run once over a dataset, and training then reads integers only.

A cache is a folder of ``index.json`` (source, views, vocabularies, checksum of the models) and shards ``shard-00000/``
of plain ``.npy`` arrays, memory-mapped when read: ``semantic`` (n, views, N) and ``vq`` (n, views, M), uint16 where the
vocabulary fits and uint32 else, and ``labels`` (n,) int64. A shard appears whole or not at all, so building one again
goes on where it stopped.

A *view* is a way to cut an image: the centre, its mirror image, and random crops. Crop v of image i is drawn from
(seed, v, i) alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from digit.core.config import NonNegativeInt, config, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_json, sha256_of, write_bytes, write_folder, write_json
from digit.core.images import to_tensor
from digit.core.progress import bar
from digit.core.transforms import Transform, build_transform
from digit.data.dataset import ImageDataset
from digit.data.sampling import map_ahead, sample_rng
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokenizer import Tokenizer, VQTokenizer

FORMAT = "digit-token-cache"
VERSION = 1
Kind = Literal["semantic", "vq"]


@config
class Views:
    """How often and how an image is cut.

    Attributes:
        center: the shorter side scaled, the square in the middle.
        flip: that, mirrored.
        crops: further random cuts, each mirrored one time in two.
        crop: how they are cut: "random" places the square anywhere (the paper), "random-resized" also varies its size.
        scale: for random-resized, the least and the greatest share of the image's area.
    """

    center: bool = True
    flip: bool = True
    crops: NonNegativeInt = 0
    crop: Literal["random", "random-resized"] = "random"
    scale: tuple[float, float] = (0.6, 1.0)
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("there must be at least one view: center, flip or crops")

    @property
    def names(self) -> list[str]:
        """Such as ["center", "flip", "crop0", "crop1"]."""
        return ["center"] * self.center + ["flip"] * self.flip + [f"crop{i}" for i in range(self.crops)]

    def cut(self, image: Image.Image, size: int, number: int) -> list[Image.Image]:
        """All views of image ``number``, each of ``size`` x ``size`` pixels."""
        rng = sample_rng(self.seed, 0, number)
        middle = build_transform(Transform(size=size))(image, rng)
        cuts = [middle] * self.center + [ImageOps.mirror(middle)] * self.flip
        crop = build_transform(Transform(size=size, crop=self.crop, flip=True, scale=self.scale))
        return cuts + [crop(image, sample_rng(self.seed, view, number)) for view in range(self.crops)]


@dataclass(frozen=True)
class TokenSpace:
    """Tokens of one kind: ids below ``vocab_size``, a ``grid`` of (rows, columns) places, and ``depth`` tokens a
    place.
    """

    vocab_size: int
    grid: tuple[int, int]
    depth: int = 1

    @property
    def length(self) -> int:
        """Tokens an image."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The smallest integers that hold the ids."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32


class TokenCache:
    """A finished cache, read through memory maps; ``info`` is its ``index.json``."""

    def __init__(self, folder: Path, info: Mapping[str, Any]) -> None:
        self.folder, self.info = folder, info
        spaces = info["tokens"].items()
        self.spaces = {k: TokenSpace(v["vocab_size"], tuple(v["grid"]), v.get("depth", 1)) for k, v in spaces}
        self.views: list[str] = info["views"]["names"]
        self.classes: list[str] = info["classes"]
        self.shards = _shard_folders(folder, len(self), info["shard_size"])
        self._arrays: dict[tuple[int, str], NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self.info["images"])

    @property
    def fingerprint(self) -> str:
        """Identifies the source, the views and the models, and so every token."""
        keys = ("source", "images", "views", "models", "tokens")
        return hashlib.sha256(json.dumps({k: self.info[k] for k in keys}, sort_keys=True).encode()).hexdigest()

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(images,) class ids; -1 for none."""
        return np.concatenate([self.array(shard, "labels") for shard in range(len(self.shards))])

    def tokens(self, kind: Kind, images: NDArray[np.int64], views: NDArray[np.int64] | int = 0) -> Tensor:
        """Tokens (B, n) int64 of images (B,), in views (B,) or one for all; a DigitError for a kind that is not
        here.
        """
        space = self.space(kind)
        chosen = np.broadcast_to(np.asarray(views, dtype=np.int64), images.shape)
        shards, rows = np.divmod(images, self.info["shard_size"])
        out = np.empty((len(images), space.length), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self.array(int(shard), kind)[rows[here], chosen[here]]
        return torch.from_numpy(out)

    def space(self, kind: Kind) -> TokenSpace:
        """Vocabulary and grid of a kind; a DigitError where this cache does not hold it."""
        if kind not in self.spaces:
            missing = "an encoder and a codebook" if kind == "semantic" else "a VQGAN"
            raise DigitError(
                f"The cache {self.folder} holds no {kind} tokens; build one with a model that has {missing}."
            )
        return self.spaces[kind]

    def verify(self) -> None:
        """Compare every file with its checksum; a DigitError names the first that has changed since it was written."""
        for folder in self.shards:
            for name, checksum in read_json(folder / "checksums.json").items():
                if sha256_of(folder / name) != checksum:
                    raise DigitError(
                        f"{folder / name} is damaged: remove the folder {folder} and run digit cache-tokens again."
                    )

    def array(self, shard: int, name: str) -> NDArray[Any]:
        """A shard's "labels" (n,), or tokens (n, views, tokens an image), memory-mapped; a DigitError where damaged."""
        if (shard, name) not in self._arrays:
            path = self.shards[shard] / f"{name}.npy"
            again = f"remove the folder {path.parent} and run digit cache-tokens again"
            try:
                array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DigitError(f"{path} is missing or damaged ({error}); {again}.") from error
            rows = min(self.info["shard_size"], len(self) - shard * self.info["shard_size"])
            shape = (rows,) if name == "labels" else (rows, len(self.views), self.spaces[name].length)
            if array.shape != shape:
                raise DigitError(f"{path} has the shape {array.shape}, expected {shape}; {again}.")
            self._arrays[shard, name] = array
        return self._arrays[shard, name]


def open_token_cache(folder: str | Path) -> TokenCache:
    """Open a cache made by ``digit cache-tokens``; a DigitError where it is not one, not finished, or damaged."""
    folder = Path(folder)
    if not (folder / "index.json").is_file():
        raise DigitError(f"{folder} is not a token cache: it has no index.json. Make one with: digit cache-tokens")
    info = read_json(folder / "index.json")
    if not isinstance(info, dict) or info.get("format") != FORMAT or info.get("version") != VERSION:
        raise DigitError(f"{folder / 'index.json'} does not describe a token cache of version {VERSION}.")
    cache = TokenCache(folder, info)
    count, there = len(cache.shards), sum(shard.is_dir() for shard in cache.shards)
    if there < count:
        raise DigitError(
            f"The cache {folder} has {there} of its {count} shards; run the same digit cache-tokens command again "
            "to make the rest."
        )
    for shard in range(count):
        for name in ("labels", *cache.spaces):
            cache.array(shard, name)
    return cache


def build_token_cache(
    model: DigitPipeline,
    dataset: ImageDataset,
    out: str | Path,
    views: Views | None = None,
    *,
    batch_size: int = 64,
    shard_size: int = 8192,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
) -> TokenCache | None:
    """Tokenize every view of every image of a dataset; go on if ``out`` holds a part of the same cache.

    Args:
        model: with encoder and codebook, a VQGAN, or all; it decides which kinds of tokens are made, and runs where it
            is.
        batch_size: images at a time; each is tokenized in all its views.
        rank, world: number of this process, which makes the shards ``rank``, ``rank + world``, ..., and how many there
            are.

    Returns:
        The cache, or None where other processes have shards left to make.

    Raises:
        DigitError: ``out`` holds a cache of another model, dataset or other views; the message says which.
    """
    out, views = Path(out), views or Views()
    info = _describe(model, dataset, views, shard_size)
    _claim(out, info, rank, world)
    tokenizers = _tokenizers(model)
    size, folders = info["image_size"], _shard_folders(out, len(dataset), shard_size)
    missing = [number for number, folder in enumerate(folders) if not folder.is_dir()]
    todo = [n for n in missing if n % world == rank]
    ranges = [range(len(dataset))[n * shard_size : (n + 1) * shard_size] for n in todo]

    def cut(number: int) -> Tensor:
        return torch.stack([to_tensor(view) for view in views.cut(dataset[number].image, size, number)])

    # the next batch is cut while one is tokenized
    cuts = map_ahead(cut, chain.from_iterable(ranges), max(1, workers), 2 * batch_size)
    with bar("Caching tokens", sum(map(len, ranges))) as progress:
        for number, images in zip(todo, ranges, strict=True):
            arrays: dict[str, NDArray[Any]] = {"labels": dataset.labels[images]}
            for kind, tokenizer in tokenizers.items():
                space = TokenSpace(tokenizer.vocab_size, tokenizer.grid)
                arrays[kind] = np.empty((len(images), len(views.names), space.length), dtype=space.dtype)
            for start in range(0, len(images), batch_size):
                batch = torch.stack(list(islice(cuts, min(batch_size, len(images) - start))))  # (B, views, 3, S, S)
                for kind, tokenizer in tokenizers.items():
                    tokens = tokenizer.encode(batch.flatten(0, 1).to(model.device)).view(*batch.shape[:2], -1)
                    arrays[kind][start : start + batch_size] = tokens.cpu().numpy()
                progress.advance(len(batch))
            with write_folder(folders[number]) as aside:
                for name, array in arrays.items():
                    buffer = io.BytesIO()
                    np.save(buffer, array, allow_pickle=False)
                    write_bytes(aside / f"{name}.npy", buffer.getvalue())
                write_checksums(aside)
    return None if any(not folder.is_dir() for folder in folders) else open_token_cache(out)


def write_checksums(shard: Path) -> None:
    """Write the SHA-256 of each array in a shard's folder, for :meth:`TokenCache.verify`."""
    write_json(shard / "checksums.json", {path.name: sha256_of(path) for path in sorted(shard.glob("*.npy"))})


def _tokenizers(model: DigitPipeline) -> dict[str, Tokenizer]:
    """By kind, those for which the model has the parts."""
    semantic = model.encoder is not None and model.codebook is not None
    return {
        **({"semantic": model.tokenizer} if semantic else {}),
        **({"vq": VQTokenizer(model.vqgan)} if model.vqgan is not None else {}),
    }


def _describe(model: DigitPipeline, dataset: ImageDataset, views: Views, shard_size: int) -> dict[str, Any]:
    """The ``index.json`` of a cache, before any work is done."""
    tokenizers = _tokenizers(model)
    if not tokenizers:
        raise DigitError("The model makes no tokens: it needs an encoder with a codebook, a VQGAN, or all of them.")
    sizes = [tokenizer.image_size for tokenizer in tokenizers.values()]
    if len(set(sizes)) > 1:
        raise DigitError(f"The encoder takes images of {sizes[0]} pixels and the VQGAN of {sizes[1]}; they must agree.")
    settings = getattr(model.encoder, "config", None)
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": {"name": dataset.name, "split": dataset.split, "fingerprint": dataset.fingerprint},
        "images": len(dataset),
        "classes": list(dataset.classes),
        "image_size": sizes[0],
        "views": {**to_dict(views), "names": views.names},
        "tokens": {
            kind: {"vocab_size": t.vocab_size, "grid": list(t.grid)} | ({"depth": t.depth} if t.depth > 1 else {})
            for kind, t in tokenizers.items()
        },
        # weights alone do not say how images are prepared for them
        "models": {"weights": model.fingerprint(), "encoder": to_dict(settings) if settings is not None else None},
        "shard_size": shard_size,
    }


def _claim(out: Path, info: dict[str, Any], rank: int, world: int) -> None:
    """Begin a cache, or see that the one in ``out`` is the same."""
    if not (out / "index.json").is_file():
        write_json(out / "index.json", info)
    saved = read_json(out / "index.json")
    info = json.loads(json.dumps(info))
    names = {
        **dict.fromkeys(("models", "tokens", "image_size"), "another model"),
        **{"views": "other views", "shard_size": "another shard size"},
    }
    differing = {names.get(key, "another dataset") for key in info if saved.get(key) != info[key]}
    if differing:
        raise DigitError(
            f"{out} holds a token cache of {' and '.join(sorted(differing))}; tokens of different caches are never "
            "mixed. Choose another --out, or give what it was begun with."
        )
    for aside in out.glob(".shard-*.tmp"):
        # another process may be writing its own right now
        if int(aside.name.split(".")[1].removeprefix("shard-")) % world == rank:
            shutil.rmtree(aside)


def _shard_folders(out: Path, images: int, shard_size: int) -> list[Path]:
    return [out / f"shard-{number:05d}" for number in range(-(-images // shard_size))]
