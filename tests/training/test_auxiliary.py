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
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.training.auxiliary import Auxiliary, known_fields, load_centroids, neighbours, set_embeddings
from digit.training.build import build_task
from digit.training.loop import Interrupted
from digit.training.task import Step
from digit.training.tasks.tokens import TokenLoss
from runs import batches, curve, fell, learn, pure_batches, same

CENTROIDS = torch.randn(tiny.CLUSTERS, 6, generator=torch.Generator().manual_seed(5))
EVERYTHING = {
    "prior": {"token_noise": 1.0, "centroid_embeddings": True},
    "masked": {"token_noise": 1.0, "prefix_noise": 0.3, "centroid_embeddings": True},
    "ar": {"prefix_noise": 0.3, "prefix_neighbours": 4},
    "prior-random": {"token_noise": 0.5, "order_annealing": [0.25, 0.75]},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the token cache was made with."""
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("extras") / "model")


def some_tokens(count: int = 4, vocab: int = tiny.CLUSTERS) -> Tensor:
    return torch.randint(vocab, (count, tiny.TOKENS), generator=torch.Generator().manual_seed(1))


def build(cache: TokenCache, folder: Path, preset: str, extras: dict, *more: str):
    small = ["model.transformer.dim=32", "model.transformer.depth=2", "training.batch_size=16", "training.log_every=1"]
    changes = [f"objective.{name}={value}" for name, value in {**extras, "codebook": folder}.items()]
    values = load_preset(preset, [*small, *changes, *more])
    return build_task(values["component"], values, cache.folder, preset)


# -- off


def test_off_by_default_a_run_is_what_it_was(token_cache: TokenCache) -> None:
    values = load_preset("cifar10-tiny-ar")
    with_section, _ = build_task("decoder", values, token_cache.folder, "test")
    del values["objective"]
    without, _ = build_task("decoder", values, token_cache.folder, "test")
    assert with_section.description == without.description
    assert not {"objective", "start"} & with_section.description.keys()
    first, second = (batches(task, stop=1)[0] for task in (with_section, without))
    assert first.keys() == second.keys() == {"index", "tokens", "prefix"}
    assert with_section.modules.state_dict().keys() == without.modules.state_dict().keys()


def test_with_nothing_drawn_the_loss_is_the_models(token_cache: TokenCache) -> None:
    for role in ("prior", "masked", "random"):
        model = tiny.token_model(role, num_classes=3)
        vocab = model.config.vocab_size
        tokens, labels = some_tokens(vocab=vocab), torch.tensor([0, 2, -1, 1])
        prefix = some_tokens() if role == "masked" else None
        mask = tokens % 3 == 0 if role == "masked" else None
        order = torch.rand(tokens.shape).argsort(1) if role == "random" else None
        expected, metrics = model.loss(tokens, labels, prefix, mask, 0.01, order=order)
        more = {"labels": labels, "prefix": prefix, "mask": mask, "inputs": tokens, "order": order}
        found, same = TokenLoss(model, 0.01).train()(tokens, **more)
        assert torch.allclose(found, expected, rtol=1e-5)
        assert torch.allclose(same["nll"], metrics["nll"], rtol=1e-5)


# -- each by itself


@pytest.mark.parametrize("progress", [0.0, 0.375, 0.75, 0.99])
def test_token_noise_is_uniform_and_ends_at_three_quarters(progress: float) -> None:
    extras, tokens = Auxiliary(token_noise=1.0), torch.full((3000, 16), 3)
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
    found, _ = TokenLoss(model)(tokens, inputs=noisy)
    expected = F.cross_entropy(model(noisy[:, :-1]).flatten(0, 1), tokens.flatten())
    assert torch.allclose(found, expected, rtol=1e-5)


def test_prefix_noise_takes_neighbours_of_some_images_and_half_as_many_at_last() -> None:
    extras = Auxiliary(prefix_noise=0.25, prefix_tokens=0.5, prefix_neighbours=6, codebook="given")
    near = neighbours(CENTROIDS, 6)
    by_hand = torch.cdist(CENTROIDS, CENTROIDS).argsort(1)[:, 1:7]
    assert torch.equal(near, by_hand)
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


def test_centroids_as_embeddings_keep_their_geometry() -> None:
    table = nn.Embedding(tiny.CLUSTERS, 32)
    scale = table.weight.std().item()
    set_embeddings(table, CENTROIDS + 100)
    centred = CENTROIDS - CENTROIDS.mean(0)
    expected, found = torch.cdist(centred, centred), torch.cdist(table.weight, table.weight)
    assert torch.allclose(found / found.mean(), expected / expected.mean(), atol=1e-3)
    assert table.weight.std().item() == pytest.approx(scale, rel=1e-3)


# -- what does not go together


@pytest.mark.parametrize(
    ("preset", "extras", "words"),
    [
        ("cifar10-tiny-prior", {"alignment": 1}, "has alignment = 1; this loss was removed"),
        ("cifar10-tiny-prior", {"prefix_noise": 0.1}, "no semantic prefix to disturb"),
        ("cifar10-tiny-prior", {"order_annealing": [0.5, 0.75]}, "is for role 'random'; this model's is 'prior'"),
        ("cifar10-tiny-prior-random", {"order_annealing": [0.5, 0.5]}, "expected two parts of the run, low < high"),
        (
            "cifar10-tiny-prior",
            {"centroid_embeddings": True, "codebook": "null"},
            "centroid_embeddings needs 'codebook'",
        ),
        ("cifar10-tiny-prior", {"token_nois": 0.5}, "did you mean 'token_noise'"),
        ("cifar10-tiny-prior", {"token_noise": 2}, "token_noise = 2"),
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


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 1.0), (0.6, 0.6), (0.75, 0.0), (1.0, 0.0)])
def test_orders_are_annealed_to_row_by_row(progress: float, share: float) -> None:
    """RAR's schedule: all random up to half of the run, none from three quarters on, evenly in between."""
    generator, tokens = torch.Generator().manual_seed(0), some_tokens(4000)
    order = torch.rand(tokens.shape, generator=generator).argsort(1)
    auxiliary = Auxiliary(order_annealing=(0.5, 0.75))
    batch = {"tokens": tokens, "order": order, **auxiliary.draw({"tokens": tokens}, tiny.CLUSTERS, generator)}
    shown = auxiliary.disturb(batch, progress, None)["order"]
    raster = (shown == torch.arange(tiny.TOKENS)).all(1)
    assert float(raster.float().mean()) == pytest.approx(1 - share, abs=0.03 * (0 < share < 1))
    assert torch.equal(shown[~raster], order[~raster])


# -- whole runs


@pytest.mark.parametrize("role", EVERYTHING)
def test_batches_do_not_depend_on_the_number_of_processes(
    token_cache: TokenCache, model_folder: Path, role: str
) -> None:
    task, _ = build(token_cache, model_folder, f"cifar10-tiny-{role}", EVERYTHING[role])
    [loss] = task.losses(pure_batches(task)[0], Step(0, 10))
    loss.value.backward()
    assert all(p.grad is not None for p in task.modules.parameters())


@pytest.mark.parametrize("role", ["prior", "masked", "prior-random"])
def test_a_run_with_all_of_it_learns_resumes_and_exports_a_plain_model(
    token_cache: TokenCache, model_folder: Path, tmp_path: Path, role: str
) -> None:
    preset = f"cifar10-tiny-{role}"
    length = [f"training.{name}" for name in ("steps=40", "warmup_steps=5", "checkpoint_every=20", "sample_every=40")]

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
        return learn(task, config, out, resume)

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop_after=23)
    parts = run(tmp_path / "parts", resume=True)
    expected, found = (read_tensors(folder / "model.safetensors") for folder in (whole, parts))
    assert expected.keys() == tiny.token_model(role.removeprefix("prior-")).state_dict().keys()
    assert same(found, expected)
    model = load_component(whole, TokenModel, TokenModelConfig)
    assert set(model.provenance["objective"]) == set(EVERYTHING[role])
    assert fell(curve(tmp_path / "whole")) < 0.95
    untrained, _ = build(token_cache, model_folder, preset, EVERYTHING[role], *length)
    untrained.modules.eval()
    assert curve(tmp_path / "whole", "validation/nll")[-1] < 0.9 * untrained.validate()["nll"]


def test_description_names_what_is_on_and_not_where_it_lies() -> None:
    assert from_dict(Auxiliary, {"token_noise": 0.1, "codebook": "somewhere"}, "test").chosen == {"token_noise": 0.1}


def test_removed_losses_that_are_off_are_left_out_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="'alignment' was removed"):
        assert known_fields({"alignment": 0.0, "token_noise": 0.5}, "test") == {"token_noise": 0.5}
