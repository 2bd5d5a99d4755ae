"""A model with a one-pass decoder and no VQGAN, from training to editing, as a user types it."""

import numpy as np
from PIL import Image

import tiny
from digit import DigitPipeline
from terminal import run

SMALL = (
    "model.transformer={dim: 32, depth: 1, heads: 2, causal: false}",
    "model.pixels={resolution: 32, widths: [8, 8], patch: 4}",
    "data.held_out_split=null", "training.steps=2", "training.batch_size=8", "training.sample_every=2",
    "objective.gan_start=0",
)  # fmt: skip


def test_from_training_to_images(cifar512, photo, tmp_path, monkeypatch, capsys):
    lean = tiny.pipeline().with_parts(decoders={}, vqgan=None)
    base = lean.save_pretrained(tmp_path / "base")
    words = [word for change in SMALL for word in ("--set", change)]
    train = ["train", "decoder", "--preset", "cifar10-tiny-onepass", "--data", cifar512, "--model", base, *words]
    assert run(monkeypatch, *train, "--device", "cpu", "--out", tmp_path / "run") == 0
    assert run(monkeypatch, "assemble", "--base", base, "--decoder", tmp_path / "run", "--out", tmp_path / "model") == 0
    model, pictures = tmp_path / "model", tmp_path / "pictures"
    assert not (model / "vqgan").exists()

    made = ["generate", model, "--num", 3, "--decoder", "onepass", "--save-tokens", "--out", pictures]
    assert run(monkeypatch, *made) == 0
    assert run(monkeypatch, "decode", model, pictures / "tokens.npz", "--out", tmp_path / "again") == 0
    for index in range(3):
        pair = [np.asarray(Image.open(f / f"{index:05d}.png")).astype(int) for f in (pictures, tmp_path / "again")]
        assert abs(pair[0] - pair[1]).max() <= 1, "the same seed decodes alike, but for the rounding of another batch"

    assert run(monkeypatch, "reconstruct", model, photo, "--out", tmp_path / "re") == 0
    assert Image.open(tmp_path / "re" / "photo.png").size == (32, 32)
    assert run(monkeypatch, "edit", model, photo, "--prefix", 2, "--num", 2, "--out", tmp_path / "edits") == 0
    assert run(monkeypatch, "tokenize", model, photo, "--out", tmp_path / "photo.npz") == 0
    assert run(monkeypatch, "info", model) == 0
    assert "in one pass" in capsys.readouterr().out

    samples = f"--from {tmp_path / 'run'} --set data.samples={pictures / 'tokens.npz'} --out {tmp_path / 'post'}"
    assert run(monkeypatch, *train, "--device", "cpu", *samples.split()) == 0
    assert list(DigitPipeline.from_pretrained(model).decoders) == ["onepass"]


def test_what_is_missing_is_said(cifar512, tmp_path, monkeypatch, capsys):
    words = ["train", "decoder", "--preset", "cifar10-tiny-onepass", "--data", cifar512, "--out", tmp_path / "run"]
    assert run(monkeypatch, *words) == 2
    assert "with --model" in " ".join(capsys.readouterr().err.split())
    base = tiny.pipeline().with_parts(vqgan=None).save_pretrained(tmp_path / "base")
    assert run(monkeypatch, "generate", base, "--decoder", "ar", "--num", 1, "--out", tmp_path / "out") == 2
    assert "has no vqgan" in capsys.readouterr().err
