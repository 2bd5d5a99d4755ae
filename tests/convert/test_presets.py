"""The paper's presets: every key counts, and the parameters are those of the authors' networks."""

import json
import re
from pathlib import Path

import pytest
import torch

from digit.core.config import from_dict, load_preset, preset_names, to_dict
from digit.models.feedforward import PixelHeadConfig
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.training.auxiliary import Auxiliary
from digit.training.losses.encoders import DistillationObjective, PairObjective
from digit.training.task import TrainingConfig
from digit.training.tasks.feedforward import OnePassObjective
from digit.training.tasks.tokens import TokenData
from digit.training.tasks.vqgan import VqganObjective

PRESETS = Path(__file__).parents[2] / "src/digit/presets"
GONE = {"objective.alignment", "objective.soft_targets", "objective.random_order"}  # losses that nothing used
FIRST = json.loads((Path(__file__).parent / "first_presets.json").read_text())
OBJECTIVES = {
    "vqgan": VqganObjective,
    "onepass": OnePassObjective,
    "encoder-vit": DistillationObjective,
    "encoder": PairObjective,
}

SPECIALS = 5
POSITIONS = 1026  # rows of their position tables
OTHERS = ("imagenet256-linear-probe", "imagenet256-base-onepass")
TOKEN_MODELS = [name for name in preset_names() if name.startswith("imagenet256-") and not name.startswith(OTHERS)]


def model_of(name: str) -> TokenModel:
    with torch.device("meta"):
        return TokenModel(from_dict(TokenModelConfig, load_preset(name)["model"], name))


def parameters(model: TokenModel) -> int:
    return sum(p.numel() for p in model.parameters())


def dropped_rows(model: TokenModel) -> int:
    """Rows of the authors' tables that ours do without, one by one."""
    c = model.config
    inputs = SPECIALS - 1 - (c.role == "masked")  # the end symbol is our start, the unknown symbol our mask
    outputs = SPECIALS
    source = SPECIALS if c.prefix_length else 0
    positions = POSITIONS - (1 + c.length)
    prefix_positions = POSITIONS - c.prefix_length if c.prefix_length else 0
    return inputs + outputs + source + positions + prefix_positions


def flat(values: dict, above: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_every_section_is_valid(name):
    preset = load_preset(name)
    assert set(preset) == {"component", "model", "data", "objective", "training"}
    assert from_dict(Auxiliary, preset["objective"], name) == Auxiliary()
    from_dict(TokenModelConfig, preset["model"], name)
    from_dict(TrainingConfig, preset["training"], name)
    from_dict(TokenData, preset["data"], name)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_what_the_first_edition_had(name):
    """Every value is the same, and what is named now and was not then is the library's default."""
    if name not in FIRST:
        pytest.skip("made since")
    was, now = flat(FIRST[name]), flat(load_preset(name))
    was = {key: value for key, value in was.items() if key not in GONE}
    if was.get("training.precision") == "bf16":
        was["training.precision"] = "auto"  # which is bf16 on every device that the first edition's runs were made for
    objective = next((cls for part, cls in OBJECTIVES.items() if part in name), Auxiliary)()
    training = TrainingConfig(steps=1, batch_size=1)
    model = {"class_dropout": 0.1, "pixels": {"smoothing": PixelHeadConfig().smoothing}}
    usual = flat({"training": to_dict(training), "objective": to_dict(objective), "model": model})
    usual["training.steps"] = None
    assert {key: now.get(key, usual.get(key)) for key in was} == was
    added = now.keys() - was.keys()
    assert {key: now[key] for key in added} == {key: usual[key] for key in added}


def test_every_key_is_explained():
    """In a base, with a comment; a key of one family alone in the preset."""
    explained = set()
    for path in PRESETS.rglob("*.yaml"):
        parents = []
        for line in path.read_text().splitlines():
            if key := re.match(r"( *)(\w+):", line):
                parents = [*parents[: len(key[1]) // 2], key[2]]
                if " # " in line:
                    explained.add(".".join(parents))
    used = {key for name in preset_names() for key in flat(load_preset(name))}
    assert {key for key in used - explained if not key.startswith("objective.local_views.")} == set()


# millions of parameters of the authors' networks: keys_real.txt and SPEC.md of their layout; K = 16,000 for the large
# ones
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("imagenet256-base", 219.378),
        ("imagenet256-base-cond", 220.402),
        ("imagenet256-base-ar", 214.144),
        ("imagenet256-base-masked", 214.144),
        ("imagenet256-base-vq", 204.7),
        ("imagenet256-large", 730.7),
        ("imagenet256-large-cond", 732.2),
    ],
)
def test_parameters_are_the_authors(name, millions):
    model = model_of(name)
    theirs = parameters(model) + dropped_rows(model) * model.config.transformer.dim
    digits = len(str(millions).split(".")[1])  # as many as were published
    assert round(theirs / 1e6, digits) == millions


def test_a_class_costs_one_row():
    classes = parameters(model_of("imagenet256-large-cond")) - parameters(model_of("imagenet256-large"))
    assert classes == 1000 * 1536  # 1.54M


@pytest.mark.parametrize("kind", ["ar", "masked"])
def test_large_decoders_follow_the_large_prior(kind):
    decoder, prior = model_of(f"imagenet256-large-{kind}").config, model_of("imagenet256-large").config
    assert (decoder.prefix_vocab_size, decoder.prefix_length) == (prior.vocab_size, prior.length)
    assert decoder.transformer.dim == prior.transformer.dim
    assert decoder.transformer.depth == prior.transformer.depth
