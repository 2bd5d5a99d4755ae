import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from typer.testing import CliRunner

from digit.cli.evaluate import app
from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.features import dataset_batches, measure
from digit.evaluation.metrics.fidelity import METRICS, FidelityOptions, compare, fidelity
from digit.evaluation.metrics.inception import OnnxExtractor, TorchExtractor, load_inception
from digit.evaluation.metrics.statistics import FeatureStatistics, load_statistics, save_statistics

SMALL = FidelityOptions(metrics=METRICS, kid_subset_size=50)
SHARED = Path(os.environ.get("DIGIT_SHARED") or Path(__file__).parents[4] / "shared")


@pytest.fixture(scope="session")
def halves(cifar512):
    """Two times 256 photographs, (256, 3, 32, 32) uint8."""
    pixels, _ = open_dataset(cifar512).arrays()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images[::2], images[1::2]


@pytest.fixture
def folder(tmp_path, halves):
    """The first 20 photographs as a folder of PNG files."""
    for index, image in enumerate(halves[0][:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{index:03d}.png")
    return tmp_path


# ---- values ----------------------------------------------------------------------------------------------------------


def test_values_are_torch_fidelitys(halves, pooling):
    ours, theirs = halves
    found = fidelity(ours.split(64), theirs.split(100), extractor=pooling, options=SMALL).values
    (a, logits), (b, _) = pooling(ours), pooling(theirs)
    sides = [fid_features_to_statistics(side.double()) for side in (a, b)]
    expected_fid = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    expected_kid = kid_features_to_metric(a, b, kid_subset_size=50, verbose=False)
    expected_is = isc_features_to_metric(logits, 10, True, 2020)
    expected_prc = prc_features_to_metric(a, b, verbose=False)
    assert found["fid"] == pytest.approx(expected_fid, abs=1e-9)
    assert found["kid_mean"] == pytest.approx(expected_kid["kernel_inception_distance_mean"], abs=1e-12)
    assert found["kid_std"] == pytest.approx(expected_kid["kernel_inception_distance_std"], abs=1e-12)
    assert found["is_mean"] == pytest.approx(expected_is["inception_score_mean"], abs=1e-12)
    assert (found["precision"], found["recall"]) == (expected_prc["precision"], expected_prc["recall"])
    assert 0.3 < found["precision"] < 1
    assert found["fid"] > 0


def test_batch_size_and_order_do_not_matter(halves, pooling):
    ours, theirs = halves
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    found = [
        fidelity(images.split(size), theirs.split(64), extractor=pooling).values["fid"]
        for images, size in [(ours, 256), (ours, 7), (ours[order], 64)]
    ]
    assert max(found) - min(found) < 1e-6


def test_a_set_with_itself_is_zero(halves, pooling):
    assert abs(fidelity([halves[0]], [halves[0]], extractor=pooling).values["fid"]) < 1e-3


def test_more_noise_is_further_away(halves, pooling):
    ours, theirs = halves
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(ours.shape, generator=generator)
    reference = measure([theirs], pooling, METRICS)
    values = [
        compare(measure([(ours + s * noise).clamp(0, 255).to(torch.uint8)], pooling, METRICS), reference, SMALL).values
        for s in (0, 200, 800)
    ]
    assert values[0]["fid"] < values[1]["fid"] < values[2]["fid"]
    assert values[0]["kid_mean"] < values[1]["kid_mean"] < values[2]["kid_mean"]


def test_total_takes_the_first_images(halves, pooling):
    found = fidelity(iter(halves[0].split(64)), [halves[1]], extractor=pooling, total=100)
    expected = fidelity([halves[0][:100]], [halves[1]], extractor=pooling)
    assert found.source["images"] == 100
    assert found.values["fid"] == pytest.approx(expected.values["fid"], abs=1e-9)


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_folder_tensors_and_statistics_agree(folder, halves, pooling, tmp_path_factory):
    reference = [halves[1]]
    from_folder = fidelity(folder, reference, extractor=pooling)
    saved = save_statistics(tmp_path_factory.mktemp("s") / "ours.npz", measure([halves[0][:20]], pooling).statistics)
    assert from_folder.source == {**from_folder.source, "name": folder.name, "images": 20}
    assert fidelity(saved, reference, extractor=pooling).values == pytest.approx(from_folder.values, abs=1e-9)


def test_saved_features_serve_every_metric(halves, pooling, tmp_path):
    options = FidelityOptions(metrics=("fid", "kid", "prc"), kid_subset_size=10)
    direct = fidelity([halves[0]], [halves[1]], extractor=pooling, options=options)
    saved = []
    for name, half in zip(("ours", "real"), halves, strict=True):
        found = measure([half], pooling, ("fid", "kid"))
        saved.append(save_statistics(tmp_path / f"{name}.npz", found.statistics, found.features))
    again = fidelity(saved[0], saved[1], options=options)  # without the network
    assert not again.not_measured
    assert again.values == pytest.approx(direct.values, abs=1e-9)


def test_a_data_set_by_split(cifar512, halves, pooling):
    found = measure(cifar512, pooling, split="train", total=40, batch_size=16)
    assert found.name == "cifar512 (train)"
    assert found.statistics.n == 40
    with pytest.raises(DigitError, match="no split 'test'"):
        measure(cifar512, pooling, split="test")


def test_the_grid_of_a_generation_is_left_out(folder, pooling):
    Image.new("RGB", (320, 320)).save(folder / "grid.png")
    with pytest.raises(DigitError, match=r"different sizes: 32x32 at first, 320x320 in .*grid.png"):
        measure(folder, pooling)
    (folder / "000.png").rename(folder / "00000.png")
    assert measure(folder, pooling).statistics.n == 20


def test_grey_files_are_read_as_three_channels(tmp_path, pooling):
    for index in range(3):
        Image.new("L", (16, 16), 40 * index).save(tmp_path / f"{index}.png")
    batches, count = dataset_batches(tmp_path, None, 8)
    images = next(batches)
    assert count == 3
    assert images.shape == (3, 3, 16, 16)
    assert images[2].unique().tolist() == [80]


def test_mixed_sizes_between_batches(halves, pooling):
    with pytest.raises(DigitError, match="different sizes: 32x32 at first, 30x16 in image 64"):
        measure([halves[0][:64], halves[0][:64, :, :16, :30]], pooling)


def test_an_empty_folder_is_explained(tmp_path, pooling):
    with pytest.raises(DigitError, match="no image in the folder"):
        measure(tmp_path, pooling)


def test_fewer_than_two_images(halves, pooling):
    with pytest.raises(DigitError, match=r"1 image\(s\) were given"):
        fidelity([halves[0][:1]], [halves[1]], extractor=pooling)


# ---- what cannot be measured -----------------------------------------------------------------------------------------


def test_statistics_serve_fid_alone(halves, pooling, pooling_without_head):
    reference = measure([halves[1]], pooling).statistics
    result = fidelity([halves[0]], reference, extractor=pooling_without_head, options=SMALL)
    assert set(result.values) == {"fid"}
    assert "needs the features of every image" in result.not_measured["kid"]
    assert "needs the features of every image" in result.not_measured["prc"]
    assert result.not_measured["isc"].startswith("not measured: the weights in use have no classifier head")
    assert json.loads(json.dumps(result.to_dict()))["not_measured"] == result.not_measured


def test_what_was_not_kept_is_said(halves, pooling):
    ours, theirs = (measure([images], pooling) for images in halves)
    reasons = compare(ours, theirs, SMALL).not_measured
    assert "measured without keeping features" in reasons["kid"]
    assert "measured without keeping logits; ask for isc" in reasons["isc"]


def test_saved_source_has_no_inception_score(halves, pooling):
    saved = measure([halves[0]], pooling).statistics
    result = fidelity(saved, None, options=FidelityOptions(metrics=("isc",)))
    assert "the Inception Score needs the images" in result.not_measured["isc"]


def test_inception_score_needs_no_reference(halves, pooling):
    result = fidelity([halves[0]], None, extractor=pooling, options=FidelityOptions(metrics=("isc",)))
    assert result.values["is_mean"] > 1
    assert result.reference is None


def test_too_few_images_for_each_metric(halves, pooling):
    options = FidelityOptions(metrics=METRICS)
    few = fidelity([halves[0][:3]], [halves[1]], extractor=pooling, options=options)
    assert "KID draws subsets of 1000 images and the source images has 3" in few.not_measured["kid"]
    assert "look at 3 neighbours of each image" in few.not_measured["prc"]
    assert "averages 10 parts and there are 3 images" in few.not_measured["isc"]
    assert any("3 images: a covariance of 48 features" in note for note in few.notes)


def test_another_feature_width_is_found_before_the_long_part(pooling):
    def never():
        raise AssertionError("images were read before the reference was checked")
        yield

    reference = FeatureStatistics(np.zeros(2048), np.eye(2048), 10)
    with pytest.raises(DigitError, match="features of width 2048, the images' have 48"):
        fidelity(never(), reference, extractor=pooling)


def test_other_weights_are_noted(halves, pooling):
    made = measure([halves[1]], pooling).statistics
    other = FeatureStatistics(made.mu, made.sigma, made.n, {**made.metadata, "weights_sha256": "f" * 64})
    assert any(
        "different InceptionV3 weights" in note for note in fidelity([halves[0]], other, extractor=pooling).notes
    )
    unknown = FeatureStatistics(made.mu, made.sigma, None, {})
    notes = fidelity([halves[0]], unknown, extractor=pooling, reference_name="adm").notes
    assert "The reference adm does not say how many images it was made from." in notes
    assert "The reference adm does not say which InceptionV3 weights made it." in notes
    assert not fidelity([halves[0]], made, extractor=pooling).notes


@pytest.mark.parametrize(
    ("metrics", "sentence"), [((), "No metric was asked for"), (("fdd",), "metrics fdd were asked for")]
)
def test_unknown_metrics(metrics, sentence, pooling):
    with pytest.raises(DigitError, match=sentence):
        fidelity([], [], extractor=pooling, options=FidelityOptions(metrics=metrics))


def test_a_result_names_everything(halves, pooling):
    result = fidelity(
        [halves[0]], [halves[1]], extractor=pooling, source_name="ours", reference_name="CIFAR-10"
    ).to_dict()
    assert result["tool"].startswith("torch-fidelity 0.")
    assert result["weights"] == {"source": "pooling", "sha256": "0" * 64}
    assert (result["source"]["name"], result["source"]["images"]) == ("ours", 256)
    assert (result["reference"]["name"], result["reference"]["images"]) == ("CIFAR-10", 256)
    assert "299 x 299" in result["preprocessing"]
    assert result["options"]["kid_subset_size"] == 1000


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command_on_saved_statistics(tmp_path, halves, pooling):
    for name, images in zip(("a", "b"), halves, strict=True):
        save_statistics(tmp_path / f"{name}.npz", measure([images], pooling).statistics)
    arguments = [
        str(tmp_path / "a.npz"),
        "--reference",
        str(tmp_path / "b.npz"),
        "--kid",
        "--out",
        str(tmp_path / "r.json"),
    ]
    done = CliRunner().invoke(app, ["fidelity", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert f"{written['values']['fid']:.4f}" in done.output
    assert "not measured: the source a.npz is saved statistics" in done.output
    assert "b.npz: 256 images" in done.output


def test_commands_from_images_to_fid(tmp_path, folder, random_inception):
    """The real network with random weights, from a folder to statistics and back to a distance of zero."""
    torch.save(random_inception.tensors, tmp_path / "weights.pth")
    (tmp_path / "weights.pth").rename(weights := folder.parent / "weights.pth")
    common = ["--num", "2", "--weights", str(weights), "--backend", "torch"]
    made = CliRunner().invoke(app, ["statistics", str(folder), "--out", str(folder.parent / "s.npz"), *common])
    assert made.exit_code == 0, made.output
    statistics = load_statistics(folder.parent / "s.npz")
    assert statistics.n == 2
    assert statistics.metadata["weights_sha256"] == random_inception.sha256
    arguments = [str(folder), "--no-fid", "--isc", "--out", str(folder.parent / "r.json"), *common]
    done = CliRunner().invoke(app, ["fidelity", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "there are 2 images" in done.output


# ---- against the real weights ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_fid_agrees_with_torch_fidelitys_own_path(halves, users_cache, tmp_path):
    """torch-fidelity from files to FID, against our path with both backends, on the same photographs."""
    import torch_fidelity

    weights = load_inception("auto")
    network = TorchExtractor(weights).network
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    sides = []
    for side, images in enumerate(halves):
        (tmp_path / str(side)).mkdir()
        sides.append(images[:64])
        for index, image in enumerate(sides[-1]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / str(side) / f"{index:03d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "0"),
        input2=str(tmp_path / "1"),
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        cuda=False,
        fid=True,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    ours = fidelity(tmp_path / "0", tmp_path / "1", extractor=TorchExtractor(weights)).values["fid"]
    faster = fidelity(tmp_path / "0", tmp_path / "1", extractor=OnnxExtractor(weights)).values["fid"]
    print(f"torch-fidelity {expected:.6f}, ours with torch {ours:.6f}, with ONNX Runtime {faster:.6f}")
    assert expected > 10
    assert ours == pytest.approx(expected, abs=1e-4)
    assert faster == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(10800)
def test_cifar10_test_against_train_is_the_literatures_value(users_cache):
    """FID(CIFAR-10 test, 10k; train, 50k) = 3.15 in the literature, 3.1508 with these weights."""
    reference = SHARED / "stats" / "cifar10_train_inception.npz"
    data = Path(os.environ.get("DIGIT_CIFAR10") or Path(__file__).parents[3] / "data" / "cifar10")
    for path, name in ((reference, "DIGIT_SHARED"), (data, "DIGIT_CIFAR10")):
        if not path.exists():
            pytest.skip(f"{path} is not here; set {name}, or make the data with: digit data cifar10 --out data/cifar10")
    result = fidelity(data, reference, source_split="test", extractor=OnnxExtractor(load_inception("auto")))
    assert result.source["images"] == 10_000
    assert result.values["fid"] == pytest.approx(3.1508, abs=1e-3)
