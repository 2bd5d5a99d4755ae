import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from digit.core.config import from_dict, load_preset
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.data.dataset import ImageDataset
from digit.data.token_cache import TokenCache, Views, build_token_cache
from digit.models.component import load_component
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import NO_LABEL, TokenModel
from digit.sampling import SamplingParams
from digit.sampling.sampler import sample
from digit.training.build import build_task
from digit.training.task import Step, Stream
from digit.training.tasks.tokens import TokenData, TokenTask, random_masks, token_model_config
from runs import curve, learn, lines, pure_batches, settings

TRANSFORMER = {"dim": 64, "depth": 2, "heads": 4}


def build(cache: TokenCache, role: str = "prior", seed: int = 0, **data: object) -> TokenTask:
    chosen = from_dict(TokenData, data, "test")
    values = {"role": role, "transformer": {**TRANSFORMER, "causal": role != "masked"}}
    torch.manual_seed(seed)
    return TokenTask(TokenModel(token_model_config(values, cache, chosen, "test")), cache, chosen)


def first_batch(task: TokenTask, **changes: int) -> dict[str, torch.Tensor]:
    return next(iter(task.batches(Stream(**{"start": 0, "stop": 1, "batch_size": 16, **changes}))))


# -- the model's shape comes from the cache


def test_model_is_completed_from_the_cache(token_cache: TokenCache) -> None:
    decoder = build(token_cache, "ar", target="vq", prefix="semantic", labels=True).model.config
    assert (decoder.vocab_size, decoder.length) == (tiny.CODES, tiny.TOKENS)
    assert (decoder.prefix_vocab_size, decoder.prefix_length, decoder.num_classes) == (tiny.CLUSTERS, tiny.TOKENS, 10)
    assert build(token_cache).model.config.num_classes == 0


@pytest.mark.parametrize(
    ("values", "data", "words"),
    [
        ({"vocab_size": 99}, {}, r"vocab_size = 99 \(expected: 12\)"),
        ({"num_classes": 3}, {"labels": True}, r"num_classes = 3 \(expected: 10\)"),
        ({}, {"views": ["crop7"]}, "crop7 were asked for; the cache has: center, flip"),
        ({}, {"views": []}, "the cache has: center, flip"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(token_cache: TokenCache, values: dict, data: dict, words: str) -> None:
    chosen = from_dict(TokenData, data, "test")
    values = {"role": "prior", "transformer": TRANSFORMER, **values}
    with pytest.raises(DigitError, match=words):
        TokenTask(TokenModel(token_model_config(values, token_cache, chosen, "test")), token_cache, chosen)


# -- batches


def test_a_batch_depends_on_seed_and_step_alone(token_cache: TokenCache) -> None:
    task = build(token_cache, "masked", target="vq", prefix="semantic", labels=True)
    whole = pure_batches(task)
    assert not torch.equal(whole[4]["tokens"], whole[5]["tokens"])
    assert not torch.equal(first_batch(task, seed=1)["index"], first_batch(task, seed=2)["index"])


def test_a_batch_holds_the_tokens_of_one_view_of_each_image(token_cache: TokenCache) -> None:
    task = build(token_cache, "ar", target="vq", prefix="semantic")
    flipped = 0
    for batch in task.batches(Stream(start=0, stop=8, batch_size=16)):
        images = batch["index"].numpy()
        views = [
            (token_cache.tokens("vq", images, v) == batch["tokens"]).all(1)
            & (token_cache.tokens("semantic", images, v) == batch["prefix"]).all(1)
            for v in (0, 1)
        ]
        assert bool((views[0] | views[1]).all())
        flipped += int((views[1] & ~views[0]).sum())
    assert 30 < flipped < 98  # of 128, half in expectation


def test_an_epoch_sees_every_training_image_once_and_no_held_out_one(token_cache: TokenCache) -> None:
    task = build(token_cache, held_out=32)
    assert task.examples == 480
    seen = torch.cat([batch["index"] for batch in task.batches(Stream(start=0, stop=30, batch_size=16))])
    assert sorted(seen.tolist()) == sorted(task._train.tolist())
    assert not set(seen.tolist()) & set(task._held_out.tolist())


def test_labels_are_dropped_now_and_then_and_otherwise_true(token_cache: TokenCache) -> None:
    task = build(token_cache, labels=True)
    batches = list(task.batches(Stream(start=0, stop=30, batch_size=16)))
    labels, images = (torch.cat([b[name] for b in batches]) for name in ("labels", "index"))
    kept = labels != NO_LABEL
    assert torch.equal(labels[kept], torch.from_numpy(token_cache.labels[images.numpy()])[kept])
    assert 20 < int((~kept).sum()) < 85  # of 480, a tenth in expectation


def test_masks_are_maskgits() -> None:
    masks = random_masks(4000, 256, torch.Generator().manual_seed(0))
    counts = masks.sum(1).float()
    assert int(counts.min()) >= 1
    assert int(counts.max()) == 256
    # E[floor(256 cos(pi u / 2) + 1)] is near 256 * 2 / pi + 1/2; one token's chance is the same everywhere
    assert float(counts.mean()) == pytest.approx(256 * 2 / math.pi + 0.5, rel=0.02)
    assert float((masks.float().mean(0) - 2 / math.pi).abs().max()) < 0.04
    below = [float((counts <= 256 * math.cos(math.pi * u / 2) + 1).float().mean()) for u in (0.25, 0.5, 0.75)]
    assert below == pytest.approx([0.75, 0.5, 0.25], abs=0.03)


# -- losses


@pytest.mark.parametrize("role", ["prior", "masked", "random"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(token_cache: TokenCache, role: str) -> None:
    task = build(token_cache, role, target="vq")
    task.modules.eval()
    batch = first_batch(task)

    def gradient(parts: int) -> torch.Tensor:
        task.modules.zero_grad()
        pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}
        for number in range(parts):
            [loss] = task.losses({name: chunks[number] for name, chunks in pieces.items()}, Step(0, 1))
            (loss.value / parts).backward()
        return torch.cat([p.grad.flatten() for p in task.modules.parameters() if p.grad is not None])

    whole, halves, eighths = gradient(1), gradient(2), gradient(8)
    assert float(whole.norm()) > 0.01
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(eighths, whole, rtol=1e-4, atol=1e-6)


def test_random_orders_are_of_all_kinds_and_fixed_in_validation(token_cache: TokenCache) -> None:
    task = build(token_cache, "random", held_out=51)
    order = first_batch(task, batch_size=200)["order"]
    assert torch.equal(order.sort(1).values, torch.arange(tiny.TOKENS).expand(200, -1))
    first = torch.bincount(order[:, 0], minlength=tiny.TOKENS)
    assert first.min() > 0
    assert len({tuple(row.tolist()) for row in order}) == 200
    task.modules.eval()
    assert task.validate() == task.validate()


def test_z_loss_is_added_in_training_only(token_cache: TokenCache) -> None:
    task = build(token_cache)
    batch = first_batch(task)
    model = task.model.eval()
    plain, metrics = model.loss(batch["tokens"])
    with_z, same = model.loss(batch["tokens"], z_loss=0.5)
    logits = model(batch["tokens"][:, :-1])
    assert (with_z - plain).item() == pytest.approx(0.5 * logits.logsumexp(-1).square().mean().item(), rel=1e-5)
    assert float(metrics["nll"]) == float(same["nll"])


def test_unigram_perplexity_is_that_of_the_frequencies(token_cache: TokenCache) -> None:
    task = build(token_cache)
    counts = np.bincount(token_cache.tokens("semantic", task._train, 0).flatten(), minlength=tiny.CLUSTERS) + 1
    held_out = token_cache.tokens("semantic", task._held_out, 0).numpy().flatten()
    expected = math.exp(-np.log(counts / counts.sum())[held_out].mean())
    assert task.validate()["unigram_perplexity"] == pytest.approx(expected, rel=1e-9)


def test_validation_is_the_mean_over_all_held_out_tokens(token_cache: TokenCache) -> None:
    task = build(token_cache, held_out=51)
    task.modules.eval()
    tokens = token_cache.tokens("semantic", task._held_out, 0)
    _, metrics = task.model.loss(tokens)
    found = task.validate()
    assert found["nll"] == pytest.approx(float(metrics["nll"]), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["accuracy"] == pytest.approx(float(metrics["accuracy"]), abs=1e-6)


# -- whole runs

CASES = [
    ("cifar10-tiny-prior", "prior", 0.25),
    ("cifar10-tiny-prior-cond", "prior", 0.25),
    ("cifar10-tiny-prior-masked", "prior", 0.2),
    ("cifar10-tiny-prior-random", "prior", 0.2),
    ("cifar10-tiny-vq-prior", "prior", 0.25),
    ("cifar10-tiny-ar", "decoder", 0.25),
    ("cifar10-tiny-masked", "decoder", 0.2),
]


@pytest.mark.parametrize(("preset", "component", "share"), CASES)
def test_every_preset_learns(
    token_cache: TokenCache, tmp_path: Path, preset: str, component: str, share: float
) -> None:
    """In 60 steps the held-out loss falls by a stated share of where it began, and below that of the tokens'
    frequencies."""
    changes = ["training.steps=60", "training.warmup_steps=10", "training.batch_size=32", "training.sample_every=60"]
    small = ["model.transformer.dim=64", "model.transformer.depth=2", "training.log_every=1"]
    task, config = build_task(component, load_preset(preset, [*changes, *small]), token_cache.folder, preset)
    task.modules.eval()
    before = task.validate()["nll"]
    folder = learn(task, config, tmp_path)
    end, losses = lines(tmp_path)[-1], curve(tmp_path)
    after = end["validation/nll"]
    assert after < (1 - share) * before
    assert end["validation/perplexity"] < end["validation/unigram_perplexity"]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < (1 - share) * losses[0]
    model = load_component(folder, TokenModel, TokenModelConfig)
    assert model.provenance["steps"] == 60
    assert model.provenance["space"] == task.data.target
    assert model.provenance["class_names"] == (token_cache.classes if "cond" in preset or "vq" in preset else [])
    assert model.provenance["metrics"]["nll"] == after
    assert (tmp_path / "samples" / "step-0000060.png").stat().st_size > 500
    assert read_json(folder / "config.json")["config"]["transformer"]["dim"] == 64


@pytest.mark.parametrize("role", ["prior", "ar", "masked", "random"])
def test_overfits_eight_images_to_exact_tokens(images: ImageDataset, tmp_path: Path, role: str) -> None:
    """A tiny model learns eight images, one of each class, by heart; sampling without chance then gives their exact
    tokens."""
    eight = images.subset([int(np.flatnonzero(images.labels == label)[0]) for label in range(8)])
    cache = build_token_cache(tiny.pipeline(), eight, tmp_path / "cache", Views(flip=False))
    target, prefix = ("semantic", None) if role in ("prior", "random") else ("vq", "semantic")
    data = TokenData(target=target, prefix=prefix, labels=True)
    values = {"role": role, "class_dropout": 0.0, "transformer": {**TRANSFORMER, "causal": role != "masked"}}
    torch.manual_seed(0)
    task = TokenTask(TokenModel(token_model_config(values, cache, data, "test")), cache, data)
    assert task.examples == 8  # nothing is held out of so few
    config = settings(steps=200, batch_size=8, schedule="cosine", warmup_steps=20, checkpoint_every=0, log_every=50)
    learn(task, config, tmp_path / "run")
    params = SamplingParams(temperature=0, choice_temperature=0)
    given = None if prefix is None else cache.tokens("semantic", np.arange(8))
    tokens = sample(task.model.eval(), range(8), params=params, labels=torch.arange(8), prefix=given)
    assert torch.equal(tokens, cache.tokens(target, np.arange(8)))
