"""What is in a model: parts, sizes, presets, where they come from, and the memory that sampling will need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.tree import Tree

from digit.core.config import from_dict, load_preset, preset_names
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.models.feedforward import FeedForwardConfig, PixelHeadConfig
from digit.models.token_model import TokenModelConfig
from digit.models.vqgan import VQGANConfig

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline


@dataclass(frozen=True)
class Part:
    """A component of a model.

    Attributes:
        place: in the model folder, such as "decoder/ar".
        type: our class.
        config: its fields, plain.
        parameters: how many numbers.
        bytes: of its tensors as stored, or as loaded.
        dtypes: of its tensors.
        provenance: where it comes from.
    """

    place: str
    type: str
    config: Mapping[str, Any]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def token_model(self) -> TokenModelConfig | None:
        """Its config, for priors and decoders that sample token by token or step by step."""
        return from_dict(TokenModelConfig, self.config, self.place) if self.type == "TokenModel" else None

    def onepass(self) -> FeedForwardConfig | None:
        """Its config, for one-pass decoders."""
        return from_dict(FeedForwardConfig, self.config, self.place) if self.type == "OnePassDecoder" else None

    def summary(self) -> str:
        """Its shape in a line."""
        c = self.config
        model = self.token_model()
        if model is not None:
            return _token_summary(model)
        if (decoder := self.onepass()) is not None:
            return _onepass_summary(decoder)
        if self.type == "Codebook":
            half = ", assigned in half precision" if c.get("half_precision") else ""
            return f"{c['clusters']:,} clusters of width {c['dim']}{half}"
        if self.type == "VQGAN":
            v = from_dict(VQGANConfig, c, self.place)
            rows, columns = v.grid
            return f"{v.resolution} px to {rows} x {columns} of {v.codes:,} codes; width {v.channels} x {list(v.multipliers)}"
        if self.type == "LinearProbe":
            return f"{c['states']} states of width {c['dim']} to {c['classes']:,} classes"
        return _encoder_summary(c)


def folder_parts(folder: str | Path) -> list[Part]:
    """The components in a model folder, in the order in which images are made. Weights are not read, only their
    headers.
    """
    folder = Path(folder)
    places = [
        "encoder",
        "codebook",
        "prior",
        *(f"decoder/{p.name}" for p in sorted(folder.glob("decoder/*"))),
        "vqgan",
        "probe",
    ]
    return [folder_part(folder, place) for place in places if (folder / place / "config.json").is_file()]


def folder_part(folder: Path, place: str) -> Part:
    """The component at ``place`` in a folder; see :func:`folder_parts`."""
    from safetensors import SafetensorError, safe_open

    path = folder / place / "model.safetensors"
    values = read_json(folder / place / "config.json")
    try:
        with safe_open(str(path), framework="pt") as handle:
            slices = [handle.get_slice(name) for name in handle.keys()]  # noqa: SIM118 - not a dict
            counts = [_product(part.get_shape()) for part in slices]
            dtypes = tuple(sorted({str(part.get_dtype()) for part in slices}))
    except (SafetensorError, OSError) as error:
        raise DigitError(f"{path} cannot be read: it is missing or damaged ({error}).") from error
    return Part(
        place, values["type"], values["config"], sum(counts), path.stat().st_size, dtypes, values.get("provenance", {})
    )


def pipeline_parts(pipe: DigitPipeline) -> list[Part]:
    """The components of a loaded model."""
    modules: dict[str, Any] = {"encoder": pipe.encoder, "codebook": pipe.codebook, "prior": pipe.prior}
    modules |= {f"decoder/{kind}": decoder for kind, decoder in pipe.decoders.items()}
    return [
        module_part(place, module) for place, module in {**modules, "vqgan": pipe.vqgan}.items() if module is not None
    ]


def module_part(place: str, module: Any) -> Part:
    """A loaded component."""
    from digit.core.config import to_dict

    tensors: list[Any] = list(module.state_dict().values())
    size = sum(t.numel() * t.element_size() for t in tensors)
    dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
    count = sum(t.numel() for t in tensors)
    kind = getattr(module, "saved_as", type(module).__name__)
    return Part(place, kind, to_dict(module.config), count, size, dtypes, getattr(module, "provenance", {}))


def one_line(module: Any) -> str:
    """A loaded component as its ``repr`` shows it, instead of torch's list of every layer."""
    part = module_part("", module)
    return f"{part.type}({part.summary()}; {_millions(part.parameters)} parameters)"


def describe(pipe: DigitPipeline) -> str:
    """A model in a few lines of text."""
    lines = [f"DigitPipeline '{pipe.name}' on {pipe.device}"]
    lines += [
        f"  {part.place}: {part.summary()}; {_millions(part.parameters)} parameters" for part in pipeline_parts(pipe)
    ]
    return "\n".join(lines)


# -- memory
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What sampling needs, in bytes.

    Attributes:
        weights: of all parts, as a pipeline loads them.
        caches: keys and values, of the stage that needs most.
        pixels: activations where pixels are made, of the VQGAN's decoder or of a one-pass decoder's head, at the widest
            place.
    """

    weights: int
    caches: int
    pixels: int

    @property
    def total(self) -> int:
        """Stages run one after the other, so caches and pixels do not add up."""
        return self.weights + max(self.caches, self.pixels)


def sampling_memory(parts: Iterable[Part], batch: int, item: int) -> Memory:
    """Estimate the memory of sampling.

    Args:
        parts: of a model.
        batch: images at a time.
        item: bytes of a number in prior and decoders: 4 for float32, 2 for bfloat16. The other parts stay in float32.
    """
    loaded = [part for part in parts if part.type != "LinearProbe"]
    models = [model for part in loaded if (model := part.token_model()) is not None]
    weights = sum(part.parameters * (item if part.type in ("TokenModel", "OnePassDecoder") else 4) for part in loaded)
    caches = max((cache_bytes(model, item) for model in models), default=0)
    vqgan = next((part for part in loaded if part.type == "VQGAN"), None)
    pixels = decoder_activation_bytes(from_dict(VQGANConfig, vqgan.config, "vqgan")) if vqgan else 0
    heads = [one.pixels for part in loaded if (one := part.onepass()) is not None and one.pixels is not None]
    pixels = max([pixels, *(head_activation_bytes(head, item) for head in heads)])
    return Memory(weights, caches * batch, pixels * batch)


def cache_bytes(model: TokenModelConfig, item: int) -> int:
    """Keys and values of every block for one image, in bytes; 0 for masked models, which keep none."""
    if model.role == "masked":
        return 0
    return 2 * model.transformer.depth * (model.prefix_length + model.length) * model.transformer.dim * item


def decoder_activation_bytes(config: VQGANConfig) -> int:
    """Float32 activations of the VQGAN's decoder for one image, in bytes, where they are largest.

    The convolutions' own workspace comes on top and depends on the machine.
    """
    widths = [config.channels * m for m in config.multipliers]
    peaks = []
    for level, width in enumerate(widths):
        before = widths[min(level + 1, len(widths) - 1)]  # what comes up from the coarser level
        peaks.append(_block_channels(before, width) * (config.resolution >> level) ** 2)
    return 4 * max(peaks)


def head_activation_bytes(config: PixelHeadConfig, item: int) -> int:
    """Activations of a one-pass decoder's head for one image, in bytes, where they are largest; as
    :func:`decoder_activation_bytes`, with ``item`` bytes a number.
    """
    peaks = []
    for level, width in enumerate(config.widths):
        before = config.widths[max(level - 1, 0)]
        peaks.append(_block_channels(before, width) * (config.resolution // config.factor << level) ** 2)
    return item * max(peaks)


def _block_channels(before: int, width: int) -> int:
    """How many channels a residual block holds at most at a time.

    Of one width it holds three tensors: its input, and what the running layer reads and writes. If it changes the width
        it holds
    its input twice, as it came and normed, and the hidden features; later its input, the hidden features, the shortcut
    and their sum.
    """
    return 3 * width if before == width else max(2 * before + width, before + 3 * width)


# -- the tree
# ----------------------------------------------------------------------------------------------------------------


def model_tree(folder: str | Path, batch: int = 1) -> Tree:
    """What ``digit info`` prints.

    Args:
        folder: of a model, or of a single component.
        batch: images at a time, for the memory estimate.

    Raises:
        DigitError: neither a model nor a component, or damaged.
    """
    from digit.pipeline.pipeline import INDEX, read_index

    folder = Path(folder)
    if not (folder / INDEX).is_file() and (folder / "config.json").is_file():
        tree = Tree(f"[bold]{escape(str(folder))}[/]")
        _add_part(tree, folder_part(folder, "."))
        return tree
    index = read_index(folder)
    parts = folder_parts(folder)
    size = sum(part.bytes for part in parts)
    count = sum(part.parameters for part in parts)
    tree = Tree(
        f"[bold]{escape(index['name'])}[/]  {_size(size)}, {_millions(count)} parameters  [dim]{escape(str(folder))}[/]"
    )
    if names := index["class_names"]:
        more = f" ... ({len(names):,})" if len(names) > 20 else ""
        tree.add(escape(f"classes: {', '.join(names[:20])}{more}"))
    for part in parts:
        _add_part(tree, part)
    if any(part.place == "prior" or part.place.startswith("decoder/") for part in parts):
        _add_memory(tree, parts, batch)
    if index["provenance"]:
        branch = tree.add("[bold]provenance[/]")
        for key, value in index["provenance"].items():
            branch.add(_fact(key, value))
    return tree


def _add_part(tree: Tree, part: Part) -> None:
    label = "" if part.place == "." else f"[bold]{part.place}[/]  "
    branch = tree.add(f"{label}{_millions(part.parameters)} parameters, {_size(part.bytes)} ({', '.join(part.dtypes)})")
    branch.add(escape(part.summary()))
    preset = matching_preset(part)
    if preset:
        branch.add(f"preset: {preset}")
    facts = {key: value for key, value in part.provenance.items() if value is not None}
    for key in ("source", "updates", "steps", "data"):
        if key in facts:
            checksum = f" (sha256 {facts['sha256'][:12]}…)" if key == "source" and "sha256" in facts else ""
            if text := _origin(facts[key]):
                branch.add(_fact(key, f"{text}{checksum}"))


def _origin(value: object) -> str:
    """A fact of the provenance in a few words: a data set by name, a long checksum by its beginning."""
    if isinstance(value, Mapping):
        return " ".join(str(value[key]) for key in ("name", "split") if key in value)
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text


def _add_memory(tree: Tree, parts: list[Part], batch: int) -> None:
    images = "1 image" if batch == 1 else f"{batch} images"
    branch = tree.add(f"[bold]memory for sampling[/] {images} at a time, beside what PyTorch itself takes, about")
    for name, item in (("float32", 4), ("bfloat16", 2)):
        m = sampling_memory(parts, batch, item)
        terms = [
            f"{what} {_size(count)}"
            for what, count in (("key-value cache", m.caches), ("activations of pixels", m.pixels))
            if count
        ]
        larger = (
            f" + the larger of {' and '.join(terms)}" if len(terms) > 1 else "".join(f" + {term}" for term in terms)
        )
        branch.add(f"{name}: {_size(m.total)} = weights {_size(m.weights)}{larger}")
    if any(model.can_guide for part in parts if (model := part.token_model()) is not None):
        branch.add("with guidance: twice the prior's key-value cache")


def matching_preset(part: Part) -> str | None:
    """The packaged preset that describes the same network, training aside."""
    model: TokenModelConfig | FeedForwardConfig | None = part.token_model() or part.onepass()
    if model is None:
        return None
    for name in preset_names():
        values = load_preset(name)
        if values.get("component") not in ("prior", "decoder"):
            continue
        try:
            other: TokenModelConfig | FeedForwardConfig = from_dict(type(model), values["model"], name)
        except DigitError:
            continue  # another kind of model, or its vocabulary comes from a cache
        if _network(other) == _network(model):
            return name
    return None


def _network(model: TokenModelConfig | FeedForwardConfig) -> TokenModelConfig | FeedForwardConfig:
    """The config with the fields of training, which are no part of the network, set to a standard."""
    transformer = dataclasses.replace(
        model.transformer, dropout=0.0, ffn_dim=model.transformer.ffn_dim or 4 * model.transformer.dim
    )
    if isinstance(model, FeedForwardConfig):
        return dataclasses.replace(model, transformer=transformer, class_dropout=0.0)
    return dataclasses.replace(model, transformer=transformer, class_dropout=0.0, label_smoothing=0.0)


def _token_summary(model: TokenModelConfig) -> str:
    t = model.transformer
    classes = f"; {model.num_classes:,} classes" if model.num_classes else ""
    guidance = "" if not model.num_classes else " with guidance" if model.can_guide else ", no guidance"
    prefix = f" from {model.prefix_length} of {model.prefix_vocab_size:,}" if model.prefix_length else ""
    return (
        f"{t.depth} blocks of width {t.dim}, {t.heads} heads, {t.norm}-norm; "
        f"{model.length} tokens of {model.vocab_size:,}{prefix}{classes}{guidance}"
    )


def _onepass_summary(model: FeedForwardConfig) -> str:
    t, p = model.transformer, model.pixels
    made = f"{model.length} VQ tokens of {model.vocab_size:,}"
    if p is not None:
        made = f"{p.resolution} px through widths {list(p.widths)}" + (
            f" and patches of {p.patch}" if p.patch > 1 else ""
        )
    classes = f"; {model.num_classes:,} classes" if model.num_classes else ""
    return (
        f"in one pass, {t.depth} blocks of width {t.dim}, {t.heads} heads; {made} from {model.prefix_length} of "
        f"{model.prefix_vocab_size:,}, noise of {model.noise_dim}{classes}"
    )


def _encoder_summary(config: Mapping[str, Any]) -> str:
    hf = config.get("hf_config", {})
    pre = config.get("preprocessing", {})
    seen = f"{pre.get('image_size')} px" + (f" seen at {pre['resize']}" if pre.get("resize") else "")
    if not hf:
        return f"convolutional; {seen}"
    norm = " with the final norm" if config.get("final_norm") else ""
    return (
        f"{hf.get('model_type')}, {hf.get('num_hidden_layers')} blocks of width {hf.get('hidden_size')}, "
        f"patch {hf.get('patch_size')}; layer {config.get('layer')}{norm}; {seen}"
    )


def _fact(key: str, value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"[dim]{key.replace('_', ' ')}: {escape(text)}[/]"


def _product(shape: Iterable[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count >= 1e5 else f"{count:,}"


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}" if unit == 2**30 else f"{count / unit:.1f} {name}"
    return f"{count} B"
