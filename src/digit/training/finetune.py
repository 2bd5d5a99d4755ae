"""Fine-tuning: begin a run with the weights of a saved token model instead of random ones.

The network is the saved model's; of the preset's ``model`` section only what concerns training counts (dropout, label
dropout, label smoothing). Classes may be other ones: those that both know by name keep their vector, a new one begins
as the mean of the known, and a model without classes gives its start vector to all, so that it begins exactly where it
ended.

Source of the low-rank changes: Hu et al. 2021, arXiv 2106.09685 (LoRA), with alpha = 2 x rank on all matrices of the
blocks. They are a parametrization of the weights, not the ``peft`` package: this needs no other layers, names or
    merging code of its own, and
``peft`` loads all of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from digit.core.config import config, to_dict
from digit.core.errors import DigitError
from digit.data.token_cache import TokenCache
from digit.models.component import weights_checksum
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.pipeline.assembly import part_folder
from digit.pipeline.hub import resolve_model
from digit.pipeline.pipeline import read_index
from digit.training import checkpoint
from digit.training.tasks.tokens import TokenData, token_model_config

_TRAINING_FIELDS = ("class_dropout", "label_smoothing")
_EMBEDDINGS = ("token_embedding", "position_embedding", "mask_vector", "prefix_embedding", "prefix_position_embedding")
_CLASSES = ("class_embedding", "start")
_HEAD = ("transformer.norm", "head")


@config
class FineTune:
    """From what a run starts, and what may move.

    Attributes:
        source: a saved prior, decoder, encoder or VQGAN, the run that made it, or a whole model.
        freeze: parts of a token model that stay as they are: "embeddings" (tokens and positions), "classes" (and the
            start vector), "blocks", "blocks:N" (the first N), "head" (with the norm before it); of a VQGAN "tokens"
            (encoder, codebook).
        lora: rank of the changes of the blocks' matrices; all else but the classes then stays as it is. 0 trains the
            weights.
    """

    source: str
    freeze: tuple[str, ...] = ()
    lora: Annotated[int, Field(ge=0)] = 0


class Start(NamedTuple):
    """A saved model.

    Attributes:
        model: with its weights.
        class_names: empty where they are not known.
        space: "semantic" or "vq", what it predicts; None where that is not known.
    """

    model: TokenModel
    class_names: list[str]
    space: str | None


def start_folder(source: str, role: str) -> tuple[Path, list[str]]:
    """The folder of a saved part, and the class names that a whole model says.

    Args:
        source: see :class:`FineTune`.
        role: "encoder", "vqgan", "prior", or a decoder's kind.

    Raises:
        DigitError: nothing there, or a model without such a part.
    """
    path = Path(source)
    if any((folder / "config.json").is_file() for folder in (path, path / "model")):
        return part_folder(path), []
    whole = resolve_model(source)
    index = read_index(whole)
    decodes = role not in ("encoder", "vqgan", "prior")
    folder = whole / (f"decoder/{role}" if decodes else role)
    if not folder.is_dir():
        raise DigitError(f"The model {source} has no {f'decoder {role!r}' if decodes else role} to start from.")
    return folder, list(index["class_names"])


def take_modules(modules: nn.ModuleDict, run: str | Path, names: Sequence[str]) -> None:
    """Go on with what only training has (a discriminator, a projection head) of the run that made the saved part.

    Args:
        modules: of the new run.
        run: the other's folder; nothing is taken where it has no checkpoint.
        names: of the modules; one that the run has not, or of another shape, stays as it is.
    """
    last = checkpoint.latest(Path(run))
    if last is None:
        return
    tensors = checkpoint.load(last).tensors["modules"]
    for name in (name for name in names if name in modules):
        mine = modules[name].state_dict()
        saved = {key: tensors[f"{name}.{key}"] for key in mine if f"{name}.{key}" in tensors}
        if len(saved) == len(mine) and all(saved[key].shape == mine[key].shape for key in mine):
            modules[name].load_state_dict(saved)


def open_start(source: str, role: str) -> Start:
    """The saved model of a role.

    Args:
        source: see :class:`FineTune`.
        role: "prior", "ar" or "masked".

    Raises:
        DigitError: nothing there, or it is of another role.
    """
    folder, names = start_folder(source, role)
    model = TokenModel.from_pretrained(folder)
    if model.config.role != role:
        raise DigitError(f"{source} is a model of role '{model.config.role}'; the preset trains one of role '{role}'.")
    provenance: Mapping[str, Any] = model.provenance
    return Start(model, list(provenance.get("class_names") or names), provenance.get("space"))


def start_model(
    start: FineTune, values: Mapping[str, Any], cache: TokenCache, data: TokenData, where: str
) -> tuple[TokenModel, dict[str, Any]]:
    """A saved model, ready to be trained on a cache, and what to note about it.

    Args:
        start: which, and what may move.
        values: the ``model`` section of the preset.
        cache, data: what it is to learn.
        where: the preset's name, for messages.

    Raises:
        DigitError: it has another vocabulary or length than the cache, another role, or nothing would move.
    """
    source, names, space = open_start(start.source, str(values.get("role", "prior")))
    if space not in (None, data.target):
        raise DigitError(f"{start.source} predicts {space} tokens; {where} asks for {data.target} tokens.")
    check_vocabulary(source.config, cache, data, start.source)
    known = to_dict(source.config)
    del known["num_classes"]
    known |= {name: values[name] for name in _TRAINING_FIELDS if name in values}
    dropout = (values.get("transformer") or {}).get("dropout", source.config.transformer.dropout)
    known["transformer"] = {**known["transformer"], "dropout": dropout}
    model = TokenModel(token_model_config(known, cache, data, where))
    tensors = source.state_dict()
    if model.class_embedding is not None:
        tensors["class_embedding.weight"] = _class_rows(source, names, cache.classes, model.config.num_classes)
    else:
        tensors.pop("class_embedding.weight", None)
    if source.class_embedding is not None and not source.config.can_guide:
        tensors["start"] = source.class_embedding.weight.mean(0)  # it never had a gradient
    model.load_state_dict(tensors)
    if start.lora:
        add_lora(model, start.lora)
    freeze(model, start.freeze)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise DigitError("Everything is frozen; nothing would be trained.")
    return model, {"weights": weights_checksum(source), "freeze": list(start.freeze), "lora": start.lora}


def check_vocabulary(model: TokenModelConfig, cache: TokenCache, data: TokenData, source: str) -> None:
    """See that a model speaks the tokens of a cache.

    Raises:
        DigitError: another vocabulary or another number of tokens; says both.
    """
    target = cache.space(data.target)
    pairs = [(f"{data.target} tokens", (model.vocab_size, model.length), (target.vocab_size, target.length))]
    prefix = cache.space(data.prefix) if data.prefix else None
    wanted = (prefix.vocab_size, prefix.length) if prefix else (0, 0)
    pairs.append(("semantic tokens in front", (model.prefix_vocab_size, model.prefix_length), wanted))
    for what, (has, length), (given, count) in pairs:
        if (has, length) != (given, count):
            raise DigitError(
                f"{source} knows {length} {what} an image, from a vocabulary of {has:,}; the cache {cache.folder} has {count} from "
                f"{given:,}. A token means nothing to a model of another vocabulary: make the cache with the tokenizers that "
                "the model was trained with (digit cache-tokens --model ...), or train from the start."
            )


def freeze(model: TokenModel, parts: Sequence[str]) -> None:
    """Let parts of a model stay as they are; see :class:`FineTune`.

    Raises:
        DigitError: an unknown part, or more blocks than there are.
    """
    blocks = list(model.transformer.blocks)
    for part in parts:
        name, _, number = part.partition(":")
        if name == "blocks" and (not number or (number.isdecimal() and 0 < int(number) <= len(blocks))):
            frozen: list[nn.Module | nn.Parameter | None] = [*blocks[: int(number) if number else None]]
        elif name in ("embeddings", "classes", "head") and not number:
            chosen = {"embeddings": _EMBEDDINGS, "classes": _CLASSES, "head": _HEAD}[name]
            frozen = [attrgetter(attribute)(model) for attribute in chosen]
        else:
            raise DigitError(
                f"'{part}' cannot be frozen; the parts are embeddings, classes, head, blocks, and blocks:N for the first N of "
                f"{len(blocks)}."
            )
        for item in frozen:
            if item is not None:
                item.requires_grad_(False)


class LowRank(nn.Module):
    """A weight (out, in) plus 2 B A, with A (rank, in) and B (out, rank); B begins at zero, so nothing changes at
    first.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inner = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inner) * inner**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight (out, in)."""
        return weight + 2 * (self.b @ self.a)


def add_lora(model: TokenModel, rank: int) -> None:
    """Freeze a model but for its classes, and give the matrices of its blocks changes of low rank that are trained.

    :func:`digit.training.tasks.tokens.merged` merges them.
    """
    model.requires_grad_(False)
    for name in _CLASSES:
        part = getattr(model, name)
        if part is not None:
            part.requires_grad_(True)
    for module in model.transformer.blocks.modules():
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))


def _class_rows(source: TokenModel, old: Sequence[str], new: Sequence[str], count: int) -> Tensor:
    """Class vectors (count, D): by name where both sides have names, else by number; the others as the module says."""
    if source.class_embedding is None:
        return source.start.detach().expand(count, -1).clone()
    known = source.class_embedding.weight.detach()  # (C, D)
    rows = known.mean(0).expand(count, -1).clone()  # (count, D)
    if len(old) == len(known) and new:
        for number, name in enumerate(new):
            if name in old:
                rows[number] = known[old.index(name)]
    else:
        kept = min(count, len(known))
        rows[:kept] = known[:kept]
    return rows
