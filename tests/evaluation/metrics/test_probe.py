import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from digit.convert.upstream import convert_upstream
from digit.core.config import load_preset
from digit.core.errors import DigitError
from digit.core.transforms import center_crop, resize_shorter
from digit.encoders.conv import ConvEncoder
from digit.evaluation.metrics.probe import (
    ProbeData,
    ProbeOptions,
    kept_feed,
    preset_options,
    probe,
    score_features,
    split_off,
    top1,
    train_probes,
)  # fmt: skip
from digit.evaluation.metrics.probe_features import (
    Features,
    collect_features,
    crops,
    encoder_features,
    fresh_feed,
    prior_features,
)  # fmt: skip
from digit.evaluation.model_source import open_images
from digit.evaluation.results import Result
from digit.models.probe import LinearProbe
from digit.pipeline.pipeline import DigitPipeline

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures" / "upstream_A.tar.xz"


@pytest.fixture(scope="module")
def gaussians():
    """Two states: the first tells four classes apart fairly well, the second is noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(800) % 4
    centres = 1.2 * torch.randn(4, 6, generator=generator)
    good = centres[labels] + torch.randn(800, 6, generator=generator)
    values = torch.stack([good, torch.randn(800, 6, generator=generator)])
    return Features(values[:, :600], labels[:600]), Features(values[:, 600:], labels[600:])


def trained(train, lr, options):
    """The classifiers of four classes at one learning rate."""
    return train_probes(kept_feed(train, options), len(train.labels), 4, replace(options, lrs=(lr,)))[lr]


def test_the_probe_reaches_logistic_regression(gaussians):
    train, test = gaussians
    options = ProbeOptions(epochs=40, batch_size=100, lrs=(4.0,))
    accuracy = top1(trained(train, 4.0, options), test)
    for state in range(2):
        reference = LogisticRegression(C=1e6, max_iter=2000).fit(train.values[state].numpy(), train.labels.numpy())
        expected = reference.score(test.values[state].numpy(), test.labels.numpy())
        assert accuracy[state] == pytest.approx(expected, abs=0.035)
    assert accuracy[0] > 0.6 > 0.4 > accuracy[1]


def test_one_step_of_sgd_is_the_formula(gaussians):
    """A single full batch, by hand: W1 = W0 - lr * n / 1024 * gradient of the mean cross entropy."""
    train, _ = gaussians
    options = ProbeOptions(epochs=1, batch_size=600, lrs=(0.4,))
    torch.manual_seed(0)
    start = LinearProbe(trained(train, 0.4, options).config)
    found = trained(train, 0.4, options)
    for state in range(2):
        x, onehot = train.values[state].double(), torch.nn.functional.one_hot(train.labels, 4).double()
        w0, b0 = (p.detach().double() for p in (start.classifiers[state].weight, start.classifiers[state].bias))
        error = (x @ w0.T + b0).softmax(1) - onehot  # (600, 4)
        expected = w0 - 0.4 * 600 / 1024 * error.T @ x / 600
        torch.testing.assert_close(found.classifiers[state].weight.double(), expected, atol=1e-6, rtol=1e-5)
        bias = b0 - 0.4 * 600 / 1024 * error.mean(0)
        torch.testing.assert_close(found.classifiers[state].bias.double(), bias, atol=1e-6, rtol=1e-5)


def test_states_do_not_disturb_each_other(gaussians):
    train, _ = gaussians
    options = ProbeOptions(epochs=3, batch_size=50)
    one = trained(train, 0.4, options)
    other = trained(Features(torch.stack([train.values[0], 9 * train.values[1]]), train.labels), 0.4, options)
    torch.testing.assert_close(one.classifiers[0].weight, other.classifiers[0].weight, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(one.classifiers[1].weight, other.classifiers[1].weight, atol=1e-3)


def test_scores_keep_every_learning_rate(gaussians):
    train, test = gaussians
    scores, probes = score_features(train, test, 4, ProbeOptions(epochs=5, batch_size=100, lrs=(0.01, 4.0)))
    assert set(probes) == {0.01, 4.0}
    assert scores[0].by_lr.keys() == {"0.01", "4.0"}
    assert (scores[0].accuracy, scores[0].lr) == max((a, float(lr)) for lr, a in scores[0].by_lr.items())
    assert scores[0].knn > 0.6
    assert scores[1].knn < 0.4


def test_standardizing_makes_scale_irrelevant(gaussians):
    train, test = gaussians
    options = ProbeOptions(epochs=5, batch_size=100, standardize=True, neighbours=0)
    scaled = [Features(f.values * 1000 + 7, f.labels) for f in (train, test)]
    one, other = score_features(train, test, 4, options)[0], score_features(*scaled, 4, options)[0]
    assert [s.accuracy for s in one] == pytest.approx([s.accuracy for s in other], abs=0.011)
    assert one[0].knn is None


def test_learning_rates_share_nothing(gaussians):
    train, _ = gaussians
    options = ProbeOptions(epochs=2, batch_size=100, lrs=(0.1, 4.0))
    both = train_probes(kept_feed(train, options), 600, 4, options)
    for lr in options.lrs:
        assert torch.equal(both[lr].classifiers[0].weight, trained(train, lr, options).classifiers[0].weight)


def test_divergence_is_a_sentence(gaussians):
    train, _ = gaussians
    huge = Features(train.values * 1e18, train.labels)
    with pytest.raises(DigitError, match="diverged at lr"):
        trained(huge, 1e6, ProbeOptions(epochs=3, batch_size=100))


def test_features_are_means_over_all_positions(pipe, cifar512):
    dataset = open_images(cifar512, num=6)
    found = collect_features(pipe, dataset, batch_size=4)
    assert found.values.shape == (3, 6, 32)
    assert found.labels.tolist() == dataset.labels.tolist()
    # one image alone, through the public pieces; the prior is told no class
    tokens = pipe.tokenizer.encode([dataset[4].image])
    with torch.inference_mode():
        states = pipe.prior.states(tokens, torch.tensor([-1]))
    assert [s.shape[1] for s in states] == [17] * 3
    expected = torch.stack([s[0].double().mean(0) for s in states])
    torch.testing.assert_close(found.values[:, 4].double(), expected, atol=1e-5, rtol=1e-4)
    encoder = collect_features(pipe, dataset, encoder_features).values
    torch.testing.assert_close(
        encoder[0, 4], pipe.tokenizer.features([dataset[4].image])[0].mean(0), atol=1e-5, rtol=1e-4
    )


def test_views_are_crops_and_repeat(pipe, cifar512):
    dataset = open_images(cifar512, num=6)
    one, again = (collect_features(pipe, dataset, encoder_features, views=2, seed=1) for _ in range(2))
    assert one.values.shape[1] == 12
    assert torch.equal(one.values, again.values)
    assert not torch.equal(one.values[:, :6], one.values[:, 6:])
    assert one.labels.tolist() == 2 * dataset.labels.tolist()


def test_baseline_reads_vq_tokens(vq_pipe, cifar512):
    assert collect_features(vq_pipe, open_images(cifar512, num=4)).values.shape == (3, 4, 32)


def test_agrees_with_the_authors_states_and_probe(tmp_path):
    with tarfile.open(FIXTURES) as archive:
        archive.extractall(tmp_path, filter="data")
    checkpoint = next(tmp_path.rglob("stage1_linprobe_*/checkpoint_last.pt"))
    meta = json.loads((checkpoint.parent / "meta.json").read_text())
    folder = convert_upstream(tmp_path / "model", stage1=checkpoint, heads=meta["vit"]["heads"])
    with np.load(checkpoint.parent / "io.npz") as arrays:
        given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    pipe = DigitPipeline.from_folder(folder)
    with torch.inference_mode():
        states = prior_features(pipe, given["images"])
    expected = given["inner_states_mean"]
    assert (states - expected).abs().max() < 1e-4 * expected.abs().max()
    classifier = LinearProbe.from_pretrained(folder / "probe")
    logits = torch.stack([given[f"probe_logits_{n}"] for n in range(len(expected) - 1)])
    assert (classifier(states[:-1]) - logits).abs().max() < 1e-4 * logits.abs().max()


def test_cache_serves_the_same_features_and_notices_change(pipe, cifar512, tmp_path):
    train, test = split_off(open_images(cifar512, num=40), 0.25)
    assert (len(train), len(test)) == (30, 10)
    data, model = ProbeData(train, test, cache=tmp_path), {"parts": {"prior": {"sha256": "a"}}}
    kept = [data.features(pipe, "prior", model)[1] for _ in range(2)]
    expected = collect_features(pipe, test)
    for features in kept:
        assert torch.equal(features.values, expected.values)
        assert torch.equal(features.labels, expected.labels)
    files = list(tmp_path.rglob("*.safetensors"))
    data.features(pipe, "prior", {"parts": {"prior": {"sha256": "b"}}})
    assert len(files) == 2
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_fresh_crops_are_new_in_every_epoch_and_repeat(pipe, cifar512):
    dataset = open_images(cifar512, num=6)
    one, again = (list(fresh_feed(pipe, dataset, encoder_features, 6, 2, batch_size=4, seed=1)) for _ in range(2))
    assert [values.shape[:2] for values, _ in one] == [(1, 6)] * 2
    for (values, labels), (same, _) in zip(one, again, strict=True):
        assert torch.equal(values, same)
        assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())
    first, second = (values[0].sort(0).values for values, _ in one)
    assert not torch.allclose(first, second, atol=1e-3)


def test_validation_images_go_to_the_encoder_at_the_size_that_it_sees(pipe, cifar512):
    """A model that takes 48 px of which its encoder sees 32: crops of 48 are shrunk, the middle 32 of 48 is not."""
    settings = replace(pipe.encoder.preprocessing, image_size=48, resize=32)
    config = replace(pipe.encoder.config, preprocessing=settings)
    encoder = ConvEncoder(config)
    encoder.load_state_dict(pipe.encoder.state_dict())
    wide = pipe.with_parts(encoder=encoder.eval(), vqgan=None, decoders={})
    train, test = crops(wide)
    assert (train.size, train.crop, train.flip, train.scale) == (48, "random-resized", True, (0.08, 1.0))
    assert (test.size, test.resize) == (32, 48)
    dataset = open_images(cifar512, num=4)
    middle = center_crop(resize_shorter(dataset[2].image, 48), 32)
    found = collect_features(wide, dataset, encoder_features).values[0, 2]
    expected = pipe.tokenizer.features([middle])[0].mean(0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_authors_preset_gives_their_protocol(cifar512):
    dataset = open_images(cifar512)
    given = preset_options(load_preset("imagenet256-linear-probe"), dataset)
    assert given == {"epochs": 200_000, "lrs": (0.4,), "batch_size": 1024, "momentum": 0.9, "seed": 1}
    changed = load_preset("imagenet256-linear-probe", ["training.label_smoothing=0.1", "data.flip=false"])
    with pytest.raises(DigitError, match="another label_smoothing and flip"):
        preset_options(changed, dataset)
    with pytest.raises(DigitError, match="expected one of a probe"):
        preset_options(load_preset("cifar10-prior"), dataset)


def test_split_is_disjoint_and_whole(cifar512):
    dataset = open_images(cifar512, num=40)
    train, test = split_off(dataset, 0.25)
    keys = [{part[i].key for i in range(len(part))} for part in (train, test)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 40
    with pytest.raises(DigitError, match="leaves nothing"):
        split_off(dataset, 0.001)


def test_record(pipe, cifar512, tmp_path):
    train, test = split_off(open_images(cifar512, num=120), 0.25)
    data = ProbeData(train, test, cache=tmp_path)
    options = ProbeOptions(epochs=4, batch_size=30, lrs=(0.4, 4.0), neighbours=5)
    found = probe(pipe, data, tmp_path, options, layers="all").save(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["state"] for row in result["values"]["layers"]] == [0, 1, 2]
    assert result["values"]["layers"][1]["by_lr"].keys() == {"0.4", "4.0"}
    assert 0 <= found.values.encoder.accuracy <= 1
    assert [row["Features"] for row in found.rows()] == ["state 0 (embedding)", "state 1", "state 2", "encoder"]
    assert Result.load(tmp_path / "result.json").rows() == found.rows()
    assert result["values"]["chance"] == 0.1
    assert Image.open(tmp_path / "probe.png").width > 900
    assert LinearProbe.from_pretrained(tmp_path / "probe").config.states == 3
    assert {p.name for p in tmp_path.glob("features-*")} == {"features-prior", "features-encoder"}
    values = probe(pipe, data, tmp_path, options, encoder=False).values
    assert [s.state for s in values.layers] == [0, 1]
    assert values.encoder is None
    assert all(math.isfinite(s.accuracy) for s in values.layers)


def test_record_of_fresh_crops(pipe, cifar512, tmp_path):
    data = ProbeData(*split_off(open_images(cifar512, num=120), 0.25), fresh=True)
    found = probe(pipe, data, tmp_path, ProbeOptions(epochs=3, batch_size=30, lrs=(0.4, 4.0)))
    assert [(layer.state, layer.knn) for layer in found.values.layers] == [(0, None), (1, None)]
    assert found.settings["fresh_crops"] is True
    assert "new random resized crops with flips in each epoch" in found.notes[0]
    assert found.figure() is not None
    with pytest.raises(DigitError, match="nothing to standardize"):
        probe(pipe, data, tmp_path, ProbeOptions(standardize=True))


def test_images_without_classes_are_refused(pipe, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "b.png")
    with pytest.raises(DigitError, match="without a class"):
        collect_features(pipe, open_images(tmp_path))
