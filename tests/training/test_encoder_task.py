import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.data.dataset import ImageDataset
from digit.encoders import load_encoder
from digit.training.build import build_task
from digit.training.finetune import FineTune
from digit.training.losses.encoders import matched_places
from digit.training.task import Step
from digit.training.tasks.encoder import EncoderTask, build_method, model_from, objective_from
from runs import curve, fell, learn, lines, pure_batches, resumed, settings

SETTINGS = settings(batch_size=64, lr=2e-3, validate_every=1000)

CONV = {"kind": "conv", "widths": [8, 16, 32]}
VIT = {"kind": "vit", "dim": 48, "depth": 2}
SMALL = {"size": 16}
RUNS = {
    "simclr": (CONV, {"method": "simclr", "hidden": 64, "dim": 32, "views": SMALL}),
    "dense": (CONV, {"method": "simclr", "hidden": 64, "dim": 32, "views": SMALL, "dense": 1.0}),
    "vicreg": (CONV, {"method": "vicreg", "hidden": 64, "dim": 32, "views": SMALL}),
    "dino": (
        CONV,
        {"method": "dino", "hidden": 64, "bottleneck": 32, "prototypes": 64, "patch_weight": 0.0, "batch_norm": True,
         "views": SMALL},
    ),
    "ibot": (
        VIT,
        {"method": "dino", "hidden": 64, "bottleneck": 32, "prototypes": 64, "koleo_weight": 0.1,
        "teacher_momentum": 0.9},
    ),
    "multi-crop": (
        VIT,
        {"method": "dino", "hidden": 64, "bottleneck": 32, "prototypes": 64, "local_count": 2,
         "local_views": {"size": 16, "scale": [0.1, 0.4]}},
    ),
    "mae": (VIT, {"method": "mae", "decoder_dim": 48}),
}  # fmt: skip


def build(images: ImageDataset, name: str, seed: int = 0, start: FineTune | None = None) -> EncoderTask:
    torch.manual_seed(seed)
    model, objective = RUNS[name]
    held_out, rest = images.subset(range(64)), images.subset(range(64, 512))
    return EncoderTask(model_from(model, "test"), objective_from(objective, "test"), rest, held_out, start=start)


# how far the mean loss of the last five steps lies below that of the first five, as a share
@pytest.mark.parametrize(("name", "fall"), [("simclr", 0.12), ("dense", 0.1), ("vicreg", 0.2), ("mae", 0.1)])
def test_loss_falls_and_features_do_not_collapse(images: ImageDataset, tmp_path: Path, name: str, fall: float) -> None:
    learn(build(images, name), SETTINGS, tmp_path)
    assert fell(curve(tmp_path)) < 1 - fall
    end = lines(tmp_path)[-1]
    assert end["validation/feature_spread"] > 0.3
    assert 0 <= end["validation/neighbour_accuracy"] <= 1


def test_masked_patches_are_learned_and_the_teacher_does_not_collapse(images: ImageDataset, tmp_path: Path) -> None:
    # at first all images project alike and the losses are near 0; they peak when the centers have caught up with that
    task = build(images, "ibot")
    learn(task, replace(SETTINGS, steps=80, batch_size=24, lr=1e-3, log_every=10), tmp_path)
    patch = curve(tmp_path, "ibot")
    assert patch[-1] < 0.85 * max(patch)
    assert lines(tmp_path)[-1]["validation/feature_spread"] > 0.8


@pytest.mark.parametrize("name", ["simclr", "dense", "ibot", "multi-crop"])
def test_interrupted_and_resumed_a_run_ends_in_the_same_weights(
    images: ImageDataset, tmp_path: Path, name: str
) -> None:
    config = settings(steps=4, checkpoint_every=2)
    resumed(lambda seed: build(images, name, seed), config, tmp_path)


def test_the_teacher_follows_and_is_what_is_exported(images: ImageDataset, tmp_path: Path) -> None:
    task = build(images, "dino")
    student, teacher = (task.modules[name].encoder.stem.weight for name in ("student", "teacher"))
    assert torch.equal(student, teacher)
    with torch.no_grad():
        student += 1.0
    before = teacher.clone()
    task.after_step(Step(0, 100))
    torch.testing.assert_close(teacher, before + 0.01)  # momentum 0.99 at the start ...
    task.after_step(Step(99, 100))
    assert float((teacher - before - 0.01).abs().max()) < 1e-5  # ... and 1 at the end
    task.export(tmp_path / "model", {"steps": 3})
    loaded = load_encoder(tmp_path / "model")
    assert loaded.provenance == {"steps": 3}
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), task.modules["teacher"].encoder.eval()(x))


@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_export_gives_an_encoder_that_loads(images: ImageDataset, tmp_path: Path, name: str) -> None:
    task = build(images, name)
    task.export(tmp_path / "model", {"data": "cifar512"})
    loaded = load_encoder(tmp_path / "model")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = loaded(x)
    assert features.shape == (2, 64, loaded.dim)
    torch.testing.assert_close(features, task.method.encoder.eval()(x))


@pytest.mark.parametrize("name", ["simclr", "ibot", "mae"])
def test_a_run_goes_on_from_a_saved_encoder(images: ImageDataset, tmp_path: Path, name: str) -> None:
    first = build(images, name)
    learn(first, replace(SETTINGS, steps=3), tmp_path / "run")
    whole = build(images, name, seed=1, start=FineTune(source=str(tmp_path / "run")))
    # a teacher is what is saved, and its student goes on from there
    saved = first.method.encoder.state_dict()
    for module in (whole.modules[name] for name in ("student", "teacher") if name in whole.modules):
        torch.testing.assert_close(module.encoder.state_dict(), saved)
    heads = {
        key: value for key, value in first.modules["student"].state_dict().items() if not key.startswith("encoder.")
    }
    now = whole.modules["student"].state_dict()
    assert heads
    torch.testing.assert_close({key: now[key] for key in heads}, heads)
    assert whole.description["start"]["weights"]

    shutil.copytree(tmp_path / "run" / "model", tmp_path / "alone")
    alone = build(images, name, seed=1, start=FineTune(source=str(tmp_path / "alone")))  # its heads begin anew
    torch.testing.assert_close(alone.method.encoder.state_dict(), saved)
    assert not all(torch.equal(alone.modules["student"].state_dict()[key], heads[key]) for key in heads)


@pytest.mark.parametrize(
    ("change", "words"), [({}, "another shape"), ({"freeze": ("head",)}, "--freeze and --lora are for token models")]
)
def test_a_saved_encoder_that_does_not_fit(images: ImageDataset, tmp_path: Path, change: dict, words: str) -> None:
    build(images, "simclr").export(tmp_path / "model", {})
    with pytest.raises(DigitError, match=words):
        build(images, "mae", start=FineTune(source=str(tmp_path / "model"), **change))


@pytest.mark.parametrize("name", ["simclr", "ibot", "mae"])
def test_batches_depend_on_seed_and_step_alone(images: ImageDataset, name: str) -> None:
    whole = pure_batches(build(images, name))
    assert whole[0]["images"].shape == (32, 3, 32, 32)
    assert whole[0]["images"].dtype == torch.uint8


def test_masks_hide_the_share_asked_for(images: ImageDataset) -> None:
    masks = build(images, "ibot").method.draw(2000, torch.Generator().manual_seed(0))["masked0"]
    share = masks.float().mean(1)
    hidden = share[share > 0]
    assert 0.45 < len(hidden) / 2000 < 0.55
    assert 0.09 < hidden.min() < 0.15
    assert 0.45 < hidden.max() < 0.51
    assert masks.float().mean(0).std() < 0.02  # no place is favoured


def test_neighbours_of_an_image_are_of_its_class(images: ImageDataset) -> None:
    torch.manual_seed(0)
    model, objective = (
        part(values, "test") for part, values in zip((model_from, objective_from), RUNS["simclr"], strict=True)
    )
    task = EncoderTask(model, objective, images, images.subset(range(128)))  # each is among its own neighbours
    task.modules.eval()
    with torch.no_grad():
        found = task.validate()
    assert found["neighbour_accuracy"] > 0.2
    assert found["feature_spread"] > 0


@pytest.mark.parametrize(
    ("model", "objective", "words"),
    [
        ({"kind": "mlp"}, {"method": "simclr"}, "kind 'mlp'; expected one of conv, vit"),
        (CONV, {"method": "byol"}, "method 'byol'; expected one of simclr, vicreg, dino, mae"),
        (CONV, {}, "method None; expected one of"),
        (CONV, {"method": "simclr", "view": {}}, "unknown field 'view'; did you mean 'views'"),
        (CONV, {"method": "dino"}, "dino with patch_weight 0"),
        (CONV, {"method": "mae"}, "needs a DINOv2-like ViT"),
        (VIT, {"method": "dino", "views": {"size": 30}}, "not a whole number of this encoder's patches"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(model: dict, objective: dict, words: str) -> None:
    with pytest.raises(DigitError, match=words):
        build_method(model_from(model, "preset x"), objective_from(objective, "preset x"))


def test_a_preset_builds_its_task_and_keeps_images_back(cifar512: Path) -> None:
    preset = load_preset("cifar10-tiny-encoder", ["data.held_out_split=null", "data.held_out=100"])
    task, config = build_task("encoder", preset, cifar512, "cifar10-tiny-encoder")
    assert isinstance(task, EncoderTask)
    assert task.held_out is not None
    assert (len(task.train), len(task.held_out)) == (461, 51)  # at most a tenth
    assert task.description["component"] == "encoder"
    assert config.batch_size == preset["training"]["batch_size"]
    with pytest.raises(DigitError, match="test"):  # these 512 images have no such split
        build_task("encoder", load_preset("cifar10-encoder"), cifar512, "cifar10-encoder")


@pytest.mark.parametrize("name", ["cifar10-encoder", "cifar10-encoder-vit"])
def test_the_other_presets_are_valid(cifar512: Path, name: str) -> None:
    task, _ = build_task("encoder", load_preset(name, ["data.held_out_split=null", "data.held_out=51"]), cifar512, name)
    assert task.examples == 461


def test_the_dense_term_compares_patches_that_show_the_same_place():
    whole = torch.eye(2, 3)[None]  # the image as it is
    mirrored = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]])
    corner = torch.tensor([[[0.5, 0, -0.5], [0, 0.5, -0.5]]])  # its upper left quarter
    order = torch.arange(16.0)[None]
    same = matched_places(whole, whole, order, side=4, places=16)
    assert same.tolist() == [*range(16), *range(16, 32)]
    turned = matched_places(whole, mirrored, order, side=4, places=4)
    assert turned.tolist() == [0, 1, 2, 3, 16 + 3, 16 + 2, 16 + 1, 16 + 0]
    quarter = matched_places(whole, corner, order, side=4, places=16)
    first, second = quarter.chunk(2)
    assert first[:2].tolist() == [0, 1]  # centres outside the quarter by more than a patch have no match
    assert 3 not in first.tolist()
    assert 15 not in first.tolist()
    assert set((second - 16).tolist()) <= set(range(16))
    two = matched_places(whole.repeat(2, 1, 1), whole.repeat(2, 1, 1), torch.rand(2, 16), side=4, places=3)
    assert len(two) == 2 * 2 * 3
    assert (two[6:] - two[:6] == 32).all()
