"""Fine-tuning: begin a run with the weights of a saved token model instead of random ones.

The network is the saved model's; of the preset's ``model`` section only what concerns training counts (dropout, label
dropout, label smoothing). Classes may be other ones: those that both know by name keep their vector, a new one begins
as the mean of the known, and a model without classes gives its start vector to all, so that it begins exactly where it
ended.

Source of the low-rank changes: Hu et al. 2021, arXiv 2106.09685 (LoRA), with alpha = 2 x rank on all matrices of the
blocks. They are a parametrization of the weights, not the ``peft`` package, which brings layers and names of its
own and loads all of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from digit.core.config import NonNegativeInt, config, to_dict
from digit.core.errors import DigitError
from digit.data.token_cache import TokenCache, TokenSpace
from digit.models.component import weights_checksum
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.pipeline.assembly import part_folder
from digit.pipeline.hub import resolve_model
from digit.pipeline.index import read_index
from digit.training import checkpoint
from digit.training.tasks.tokens import TokenData, token_model_config

M = TypeVar("M", bound=nn.Module)
_TRAINING_FIELDS = ("class_dropout", "label_smoothing")
_PARTS = {
    "embeddings": (
        "token_embedding", "position_embedding", "mask_vector", "instruction", "prefix_embedding",
        "prefix_position_embedding",
    ),
    "classes": ("class_embedding", "start"),
    "head": ("backbone.norm", "head"),
}  # fmt: skip


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
    lora: NonNegativeInt = 0


def start_folder(source: str, role: str) -> tuple[Path, list[str]]:
    """The folder of a saved part, "encoder", "vqgan", "prior" (of any role) or a decoder's kind, and the class names
    that a whole model says; a DigitError where nothing is there, or a model without such a part.
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
    """Take over those named ``modules`` that the last checkpoint of ``run`` has in the same shape, such as heads."""
    last = checkpoint.latest(Path(run))
    if last is None:
        return
    tensors = checkpoint.load(last).tensors["modules"]
    for name in (name for name in names if name in modules):
        mine = modules[name].state_dict()
        saved = {key: tensors[f"{name}.{key}"] for key in mine if f"{name}.{key}" in tensors}
        if len(saved) == len(mine) and all(saved[key].shape == mine[key].shape for key in mine):
            modules[name].load_state_dict(saved)


def saved_part(
    start: FineTune,
    role: str,
    load: Callable[[Path], M],
    own: M,
    fits: Callable[[M], bool] = lambda _: True,
    may_freeze: str = "",
) -> dict[str, Any]:
    """Give ``own`` the weights of the saved encoder, VQGAN or feed-forward decoder that a run begins with, opened by
    ``load``; what to note about it. Of its parts none but ``may_freeze`` may stay as it is.

    Raises:
        DigitError: nothing there, of another shape (or ``fits`` says no), or something else is to be frozen.
    """
    if start.lora or set(start.freeze) - {may_freeze}:
        but = f", or with --freeze {may_freeze}" if may_freeze else ""
        raise DigitError(f"--freeze and --lora are for token models; this part is trained as a whole{but}.")
    part = load(start_folder(start.source, role)[0])
    shapes, known = ({name: t.shape for name, t in one.state_dict().items()} for one in (part, own))
    if shapes != known or not fits(part):
        raise DigitError(
            f"{start.source} is of another shape than the preset's model section describes, or of other tokens."
        )
    own.load_state_dict(part.state_dict())
    return {"weights": weights_checksum(part)}


def start_model(
    start: FineTune, values: Mapping[str, Any], cache: TokenCache, data: TokenData, where: str
) -> tuple[TokenModel, dict[str, Any]]:
    """A saved token model, ready to be trained on a cache, and what to note about it, by a preset's ``model`` section.
    A DigitError where it has another vocabulary or length than the cache, another role, or nothing would move.
    """
    role = str(values.get("role", "prior"))
    folder, names = start_folder(start.source, role if data.prefix else "prior")
    source = TokenModel.from_pretrained(folder)
    if source.config.role != role:
        raise DigitError(
            f"{start.source} is a model of role '{source.config.role}'; the preset trains one of role '{role}'."
        )
    names = list(source.provenance.get("class_names") or names)
    space = source.provenance.get("space")  # what it predicts, where that is known
    if space not in (None, data.target):
        raise DigitError(f"{start.source} predicts {space} tokens; {where} asks for {data.target} tokens.")
    check_vocabulary(source.config, cache, data, start.source)
    known = to_dict(source.config)
    del known["num_classes"]
    known |= {name: values[name] for name in _TRAINING_FIELDS if name in values}
    kind = "transformer" if source.config.transformer else "state_space"
    known[kind]["dropout"] = (values.get(kind) or {}).get("dropout", source.config.backbone.dropout)
    model = TokenModel(token_model_config(known, cache, data, where))
    tensors = source.state_dict()
    tensors.pop("class_embedding.weight", None)
    if model.class_embedding is not None:
        tensors["class_embedding.weight"] = _class_rows(source, names, cache.classes, model.config.num_classes)
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
    """Raise DigitError unless a model speaks the tokens of a cache: their vocabulary and their number."""
    target, prefix = cache.space(data.target), cache.space(data.prefix) if data.prefix else TokenSpace(0, (0, 0))
    for what, has, length, space in (
        (f"{data.target} tokens", model.vocab_size, model.length, target),
        ("semantic tokens in front", model.prefix_vocab_size, model.prefix_length, prefix),
    ):
        if (has, length) != (space.vocab_size, space.length):
            raise DigitError(
                f"{source} knows {length} {what} per image, from a vocabulary of {has:,}; the cache {cache.folder} has "
                f"{space.length} from {space.vocab_size:,}. A token means nothing to a model of another vocabulary: "
                "make the cache with the tokenizers that the model was trained with (digit cache-tokens --model ...), "
                "or train anew."
            )


def freeze(model: TokenModel, parts: Sequence[str]) -> None:
    """Let parts of a model stay as they are, those of :class:`FineTune`; DigitError for any other."""
    blocks = list(model.backbone.blocks)
    for part in parts:
        name, _, number = part.partition(":")
        if name == "blocks" and (not number or (number.isdecimal() and 0 < int(number) <= len(blocks))):
            frozen: list[nn.Module | nn.Parameter | None] = [*blocks[: int(number) if number else None]]
        elif name in _PARTS and not number:
            frozen = [attrgetter(attribute)(model) for attribute in _PARTS[name]]
        else:
            raise DigitError(
                f"'{part}' cannot be frozen; the parts are embeddings, classes, head, blocks, and blocks:N for the "
                f"first N of {len(blocks)}."
            )
        for item in frozen:
            if item is not None:
                item.requires_grad_(False)


class LowRank(nn.Module):
    """A weight (out, in) plus 2 B A, with A (rank, in) and B (out, rank), which begins at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inner = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inner) * inner**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight (out, in)."""
        return weight + 2 * (self.b @ self.a)


def add_lora(model: TokenModel, rank: int) -> None:
    """Freeze a model but for its classes, and give the matrices of its blocks changes of low rank that are trained."""
    model.requires_grad_(False)
    for name in _PARTS["classes"]:
        part = getattr(model, name)
        if part is not None:
            part.requires_grad_(True)
    for module in model.backbone.blocks.modules():
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
