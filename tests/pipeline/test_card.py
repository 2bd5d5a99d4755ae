"""The card of a model: made from its parts and from real measurements of it."""

import json

import numpy as np
import pytest
import yaml

import tiny
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.fidelity import Fidelity
from digit.evaluation.metrics.noise import Change, NoiseModel
from digit.evaluation.metrics.stability import stability
from digit.pipeline.card import CardFacts, Measured, describe_model, model_card, with_facts
from digit.pipeline.pipeline import DigitPipeline
from hub_server import check_card
from terminal import run


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def runs(pipe, cifar512, tmp_path_factory):
    """A folder of measurements: stability, really measured, and fidelity, whose network the tests do not have."""
    folder = tmp_path_factory.mktemp("runs")
    images = open_dataset(cifar512, "train").subset(np.arange(8))
    changes = [Change(kind="noise", level=level) for level in (30.0, 20.0, 5.0)]
    stability(pipe, images, changes, NoiseModel(), 8).save(folder / "stability")
    fidelity = Fidelity(
        title="Fidelity of tiny",
        values={"fid": 123.456},
        source={"name": "tiny", "images": 64},
        reference={"name": "cifar512", "images": 512},
        weights={"source": "a file", "sha256": "a1b2c3d4e5f6a7b8"},
        model=describe_model(pipe),
        sampling={"num": 64, "decoder": "ar", "labels": "all in turns", "settings": {"top_k": 5}},
    )
    write_json(folder / "fid.json", fidelity.to_dict())
    return folder


def head(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_card_without_measurements_says_what_it_knows(pipe):
    card = model_card(pipe)
    check_card(card)
    assert head(card)["library_name"] == "digit"
    assert "arxiv:2410.12490" in head(card)["tags"]
    assert "model-index" not in head(card)
    assert "has not stated a licence" in card
    assert "Classes: 0 cat, 1 dog, 2 ship." in card
    assert f"{sum(p.numel() for p in pipe.prior.parameters()):,}" in card
    assert "@inproceedings{zhu2024stabilize" in card


def test_results_become_a_table_and_the_hubs_model_index(pipe, runs, tmp_path):
    known = with_facts(pipe, results=[runs], license="mit", data=["uoft-cs/cifar10"])
    card = model_card(known)
    check_card(card)
    assert head(card)["license"] == "mit"
    assert head(card)["datasets"] == ["uoft-cs/cifar10"]
    found = {
        (result["task"]["type"], result["dataset"]["name"], metric["type"]): metric["value"]
        for result in head(card)["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert found["unconditional-image-generation", "cifar512", "fid"] == 123.456
    assert 0 <= found["image-feature-extraction", "cifar512", "changed_tokens"] <= 1
    line = next(line for line in card.splitlines() if line.startswith("| FID, ar decoder | 123.5 |"))
    told = ("64 generated images", "all in turns", "top_k 5", "reference cifar512 (512 images)", "weights a1b2c3d4e5f6")
    assert all(fact in line for fact in told)
    assert "semantic tokens changed by noise of 20 dB" in card
    assert "VQ tokens changed by noise of 20 dB" in card

    # saved with the model, and there after loading; what is not given anew stays
    again = DigitPipeline.from_pretrained(known.save_pretrained(tmp_path / "model"))
    assert again.card == known.card
    assert (tmp_path / "model" / "README.md").read_text() == card
    assert with_facts(again, license="apache-2.0").card.results == known.card.results


def test_a_result_belongs_to_the_weights_it_was_measured_with(pipe, runs, tmp_path):
    retrained = pipe.with_parts(prior=tiny.token_model("prior", 9, num_classes=tiny.CLASSES))
    metrics = {one.metric for one in with_facts(retrained, results=[runs]).card.results}
    assert metrics == {"changed_tokens"}, "stability does not depend on the prior, FID does"
    with pytest.raises(DigitError, match=r"fid\.json holds no measurement of the model 'tiny'"):
        with_facts(retrained, results=[runs / "fid.json"])
    other_masked = pipe.with_parts(decoders={**pipe.decoders, "masked": tiny.token_model("masked", 9)})
    assert with_facts(other_masked, results=[runs / "fid.json"]).card.results, "made with the AR decoder alone"
    write_json(
        tmp_path / "images.json",
        {"kind": "fidelity", "title": "a folder", "values": {"fid": 1.0}, "source": {"images": 2}},
    )
    with pytest.raises(DigitError, match="belongs to the weights"):
        with_facts(pipe, results=[tmp_path / "images.json"])


def test_an_index_without_a_card_loads(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    del index["card"]
    write_json(folder / "model_index.json", index)
    assert DigitPipeline.from_pretrained(folder).card == CardFacts()
    facts = CardFacts(results=(Measured(task="t", metric="fid", name="FID", value=1.0, data="d"),))
    assert "| FID | 1 |" in model_card(pipe.with_parts(card=facts))


def test_a_card_of_tokenizers_alone(pipe):
    card = model_card(pipe.with_parts(prior=None, decoders={}))
    check_card(card)
    assert "the tokenizers alone" in card
    assert "pipeline_tag" not in head(card)


def test_the_command_writes_a_card_in_place(pipe, runs, tmp_path, monkeypatch, capsys):
    folder = pipe.save_pretrained(tmp_path / "model")
    weights = (folder / "prior" / "model.safetensors").stat().st_mtime_ns
    assert run(monkeypatch, "card", folder, "--results", runs, "--license", "mit") == 0
    assert "3 measured numbers, licence mit" in capsys.readouterr().out
    assert head((folder / "README.md").read_text())["license"] == "mit"
    assert (folder / "prior" / "model.safetensors").stat().st_mtime_ns == weights, "weights are left alone"
    assert run(monkeypatch, "push", folder, "someone/tiny") == 2
    assert "HF_HUB_OFFLINE is set" in " ".join(capsys.readouterr().err.split())


def test_training_is_told_from_the_parts_provenance(pipe):
    eyes, prior = tiny.encoder(), tiny.token_model("prior", num_classes=tiny.CLASSES)
    eyes.provenance = {"data": {"name": "birds", "split": "train"}, "steps": 1200}
    prior.provenance = {"source": "someone/checkpoint.pt", "updates": 125000}
    decoder = tiny.token_model("ar")
    decoder.provenance = {"data": {"name": "birds"}, "steps": 300, "start": {"weights": "0a"}}
    card = model_card(pipe.with_parts(encoder=eyes, prior=prior, decoders={"ar": decoder}))
    assert "- decoder/ar: on birds; 300 steps; from weights that were trained before" in card
    assert "- encoder: on birds, split train; 1,200 steps" in card
    assert "- prior: 125,000 updates; from someone/checkpoint.pt" in card
