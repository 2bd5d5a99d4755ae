"""The DiGIT authors' fairseq checkpoints: which model a file holds, its settings, and its tensors in our layout.

Vocabulary of theirs, and what becomes of it (fairseq 0.12.2 with DAMO-NLP-SG/DiGIT at cd6d8ca):

| their row | what it is | ours |
|---|---|---|
| 0, 1, 4 | ``<s>``, padding, ``<n>``: never used | dropped |
| 2 | end of sequence; as an input it starts the sequence | ``start`` (the output row is dropped: our sequences have a length) |
| 3 | unknown; the masked decoder's mask | ``mask_vector`` of a masked decoder, else dropped |
| 5 + i | symbol i | row i of ``token_embedding`` and of ``head`` |
| behind them, stage 1 | class c | row c of ``class_embedding`` |
| behind them, stage 2 | the same five, then semantic token s | row s of ``prefix_embedding`` |

Their position tables count from row 2 and have room for 1,024 or more; ours have a row for every place that exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from digit.convert.keys import Keys
from digit.convert.stream import Component, Parts
from digit.convert.torchfile import plain, read_torch_file
from digit.core.errors import DigitError
from digit.models.probe import LinearProbeConfig
from digit.models.token_model import TokenModelConfig
from digit.models.transformer import TransformerConfig

SPECIALS = 5  # <s>, padding, </s>, unknown, <n>
_START, _MASK = 2, 3
_FIRST_POSITION = 2
TOKENS = 256  # theirs is a grid of 16 x 16, for semantic and VQ tokens alike; the code has it as a constant

Kind = Literal["stage 1", "stage 2", "masked stage 2", "VQ-only"]
_KINDS: dict[str, Kind] = {
    "stlm": "stage 1",
    "stlm_linearprobe": "stage 1",
    "st2vtlm": "stage 2",
    "st2vtlm_nar": "masked stage 2",
    "st2vtlm_vq": "VQ-only",
}
# settings of fairseq that change the arithmetic, and the only values that the published models and this converter know
_REQUIRED = {
    "activation_fn": "gelu",
    "decoder_learned_pos": True,
    "layernorm_embedding": False,
    "share_decoder_input_output_embed": False,
    "no_token_positional_embeddings": False,
    "no_decoder_final_norm": False,
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "character_embeddings": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_fc": False,
    "scale_resids": False,
    "base_layers": 0,
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened file of theirs.

    Attributes:
        path: of the file.
        kind: which model it holds; None if it does not say.
        settings: of the model.
        label_smoothing: of its training.
        sizes: vocabulary sizes that the task names: "source_vocab_size", "target_vocab_size".
        keys: its tensors.
        updates: training steps, where the file says.
    """

    path: Path
    kind: Kind | None
    settings: Mapping[str, Any]
    label_smoothing: float
    sizes: Mapping[str, int]
    keys: Keys
    updates: int | None

    @property
    def provenance(self) -> dict[str, Any]:
        """Kept with what is converted."""
        return {"layout": "fairseq (DAMO-NLP-SG/DiGIT)", "updates": self.updates}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of theirs; tensors stay on disk.

    Raises:
        DigitError: not such a file; the message names it and the reason.
    """
    path = Path(path)
    values = read_torch_file(path)
    tensors = values.get("model") if isinstance(values, dict) else None
    if not isinstance(tensors, dict) or not any(str(name).startswith("decoder.") for name in tensors):
        found = ", ".join(map(str, list(values)[:4])) if isinstance(values, dict) else type(values).__name__
        raise DigitError(
            f"{path} is not a DiGIT checkpoint: expected a 'model' with tensors named decoder.*; it holds {found}. "
            "A VQGAN is given as --vqgan, an encoder as --encoder, a codebook as --codebook."
        )
    settings, task, criterion = _settings(values)
    name = settings.get("_name") or settings.get("arch")
    return Checkpoint(
        path=path,
        kind=_KINDS.get(str(name)) or _kind_by_keys(tensors),
        settings=settings,
        label_smoothing=float(criterion.get("label_smoothing") or 0.0),
        sizes={
            key: int(task[key]) for key in ("source_vocab_size", "target_vocab_size") if isinstance(task.get(key), int)
        },
        keys=Keys(tensors, str(path)),
        updates=_updates(values),
    )


def _settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings of model, task and criterion: three sections of "cfg", or one flat "args" as older fairseq writes."""
    cfg = plain(values.get("cfg"))
    flat = [plain(values.get("args"))] * 3
    sections = [cfg.get(key) for key in ("model", "task", "criterion")] if isinstance(cfg, dict) else flat
    model, task, criterion = (section if isinstance(section, dict) else {} for section in sections)
    return model, task, criterion


def _kind_by_keys(tensors: Mapping[str, Any]) -> Kind | None:
    if "decoder.embed_positions_1.weight" in tensors:
        return None  # AR and masked decoders have the same tensors
    return "stage 1" if "centroids" in tensors else "VQ-only"


def _updates(values: Mapping[str, Any]) -> int | None:
    history = plain(values.get("optimizer_history"))
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    return updates if isinstance(updates, int) else None


def token_model(file: Checkpoint, role: Literal["prior", "ar", "masked"]) -> Component:
    """Their decoder-only transformer as a token model.

    Raises:
        DigitError: settings that the layout does not cover, or vocabularies that contradict each other.
    """
    keys = file.keys
    rows, dim = keys.shape("decoder.embed_tokens.weight")
    vocab = keys.shape("decoder.output_projection.weight")[0] - SPECIALS
    rest = rows - SPECIALS - vocab  # class rows (stage 1), or the source vocabulary (stage 2)
    prefix_vocab = rest - SPECIALS if role != "prior" else 0
    if vocab < 1 or rest < 0 or (role != "prior" and prefix_vocab < 1):
        raise DigitError(
            f"{file.path}: decoder.embed_tokens.weight has {rows} rows and decoder.output_projection.weight {vocab + SPECIALS}; "
            f"these do not make a {'prior' if role == 'prior' else 'decoder with a semantic prefix'}."
        )
    _check_sizes(file, {"target_vocab_size": vocab, "source_vocab_size": prefix_vocab if role != "prior" else -1})
    config = TokenModelConfig(
        role=role,
        vocab_size=vocab,
        length=TOKENS,
        prefix_vocab_size=prefix_vocab,
        prefix_length=TOKENS if prefix_vocab else 0,
        num_classes=rest if role == "prior" else 0,
        class_dropout=0.0,  # their labels are never dropped: guidance was not trained
        embedding_scale=1.0 if file.settings.get("no_scale_embedding") else dim**0.5,
        label_smoothing=file.label_smoothing,
        transformer=_transformer_config(file, dim, causal=role != "masked"),
    )
    return Component(
        "TokenModel", config, _token_model_parts(keys.under("decoder."), config, rows), file.provenance, file.path
    )


def _transformer_config(file: Checkpoint, dim: int, causal: bool) -> TransformerConfig:
    settings = file.settings
    for name, only in _REQUIRED.items():
        if name in settings and settings[name] != only:
            raise DigitError(
                f"{file.path} was trained with {name}={settings[name]!r}; this converter knows {name}={only!r} only, "
                "as in all published models."
            )
    heads = settings.get("decoder_attention_heads")
    if not isinstance(heads, int):
        raise DigitError(
            f"{file.path} does not say how many attention heads it has (cfg.model.decoder_attention_heads)."
        )
    layers = [int(m.group(1)) for name in file.keys.names() if (m := re.match(r"decoder\.layers\.(\d+)\.", name))]
    depth = settings.get("decoder_layers")
    before = settings.get("decoder_normalize_before")
    pre = bool(before) if before is not None else "decoder.layer_norm.weight" in file.keys
    return TransformerConfig(
        dim=dim,
        depth=depth if isinstance(depth, int) else max(layers, default=0) + 1,
        heads=heads,
        ffn_dim=file.keys.shape("decoder.layers.0.fc1.weight")[0],
        norm="pre" if pre else "post",
        causal=causal,
        dropout=float(settings.get("dropout") or 0.0),
        norm_eps=1e-5,
    )


def _check_sizes(file: Checkpoint, found: Mapping[str, int]) -> None:
    for name, size in found.items():
        said = file.sizes.get(name, -1)
        if said >= 0 and size >= 0 and said != size:
            raise DigitError(
                f"{file.path} contradicts itself: its task says {name} = {said}, its tensors have {size} symbols."
            )


def _token_model_parts(keys: Keys, config: TokenModelConfig, rows: int) -> Parts:
    dim, vocab = config.transformer.dim, config.vocab_size
    table = keys.take("embed_tokens.weight", rows, dim)
    behind = SPECIALS + vocab
    parts: dict[str, list[Tensor]] = {
        "token_embedding.weight": [table[SPECIALS:behind]],
        "start": [table[_START]],
        "position_embedding.weight": [_positions(keys, "embed_positions.weight", 1 + config.length, dim)],
        "head.weight": [keys.take("output_projection.weight", behind, dim)[SPECIALS:]],
    }
    if config.num_classes:
        parts["class_embedding.weight"] = [table[behind:]]
    if config.role == "masked":
        parts["mask_vector"] = [table[_MASK]]
    if config.prefix_length:
        parts["prefix_embedding.weight"] = [table[behind + SPECIALS :]]
        parts["prefix_position_embedding.weight"] = [
            _positions(keys, "embed_positions_1.weight", config.prefix_length, dim)
        ]
    if config.transformer.norm == "pre":
        for name in ("weight", "bias"):
            parts[f"transformer.norm.{name}"] = [keys.take(f"layer_norm.{name}", dim)]
    for index in range(config.transformer.depth):
        inner = _block_parts(keys.under(f"layers.{index}."), dim, cast(int, config.transformer.ffn_dim))
        parts |= {f"transformer.blocks.{index}.{name}": value for name, value in inner.items()}
    keys.ignore("version")
    return parts


def _positions(keys: Keys, name: str, count: int, dim: int) -> Tensor:
    rows = max(keys.shape(name)[0], _FIRST_POSITION + count)
    return keys.take(name, rows, dim)[_FIRST_POSITION : _FIRST_POSITION + count]


def _block_parts(keys: Keys, dim: int, ffn_dim: int) -> dict[str, list[Tensor]]:
    parts: dict[str, list[Tensor]] = {}
    for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
        parts[f"attention.qkv.{kind}"] = [keys.take(f"self_attn.{x}_proj.{kind}", *shape) for x in "qkv"]
        parts[f"attention.out.{kind}"] = [keys.take(f"self_attn.out_proj.{kind}", *shape)]
        parts[f"attention_norm.{kind}"] = [keys.take(f"self_attn_layer_norm.{kind}", dim)]
        parts[f"ffn_norm.{kind}"] = [keys.take(f"final_layer_norm.{kind}", dim)]
    for ours, theirs, width_in, width in (("ffn_in", "fc1", dim, ffn_dim), ("ffn_out", "fc2", ffn_dim, dim)):
        parts[f"{ours}.weight"] = [keys.take(f"{theirs}.weight", width, width_in)]
        parts[f"{ours}.bias"] = [keys.take(f"{theirs}.bias", width)]
    return parts


def linear_probe(file: Checkpoint) -> Component | None:
    """The classifiers of a linear-probe checkpoint; None if it has none."""
    keys = file.keys.under("linear_classifiers.")
    found = [int(m.group(1)) for name in keys.names() if (m := re.match(r"classifier_(\d+)_blocks\.weight$", name))]
    if not found:
        return None
    classes, dim = keys.shape(f"classifier_{min(found)}_blocks.weight")
    config = LinearProbeConfig(dim=dim, states=max(found) + 1, classes=classes)
    parts = {}
    for index in range(config.states):
        name = f"classifier_{index}_blocks"
        parts[f"classifiers.{index}.weight"] = [keys.take(f"{name}.weight", classes, dim)]
        parts[f"classifiers.{index}.bias"] = [keys.take(f"{name}.bias", classes)]
    return Component("LinearProbe", config, parts, file.provenance, file.path)


def centroids(file: Checkpoint) -> Tensor | None:
    """The codebook (K, D) of a checkpoint, which holds it transposed; None for VQ-only ones."""
    if "centroids" not in file.keys:
        return None
    dim, clusters = file.keys.shape("centroids")
    if "centroid_norm" in file.keys:
        file.keys.take("centroid_norm", 1, clusters)  # sums of squares, which we compute
    return file.keys.take("centroids", dim, clusters).T
