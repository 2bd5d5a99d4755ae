"""Every command of digit evaluate for models, end to end: the terminal, result.json, plots."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.errors import DigitError
from digit.core.files import write_tensors
from digit.core.images import save_png
from digit.data.dataset import open_dataset
from digit.pipeline.generation import generate_folder
from digit.pipeline.pipeline import DigitPipeline


@pytest.fixture
def run(monkeypatch):
    """Run a command; errors for users come out as they are."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(command):
        result = CliRunner().invoke(app, ["evaluate", *command.split()])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return call


@pytest.fixture(scope="session")
def weights(random_inception, tmp_path_factory):
    return write_tensors(tmp_path_factory.mktemp("inception") / "random.safetensors", random_inception.tensors)


def read(folder, kind):
    result = json.loads((folder / "result.json").read_text())
    assert result["kind"] == kind
    assert result["hardware"]["cores"] >= 1
    assert {"digit-ar", "torch", "python"} <= result["versions"].keys()
    assert result["seconds"] > 0
    for plot in result["plots"]:
        assert min(Image.open(folder / plot).size) > 300
    return result


def test_stability(run, model_folder, cifar512, tmp_path):
    text = run(f"stability {model_folder} --data {cifar512} --num 24 --out {tmp_path} --signal variance --no-clip")
    result = read(tmp_path, "stability")
    assert result["settings"]["noise"] == {"signal": "variance", "clip": False, "seed": 0}
    assert result["data"] | {"fingerprint": ""} == {
        "name": "cifar512", "path": None, "split": "train", "images": 24, "filter": "none", "fingerprint": ""
    }  # fmt: skip
    assert result["plots"] == ["stability.png"]
    assert "noise at 0.01 dB" in text
    assert "0.721" in text  # the paper's column
    assert "against the variance of each image's pixels in 0..1; not clipped" in text


def test_stability_with_own_levels(run, model_folder, cifar512, tmp_path):
    run(f"stability {model_folder} --data {cifar512} -n 8 --snr 12,3 --noise-only -o {tmp_path}")
    assert {row["level"] for row in read(tmp_path, "stability")["values"]} == {12, 3}
    with pytest.raises(DigitError, match="--snr twelve"):
        run(f"stability {model_folder} --data {cifar512} --snr twelve")
    with pytest.raises(DigitError, match="signal"):
        run(f"stability {model_folder} --data {cifar512} --signal loudness")


def test_probe_and_a_second_learning_rate_from_kept_features(run, model_folder, cifar512, tmp_path, monkeypatch):
    words = f"probe {model_folder} --data {cifar512} --holdout 0.25 --epochs 5 --out {tmp_path}"
    text = run(words)
    assert "state 0 (embedding)" in text
    result = read(tmp_path, "probe")
    assert [layer["state"] for layer in result["values"]["layers"]] == [0, 1]
    monkeypatch.setattr("digit.evaluation.metrics.probe.collect_features", lambda *_: pytest.fail("features were kept"))
    run(f"{words} --layers all --lr 0.1,4 --no-encoder")
    result = read(tmp_path, "probe")
    assert [layer["state"] for layer in result["values"]["layers"]] == [0, 1, 2]
    assert result["values"]["layers"][0]["by_lr"].keys() == {"0.1", "4.0"}
    assert result["values"]["encoder"] is None


def test_probe_says_what_to_do_without_a_test_split(run, model_folder, cifar512, tmp_path):
    with pytest.raises(DigitError, match=r"no split 'test'.*give --holdout"):
        run(f"probe {model_folder} --data {cifar512} --out {tmp_path}")


def test_probe_by_the_authors_preset(run, model_folder, cifar512, tmp_path):
    words = f"probe {model_folder} --data {cifar512} -n 40 --holdout 0.25 --out {tmp_path}"
    text = run(f"{words} --preset imagenet256-linear-probe --epochs 2")
    settings = read(tmp_path, "probe")["settings"]
    assert (settings["fresh_crops"], settings["epochs"], settings["lrs"], settings["seed"]) == (True, 2, [0.4], 1)
    assert "new random resized crops" in text


def test_reconstruction_without_networks(run, model_folder, cifar512, tmp_path):
    text = run(
        f"reconstruction {model_folder} --data {cifar512} --split train -n 12 --no-rfid --lpips none -o {tmp_path}"
    )
    result = read(tmp_path, "reconstruction")
    assert [set(row["values"]) for row in result["values"]] == [{"psnr", "ssim", "usage", "entropy"}] * 3
    assert "Codebook used" in text
    assert "semantic tokens, masked decoder" in text
    assert "not measured: left out by --no-rfid." in text


def test_screen(run, model_folder, cifar512, tmp_path):
    small = "--holdout 0.25 --steps 20 --dim 32 --depth 2 --device cpu"
    text = run(f"screen {model_folder} --clusters 3,12 --data {cifar512} {small} -o {tmp_path}")
    result = read(tmp_path, "screen")
    assert sorted(line["vocabulary"] for line in result["values"]) == [3, 12]
    assert "tiny, K = 12" in text


def test_tokens(run, model_folder, cifar512, tmp_path):
    given = f"--data {cifar512} --holdout 0.25 --num 128 -o {tmp_path} --device cpu"
    text = run(f"tokens {model_folder} {given} --clusters 4,6 --kinds kmeans,residual,fsq --depth 2")
    result = read(tmp_path, "screen")
    assert [line["vocabulary"] for line in sorted(result["values"], key=lambda v: v["name"])] == [4, 4, 4, 6, 6, 6]
    assert {line["tokens"] for line in result["values"] if "residual, depth 2" in line["name"]} == {32}
    assert "tiny, K = 6, fsq" in text
    assert "Bits saved/spent" in text
    run(f"tokens {model_folder} {given}")  # the model's own codebook
    assert [line["name"] for line in read(tmp_path, "screen")["values"]] == ["tiny, K = 12"]
    with pytest.raises(DigitError, match=r"sizes are not said; give --clusters"):
        run(f"tokens {model_folder} {given} --kinds fsq")
    with pytest.raises(DigitError, match=r"--kinds.*kind.*'lattice' was given|--kinds.*lattice"):
        run(f"tokens {model_folder} {given} --clusters 4 --kinds lattice")


def test_sweep_refuses_nonsense_before_it_works(run, model_folder, cifar512):
    with pytest.raises(DigitError, match="expected the form NAME"):
        run(f"sweep {model_folder} --reference {cifar512} --vary top_k")
    with pytest.raises(DigitError, match="--metrics fad"):
        run(f"sweep {model_folder} --reference {cifar512} --vary top_k=1 --metrics fad")
    with pytest.raises(DigitError, match="top_p"):
        run(f"sweep {model_folder} --reference {cifar512} --vary top_p=0.5,7 --weights /none.pth")
    with pytest.raises(DigitError, match="top_p"):
        run(f"prefix {model_folder} --data {cifar512} --split train --set top_p=7 --weights /none.pth")


def test_fidelity_of_a_model_needs_a_number(run, model_folder, cifar512):
    with pytest.raises(DigitError, match="give --num"):
        run(f"fidelity {model_folder} --reference {cifar512}")
    with pytest.raises(DigitError, match="is none"):
        run(f"fidelity {cifar512} --reference {cifar512} --set top_k=3")


@pytest.fixture
def network(pooling, monkeypatch):
    """A small network in place of InceptionV3."""
    monkeypatch.setattr("digit.evaluation.metrics.inception.open_extractor", lambda *_: pooling)


def test_an_array_of_images_as_adm_evaluates_it(run, model_folder, cifar512, network, tmp_path):
    """From the generator's file and the real images' statistics to every number of ADM's evaluator, labels named."""
    npz, pixels = tmp_path / "samples.npz", open_dataset(cifar512).arrays()[0]
    record = generate_folder(
        DigitPipeline.from_pretrained(str(model_folder)), tmp_path / "out", labels_per_class=3, npz=npz
    )
    run(f"statistics {cifar512} --out {tmp_path / 'real.npz'}")
    with np.load(tmp_path / "real.npz", allow_pickle=False) as arrays:
        statistics = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", arr_0=pixels[:100], **statistics)
    text = run(f"fidelity --images {npz} --reference {tmp_path / 'adm.npz'} --out {tmp_path / 'r.json'}")
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"fid", "sfid", "is_adm", "is_mean", "precision", "recall"} <= result["values"].keys()
    assert not result["not_measured"]
    assert record["num"] == result["source"]["images"] == 30
    for said in ("sFID ↓", "Inception Score as ADM", "Precision ↑", "Recall ↑", "labels balanced, 3 a class"):
        assert said in text
    run(f"fidelity {tmp_path / 'out'} --reference {tmp_path / 'adm.npz'} --sfid --out {tmp_path / 'f.json'}")
    files = json.loads((tmp_path / "f.json").read_text())
    assert files["values"]["fid"] == pytest.approx(result["values"]["fid"], abs=1e-6)
    with pytest.raises(DigitError, match="Give what is measured once"):
        run(f"fidelity {npz} --images {npz}")


def test_statistics_say_how_images_were_resized(run, cifar512, network, tmp_path):
    run(f"statistics {cifar512} --size 16 --filter bilinear --out {tmp_path / 's.npz'} --compact")
    text = run(f"fidelity {cifar512} --num 64 --reference {tmp_path / 's.npz'} --out {tmp_path / 'r.json'}")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["reference"]["filter"] == "bilinear"
    assert (result["source"]["images"], result["reference"]["images"]) == (64, 512)
    assert "resized with the bilinear filter" in text


def test_a_models_labels_are_balanced_or_random(run, model_folder, cifar512, network, tmp_path):
    for words, named in (
        ("--labels-per-class 2", "balanced, 2 a class"),
        ("--labels random --num 20", "random"),
    ):
        out = tmp_path / "r.json"
        text = run(f"fidelity {model_folder} {words} --reference {cifar512} --reference-num 64 --out {out}")
        result = json.loads(out.read_text())
        assert (result["source"]["images"], result["reference"]["images"]) == (20, 64)
        assert result["sampling"]["labels"] == named
        assert f"labels {named}" in text


# ---- through the real network's layout; minutes, for FID's square root of a 2048 x 2048 matrix
# ------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fidelity_straight_from_sampling(run, model_folder, pipe, cifar512, weights, tmp_path):
    """The same numbers as from the files that digit generate writes."""
    how = f"--reference {cifar512} --weights {weights} --backend torch --isc"
    run(f"fidelity {model_folder} --num 20 --seed 3 --set top_k=4 {how} --out {tmp_path / 'a.json'}")
    for number, picture in enumerate(pipe(labels=range(10), num=20, seed=3, top_k=4)):
        save_png(picture, tmp_path / "pictures" / f"{number:05d}.png")
    run(f"fidelity {tmp_path / 'pictures'} {how} --out {tmp_path / 'b.json'}")
    direct, files = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert direct["values"] == pytest.approx(files["values"], rel=1e-5)
    assert direct["sampling"]["settings"] == {"top_k": 4}
    assert direct["model"]["parts"]["prior"]["parameters"] > 0
    assert direct["source"]["name"] == "tiny"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sweep_prefix_and_reconstruction(run, model_folder, vq_pipe, cifar512, weights, tmp_path):
    folder = tmp_path / "images"
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        save_png(Image.fromarray(pixels), folder / f"{number}.png")
    network = f"--weights {weights} --backend torch"
    out = tmp_path / "sweep"
    words = f"sweep {model_folder} --reference {folder} --num 10 {network} --metrics isc,prc --out {out}"
    text = run(f"{words} --vary top_k=2,0 --vary decoder_top_p=0.5 --set temperature=0.9")
    result = read(out, "sweep")
    assert [p["prior_shared"] for p in result["values"]["points"]] == [False, False, True]
    assert result["plots"] == ["sweep.png"]
    assert "decoder top p 0.5" in text
    assert len((out / "sweep.csv").read_text().splitlines()) == 4

    baseline, out = vq_pipe.save_pretrained(tmp_path / "vq"), tmp_path / "prefix"
    words = f"prefix {model_folder} --baseline {baseline} --data {cifar512} --split train -n 8 {network}"
    run(f"{words} --reference {folder} --metrics prc --shares 0,1 --out {out}")
    result = read(out, "prefix")
    assert [(c["space"], [p["given"] for p in c["points"]]) for c in result["values"]] == [
        ("semantic", [0, 16]),
        ("vq", [0, 16]),
    ]

    out = tmp_path / "reconstruction"
    words = f"reconstruction {model_folder} --data {cifar512} --split train -n 8 {network} --lpips none"
    text = run(f"{words} --perturb --shares 0.9 --out {out}")
    result = read(out, "reconstruction")
    assert all("rfid" in row["values"] for row in result["values"])
    assert [row["space"] for row in result["settings"]["perturbation"]] == ["vq", "semantic"]
    assert "vq tokens, perturbed: pFID" in text
