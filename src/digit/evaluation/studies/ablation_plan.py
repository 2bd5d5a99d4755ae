"""What an ablation compares: one thing is varied, and everything else is shared.

The packaged ones are in ``digit/presets/ablations``. The paper's own: figure 3b (K), figure 4a (encoder), Table 3
(decoder), figure 3a (prior). :mod:`digit.evaluation.studies.ablation_run` trains and measures the variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from digit.core.config import config, from_dict, load_preset, preset_names, to_dict
from digit.core.errors import DigitError
from digit.data.token_cache import Views
from digit.evaluation import paper
from digit.evaluation.metrics.probe import ProbeOptions
from digit.models.transformer import PositiveInt

_FREE = {
    "clusters": {"clusters"},
    "encoder": {"encoder", "encoder_set", "layer", "prior", "prior_set", "decoder", "sampling"},
    "layer": {"layer"},
    "decoder": {"decoder", "decoder_set", "sampling"},
    "prior-size": {"prior", "prior_set", "sampling"},
}
_FROM_CACHE = ("vocab_size", "length", "prefix_vocab_size", "prefix_length", "num_classes")
"""Fields of a token model that follow from the tokens, which an ablation may change."""


def paper_rows() -> dict[str, dict[str, float | None]]:
    """The paper's rows that a variant may name as its own: FID, Inception Score, and the probe in percent."""
    rows: dict[str, dict[str, float | None]] = {
        f"{row.method} {row.parameters:g}M": {"fid": row.fid, "inception": row.inception}
        for row in paper.UNCONDITIONAL
        if row.parameters
    }
    rows |= {row.method: {"fid": row.fid, "inception": row.inception} for row in paper.ADDITIVE}
    return rows | {
        row.encoder: {"fid": row.fid, "inception": row.inception, "probe": row.probe} for row in paper.ENCODERS
    }


@config
class Recipe:
    """How a model is made.

    Attributes:
        encoder: a folder, a checkpoint file, a Hub id, or a training preset, by which it is trained here; None learns
            VQ tokens.
        encoder_set: changes of that preset, ``a.b=c``.
        layer: the block whose output is taken, -1 is the last; None takes the encoder's own choice.
        clusters: K.
        fit_images: how many images k-means reads; None: all.
        random_crops: cut these anywhere and mirror half of them, as the paper did.
        vqgan, vqgan_set: a folder, or a training preset and its changes.
        views: how often and how each image is tokenized.
        prior, prior_set: a training preset and its changes; fields that follow from the tokens are left to them.
        decoder, decoder_set: likewise; None trains none, and then no images can be made.
        sampling: settings, as ``digit evaluate sweep`` knows them.
    """

    encoder: str | None
    encoder_set: tuple[str, ...] = ()
    layer: int | None = None
    clusters: PositiveInt = 256
    fit_images: PositiveInt | None = None
    random_crops: bool = False
    vqgan: str
    vqgan_set: tuple[str, ...] = ()
    views: Views = Views()
    prior: str
    prior_set: tuple[str, ...] = ()
    decoder: str | None = None
    decoder_set: tuple[str, ...] = ()
    sampling: dict[str, Any] = Field(default_factory=dict)


@config
class Ablation:
    """What is varied, and how it is measured.

    Attributes:
        what: the thing that is varied; variants may change the fields that belong to it and no others.
        base: what the variants have in common.
        variants: ``name``, fields of :class:`Recipe` to replace (those ending in ``_set`` are added), and where the
            paper has the same, ``paper``: its row.
        probe: how the prior's layers are probed.
        fid_images: samples for FID.
        batch_size: images at a time; does not change the values.
        seed: of k-means and of the samples. The seeds of the trainings are in their presets.
    """

    what: Literal["clusters", "encoder", "layer", "decoder", "prior-size"]
    base: Recipe
    variants: Annotated[tuple[dict[str, Any], ...], Field(min_length=2)]
    probe: ProbeOptions = ProbeOptions()
    fid_images: Annotated[int, Field(ge=2)] = 10_000
    batch_size: PositiveInt = 64
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class Variant:
    """One model of an ablation, and its row of the paper."""

    name: str
    recipe: Recipe
    paper: Mapping[str, float | None]

    def preset(self, part: Literal["prior", "decoder"]) -> dict[str, Any]:
        """The training preset of a token model, without the fields that follow from the tokens.

        Raises:
            DigitError: there is none of that name, it is another component's, or a change does not fit it.
        """
        name = getattr(self.recipe, part)
        values = load_preset(name, getattr(self.recipe, f"{part}_set"))
        if values.get("component") != part:
            raise DigitError(
                f"'{self.name}': {name} is a preset of the component '{values.get('component')}', not {part}."
            )
        return {**values, "model": {k: v for k, v in values["model"].items() if k not in _FROM_CACHE}}


def load_ablation(name: str, overrides: Sequence[str] = ()) -> Ablation:
    """Read a packaged ablation or a YAML file; ``overrides`` are changes ``a.b=c``.

    Raises:
        DigitError: an unknown name or field, or a value that is wrong.
    """
    return from_dict(Ablation, load_preset(name, overrides, "ablations"), f"ablation {name}")


def plan(ablation: Ablation) -> list[Variant]:
    """The variants, each complete, tried before anything is trained.

    Raises:
        DigitError: a name that is missing or there twice, a field that this ablation does not vary, or a preset that
            does not fit.
    """
    rows, found, base = paper_rows(), {}, to_dict(ablation.base)
    for number, values in enumerate(ablation.variants, 1):
        changes = dict(values)
        name, row = str(changes.pop("name", "")), changes.pop("paper", None)
        if not name or name in found:
            raise DigitError(f"Variant {number} needs a 'name' of its own; {values.get('name')!r} was given.")
        if extra := sorted(set(changes) - _FREE[ablation.what]):
            raise DigitError(
                f"The variant '{name}' changes {', '.join(extra)}, but this ablation varies {ablation.what}; its variants may "
                f"change {', '.join(sorted(_FREE[ablation.what]))}. What all have in common belongs to 'base'."
            )
        if row is not None and row not in rows:
            raise DigitError(f"The variant '{name}' names the paper's row '{row}'; known are: {', '.join(rows)}.")
        added = {key: [*base[key], *changes[key]] for key in changes if key.endswith("_set")}
        variant = Variant(name, from_dict(Recipe, {**base, **changes, **added}, f"variant '{name}'"), rows.get(row, {}))
        _check(variant)
        found[name] = variant
    return list(found.values())


def _check(variant: Variant) -> None:
    target = (variant.preset("prior").get("data") or {}).get("target", "semantic")
    wanted = "vq" if variant.recipe.encoder is None else "semantic"
    if target != wanted:
        given = "has no encoder" if wanted == "vq" else "has an encoder"
        raise DigitError(
            f"The variant '{variant.name}' {given}, so its prior must predict {wanted} tokens; {variant.recipe.prior} predicts {target}."
        )
    if variant.recipe.decoder is not None and wanted == "semantic":
        variant.preset("decoder")
    for component in ("encoder", "vqgan"):
        source = getattr(variant.recipe, component)
        if source is not None and is_preset(source):
            load_preset(source, getattr(variant.recipe, f"{component}_set"))


def is_preset(source: str) -> bool:
    """Whether a part is given by a training preset, and not as it is."""
    return source.endswith((".yaml", ".yml")) or source in preset_names()
