from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from digit.core.config import from_dict, load_preset
from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.data.dataset import ImageDataset
from digit.encoders.loading import small_conv
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.training.build import build_task
from digit.training.finetune import FineTune
from digit.training.logs import read_metrics
from digit.training.task import Step, Stream
from digit.training.tasks.vqgan import VqganObjective, VqganTask
from runs import curve, fell, learn, lines, pure_batches, resumed, settings

MODEL = VQGANConfig(resolution=32, channels=16, multipliers=(1, 2, 2), blocks=1, codes=64, code_dim=8, groups=8)
GAN = {"gan_weight": 0.02, "gan_start": 0.5, "gan_warmup": 0.25, "discriminator": {"channels": 8}}


def build(
    images: ImageDataset,
    seed: int = 0,
    held_out: ImageDataset | None = None,
    start: FineTune | None = None,
    model: VQGANConfig = MODEL,
    **objective: object,
) -> VqganTask:
    torch.manual_seed(seed)
    return VqganTask(model, from_dict(VqganObjective, objective, "test"), images, held_out, start)


def test_loss_falls_with_a_discriminator_and_the_codes_are_used(images: ImageDataset, tmp_path: Path) -> None:
    task = build(images.subset(range(64, 512)), held_out=images.subset(range(64)), **GAN)
    learn(task, settings(steps=40, sample_every=40), tmp_path)
    assert fell(curve(tmp_path, "l1")) < 0.65
    assert len(curve(tmp_path, "discriminator/loss")) == 20  # from half of the run on
    end = lines(tmp_path)[-1]
    assert end["validation/psnr"] > 12.5
    assert end["validation/codebook_use"] > 0.8
    assert 20 < end["validation/perplexity"] <= 64
    with Image.open(tmp_path / "samples" / "step-0000040.png") as picture:
        assert picture.size[0] > picture.size[1] > 0


def test_eight_images_are_learned_by_heart(images: ImageDataset, tmp_path: Path) -> None:
    eight = images.subset(range(8))
    torch.manual_seed(0)
    task = VqganTask(replace(MODEL, codes=256), VqganObjective(flip=0.0, l2=2.0), eight, eight)
    learn(task, settings(steps=150, batch_size=8, schedule="cosine", log_every=50), tmp_path)
    assert read_metrics(tmp_path)[-1]["validation/psnr"] > 19  # one colour an image gives 13.9 dB
    vqgan = VQGAN.from_pretrained(tmp_path / "model")
    pixels = torch.from_numpy(eight.arrays()[0]).permute(0, 3, 1, 2).float() / 255
    rebuilt = vqgan.decode(vqgan.encode(pixels)).clamp(0, 1)
    assert float(-10 * (rebuilt - pixels).square().mean((1, 2, 3)).log10().mean()) > 19


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_interrupted_and_resumed_a_run_ends_in_the_same_weights(
    images: ImageDataset, tmp_path: Path, ema: float
) -> None:
    config = settings(steps=6, checkpoint_every=3, ema_decay=ema)
    end = resumed(lambda seed: build(images, seed, **GAN), config, tmp_path)
    assert {"quantizer.codebook", "quantizer.uses", "quantizer.sums", "quantizer.updates"} <= end.keys()


def test_a_dead_code_of_a_run_comes_back(images: ImageDataset) -> None:
    task = build(images)
    stream = Stream(start=0, stop=8, batch_size=16)
    for step, batch in enumerate(task.batches(stream)):
        if step == 4:
            with torch.no_grad():
                task.vqgan.codebook[:32] = 1e3
                task.quantizer.uses[:32] = 0.01
                task.quantizer.sums[:32] = 1e3 * 0.01
        list(task.losses(batch, Step(step, 8)))
        task.after_step(Step(step, 8))
    assert float(task.vqgan.codebook.abs().max()) < 100
    assert float(task.quantizer.statistics()["codebook_use"]) > 0.9


def test_accumulated_parts_give_the_codebook_of_the_whole_batch(images: ImageDataset, tmp_path: Path) -> None:
    found = []
    for parts in (1, 2):
        task = build(images)
        # the first batch starts the codebook from what it sees first, so compare a codebook that is already started
        config = settings(steps=2, accumulation=parts)
        task.quantizer.updates.fill_(1)
        task.quantizer.uses.fill_(1.0)
        with torch.no_grad():
            task.vqgan.codebook.copy_(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
        task.quantizer.sums.copy_(task.vqgan.codebook)
        learn(task, config, tmp_path / str(parts))
        found.append(task.vqgan.codebook.detach().clone())
    # the revived codes take other latents when they arrive in two parts, the moved ones agree
    same = torch.isclose(found[0], found[1], atol=1e-3, rtol=1e-3).all(1)
    assert float(same.float().mean()) > 0.5


def test_export_holds_the_codebook_and_averaged_weights(images: ImageDataset, tmp_path: Path) -> None:
    task = build(images)
    folder = learn(task, settings(steps=3, ema_decay=0.9), tmp_path)
    loaded = VQGAN.from_pretrained(folder)
    assert loaded.provenance["steps"] == 3
    torch.testing.assert_close(loaded.codebook, task.vqgan.codebook)
    averages = read_tensors(tmp_path / "checkpoints" / "step-0000003" / "ema.safetensors")
    torch.testing.assert_close(loaded.encoder.conv_in.weight, averages["encoder.conv_in.weight"])
    assert not torch.equal(loaded.encoder.conv_in.weight, task.vqgan.encoder.conv_in.weight)


def test_batches_depend_on_seed_and_step_alone_and_mirror_half(images: ImageDataset) -> None:
    whole = pure_batches(build(images))
    assert 0.35 < torch.cat([batch["flip"] for batch in whole]).float().mean() < 0.65
    pixels = images.arrays()[0][whole[0]["index"].numpy()]
    assert np.array_equal(whole[0]["images"].permute(0, 2, 3, 1).numpy(), pixels)


def test_the_encoder_may_judge(images: ImageDataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_conv(widths=(8, 16, 32)).save_pretrained(tmp_path / "encoder")
    task = build(images, perceptual="encoder", perceptual_encoder=str(tmp_path / "encoder"), **GAN)
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=8))))
    late = list(task.losses(batch, Step(9, 10)))
    assert [loss.optimizer for loss in late] == ["model", "discriminator"]
    assert len(task.modules["discriminator"].features) == 4  # one for each block of the encoder
    assert float(late[1].value) > 0
    (loss,) = task.losses(batch, Step(0, 10))
    assert float(loss.metrics["perceptual"]) > 0
    expected = loss.metrics["l1"] + loss.metrics["perceptual"] + 0.25 * loss.metrics["commitment"]
    torch.testing.assert_close(loss.value.detach(), expected)
    assert "view" not in dict(task.modules.named_children())


@pytest.fixture
def saved(images: ImageDataset, tmp_path: Path) -> Path:
    """A run of a VQGAN with a discriminator."""
    learn(build(images, **GAN), settings(steps=12), tmp_path / "first")
    return tmp_path / "first"


def test_with_frozen_tokens_the_decoder_alone_goes_on(images: ImageDataset, tmp_path: Path, saved: Path) -> None:
    before = VQGAN.from_pretrained(saved / "model")
    judge = read_tensors(saved / "checkpoints" / "step-0000012" / "modules.safetensors")
    start = FineTune(source=str(saved), freeze=("tokens",))
    task = build(images, seed=1, held_out=images.subset(range(32)), start=start, **GAN)
    first = before.decode(before.encode(torch.zeros(1, 3, 32, 32)))
    assert torch.equal(task.vqgan.decode(task.vqgan.encode(torch.zeros(1, 3, 32, 32))), first)
    for name, tensor in task.modules["discriminator"].state_dict().items():
        assert torch.equal(tensor, judge[f"discriminator.{name}"])
    assert task.description["start"]["freeze"] == ["tokens"]
    folder = learn(task, settings(steps=12, ema_decay=0.9), tmp_path / "second")
    after = VQGAN.from_pretrained(folder)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]) != name.startswith("decoder."), name
    assert not curve(tmp_path / "second", "commitment")
    assert curve(tmp_path / "second", "validation/l1")[-1] < read_metrics(saved)[0]["l1"]


def test_a_whole_vqgan_goes_on_with_its_codebook(images: ImageDataset, tmp_path: Path, saved: Path) -> None:
    task = build(images, seed=1, start=FineTune(source=str(saved)), **GAN)
    known = VQGAN.from_pretrained(saved / "model").codebook
    assert torch.equal(task.vqgan.codebook, known)
    learn(task, settings(steps=2), tmp_path / "second")
    moved = (task.vqgan.codebook - known).norm(dim=1) / known.norm(dim=1)
    assert 0 < float(moved.median()) < 0.2  # not put on the first batch anew


def test_a_start_that_does_not_fit_gets_a_sentence(images: ImageDataset, tmp_path: Path, saved: Path) -> None:
    for wrong in (FineTune(source=str(saved), freeze=("blocks",)), FineTune(source=str(saved), lora=2)):
        with pytest.raises(DigitError, match=r"or with --freeze tokens"):
            build(images, start=wrong)
    with pytest.raises(DigitError, match="of another shape than the preset's"):
        build(images, start=FineTune(source=str(saved)), model=replace(MODEL, codes=32))
    with pytest.raises(DigitError, match="There is no model"):
        build(images, start=FineTune(source=str(tmp_path / "nowhere")))


def test_what_does_not_fit_gets_a_sentence(images: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(DigitError, match="name it as perceptual_encoder"):
        build(images, perceptual="encoder")
    with pytest.raises(DigitError, match="leave it out"):
        build(images, perceptual_encoder=str(tmp_path / "encoder"))
    with pytest.raises(DigitError, match="There is no encoder"):
        build(images, perceptual="encoder", perceptual_encoder=str(tmp_path / "nowhere"))
    with pytest.raises(DigitError, match="did you mean 'gan_weight'"):
        build(images, gan_weigth=1.0)


@pytest.mark.parametrize("name", ["cifar10-tiny-vqgan", "cifar10-vqgan"])
def test_presets_build_their_task(cifar512: Path, name: str) -> None:
    changes = [
        "data.held_out_split=null",
        "data.held_out=51",
        "objective.perceptual=none",
        "objective.perceptual_encoder=null",
    ]
    task, _ = build_task("vqgan", load_preset(name, changes), cifar512, name)
    assert isinstance(task, VqganTask)
    assert task.examples == 461
    assert task.vqgan.config.grid == (8, 8)
