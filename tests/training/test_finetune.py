import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.core.files import read_tensors, sha256_of, write_json
from digit.data.dataset import open_dataset
from digit.data.token_cache import TokenCache, Views, build_token_cache, open_token_cache
from digit.models.component import load_component
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import NO_LABEL, TokenModel
from digit.training.build import build_task
from digit.training.finetune import FineTune, add_lora, check_vocabulary
from digit.training.logs import read_metrics
from digit.training.tasks.tokens import TokenData, TokenTask, merged
from runs import curve, fell, learn

SMALL = ["model.transformer.dim=32", "model.transformer.depth=2", "training.batch_size=16", "training.log_every=1"]

CONDITIONAL = "cifar10-tiny-prior-cond"


def build(cache: TokenCache, preset: str = CONDITIONAL, start: FineTune | None = None, *more: str):
    values = load_preset(preset, [*SMALL, "training.steps=30", "training.warmup_steps=5", *more])
    task, config = build_task(values["component"], values, cache.folder, preset, start=start)
    assert isinstance(task, TokenTask)
    return task, config


@pytest.fixture(scope="module")
def run_folder(token_cache: TokenCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the conditional prior on ten classes."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    learn(*build(token_cache), out)
    return out


@pytest.fixture(scope="module")
def four_classes(cifar512: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """Other images: the classes 9, 3 and 5 under their names, and a fourth of another name."""
    images = open_dataset(cifar512)
    chosen = images.subset(np.flatnonzero(np.isin(images.labels, [9, 3, 5, 0])).tolist())
    folder = tmp_path_factory.mktemp("four") / "cache"
    build_token_cache(tiny.pipeline(), chosen, folder, Views())
    index = json.loads((folder / "index.json").read_text())
    names = index["classes"]
    index["classes"] = [names[9], names[3], "somebody's dog", names[5]]
    (folder / "index.json").write_text(json.dumps(index))
    labels = np.load(folder / "shard-00000" / "labels.npy")
    shard = folder / "shard-00000"
    np.save(shard / "labels.npy", np.vectorize({9: 0, 3: 1, 0: 2, 5: 3}.get)(labels))
    write_json(shard / "checksums.json", {path.name: sha256_of(path) for path in shard.glob("*.npy")})
    return open_token_cache(folder)


def test_begins_at_the_old_loss_on_old_data(token_cache: TokenCache, run_folder: Path, tmp_path: Path) -> None:
    old = read_metrics(run_folder)[-1]
    task, config = build(token_cache, CONDITIONAL, FineTune(source=str(run_folder)))
    task.modules.eval()
    assert task.validate()["nll"] == pytest.approx(old["validation/nll"], rel=1e-6)
    part, _ = build(token_cache, CONDITIONAL, FineTune(source=str(run_folder / "model")))
    assert part.description["start"]["weights"] == task.description["start"]["weights"]
    folder = learn(task, config, tmp_path)
    assert read_metrics(tmp_path)[-1]["validation/nll"] < old["validation/nll"]
    assert load_component(folder, TokenModel, TokenModelConfig).provenance["start"]["lora"] == 0


def test_the_network_is_the_saved_models_and_training_is_the_presets(token_cache: TokenCache, run_folder: Path) -> None:
    changes = ("model.class_dropout=0.5", "model.transformer.depth=7", "model.transformer.dropout=0.25")
    task, _ = build(token_cache, CONDITIONAL, FineTune(source=str(run_folder)), *changes)
    config = task.model.config
    assert (config.class_dropout, config.transformer.depth, config.transformer.dropout) == (0.5, 2, 0.25)


def test_other_classes_end_to_end(four_classes: TokenCache, run_folder: Path, tmp_path: Path) -> None:
    start = FineTune(source=str(run_folder))
    task, config = build(four_classes, CONDITIONAL, start, "data.held_out=20")
    old = load_component(run_folder / "model", TokenModel, TokenModelConfig)
    rows = task.model.class_embedding.weight
    known = old.class_embedding.weight
    assert torch.equal(rows, torch.stack([known[9], known[3], known.mean(0), known[5]]))
    tensors = old.state_dict()
    assert all(value.equal(tensors[name]) for name, value in task.model.state_dict().items() if "class" not in name)
    folder = learn(task, config, tmp_path)
    model = load_component(folder, TokenModel, TokenModelConfig)
    assert model.config.num_classes == 4
    assert model.provenance["class_names"][2] == "somebody's dog"
    assert fell(curve(tmp_path)) < 1


def test_a_model_without_classes_learns_them_from_where_it_stands(token_cache: TokenCache, tmp_path: Path) -> None:
    tiny.pipeline(conditional=False).save_pretrained(tmp_path)
    start = FineTune(source=str(tmp_path))
    task, _ = build(token_cache, CONDITIONAL, start)
    old = tiny.token_model("prior")
    tokens = token_cache.tokens("semantic", np.arange(5))
    labels = torch.tensor([0, 9, 4, NO_LABEL, 1])
    assert torch.equal(task.model.eval()(tokens, labels), old(tokens))
    # and a whole model's decoders, by role; classes are forgotten where the data have none
    decoder, _ = build(token_cache, "cifar10-tiny-masked", start)
    assert decoder.model.head.weight.equal(tiny.token_model("masked", 2).head.weight)
    tiny.pipeline().save_pretrained(tmp_path / "conditional")
    without, _ = build(token_cache, "cifar10-tiny-prior", FineTune(source=str(tmp_path / "conditional")))
    assert torch.equal(without.model.eval()(tokens), tiny.token_model("prior", num_classes=3)(tokens))


def test_frozen_parts_do_not_move_and_the_others_do(token_cache: TokenCache, run_folder: Path, tmp_path: Path) -> None:
    start = FineTune(source=str(run_folder), freeze=("embeddings", "blocks:1", "head"))
    task, config = build(token_cache, CONDITIONAL, start, "training.weight_decay=0.5")
    folder = learn(task, config, tmp_path)
    before, after = (read_tensors(f / "model.safetensors") for f in (run_folder / "model", folder))
    still = {name for name in before if before[name].equal(after[name])}
    prefixes = ("token_embedding", "position_embedding", "transformer.blocks.0.", "transformer.norm", "head")
    assert still == {name for name in before if name.startswith(prefixes)}
    assert {"start", "class_embedding.weight", "transformer.blocks.1.ffn_in.weight"} <= set(before) - still


def test_lora_moves_the_blocks_by_a_low_rank_and_is_merged_at_export(
    token_cache: TokenCache, run_folder: Path, tmp_path: Path
) -> None:
    task, config = build(token_cache, CONDITIONAL, FineTune(source=str(run_folder), lora=3))
    before = read_metrics(run_folder)[-1]["validation/nll"]
    task.modules.eval()
    assert task.validate()["nll"] == pytest.approx(before, rel=1e-6)
    folder = learn(task, config, tmp_path)
    assert read_metrics(tmp_path)[-1]["validation/nll"] < before
    merged = load_component(folder, TokenModel, TokenModelConfig)
    old = load_component(run_folder / "model", TokenModel, TokenModelConfig)
    for name, value in old.state_dict().items():
        change = merged.state_dict()[name] - value
        if "blocks" in name and value.ndim == 2:
            assert 0 < int(torch.linalg.matrix_rank(change.double(), atol=1e-5)) <= 3
        else:
            assert bool(change.any()) == (name in ("start", "class_embedding.weight"))


def test_merged_low_rank_changes_give_the_same_outputs() -> None:
    model = tiny.token_model(num_classes=3)
    before = model(tokens := torch.randint(tiny.CLUSTERS, (2, tiny.TOKENS)))
    add_lora(model, 2)
    assert torch.equal(model(tokens), before)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.1)
    changed = model(tokens)
    assert not torch.allclose(changed, before, atol=1e-2)
    assert torch.allclose(merged(model)(tokens), changed, atol=1e-5)
    # the trained model is untouched by its export
    assert torch.equal(model(tokens), changed)
    trained = {
        name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".blocks." not in name
    }
    assert trained == {"start", "class_embedding"}


def test_refusals(token_cache: TokenCache, run_folder: Path, tmp_path: Path) -> None:
    def start(**changes: object) -> FineTune:
        return FineTune(**{"source": str(run_folder), **changes})

    larger = token_cache.info | {"tokens": {"semantic": {"vocab_size": 20, "grid": [4, 4]}}}
    model = load_component(run_folder / "model", TokenModel, TokenModelConfig)
    words = r"knows 16 semantic tokens per image, from a vocabulary of 12; .* has 16 from 20"
    with pytest.raises(DigitError, match=words):
        check_vocabulary(model.config, TokenCache(token_cache.folder, larger), TokenData(), str(run_folder))
    with pytest.raises(DigitError, match=r"predicts semantic tokens; .* asks for vq tokens"):
        build(token_cache, "cifar10-tiny-vq-prior", start())
    with pytest.raises(DigitError, match="role 'prior'; the preset trains one of role 'ar'"):
        build(token_cache, "cifar10-tiny-ar", start())
    with pytest.raises(DigitError, match=r"'blocks:3' cannot be frozen; .* first N of 2"):
        build(token_cache, CONDITIONAL, start(freeze=("blocks:3",)))
    with pytest.raises(DigitError, match="Everything is frozen"):
        build(token_cache, CONDITIONAL, start(freeze=("embeddings", "classes", "blocks", "head")))
    with pytest.raises(DigitError, match="There is no model"):
        build(token_cache, CONDITIONAL, start(source=str(tmp_path / "nowhere")))
    tiny.pipeline().with_parts(prior=None).save_pretrained(tmp_path / "model")
    with pytest.raises(DigitError, match="has no prior to start from"):
        build(token_cache, CONDITIONAL, start(source=str(tmp_path / "model")))


@pytest.mark.parametrize("role", ["masked", "random"])
def test_priors_of_other_roles_are_found_in_a_whole_model(token_cache: TokenCache, tmp_path: Path, role: str) -> None:
    pipe = tiny.pipeline(role=role)
    pipe.save_pretrained(tmp_path / "model")
    task, _ = build(token_cache, f"cifar10-tiny-prior-{role}", FineTune(source=str(tmp_path / "model")))
    expected, found = pipe.prior.state_dict(), task.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in found)
    with pytest.raises(DigitError, match=f"is a model of role '{role}'; the preset trains one of role 'prior'"):
        build(token_cache, "cifar10-tiny-prior", FineTune(source=str(tmp_path / "model")))


def test_a_state_space_prior_is_fine_tuned_too(token_cache: TokenCache, tmp_path: Path) -> None:
    shape = ["model.transformer=null", "model.state_space={dim: 32, depth: 2, state_dim: 8, head_dim: 16}"]
    values = load_preset("cifar10-tiny-prior-cond", ["training.steps=30", "training.warmup_steps=5", *shape])
    values["training"] |= {"batch_size": 16, "log_every": 1}
    task, config = build_task("prior", values, token_cache.folder, "test")
    folder = learn(task, config, tmp_path / "first")
    old = read_metrics(tmp_path / "first")
    losses = [line["loss"] for line in old if "loss" in line]
    assert sum(losses[-5:]) < sum(losses[:5])
    start = FineTune(source=str(folder), lora=2)
    task, _ = build_task("prior", values, token_cache.folder, "test", start=start)
    task.modules.eval()
    assert task.validate()["nll"] == pytest.approx(old[-1]["validation/nll"], rel=1e-6)
    moving = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert any(name.startswith("state_space.blocks.0.inner") for name in moving)
    assert merged(task.model).config == load_component(folder, TokenModel).config
    start = FineTune(source=str(folder), freeze=("embeddings", "head", "blocks:1"))
    values["model"]["state_space"]["dropout"] = 0.5
    task, _ = build_task("prior", values, token_cache.folder, "test", start=start)
    assert task.model.config.state_space.dropout == 0.5
    assert not any(p.requires_grad for p in task.model.backbone.blocks[0].parameters())
    assert not task.model.backbone.norm.weight.requires_grad
