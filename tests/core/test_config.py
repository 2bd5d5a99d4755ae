import pytest
import yaml

from digit.core.config import from_dict, load_preset, preset_names, to_dict
from digit.core.errors import DigitError
from digit.models.token_config import TokenModelConfig

MODEL = {"role": "prior", "vocab_size": 8, "length": 4, "transformer": {"dim": 16, "depth": 1, "heads": 2}}


def test_a_config_survives_the_round_trip():
    config = from_dict(TokenModelConfig, MODEL, "test")
    assert from_dict(TokenModelConfig, to_dict(config), "test") == config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab": 8}, "unknown field 'vocab'; did you mean 'vocab_size'"),
        ({"vocab_size": 0}, "vocab_size = 0: must be above 0"),
        ({"length": "many"}, "length = 'many': must be a whole number"),
        ({"transformer": {"dim": 16, "depth": 1, "heads": 3}}, "heads=3 does not divide dim=16"),
        ({"role": "masked"}, "needs transformer.causal = False"),
        ({"prefix_length": 3}, "go together"),
        ({"role": "poet"}, "role = 'poet': must be one of 'prior', 'ar'"),
        ({"transformer": 3}, "transformer = 3: must hold fields of its own"),
    ],
)
def test_a_wrong_field_is_named(change, expected):
    with pytest.raises(DigitError, match=expected):
        from_dict(TokenModelConfig, {**MODEL, **change}, "test")


def test_a_missing_field_is_named():
    with pytest.raises(DigitError, match="'length' is missing"):
        from_dict(TokenModelConfig, {k: v for k, v in MODEL.items() if k != "length"}, "test")


def test_every_packaged_preset_is_yaml_with_its_component():
    assert preset_names()
    for name in preset_names():
        assert load_preset(name)["component"] in ("encoder", "vqgan", "prior", "decoder", "probe"), name


def test_overrides_are_yaml_values(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"component": "prior", "training": {"lr": 1.0, "steps": 5}}))
    values = load_preset(
        str(path), ["training.lr=3e-4", "training.steps=7", "training.new=[1, 2]", "training.precision=no"]
    )
    assert values["training"] == {"lr": 3e-4, "steps": 7, "new": [1, 2], "precision": "no"}


@pytest.mark.parametrize("item", ["training.lr", "nothing.here=1", "training.lr.deep=1"])
def test_a_wrong_override_says_what_is_there(tmp_path, item):
    path = tmp_path / "mine.yaml"
    path.write_text("component: prior\ntraining: {lr: 1.0}\n")
    with pytest.raises(DigitError, match="--set"):
        load_preset(str(path), [item])


def test_an_unknown_preset_suggests_near_names():
    with pytest.raises(DigitError, match="There is no preset 'cifar10-tiny-prio'; did you mean"):
        load_preset("cifar10-tiny-prio")


def test_broken_yaml_names_the_preset(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1,\n")
    with pytest.raises(DigitError, match="not valid YAML"):
        load_preset(str(path))


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{next(iter(files))}.yaml")


def test_a_preset_extends_others(tmp_path):
    path = write(
        tmp_path,
        child="extends: parent\nmodel: {dim: 8, views: null}\ntraining: {lr: 1.0}\n",
        parent="extends: base\nmodel: {dim: 4}\n",
        base="component: prior\nmodel: {dim: 2, depth: 3, views: {size: 1}}\ntraining: {lr: 2.0, betas: [1, 2]}\n",
    )
    assert load_preset(path, ["training.betas=[3]"]) == {
        "component": "prior",
        "model": {"dim": 8, "depth": 3, "views": None},
        "training": {"lr": 1.0, "betas": [3]},
    }
    packaged = load_preset(write(tmp_path, mine="extends: cifar10-tiny-prior\ntraining: {steps: 7}\n"))
    expected = load_preset("cifar10-tiny-prior", ["training.steps=7"])
    assert packaged == expected


def test_presets_that_extend_each_other_or_nothing_are_refused(tmp_path):
    with pytest.raises(DigitError, match="circle: a -> b -> a"):
        load_preset(write(tmp_path, a="extends: b\n", b="extends: a\n"))
    with pytest.raises(DigitError, match="extends 'cifar10-tiny-prio', which does not exist; did you mean"):
        load_preset(write(tmp_path, a="extends: cifar10-tiny-prio\n"))
