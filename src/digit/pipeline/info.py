"""What is in a model: parts, sizes, presets, where they come from, and the memory that sampling will need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.tree import Tree
from safetensors import SafetensorError, safe_open

from digit.core.config import from_dict, load_preset, preset_names, to_dict
from digit.core.errors import DigitError
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import EncoderConfig
from digit.models.codebook import Codebook
from digit.models.component import millions, read_component
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder, PixelHeadConfig
from digit.models.probe import LinearProbe
from digit.models.rae import RAEDecoder
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.index import INDEX, read_index
from digit.sampling.batching import decoded_at_once

if TYPE_CHECKING:
    from digit.pipeline.model import Model


COMPONENTS = (ConvEncoder, Codebook, TokenModel, FeedForwardDecoder, RAEDecoder, VQGAN, LinearProbe)
_SAMPLED = (TokenModel.saved_as, FeedForwardDecoder.saved_as)
CONFIGS = {"TransformersEncoder": EncoderConfig, **{kind.saved_as: kind.config_class for kind in COMPONENTS}}


@dataclass(frozen=True)
class Part:
    """A component of a model: its place in the folder, such as "decoder/ar", what ``config.json`` says of it, and how
    many numbers, bytes and dtypes its tensors have, as stored or as loaded.
    """

    place: str
    type: str
    config: Mapping[str, Any]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def typed_config(self) -> Any:
        """Its config, checked; a DigitError where this version knows no such component."""
        if self.type not in CONFIGS:
            raise DigitError(f"{self.place} is a '{self.type}', which is none of: {', '.join(CONFIGS)}.")
        return from_dict(CONFIGS[self.type], self.config, self.place)

    def summary(self) -> str:
        """Its shape in a line."""
        return str(self.typed_config().describe())

    def origin(self) -> list[str]:
        """What it learnt from, for how long, and the file that it was converted from."""
        made, facts = self.provenance, []
        for data in (made.get("data"), made.get("source")):
            if isinstance(data, Mapping) and "name" in data:
                facts.append(f"on {data['name']}" + (f", split {data['split']}" if data.get("split") else ""))
        facts += [f"{made[key]:,} {key}" for key in ("steps", "updates") if isinstance(made.get(key), int)]
        if "start" in made:
            facts.append("from weights that were trained before")
        if isinstance(made.get("source"), str):
            checksum = f" (sha256 {made['sha256'][:12]}…)" if "sha256" in made else ""
            facts.append(f"from {made['source']}{checksum}")
        return facts


def folder_parts(folder: str | Path) -> list[Part]:
    """The components in a model folder, in the order in which images are made. Weights are not read, only their
    headers.
    """
    folder = Path(folder)
    decoders = [f"decoder/{path.name}" for path in sorted(folder.glob("decoder/*"))]
    places = ["encoder", "codebook", "prior", *decoders, "vqgan", "probe"]
    return [folder_part(folder, place) for place in places if (folder / place / "config.json").is_file()]


def folder_part(folder: Path, place: str) -> Part:
    """One component of a folder, such as the "model" of a training run."""
    path, values = folder / place / "model.safetensors", read_component(folder / place)
    try:
        with safe_open(str(path), framework="pt") as handle:
            slices = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118 - not a dict
            count = sum(math.prod(part.get_shape()) for part in slices)
            dtypes = tuple(sorted({str(part.get_dtype()) for part in slices}))
    except (SafetensorError, OSError) as error:
        raise DigitError(f"{path} cannot be read: it is missing or damaged ({error}).") from error
    return Part(place, values["type"], values["config"], count, path.stat().st_size, dtypes, values["provenance"])


def model_parts(model: Model) -> list[Part]:
    """The components of a loaded model."""
    parts = []
    for place, module in model.components.items():
        tensors = list(module.state_dict().values())
        count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
        dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        kind = getattr(module, "saved_as", type(module).__name__)
        parts.append(Part(place, kind, to_dict(module.config), count, size, dtypes, module.provenance))
    return parts


def describe(model: Model) -> str:
    """A model in a few lines of text."""
    dtype = str(model.dtype).removeprefix("torch.")
    parts = [f"{part.place}: {part.summary()}; {millions(part.parameters)} parameters" for part in model_parts(model)]
    return "\n  ".join([f"DigitPipeline '{model.name}' on {model.device} in {dtype}", *parts])


class Memory(NamedTuple):
    """What sampling needs, in bytes, at its peak: weights of all parts, as a pipeline loads them; caches (keys and
    values) of the prior and of the decoder that needs most, both kept from batch to batch; and activations at the
    widest place where pixels are made, for as many images as are decoded at once.
    """

    weights: int
    caches: int
    pixels: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


def sampling_memory(parts: Iterable[Part], batch: int, item: int) -> Memory:
    """Estimate the memory of sampling so many images at a time with the parts of a model; ``item`` is the bytes of a
    number in prior and decoders: 4 for float32, 2 for bfloat16. The other parts stay in float32.
    """
    weights, pixels = 0, 0
    caches = {"prior": 0, "decoder": 0}
    for part in parts:
        if part.type == "LinearProbe":
            continue
        match config := part.typed_config():
            case TokenModelConfig():
                stage = part.place.partition("/")[0]
                caches[stage] = max(caches[stage], cache_bytes(config, item))
            case FeedForwardConfig(pixels=PixelHeadConfig() as head):
                pixels = max(pixels, item * head.activation_numbers() * decoded_at_once(head.resolution))
            case VQGANConfig():
                pixels = max(pixels, config.activation_bytes() * decoded_at_once(config.resolution))
        weights += part.parameters * (item if hasattr(config, "role") else 4)
    return Memory(weights, sum(caches.values()) * batch, pixels)


def cache_bytes(model: TokenModelConfig, item: int) -> int:
    """What every block keeps for one image while it is sampled, in bytes; 0 for masked models, which keep nothing."""
    tokens = model.prefix_length + model.length * (2 if model.role == "random" else 1)
    return 0 if model.role == "masked" else model.backbone.cache_numbers(tokens) * item


def model_tree(folder: str | Path, batch: int = 1) -> Tree:
    """What ``digit info`` prints of a model, of a component of any kind, or of the training run that made one, with the
    memory for so many images at a time. DigitError: none of these, or damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        for place in (".", "model"):
            if (folder / place / "config.json").is_file():
                tree = Tree(f"[bold]{escape(str(folder))}[/]")
                _add_part(tree, folder_part(folder, place), "")
                return tree
    index = read_index(folder)
    parts = folder_parts(folder)
    size, count = sum(part.bytes for part in parts), sum(part.parameters for part in parts)
    title = f"[bold]{escape(index['name'])}[/]  {_size(size)}, {millions(count)} parameters"
    tree = Tree(f"{title}  [dim]{escape(str(folder))}[/]")
    for part in parts:
        _add_part(tree, part, f"[bold]{part.place}[/]  ")
    if any(part.type in _SAMPLED for part in parts):
        _add_memory(tree, parts, batch)
    if names := index["class_names"]:
        tree.add(escape(f"classes: {', '.join(names[:20])}{f' and {len(names) - 20} more' * (len(names) > 20)}"))
    if index["provenance"]:
        branch = tree.add("[bold]provenance[/]")
        for key, value in index["provenance"].items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            branch.add(f"[dim]{key.replace('_', ' ')}: {escape(text)}[/]")
    return tree


def _add_part(tree: Tree, part: Part, label: str) -> None:
    branch = tree.add(f"{label}{millions(part.parameters)} parameters, {_size(part.bytes)} ({', '.join(part.dtypes)})")
    branch.add(escape(part.summary()))
    if preset := matching_preset(part):
        branch.add(f"preset: {preset}")
    for fact in part.origin():
        branch.add(f"[dim]{escape(fact)}[/]")


def _add_memory(tree: Tree, parts: list[Part], batch: int) -> None:
    images = "1 image" if batch == 1 else f"{batch} images"
    branch = tree.add(f"[bold]memory for sampling[/] {images} at a time, beside what PyTorch itself takes, about")
    for name, item in (("float32", 4), ("bfloat16", 2)):
        memory = sampling_memory(parts, batch, item)
        kinds = zip(("weights", "caches", "activations of pixels"), memory, strict=True)
        terms = [f"{what} {_size(count)}" for what, count in kinds if count]
        branch.add(f"{name}: {_size(memory.total)} = {' + '.join(terms)}")
    if any(part.type == "TokenModel" and part.typed_config().can_guide for part in parts):
        branch.add("with guidance: twice the prior's cache")


def matching_preset(part: Part) -> str | None:
    """The packaged preset that describes the same network, training aside."""
    if part.type not in _SAMPLED:
        return None
    model = part.typed_config()
    for name in preset_names():
        values = load_preset(name)
        if values.get("component") not in ("prior", "decoder"):
            continue
        try:
            other = from_dict(type(model), values["model"], name)
        except DigitError:
            continue  # another kind of model, or its vocabulary comes from a cache
        if _network(other) == _network(model):
            return name
    return None


def _network(model: TokenModelConfig | FeedForwardConfig) -> Any:
    """The config with the fields of training, which are no part of the network, set to a standard."""
    t = model.transformer
    shape: dict[str, Any] = {"transformer": t and dataclasses.replace(t, dropout=0.0, ffn_dim=t.hidden_dim)}
    if isinstance(model, TokenModelConfig):
        s = model.state_space
        shape |= {"label_smoothing": 0.0, "state_space": s and dataclasses.replace(s, dropout=0.0)}
    return dataclasses.replace(model, class_dropout=0.0, **shape)


def _size(count: int) -> str:
    for bits, form in ((30, "{:.2f} GiB"), (20, "{:.1f} MiB"), (10, "{:.1f} KiB")):
        if count >> bits:
            return form.format(count / 2**bits)
    return f"{count} B"
