"""The paper's presets: every key counts, and the parameters are those of the authors' networks."""

import pytest
import torch

from digit.core.config import from_dict, load_preset, preset_names
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.training.auxiliary import Auxiliary
from digit.training.config import TrainingConfig
from digit.training.tasks.tokens import TokenData

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


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_every_section_is_valid(name):
    preset = load_preset(name)
    assert set(preset) == {"component", "model", "data", "objective", "training"}
    assert from_dict(Auxiliary, preset["objective"], name) == Auxiliary()
    from_dict(TokenModelConfig, preset["model"], name)
    from_dict(TrainingConfig, preset["training"], name)
    from_dict(TokenData, preset["data"], name)


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("imagenet256-")])
def test_every_key_has_a_comment(name):
    from importlib import resources

    lines = (resources.files("digit") / "presets" / f"{name}.yaml").read_text().splitlines()
    bare = [line for line in lines if ": " in line and not line.startswith(("#", "component:")) and " #" not in line]
    assert bare == []


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
