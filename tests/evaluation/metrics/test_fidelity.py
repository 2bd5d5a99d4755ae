import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.errors import DigitError
from digit.core.transforms import Transform, build_transform
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.features import dataset_batches, measure, packaged_statistics
from digit.evaluation.metrics.fidelity import METRICS, FidelityOptions, compare, fid_infinity, fidelity
from digit.evaluation.metrics.inception import OnnxExtractor, TorchExtractor, load_inception, untrained
from digit.evaluation.metrics.statistics import (
    FeatureSet,
    FeatureStatistics,
    load_set,
    save_statistics,
)
from digit.pipeline.image_array import write_image_array

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
    (a, logits, _), (b, _, _) = pooling(ours), pooling(theirs)
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


def test_sfid_and_adms_inception_score_are_their_definitions(halves, pooling, monkeypatch):
    """The distance of two Gaussians (Dowson and Landau 1982) by scipy's matrix root, on spatial features; exp of the
    mean KL divergence (Salimans et al. 2016), over parts of the images in order, as openai/guided-diffusion at 1b61a43
    has them.
    """
    monkeypatch.setattr("digit.evaluation.metrics.fidelity.ADM_SPLIT", 100)
    found = fidelity([halves[0]], [halves[1]], extractor=pooling, options=SMALL).values
    a, b = (pooling(half).spatial.double().numpy() for half in halves)
    ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert found["sfid"] == pytest.approx(expected, abs=1e-8)
    assert found["sfid"] != pytest.approx(found["fid"], rel=0.1)
    chances = scipy.special.softmax(pooling(halves[0]).logits.double().numpy(), axis=1)
    scores = []
    for part in (chances[:100], chances[100:200], chances[200:]):
        scores.append(np.exp(np.mean([scipy.stats.entropy(p, part.mean(0)) for p in part])))
    assert found["is_adm"] == pytest.approx(np.mean(scores), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_fid_infinity_of_gaussians_is_the_known_distance(shift):
    """FID of few samples is too high; the extrapolation comes near the distance of the Gaussians that they are drawn
    from.
    """
    rng, width = np.random.default_rng(0), 40
    root = rng.standard_normal((width, width)) / 6
    sigma, mu = root @ root.T, np.zeros(width)
    true, found, plain = shift**2, [], []
    for seed in range(4):
        rows = rng.standard_normal((600, width)) @ root.T
        rows[:, 0] += shift
        found.append(fid_infinity(torch.from_numpy(rows).float(), FeatureStatistics(mu, sigma, None), seed))
        side = FeatureSet("rows", FeatureStatistics(rows.mean(0), np.cov(rows, rowvar=False), 600))
        reference = FeatureSet("all", FeatureStatistics(mu, sigma, None))
        plain.append(compare(side, reference, FidelityOptions()).values["fid"])
    assert np.mean(plain) > true + 0.4
    assert np.mean(found) == pytest.approx(true, abs=0.1)


def test_fid_of_few_images_stands_beside_its_extrapolation(halves, pooling):
    result = fidelity([halves[0]], [halves[1]], extractor=pooling)
    assert result.values.keys() == {"fid", "fid_infinity"}
    assert result.values["fid_infinity"] < result.values["fid"]
    assert [row[""] for row in result.rows()][:2] == ["FID ↓", "FID∞ ↓"]
    assert any("extrapolated from 256 images" in note for note in result.notes)
    many = measure([halves[0].repeat(40, 1, 1, 1)], pooling)
    assert many.features is None
    assert compare(many, measure([halves[1]], pooling), FidelityOptions()).values.keys() == {"fid"}


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
    from_saved = fidelity(saved, reference, extractor=pooling)
    assert from_saved.values["fid"] == pytest.approx(from_folder.values["fid"], abs=1e-9)


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
    found = measure(cifar512, pooling, split="train", total=40, batch_size=16, cache=True)
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
    images = next(dataset_batches(open_dataset(tmp_path), 8))
    assert images.shape == (3, 3, 16, 16)
    assert images[2].unique().tolist() == [80]


def test_images_of_any_size_are_resized_where_asked(tmp_path, pooling):
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30 + i, 3), dtype=np.uint8)) for i in (0, 1)
    ]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    for filter in ("bicubic", "bilinear"):
        found = measure(tmp_path, pooling, size=16, filter=filter).statistics
        cut = [build_transform(Transform(size=16, filter=filter))(image, np.random.default_rng(0)) for image in images]
        expected = torch.from_numpy(np.stack([np.asarray(image) for image in cut])).permute(0, 3, 1, 2)
        np.testing.assert_allclose(found.mu, pooling(expected).features.double().mean(0), atol=1e-6)
        assert (found.metadata["filter"], found.metadata["image_size"]) == (filter, [16, 16])


def test_an_array_of_images_is_measured_as_the_images(folder, halves, pooling, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "images.npz"
    about = {
        "model": "tiny",
        "num": 20,
        "labelling": "balanced, 2 a class",
        "settings": {"cfg_scale": 1.5},
        "decoder": "ar",
    }
    write_image_array(path, halves[0][:20].permute(0, 2, 3, 1).numpy(), 20, about)
    options = FidelityOptions(metrics=("fid", "sfid", "isc", "prc"), batch_size=7)
    of_array, of_files = (fidelity(x, [halves[1]], extractor=pooling, options=options) for x in (path, folder))
    assert of_array.values == pytest.approx(of_files.values, abs=1e-6)
    assert of_array.sampling["labels"] == "balanced, 2 a class"
    for said in (
        "20 generated images",
        "cfg_scale 1.5",
        "ar decoder",
        "labels balanced, 2 a class",
        "feature network",
    ):
        assert said in of_array.provenance()
    (folder / "generation.json").write_text(json.dumps({**about, "labels": list(range(10))}))
    assert fidelity(folder, [halves[1]], extractor=pooling).sampling == of_array.sampling


def test_adms_reference_serves_all_of_its_metrics(halves, pooling, tmp_path):
    """Statistics of many images, and some of the images themselves, from which precision and recall come."""
    many = measure([halves[1]], pooling, ("sfid",))
    sides = {"mu": many.statistics, "mu_s": many.spatial}
    arrays = {name: s.mu for name, s in sides.items()} | {
        name.replace("mu", "sigma"): s.sigma for name, s in sides.items()
    }
    np.savez(tmp_path / "adm.npz", arr_0=halves[1][:100].permute(0, 2, 3, 1).numpy(), **arrays)
    options = FidelityOptions(metrics=("fid", "sfid", "isc", "prc"))
    found = fidelity([halves[0]], tmp_path / "adm.npz", extractor=pooling, options=options)
    whole, part = (fidelity([halves[0]], [x], extractor=pooling, options=options) for x in (halves[1], halves[1][:100]))
    assert not found.not_measured
    for name, value in found.values.items():
        assert value == pytest.approx(
            (part if name in ("precision", "recall", "f_score") else whole).values[name], abs=1e-9
        )


def test_reference_statistics_are_kept_by_content_and_network(folder, halves, pooling, monkeypatch):
    """The second time the real images are not read; another network, or an image more, is another reference."""
    first = fidelity([halves[0]], folder, extractor=pooling).values
    with monkeypatch.context() as patch:
        patch.setattr("digit.evaluation.metrics.features.dataset_batches", lambda *_: pytest.fail("read again"))
        again = fidelity([halves[0]], folder, extractor=pooling)
        assert again.values == pytest.approx(first, abs=1e-12)
        assert again.reference["name"] == folder.name
        with pytest.raises(pytest.fail.Exception, match="read again"):
            fidelity([halves[0]], folder, extractor=pooling, reference_total=10)
    assert fidelity([halves[0]], folder, extractor=pooling, reference_total=10).reference["images"] == 10
    Image.new("RGB", (32, 32), "red").save(folder / "more.png")
    assert fidelity([halves[0]], folder, extractor=pooling).reference["images"] == 21


def test_the_number_limits_the_generated_side_alone(folder, halves, pooling):
    found = fidelity([halves[0]], folder, extractor=pooling, total=12)
    assert (found.source["images"], found.reference["images"]) == (12, 20)


def test_part_of_a_reference_is_spread_over_it(cifar512, pooling):
    pixels = torch.from_numpy(open_dataset(cifar512).arrays()[0]).permute(0, 3, 1, 2)
    found = measure(cifar512, pooling, total=64, spread=True).statistics
    np.testing.assert_allclose(found.mu, pooling(pixels[::8]).features.double().mean(0), atol=1e-6)
    with pytest.raises(DigitError, match="saved statistics cannot be divided"):
        measure("cifar10-train", None, total=10)


def test_cifar10s_statistics_come_with_the_package():
    found = measure("cifar10-train", None)
    assert (found.statistics.n, found.statistics.mu.shape) == (50_000, (2048,))
    assert found.statistics.metadata["weights_sha256"].startswith("5b79bf1ba01d")
    assert packaged_statistics()["cifar10-train"].stat().st_size < 4.5e6
    original = SHARED / "stats" / "cifar10_train_inception.npz"
    if original.is_file():  # the exact covariance, 34 MB, is not in the repository
        exact = load_set(original).statistics
        assert np.abs(found.statistics.sigma - exact.sigma).max() < 2e-5
        assert np.abs(found.statistics.mu - exact.mu).max() < 1e-6


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
    assert set(result.values) == {"fid", "fid_infinity"}
    assert "has no spatial statistics (mu_s, sigma_s)" in result.not_measured["sfid"]
    assert "needs the features of every image" in result.not_measured["kid"]
    assert "needs the features of every image" in result.not_measured["prc"]
    assert result.not_measured["isc"].startswith("not measured: the weights in use have no classifier head")
    assert json.loads(json.dumps(result.to_dict()))["not_measured"] == result.not_measured


def test_what_was_not_kept_is_said(halves, pooling):
    ours, theirs = (measure([images], pooling, ()) for images in halves)
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
    assert [note[:4] for note in fidelity([halves[0]], made, extractor=pooling).notes] == ["FID∞"]


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
    files = [tmp_path / name for name in ("a.npz", "b.npz", "r.json")]
    command = "evaluate fidelity {} --reference {} --kid --out {}".format(*files)
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "200"})
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
    made = CliRunner().invoke(
        app, ["evaluate", "statistics", str(folder), "--out", str(folder.parent / "s.npz"), *common]
    )
    assert made.exit_code == 0, made.output
    statistics = load_set(folder.parent / "s.npz").statistics
    assert statistics.n == 2
    assert statistics.metadata["weights_sha256"] == random_inception.sha256
    arguments = [str(folder), "--no-fid", "--isc", "--out", str(folder.parent / "r.json"), *common]
    done = CliRunner().invoke(app, ["evaluate", "fidelity", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "there are 2 images" in done.output


# ---- against the real weights ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_fid_agrees_with_torch_fidelitys_own_path(halves, users_cache, tmp_path):
    """torch-fidelity from files to FID, against our path with both backends, on the same photographs."""
    import torch_fidelity

    weights = load_inception("auto")
    torch.save({**untrained(["2048"]).state_dict(), **weights.tensors}, tmp_path / "weights.pth")
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
def test_cifar10_test_against_train_is_the_literatures_value(users_cache, tmp_path):
    """FID(CIFAR-10 test, 10k; train, 50k) = 3.15 in the literature, 3.1508 with these weights. The images in one array
    give the same, and the packaged statistics of the training images nearly so.
    """
    reference = SHARED / "stats" / "cifar10_train_inception.npz"
    data = Path(os.environ.get("DIGIT_CIFAR10") or Path(__file__).parents[3] / "data" / "cifar10")
    for path, name in ((reference, "DIGIT_SHARED"), (data, "DIGIT_CIFAR10")):
        if not path.exists():
            pytest.skip(f"{path} is not here; set {name}, or make the data with: digit data cifar10 --out data/cifar10")
    images, extractor = open_dataset(data, "test"), OnnxExtractor(load_inception("auto"))
    write_image_array(tmp_path / "test.npz", (np.asarray(images[i].image) for i in range(10_000)), 10_000)
    theirs, compact = load_set(reference), measure("cifar10-train", None)
    sides = [measure(source, extractor, split="test") for source in (tmp_path / "test.npz", data)]
    array, files, packaged = (
        compare(side, real, FidelityOptions()).values["fid"]
        for side, real in ((sides[0], theirs), (sides[1], theirs), (sides[0], compact))
    )
    assert sides[0].statistics.n == 10_000
    assert array == pytest.approx(3.1508, abs=1e-3)
    assert array == pytest.approx(files, abs=1e-6)
    assert packaged == pytest.approx(array, abs=2e-4)
