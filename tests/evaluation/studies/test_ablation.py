import json

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.config import load_preset, preset_names
from digit.core.errors import DigitError
from digit.evaluation.metrics.probe import split_off
from digit.evaluation.model_source import open_images
from digit.evaluation.studies import stages
from digit.evaluation.studies.ablation import is_preset, load_ablation, plan, run_ablation
from digit.training.build import build_task

FEW = [
    "training.steps=8",
    "training.batch_size=16",
    "training.validate_every=0",
    "training.checkpoint_every=4",
    "data.held_out=20",
]
SMALL = ["model.transformer.dim=16", "model.transformer.depth=1", "model.transformer.heads=2"]


@pytest.fixture
def parts(pipe, tmp_path):
    """An encoder and a VQGAN of random weights, with codes from real features, as folders."""
    pipe.encoder.save_pretrained(tmp_path / "encoder")
    pipe.vqgan.save_pretrained(tmp_path / "vqgan")
    return tmp_path


@pytest.fixture
def values(parts):
    """An ablation of K = 4 and 8."""
    base = {
        "encoder": str(parts / "encoder"), "vqgan": str(parts / "vqgan"), "views": {"flip": False},
        "prior": "cifar10-tiny-prior-cond", "prior_set": [*FEW, *SMALL],
        "decoder": "cifar10-tiny-ar", "decoder_set": [*FEW, *SMALL],
    }  # fmt: skip
    probe = {"epochs": 4, "lrs": [4.0], "standardize": True, "neighbours": 0}
    variants = [{"name": "K = 4", "clusters": 4}, {"name": "K = 8", "clusters": 8, "paper": "iBOT"}]
    return {"what": "clusters", "base": base, "variants": variants, "probe": probe, "fid_images": 16}


def load(values, folder, *overrides):
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return load_ablation(str(folder / "mine.yaml"), overrides)


def test_there_is_an_ablation_of_everything_at_both_scales():
    kinds = ("additive", "clusters", "decoder", "encoder", "layer", "prior-size")
    assert preset_names("ablations") == sorted(
        f"{data}-{kind}" for data in ("cifar10", "imagenet256") for kind in kinds
    )
    assert all("component" in load_preset(name) for name in preset_names())  # trainings stay a list of their own


@pytest.mark.parametrize("name", preset_names("ablations"))
def test_the_packaged_ablations_are_complete(name, cifar512):
    """Every variant fits its presets, and an encoder that is trained here can be built."""
    ablation = load_ablation(name)
    assert name.endswith(ablation.what)
    variants = plan(ablation)
    assert len({str(variant.recipe) for variant in variants}) == len(variants)
    for recipe in (variant.recipe for variant in variants):
        if recipe.encoder is not None and is_preset(recipe.encoder):
            build_task("encoder", load_preset(recipe.encoder, recipe.encoder_set), cifar512, recipe.encoder)


def test_two_codebooks_end_to_end_and_again(values, parts, cifar512, pooling, monkeypatch):
    ablation = load(values, parts)
    train, test = split_off(open_images(cifar512, num=120), 0.25)
    out = parts / "out"
    arguments = (ablation, cifar512, train, test, out)
    steps, work = [], stages.train

    def trains(task, settings, folder, **options):
        """The first training stops after a checkpoint, as if the machine had; later ones tell how much they did."""
        batches = task.batches

        def counted(stream):
            for number, batch in enumerate(batches(stream)):
                if len(steps) == 1 and number == 6:
                    raise RuntimeError("power cut")
                steps[-1] += 1
                yield batch

        steps.append(0)
        task.batches = counted
        return work(task, settings, folder, show=False, **options)

    monkeypatch.setattr(stages, "train", trains)
    with pytest.raises(RuntimeError, match="power cut"):
        run_ablation(*arguments, weights=pooling, device="cpu")
    found = run_ablation(*arguments, weights=pooling, device="cpu").save(out)
    lines = found.values
    assert [row["Codes"] for row in found.rows()] == [4, 8]
    assert found.rows()[1]["Paper (ImageNet, no classes): probe"] == 61.10
    assert steps == [6, 4, 8, 8, 8]  # the prior goes on from step 4 of 8
    assert [(line["name"], line["vocabulary"], line["tokens"]) for line in lines] == [
        ("K = 4", 4, 16),
        ("K = 8", 8, 16),
    ]
    for line in lines:
        assert line["fid"] > 0
        assert line["decoder"] == "ar"
        assert len(line["probe"]) == 2
        assert 0 < line["nats_per_token"] < 4
        assert line["not_measured"] == {}
    assert lines[0]["fid"] != lines[1]["fid"]
    assert lines[1]["paper"] == {"fid": 16.81, "inception": 57.88, "probe": 61.10}
    result = json.loads((out / "result.json").read_text())
    assert result["kind"] == "ablation"
    assert result["values"] == lines
    assert min(Image.open(out / "ablation.png").size) > 300
    # K alone differs: one encoder, one VQGAN, two of the rest
    assert {
        kind: len(list((out / kind).glob("*.json"))) for kind in ("codebook", "tokens", "prior", "decoder", "fid")
    } == dict.fromkeys(("codebook", "tokens", "prior", "decoder", "fid"), 2)
    assert run_ablation(*arguments, weights=pooling, device="cpu").values == lines
    assert len(steps) == 5


def test_decoders_share_the_prior_and_missing_weights_are_told(values, parts, cifar512):
    """By the command: an AR and a masked decoder, and no FID."""
    masked = {"name": "masked", "decoder": "cifar10-tiny-masked"}
    values |= {"what": "decoder", "variants": [{"name": "ar"}, masked]}
    load(values, parts)
    words = ["evaluate", "ablation", parts / "mine.yaml", "--data", cifar512, "--num", 80, "--holdout", 0.25]
    words += ["--set", "base.clusters=4", "--weights", parts / "none.pth", "--out", parts / "out", "--device", "cpu"]
    shown = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert len(list((parts / "out" / "prior").glob("*.json"))) == 1
    assert len(list((parts / "out" / "decoder").glob("*.json"))) == 2
    result = json.loads((parts / "out" / "result.json").read_text())
    assert [line["decoder"] for line in result["values"]] == ["ar", "masked"]
    assert "fid" not in result["values"][0]
    assert "none.pth" in result["values"][0]["not_measured"]["fid"]
    assert any("not one scale" in note for note in result["notes"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"variants": [{"name": "a"}]}, "variants"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "name' of its own"),
        ({"variants": [{"name": "a"}, {"name": "b", "layer": -1}]}, "changes layer, but this ablation varies clusters"),
        ({"variants": [{"name": "a"}, {"name": "b", "clusters": 0}]}, "variant 'b'.*clusters = 0"),
        ({"variants": [{"name": "a"}, {"name": "b", "paper": "nothing"}]}, "row 'nothing'; known are: .*MAE"),
        ({"what": "colour"}, "what = 'colour'"),
        ({"whet": 1}, "unknown field 'whet'"),
        ({"what": "encoder", "variants": [{"name": "a"}, {"name": "b", "encoder": None}]}, "must predict vq tokens"),
        (
            {"what": "prior-size", "variants": [{"name": "a"}, {"name": "b", "prior": "cifar10-tiny-ar"}]},
            "component 'decoder'",
        ),
        (
            {"what": "prior-size", "variants": [{"name": "a"}, {"name": "b", "prior": "cifar10-tiny"}]},
            "no preset 'cifar10-tiny'",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(change, expected, values, parts):
    with pytest.raises(DigitError, match=expected):
        plan(load(values | change, parts))


def test_names_and_parts_that_do_not_exist(values, parts, cifar512):
    with pytest.raises(DigitError, match="did you mean cifar10-clusters"):
        load_ablation("cifar10-cluster")
    images = open_images(cifar512, num=20)
    missing = load(values, parts, "base.encoder=there/is/none")
    with pytest.raises(DigitError, match="no encoder 'there/is/none'"):
        run_ablation(missing, cifar512, images, images, parts / "out")
    with pytest.raises(DigitError, match="metrics nnl were asked for"):
        run_ablation(load(values, parts), cifar512, images, images, parts / "out", ["nnl"])
    with pytest.raises(DigitError, match="not a saved part"):
        run_ablation(load(values, parts, "base.vqgan=nowhere"), cifar512, images, images, parts / "out")
