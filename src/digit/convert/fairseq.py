"""The DiGIT authors' fairseq checkpoints: which model a file holds, its settings, and its tensors in our layout.

Vocabulary of theirs, and what becomes of it (fairseq 0.12.2 with DAMO-NLP-SG/DiGIT at cd6d8ca):

| their row | what it is | ours |
|---|---|---|
| 0, 1, 4 | ``<s>``, padding, ``<n>``: never used | dropped |
| 2 | end of sequence; as an input it starts the sequence | ``start`` (no output row: our sequences have a length) |
| 3 | unknown; the masked decoder's mask | ``mask_vector`` of a masked decoder, else dropped |
| 5 + i | symbol i | row i of ``token_embedding`` and of ``head`` |
| behind them, stage 1 | class c | row c of ``class_embedding`` |
| behind them, stage 2 | the same five, then semantic token s | row s of ``prefix_embedding`` |

Their position tables count from row 2 and have room for 1,024 or more; ours have a row for every place that exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from digit.convert.keys import Keys
from digit.convert.stream import Component
from digit.convert.torchfile import plain, read_torch_file
from digit.core.errors import DigitError
from digit.models.component import without_weights
from digit.models.probe import LinearProbe, LinearProbeConfig
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
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
    "adaptive_softmax_cutoff": None,
    "base_layers": 0,
    **dict.fromkeys(("layernorm_embedding", "share_decoder_input_output_embed", "character_embeddings"), False),
    **dict.fromkeys(("no_token_positional_embeddings", "no_decoder_final_norm", "adaptive_input"), False),
    **dict.fromkeys(("scale_attn", "scale_heads", "scale_fc", "scale_resids"), False),
}


# our names to theirs, behind "decoder."
_RENAMES = [
    (r"^(token|class|prefix)_embedding\.weight|^start$|^mask_vector$", "embed_tokens.weight"),
    (r"^position_embedding", "embed_positions"),
    (r"^prefix_position_embedding", "embed_positions_1"),
    (r"^head", "output_projection"),
    (r"^transformer\.norm", "layer_norm"),
    (r"^transformer\.blocks", "layers"),
    (r"attention\.qkv\.(\w+)", r"self_attn.{q,k,v}_proj.\1"),
    (r"attention\.out", "self_attn.out_proj"),
    (r"attention_norm", "self_attn_layer_norm"),
    (r"ffn_norm", "final_layer_norm"),
    (r"ffn_in", "fc1"),
    (r"ffn_out", "fc2"),
]


@dataclass(frozen=True)
class Checkpoint:
    """An opened file of theirs: which model it holds, settings of the model and of its training, tensors and training
    steps; None or empty where it does not say.
    """

    path: Path
    kind: Kind | None
    settings: Mapping[str, Any]
    task: Mapping[str, Any]
    criterion: Mapping[str, Any]
    keys: Keys
    updates: int | None

    @property
    def provenance(self) -> dict[str, Any]:
        """Kept with what is converted."""
        return {"layout": "fairseq (DAMO-NLP-SG/DiGIT)", "updates": self.updates}


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of theirs; tensors stay on disk. DigitError: not such a file; the message names it and the
    reason.
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
    # three sections of "cfg", or one flat "args" as older fairseq writes
    cfg, args = plain(values.get("cfg")), plain(values.get("args"))
    sections = [cfg.get(key) if isinstance(cfg, dict) else args for key in ("model", "task", "criterion")]
    settings, task, criterion = (section if isinstance(section, dict) else {} for section in sections)
    kind = _KINDS.get(str(settings.get("_name") or settings.get("arch")))
    # by their tensors, AR and masked decoders are the same
    if kind is None and "decoder.embed_positions_1.weight" not in tensors:
        kind = "stage 1" if "centroids" in tensors else "VQ-only"
    history = plain(values.get("optimizer_history"))
    last = history[-1] if isinstance(history, list) and history else None
    updates = last.get("num_updates") if isinstance(last, dict) else None
    updates = updates if isinstance(updates, int) else None
    return Checkpoint(path, kind, settings, task, criterion, Keys(tensors, str(path)), updates)


def token_model(file: Checkpoint, role: Literal["prior", "ar", "masked"]) -> Component:
    """Their decoder-only transformer as a token model. DigitError: settings that the layout does not cover, or
    vocabularies that contradict each other.
    """
    keys = file.keys
    rows, dim = keys.shape("decoder.embed_tokens.weight")
    vocab = keys.shape("decoder.output_projection.weight")[0] - SPECIALS
    rest = rows - SPECIALS - vocab  # class rows (stage 1), or the source vocabulary (stage 2)
    prefix_vocab = rest - SPECIALS if role != "prior" else 0
    if vocab < 1 or rest < 0 or (role != "prior" and prefix_vocab < 1):
        raise DigitError(
            f"{file.path}: decoder.embed_tokens.weight has {rows} rows and decoder.output_projection.weight "
            f"{vocab + SPECIALS}; "
            f"these do not make a {'prior' if role == 'prior' else 'decoder with a semantic prefix'}."
        )
    for name, size in (("target_vocab_size", vocab), ("source_vocab_size", prefix_vocab)):
        said = file.task.get(name)
        if isinstance(said, int) and said >= 0 and size and said != size:
            raise DigitError(
                f"{file.path} contradicts itself: its task says {name} = {said}, its tensors have {size} symbols."
            )
    config = TokenModelConfig(
        role=role,
        vocab_size=vocab,
        length=TOKENS,
        prefix_vocab_size=prefix_vocab,
        prefix_length=TOKENS if prefix_vocab else 0,
        num_classes=rest if role == "prior" else 0,
        class_dropout=0.0,  # their labels are never dropped: guidance was not trained
        embedding_scale=1.0 if file.settings.get("no_scale_embedding") else dim**0.5,
        label_smoothing=float(file.criterion.get("label_smoothing") or 0.0),
        transformer=_transformer_config(file, dim, causal=role != "masked"),
    )
    behind, positions = SPECIALS + vocab, _FIRST_POSITION
    their_rows: dict[str, int | slice] = {
        "token_embedding.weight": slice(SPECIALS, behind),
        "class_embedding.weight": slice(behind, rows),
        "prefix_embedding.weight": slice(behind + SPECIALS, rows),
        "start": _START,
        "mask_vector": _MASK,
        "head.weight": slice(SPECIALS, behind),
        "position_embedding.weight": slice(positions, positions + 1 + TOKENS),
        "prefix_position_embedding.weight": slice(positions, positions + TOKENS),
    }
    with without_weights():
        model = TokenModel(config)
    inner = keys.under("decoder.")
    inner.ignore("version")
    parts = inner.parts(model, _RENAMES, their_rows)
    return Component("TokenModel", config, parts, file.provenance, file.path)


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
    depth = settings.get("decoder_layers")
    before = settings.get("decoder_normalize_before")
    pre = bool(before) if before is not None else "decoder.layer_norm.weight" in file.keys
    return TransformerConfig(
        dim=dim,
        depth=depth if isinstance(depth, int) else file.keys.count(r"decoder\.layers\.(\d+)\."),
        heads=heads,
        ffn_dim=file.keys.shape("decoder.layers.0.fc1.weight")[0],
        norm="pre" if pre else "post",
        causal=causal,
        dropout=float(settings.get("dropout") or 0.0),
        norm_eps=1e-5,
    )


def linear_probe(file: Checkpoint) -> Component | None:
    """The classifiers of a linear-probe checkpoint; None if it has none."""
    keys = file.keys.under("linear_classifiers.")
    states = keys.count(r"classifier_(\d+)_blocks\.weight$")
    if not states:
        return None
    classes, dim = keys.shape(f"classifier_{states - 1}_blocks.weight")
    config = LinearProbeConfig(dim=dim, states=states, classes=classes)
    with without_weights():
        parts = keys.parts(LinearProbe(config), [(r"^classifiers\.(\d+)", r"classifier_\1_blocks")])
    return Component("LinearProbe", config, parts, file.provenance, file.path)


def centroids(file: Checkpoint) -> Tensor | None:
    """The codebook (K, D) of a checkpoint, which holds it transposed; None for VQ-only ones."""
    if "centroids" not in file.keys:
        return None
    dim, clusters = file.keys.shape("centroids")
    if "centroid_norm" in file.keys:
        file.keys.take("centroid_norm", 1, clusters)  # sums of squares, which we compute
    return file.keys.take("centroids", dim, clusters).T
