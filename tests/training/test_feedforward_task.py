from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from digit.core.config import from_dict, load_preset, preset_names
from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.data.dataset import ImageDataset
from digit.data.token_cache import TokenCache
from digit.encoders.loading import small_conv
from digit.models.component import load_component
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.pipeline.tokens import save_tokens_file
from digit.sampling.rng import pixel_latents
from digit.training.build import build_task
from digit.training.finetune import FineTune
from digit.training.logs import read_metrics
from digit.training.task import Step, Stream, TrainingConfig
from digit.training.tasks.feedforward import OnePassData, OnePassObjective, OnePassTask
from runs import curve, learn, lines, pure_batches, resumed, settings

GAN = {"gan_weight": 0.01, "gan_start": 0.5, "gan_warmup": 0.25, "discriminator": {"channels": 8}}
SMALL = [
    "model.transformer={dim: 32, depth: 2, heads: 2, causal: false}",
    "model.pixels={resolution: 32, widths: [16, 16, 8], patch: 2}",
    "data.held_out_split=null",
]


@pytest.fixture(scope="module")
def parts() -> DigitPipeline:
    return tiny.pipeline()


def build(
    images: ImageDataset, parts: DigitPipeline, seed: int = 0, held_out: ImageDataset | None = None,
    head: str = "pixels",
    samples: torch.Tensor | None = None, noise_dim: int = 8, **objective: object,
) -> OnePassTask:  # fmt: skip
    torch.manual_seed(seed)
    values = {"prefix_vocab_size": 12, "grid": (4, 4), "head": head, "noise_dim": noise_dim,
              "transformer": {"dim": 32, "depth": 2, "heads": 2, "causal": False}}  # fmt: skip
    values |= {"pixels": {"widths": (16, 16, 8), "patch": 2}} if head == "pixels" else {"vocab_size": 20}
    model = FeedForwardDecoder(from_dict(FeedForwardConfig, values, "test"))
    chosen = from_dict(OnePassObjective, objective, "test")
    vqgan = parts.vqgan if head == "vq" else None
    return OnePassTask(model, chosen, parts.tokenizer, images, held_out, samples=samples, vqgan=vqgan)


def test_loss_falls_with_posterior_and_discriminator(
    images: ImageDataset, parts: DigitPipeline, tmp_path: Path
) -> None:
    task = build(images.subset(range(64, 512)), parts, held_out=images.subset(range(64)), prefix_noise=0.5, **GAN)
    learn(task, settings(steps=60, sample_every=60), tmp_path)
    error = curve(tmp_path, "l1")
    assert sum(error[20:30]) / 10 < 0.8 * error[0]  # before the discriminator
    assert len(curve(tmp_path, "discriminator/loss")) == 30  # from half of the run on
    assert min(curve(tmp_path, "information")[-10:]) > 5  # nats: the noise means something
    end = lines(tmp_path)[-1]
    assert end["validation/psnr"] > 9.5
    assert end["validation/spread"] > 0.05
    assert 1 / 12 < end["validation/agreement"] <= 1
    with Image.open(tmp_path / "samples" / "step-0000060.png") as picture:
        assert picture.size[0] > picture.size[1] > 0


def test_a_decoder_learns_what_is_open(images: ImageDataset, parts: DigitPipeline, tmp_path: Path) -> None:
    task = build(images, parts, energy=1.0, prefix_noise=0.5)
    assert set(dict(task.modules.named_children())) == {"model"}
    learn(task, settings(steps=60), tmp_path)
    variety = curve(tmp_path, "variety")
    assert variety[0] < 0.3
    assert 0.7 < sum(variety[-10:]) / 10 < 1.3


def test_the_discriminator_sees_both_draws_and_samples(images: ImageDataset, parts: DigitPipeline) -> None:
    samples = torch.randint(12, (40, 16))
    task = build(images, parts, energy=1.0, samples=samples, **{**GAN, "gan_start": 0.0})
    seen = []
    task.modules["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=8))))
    losses = list(task.losses(batch, Step(5, 10)))
    assert [loss.optimizer for loss in losses] == ["model", "discriminator"]
    assert seen == [8 + 8 + 4, 8 + 8 + 8 + 4]


def test_without_noise_there_is_nothing_to_draw(images: ImageDataset, parts: DigitPipeline) -> None:
    with pytest.raises(DigitError, match=r"two draws of the noise; it needs model\.noise_dim above 0"):
        build(images, parts, energy=1.0, noise_dim=0)


def test_eight_images_are_learned_by_heart(images: ImageDataset, parts: DigitPipeline, tmp_path: Path) -> None:
    eight = images.subset(range(8))
    task = build(eight, parts, held_out=eight, noise_dim=0, flip=0.0, l2=2.0)
    learn(task, settings(steps=200, batch_size=8, schedule="cosine", log_every=50), tmp_path)
    assert read_metrics(tmp_path)[-1]["validation/psnr"] > 18  # one colour an image gives 13.9 dB
    model = load_component(tmp_path / "model", FeedForwardDecoder, FeedForwardConfig)
    pixels = torch.from_numpy(eight.arrays()[0]).permute(0, 3, 1, 2).float() / 255
    rebuilt = model(parts.tokenizer.encode(pixels), pixel_latents(model.config, range(8))).clamp(0, 1)
    assert float(-10 * (rebuilt - pixels).square().mean((1, 2, 3)).log10().mean()) > 18


def test_all_vq_tokens_at_once_are_learned_too(images: ImageDataset, parts: DigitPipeline, tmp_path: Path) -> None:
    eight = images.subset(range(8))
    before = {name: value.clone() for name, value in parts.vqgan.state_dict().items()}
    task = build(eight, parts, head="vq", kl=0.0, flip=0.0)
    learn(task, settings(steps=120, batch_size=8), tmp_path)
    model = load_component(tmp_path / "model", FeedForwardDecoder, FeedForwardConfig)
    pixels = torch.from_numpy(eight.arrays()[0]).permute(0, 3, 1, 2).float() / 255
    guessed = model(parts.tokenizer.encode(pixels), pixel_latents(model.config, range(8))).argmax(-1)
    assert float((guessed == parts.vqgan.encode(pixels)).float().mean()) > 0.8
    assert all(torch.equal(value, before[name]) for name, value in parts.vqgan.state_dict().items())


def test_interrupted_and_resumed_a_run_ends_in_the_same_weights(
    images: ImageDataset, parts: DigitPipeline, tmp_path: Path
) -> None:
    config, options = settings(steps=6, checkpoint_every=3, ema_decay=0.9), {**GAN, "prefix_noise": 0.5}
    end = resumed(lambda seed: build(images, parts, seed, **options), config, tmp_path)
    assert any(name.startswith("posterior.") for name in end)


def test_batches_depend_on_seed_and_step_alone(images: ImageDataset, parts: DigitPipeline) -> None:
    task = build(images, parts, prefix_noise=0.5, samples=torch.randint(12, (40, 16)), gan_weight=0.1)
    assert {"index", "images", "flip", "sampled", "prefix_rank"} <= pure_batches(task)[0].keys()


def test_tokens_of_a_cache_are_those_of_the_images(
    cifar512: Path, token_cache: TokenCache, parts: DigitPipeline
) -> None:
    preset = load_preset("cifar10-tiny-onepass", [*SMALL, f"data.tokens={token_cache.folder}"])
    task, _ = build_task("decoder", preset, cifar512, "test", parts=parts)
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=24))))
    images = batch["images"].float() / 255
    images = torch.where(batch["flip"][:, None, None, None], images.flip(3), images)
    assert 0 < int(batch["flip"].sum()) < 24
    assert torch.equal(batch["tokens"], parts.tokenizer.encode(images))


def test_disturbed_tokens_are_near_ones(images: ImageDataset, parts: DigitPipeline) -> None:
    task = build(images, parts, prefix_noise=1.0, prefix_tokens=0.5, prefix_neighbours=2)
    seen = []
    task.modules["model"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=32))))
    list(task.losses(batch, Step(0, 10)))
    flipped = torch.where(batch["flip"][:, None, None, None], batch["images"].flip(3), batch["images"])
    truth = parts.tokenizer.encode(flipped.float() / 255)
    changed = seen[0] != truth
    assert 0.4 < float(changed.float().mean()) < 0.6
    assert bool((task.near[truth] == seen[0][..., None]).any(-1)[changed].all())


def test_the_priors_own_samples_are_judged_and_nothing_else(images: ImageDataset, parts: DigitPipeline) -> None:
    options = {"gan_weight": 0.1, "gan_start": 0.0, "gan_warmup": 0.0}
    plain, post = build(images, parts, **options), build(images, parts, samples=torch.randint(12, (40, 16)), **options)
    seen = []
    post.modules["discriminator"].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    batch = next(iter(post.batches(Stream(start=0, stop=1, batch_size=16))))
    torch.manual_seed(0)
    first = list(plain.losses({k: v for k, v in batch.items() if k != "sampled"}, Step(1, 10)))
    torch.manual_seed(0)
    second = list(post.losses(batch, Step(1, 10)))
    assert seen == [16 + 8, 16 + 16 + 8]
    for name in ("l1", "psnr", "information"):
        torch.testing.assert_close(first[0].metrics[name], second[0].metrics[name])
    assert first[0].metrics["g_loss"] != second[0].metrics["g_loss"]


def test_post_training_begins_with_the_saved_decoder(cifar512: Path, parts: DigitPipeline, tmp_path: Path) -> None:
    preset = load_preset(
        "cifar10-tiny-onepass", [*SMALL, "training.steps=2", "training.batch_size=8", "objective.gan_start=0"]
    )
    task, config = build_task("decoder", preset, cifar512, "test", parts=parts)
    learn(task, config, tmp_path / "first")
    save_tokens_file(tmp_path / "tokens.npz", Tokens(torch.randint(12, (40, 16)), None))
    preset["data"]["samples"] = str(tmp_path / "tokens.npz")
    preset["model"]["pixels"]["smoothing"] = "flat"  # the fixed filter has no weights and may be another
    start = FineTune(source=str(tmp_path / "first"))
    post, config = build_task("decoder", preset, cifar512, "test", start=start, parts=parts)
    saved = read_tensors(tmp_path / "first" / "model" / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in post.model.state_dict().items())
    assert post.description["start"]["weights"]
    assert post.samples.shape == (40, 16)
    helpers = read_tensors(tmp_path / "first" / "checkpoints" / "step-0000002" / "modules.safetensors")
    for name in ("posterior", "discriminator"):
        for key, value in post.modules[name].state_dict().items():
            assert torch.equal(value, helpers[f"{name}.{key}"])
    folder = learn(post, config, tmp_path / "second")
    again = load_component(folder, FeedForwardDecoder, FeedForwardConfig)
    assert not torch.equal(again.token_embedding.weight, saved["token_embedding.weight"])
    assert again.config.pixels.smoothing == "flat"
    assert "sampled" in next(iter(post.batches(Stream(start=0, stop=1, batch_size=8))))


def test_the_encoder_may_judge(images: ImageDataset, parts: DigitPipeline, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small_conv(widths=(8, 16, 32)).save_pretrained(tmp_path / "encoder")
    judge = {**GAN, "discriminator_steps": 2}
    task = build(images, parts, perceptual="encoder", perceptual_encoder=str(tmp_path / "encoder"), **judge)
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=8))))
    late = list(task.losses(batch, Step(9, 10)))
    assert [loss.optimizer for loss in late] == ["model", "discriminator", "discriminator"]
    assert len(task.modules["discriminator"].features) == 4
    # nothing frozen is saved
    assert set(dict(task.modules.named_children())) == {"model", "posterior", "discriminator"}


def test_images_may_be_larger_than_the_encoder_sees(cifar512: Path, parts: DigitPipeline) -> None:
    changes = ["data.held_out_split=null", "model.pixels={resolution: 64, widths: [16, 8, 8], patch: 4}"]
    task, _ = build_task("decoder", load_preset("cifar10-tiny-onepass", changes), cifar512, "test", parts=parts)
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=4))))
    assert batch["images"].shape == (4, 3, 64, 64)
    (loss,) = task.losses(batch, Step(0, 10))
    assert torch.isfinite(loss.value)


def test_classes_are_learned_and_hidden(cifar512: Path, parts: DigitPipeline) -> None:
    preset = load_preset("cifar10-tiny-onepass", [*SMALL, "data.labels=true"])
    preset["model"]["class_dropout"] = 0.25
    task, _ = build_task("decoder", preset, cifar512, "test", parts=parts)
    assert task.model.config.num_classes == 10
    batch = next(iter(task.batches(Stream(start=0, stop=1, batch_size=256))))
    labels = batch["labels"].numpy()
    truth = task.train.labels[batch["index"].numpy()]
    assert 0.15 < (labels == -1).mean() < 0.35
    assert np.array_equal(labels[labels >= 0], truth[labels >= 0])


def test_what_does_not_fit_gets_a_sentence(
    cifar512: Path, token_cache: TokenCache, parts: DigitPipeline, images: ImageDataset, tmp_path: Path
) -> None:
    def made(
        *changes: str, model: DigitPipeline | None = parts, data: Path = cifar512, start: FineTune | None = None
    ) -> None:
        build_task(
            "decoder", load_preset("cifar10-tiny-onepass", [*SMALL, *changes]), data, "test", start=start, parts=model
        )

    with pytest.raises(DigitError, match="with --model"):
        made(model=None)
    with pytest.raises(DigitError, match="becomes 8 x 8 pixels"):
        made("model.pixels={resolution: 32, widths: [16, 8]}")
    subset = tmp_path / "other"
    subset.mkdir()
    for i in range(20):
        images[i].image.save(subset / f"{i}.png")
    with pytest.raises(DigitError, match=r"leave data.tokens out"):
        made(f"data.tokens={token_cache.folder}", data=subset)
    with pytest.raises(DigitError, match="another encoder or codebook"):
        made(f"data.tokens={token_cache.folder}", model=parts.with_parts(codebook=tiny.codebook(parts.encoder.dim, 7)))
    save_tokens_file(tmp_path / "tokens.npz", Tokens(torch.full((4, 16), 12), None))
    with pytest.raises(DigitError, match=r"below 12; it has: \(4, 16\) up to 12"):
        made(f"data.samples={tmp_path / 'tokens.npz'}")
    save_tokens_file(tmp_path / "tokens.npz", Tokens(torch.full((4, 16), 11), None))
    with pytest.raises(DigitError, match="gan_weight above 0"):
        made(f"data.samples={tmp_path / 'tokens.npz'}", "objective.gan_weight=0")
    with pytest.raises(DigitError, match="trained as a whole"):
        made(start=FineTune(source="anywhere", lora=4))
    with pytest.raises(DigitError, match=r"head =.*'pixels' or 'vq'"):
        made("model.head=both")
    with pytest.raises(DigitError, match="did you mean 'gan_weight'"):
        from_dict(OnePassObjective, {"gan_weigth": 1.0}, "test")


@pytest.mark.parametrize("name", ["cifar10-tiny-onepass", "cifar10-onepass"])
def test_presets_build_their_task(cifar512: Path, name: str) -> None:
    eyes = small_conv(widths=(8, 16, 32))
    torch.manual_seed(0)
    parts = DigitPipeline(encoder=eyes, codebook=tiny.codebook(eyes.dim))
    task, _ = build_task("decoder", load_preset(name, ["data.held_out_split=null"]), cifar512, name, parts=parts)
    assert isinstance(task, OnePassTask)
    assert task.examples == 461
    assert task.model.config.grid == (8, 8)


IMAGENET = [name for name in preset_names() if name.startswith("imagenet256-base-onepass")]


@pytest.mark.parametrize("name", IMAGENET)
def test_presets_of_imagenet_are_whole_and_smaller_than_the_ar_decoder(name: str) -> None:
    preset = load_preset(name)
    assert preset["component"] == "decoder"
    shape = from_dict(FeedForwardConfig, preset["model"], name)
    from_dict(OnePassObjective, preset["objective"], name)
    from_dict(OnePassData, preset["data"], name)
    from_dict(TrainingConfig, preset["training"], name)
    with torch.device("meta"):
        model = FeedForwardDecoder(shape)
        other = TokenModel(from_dict(TokenModelConfig, load_preset("imagenet256-base-ar")["model"], "ar"))
        side = shape.pixels.resolution
        assert model(torch.zeros(2, shape.prefix_length, dtype=torch.long)).shape == (2, 3, side, side)
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(p.numel() for p in other.parameters())
    given = name.removeprefix("imagenet256-base-onepass").strip("-") or "256"
    assert {"256": 256, "512": 512, "448": 512}[given] == side


def test_the_study_decoder_has_no_more_parameters_than_the_ar_decoder() -> None:
    shape = {"prefix_vocab_size": 1024, "grid": (8, 8)}
    one = FeedForwardDecoder(from_dict(FeedForwardConfig, {**load_preset("cifar10-onepass")["model"], **shape}, "test"))
    sizes = {"vocab_size": 1024, "length": 64, "prefix_vocab_size": 1024, "prefix_length": 64}
    other = TokenModel(from_dict(TokenModelConfig, {**load_preset("cifar10-ar")["model"], **sizes}, "test"))
    assert sum(p.numel() for p in one.parameters()) <= sum(p.numel() for p in other.parameters())
