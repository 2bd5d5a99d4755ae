import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from digit.core.config import from_dict, load_preset
from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.data.token_cache import TokenCache
from digit.models.component import load_component
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.training.auxiliary import Extras, ExtrasLoss, load_centroids, neighbours, plain, set_embeddings
from digit.training.build import build_task
from digit.training.logs import read_metrics
from digit.training.loop import Interrupted, train
from digit.training.task import Step, Stream

CENTROIDS = torch.randn(tiny.CLUSTERS, 6, generator=torch.Generator().manual_seed(5))
EVERYTHING = {
    "prior": {
        "token_noise": 1.0,
        "alignment": 1.0,
        "soft_targets": 0.1,
        "random_order": 1.0,
        "centroid_embeddings": True,
    },
    "masked": {"token_noise": 1.0, "soft_targets": 0.1, "prefix_noise": 0.3, "centroid_embeddings": True},
    "ar": {"alignment": 0.5, "prefix_noise": 0.3, "prefix_neighbours": 4, "random_order": 0.5},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the token cache was made with."""
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("extras") / "model")


def some_tokens(count: int = 4, vocab: int = tiny.CLUSTERS) -> Tensor:
    return torch.randint(vocab, (count, tiny.TOKENS), generator=torch.Generator().manual_seed(1))


def on(model: TokenModel, centroids: Tensor = CENTROIDS, **fields: object) -> ExtrasLoss:
    torch.manual_seed(2)
    return ExtrasLoss(model, Extras(codebook="given", **fields), centroids).train()


def build(cache: TokenCache, folder: Path, preset: str, extras: dict, *more: str):
    small = ["model.transformer.dim=32", "model.transformer.depth=2", "training.batch_size=16", "training.log_every=1"]
    changes = [f"objective.{name}={value}" for name, value in {**extras, "codebook": folder}.items()]
    values = load_preset(preset, [*small, *changes, *more])
    return build_task(values["component"], values, cache.folder, preset)


# -- off
# -------------------------------------------------------------------------------------------------------------------


def test_off_by_default_a_run_is_what_it_was(token_cache: TokenCache) -> None:
    values = load_preset("cifar10-tiny-ar")
    with_section, _ = build_task("decoder", values, token_cache.folder, "test")
    without, _ = build_task(
        "decoder", {k: v for k, v in values.items() if k != "objective"}, token_cache.folder, "test"
    )
    assert with_section.description == without.description
    assert not {"objective", "start"} & with_section.description.keys()
    first, second = (
        next(iter(task.batches(Stream(start=0, stop=1, batch_size=8)))) for task in (with_section, without)
    )
    assert first.keys() == second.keys() == {"index", "tokens", "prefix"}
    assert with_section.modules.state_dict().keys() == without.modules.state_dict().keys()


def test_with_nothing_drawn_the_loss_is_the_models(token_cache: TokenCache) -> None:
    for role in ("prior", "masked"):
        model = tiny.token_model(role, num_classes=3)
        vocab = model.config.vocab_size
        tokens, labels = some_tokens(vocab=vocab), torch.tensor([0, 2, -1, 1])
        prefix = None if role == "prior" else some_tokens()
        mask = None if role == "prior" else tokens % 3 == 0
        expected, metrics = model.loss(tokens, labels, prefix, mask, 0.01)
        found, same = ExtrasLoss(model, Extras(), None, z_loss=0.01).train()(tokens, labels, prefix, mask)
        assert torch.allclose(found, expected, rtol=1e-5)
        assert torch.allclose(same["nll"], metrics["nll"], rtol=1e-5)


# -- each by itself
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [0.0, 0.375, 0.75, 0.99])
def test_token_noise_is_uniform_and_ends_at_three_quarters(progress: float) -> None:
    extras, tokens = Extras(token_noise=1.0), torch.full((3000, 16), 3)
    batch = {"tokens": tokens, **extras.draw({"tokens": tokens}, 20, torch.Generator().manual_seed(0))}
    shown = extras.disturb(batch, progress, None)["inputs"]
    changed = shown != tokens
    largest = max(0.0, 1 - 4 * progress / 3)
    assert float(changed.float().mean()) == pytest.approx(largest / 2 * 19 / 20, abs=0.01)
    if largest:
        # the share of an image is uniform between 0 and the largest
        assert float(changed.float().mean(1).std()) > 0.25 * largest
        assert torch.bincount(shown[changed], minlength=20)[torch.arange(20) != 3].min() > 0.9 * changed.sum() / 19


def test_noise_is_shown_and_the_truth_is_predicted() -> None:
    model = tiny.token_model()
    tokens, noisy = some_tokens(), some_tokens().flip(0)
    found, _ = on(model, token_noise=1.0)(tokens, inputs=noisy)
    expected = F.cross_entropy(model(noisy[:, :-1]).flatten(0, 1), tokens.flatten())
    assert torch.allclose(found, expected, rtol=1e-5)


def test_alignment_is_the_cosine_to_this_tokens_centroid_and_to_the_nexts() -> None:
    model = tiny.token_model(transformer={**tiny.TRANSFORMER, "depth": 4})
    tokens = some_tokens()
    loss = on(model, alignment=0.7)
    found, metrics = loss(tokens)
    states = model.states(tokens[:, :-1])  # the embedding, then the blocks
    first, third = loss.aligners[0](states[1]), loss.aligners[1](states[3])
    this = [1 - F.cosine_similarity(first[:, i + 1], CENTROIDS[tokens[:, i]]) for i in range(tiny.TOKENS - 1)]
    following = [1 - F.cosine_similarity(third[:, i], CENTROIDS[tokens[:, i]]) for i in range(tiny.TOKENS)]
    both = torch.stack(this).mean() + torch.stack(following).mean()
    assert torch.allclose(found, model.loss(tokens)[0] + 0.7 * both, rtol=1e-5)
    assert float(metrics["alignment"]) == pytest.approx(both.item() / 2, rel=1e-5)
    assert not [name for name in model.state_dict() if "align" in name]


def test_soft_targets_are_a_cross_entropy_with_neighbours() -> None:
    model = tiny.token_model(label_smoothing=0.1)
    tokens = some_tokens()
    found, metrics = on(model, soft_targets=0.2)(tokens)
    squared = torch.cdist(CENTROIDS, CENTROIDS).square()
    squared.fill_diagonal_(torch.inf)
    near = torch.softmax(-squared / squared.min(1).values.mean(), 1)  # (K, K), all eleven others
    eye = torch.eye(tiny.CLUSTERS)
    target = 0.1 / tiny.CLUSTERS + (0.9 - 0.2) * eye + 0.2 * near
    assert torch.allclose(target.sum(1), torch.ones(tiny.CLUSTERS))
    log_p = model(tokens[:, :-1]).log_softmax(-1)
    assert torch.allclose(found, -(target[tokens] * log_p).sum(-1).mean(), rtol=1e-5)
    assert float(metrics["nll"]) == pytest.approx(
        F.cross_entropy(log_p.flatten(0, 1), tokens.flatten()).item(), rel=1e-5
    )


def test_prefix_noise_takes_neighbours_of_some_images_and_half_as_many_at_last() -> None:
    extras = Extras(prefix_noise=0.25, prefix_tokens=0.5, prefix_neighbours=6, codebook="given")
    near, squared = neighbours(CENTROIDS, 6)
    by_hand = torch.cdist(CENTROIDS, CENTROIDS).argsort(1)[:, 1:7]
    assert torch.equal(near, by_hand)
    assert torch.allclose(squared[:, 0], (CENTROIDS - CENTROIDS[by_hand[:, 0]]).square().sum(1), rtol=1e-5)
    prefix = some_tokens(2000)
    batch = {"tokens": prefix, "prefix": prefix}
    batch |= extras.draw(batch, 20, torch.Generator().manual_seed(0))
    for progress, count in ((0.0, 6), (0.5, 4), (1.0, 3)):
        shown = extras.disturb(batch, progress, near)["prefix"]
        changed = shown != prefix
        touched = changed.any(1)
        assert float(touched.float().mean()) == pytest.approx(0.25, abs=0.03)
        assert float(changed[touched].float().mean()) == pytest.approx(0.5, abs=0.02)
        rank = (near[prefix] == shown[..., None]).float().argmax(-1)[changed]
        assert torch.equal(rank.unique(), torch.arange(count))


def test_in_random_order_a_place_sees_what_came_before_it_only() -> None:
    model = tiny.token_model()
    loss = on(model, random_order=1.0)
    nn.init.normal_(model.position_embedding.parametrizations.weight[0].table)
    tokens, order = some_tokens(2), torch.stack([torch.randperm(tiny.TOKENS) for _ in range(2)])

    def logits(given: Tensor) -> Tensor:
        return model.head(model.transformer(loss._embed(given, None, None, None, order)))

    other = tokens.scatter(1, order[:, 9:], (tokens.gather(1, order[:, 9:]) + 1) % tiny.CLUSTERS)
    same, changed = logits(tokens)[:, :10], logits(other)[:, :10]
    assert torch.allclose(same, changed, atol=1e-5)
    assert not torch.allclose(logits(tokens)[:, 10:], logits(other)[:, 10:], atol=1e-2)


def test_random_order_knows_its_target_and_exports_to_raster_order() -> None:
    """Images that are all the same: a place that knows which token is asked for needs no other; one that does not, must
    guess."""
    image = torch.arange(tiny.TOKENS).remainder(tiny.CLUSTERS).expand(16, -1)
    model = tiny.token_model()
    loss = on(model, random_order=1.0)
    optimizer = torch.optim.AdamW(loss.parameters(), 1e-2)
    for _ in range(80):
        order = torch.rand(image.shape).argsort(1)
        value, _ = loss(image, order=order)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        first = model.head(model.transformer(loss._embed(image, None, None, None, order)))[:, 0]
        # nothing is known at the first place but the target's position
        assert float(F.cross_entropy(first, image.gather(1, order)[:, 0])) < 0.2 < math.log(tiny.CLUSTERS)
        exported = plain(model)
        assert exported.state_dict().keys() == tiny.token_model().state_dict().keys()
        raster = loss(image, order=torch.arange(tiny.TOKENS).expand(16, -1))[0]
        assert torch.allclose(exported.loss(image)[0], raster, atol=1e-5)
        assert torch.allclose(loss.eval()(image)[0], raster, atol=1e-5)
    assert exported is not model
    assert plain(exported) is exported


def test_random_order_gives_way_to_raster_order() -> None:
    extras, tokens = Extras(random_order=0.8), some_tokens(1000)
    batch = {"tokens": tokens, **extras.draw({"tokens": tokens}, 20, torch.Generator().manual_seed(0))}
    for progress, share in ((0.0, 0.8), (0.5, 0.8), (0.625, 0.4), (0.75, 0.0), (0.9, 0.0)):
        order = extras.disturb(batch, progress, None)["order"]
        assert torch.equal(order.sort(1).values, torch.arange(tiny.TOKENS).expand(1000, -1))
        shuffled = (order != torch.arange(tiny.TOKENS)).any(1)
        assert float(shuffled.float().mean()) == pytest.approx(share, abs=0.05)


def test_centroids_as_embeddings_keep_their_geometry() -> None:
    table = nn.Embedding(tiny.CLUSTERS, 32)
    scale = table.weight.std().item()
    set_embeddings(table, CENTROIDS + 100)
    centred = CENTROIDS - CENTROIDS.mean(0)
    expected, found = torch.cdist(centred, centred), torch.cdist(table.weight, table.weight)
    assert torch.allclose(found / found.mean(), expected / expected.mean(), atol=1e-3)
    assert table.weight.std().item() == pytest.approx(scale, rel=1e-3)


# -- what does not go together
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "extras", "words"),
    [
        ("cifar10-tiny-masked", {"alignment": 1}, "alignment is for models that predict the next token"),
        ("cifar10-tiny-masked", {"random_order": 1}, "role 'masked' has no order"),
        ("cifar10-tiny-prior", {"prefix_noise": 0.1}, "no semantic prefix to disturb"),
        ("cifar10-tiny-prior", {"soft_targets": 0.5, "codebook": "null"}, "soft_targets needs 'codebook'"),
        ("cifar10-tiny-prior", {"soft_target": 0.5}, "did you mean 'soft_targets'"),
        ("cifar10-tiny-prior", {"token_noise": 2}, "'token_noise' = 2"),
    ],
)
def test_refusals(token_cache: TokenCache, model_folder: Path, preset: str, extras: dict, words: str) -> None:
    values = load_preset(preset, [f"objective.{k}={v}" for k, v in {"codebook": model_folder, **extras}.items()])
    with pytest.raises(DigitError, match=words):
        build_task(values["component"], values, token_cache.folder, preset)


def test_centroids_of_the_wrong_model(token_cache: TokenCache, model_folder: Path, tmp_path: Path) -> None:
    found = load_centroids(str(model_folder), {"semantic", "vq"}, token_cache)
    assert found["semantic"].shape == (tiny.CLUSTERS, tiny.encoder().dim)
    assert torch.equal(found["vq"], tiny.vqgan().codebook)
    assert load_centroids(str(model_folder / "codebook"), {"semantic"}, token_cache)["semantic"].equal(
        found["semantic"]
    )
    with pytest.raises(DigitError, match="has no VQGAN"):
        load_centroids(str(model_folder / "codebook"), {"vq"}, token_cache)
    tiny.Codebook.from_centroids(torch.randn(5, 16)).save_pretrained(tmp_path)
    with pytest.raises(DigitError, match=r"has 5 centroids, but the semantic tokens of the cache .* are 12"):
        load_centroids(str(tmp_path), {"semantic"}, token_cache)


# -- whole runs
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prior", "masked", "ar"])
def test_batches_do_not_depend_on_the_number_of_processes(
    token_cache: TokenCache, model_folder: Path, role: str
) -> None:
    task, _ = build(token_cache, model_folder, f"cifar10-tiny-{role}", EVERYTHING[role])
    whole = next(iter(task.batches(Stream(start=3, stop=4, batch_size=16))))
    halves = [next(iter(task.batches(Stream(start=3, stop=4, batch_size=16, rank=r, world=2)))) for r in (0, 1)]
    for name, value in whole.items():
        assert torch.equal(torch.cat([half[name] for half in halves]), value)
    [loss] = task.losses(whole, Step(0, 10))
    loss.value.backward()
    assert all(p.grad is not None for p in task.modules.parameters())


@pytest.mark.parametrize("role", ["prior", "masked"])
def test_a_run_with_all_of_it_learns_resumes_and_exports_a_plain_model(
    token_cache: TokenCache, model_folder: Path, tmp_path: Path, role: str
) -> None:
    preset = f"cifar10-tiny-{role}"
    length = (
        "training.steps=40",
        "training.warmup_steps=5",
        "training.checkpoint_every=20",
        "training.sample_every=40",
    )

    def run(out: Path, stop_after: int | None = None, resume: bool = False) -> Path | None:
        task, config = build(token_cache, model_folder, preset, EVERYTHING[role], *length)
        assert set(EVERYTHING[role]) == set(task.description["objective"])
        if stop_after:
            real = task.after_step

            def after_step(step: Step) -> None:
                real(step)
                if step.index + 1 == stop_after:
                    signal.raise_signal(signal.SIGTERM)

            task.after_step = after_step
        return train(task, config, out, resume=resume, device="cpu", show=False)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop_after=23)
    parts = run(tmp_path / "parts", resume=True)
    expected, found = (read_tensors(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == tiny.token_model(role).state_dict().keys()
    assert all(expected[name].equal(found[name]) for name in expected)
    model = load_component(whole, TokenModel, TokenModelConfig)
    assert set(model.provenance["objective"]) == set(EVERYTHING[role])
    lines = read_metrics(tmp_path / "whole")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    untrained, _ = build(token_cache, model_folder, preset, EVERYTHING[role], *length)
    untrained.modules.eval()
    assert lines[-1]["validation/nll"] < 0.9 * untrained.validate()["nll"]
    if role == "prior":
        aligned = [line["alignment"] for line in lines if "alignment" in line]
        assert sum(aligned[-5:]) < 0.8 * sum(aligned[:5])


def test_description_names_what_is_on_and_not_where_it_lies() -> None:
    assert from_dict(Extras, {"soft_targets": 0.1, "codebook": "somewhere"}, "test").chosen == {"soft_targets": 0.1}
