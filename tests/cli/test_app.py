"""The command line as a user meets it: real commands on a tiny model; mistakes get one sentence and exit code 2."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

import tiny
from digit import DigitPipeline
from digit.cli.app import app
from terminal import run


def test_generate_decode_and_reconstruct(model, photo, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert run(monkeypatch, f"generate {model} --num 4 --labels cat,2 --out {out} --save-tokens --cfg-scale 2") == 0
    assert "Look at" in capsys.readouterr().out
    assert json.loads((out / "generation.json").read_text())["labels"] == [0, 2]
    assert len(list(out.glob("0000?.png"))) == 4

    assert run(monkeypatch, "decode", model, out / "tokens.npz", "--out", tmp_path / "again") == 0
    for index in range(4):
        name = f"{index:05d}.png"
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), "the same seed decodes alike"

    assert run(monkeypatch, "tokenize", model, photo, "--out", tmp_path / "photo.npz") == 0
    with np.load(tmp_path / "photo.npz") as arrays:
        assert arrays["semantic"].shape == arrays["vq"].shape == (1, tiny.TOKENS)

    assert run(monkeypatch, "reconstruct", model, photo, "--out", tmp_path / "re") == 0
    sheet = Image.open(tmp_path / "re" / "reconstructions.png")
    assert sheet.width > 4 * tiny.SIZE
    assert (tmp_path / "re" / "photo.png").is_file()


def test_assemble_sets_defaults_and_halves_the_weights(model, tmp_path, monkeypatch, capsys):
    defaults = "--default prior.cfg_scale=1.5 --default ar.top_p=0.9 --default-decoder masked"
    assert run(monkeypatch, f"assemble --base {model} {defaults} --dtype fp16 --out {tmp_path / 'small'}") == 0
    pipe = DigitPipeline.from_pretrained(tmp_path / "small")
    assert (pipe.settings["prior"].cfg_scale, pipe.settings["ar"].top_p, pipe.default_decoder) == (1.5, 0.9, "masked")
    before, after = (Path(p) / "prior" / "model.safetensors" for p in (model, tmp_path / "small"))
    assert after.stat().st_size < 0.7 * before.stat().st_size
    for wrong in ("cfg_scale=1.5", "onepass.top_k=3", "prior.top_q=3"):
        assert run(monkeypatch, "assemble", "--base", model, "--default", wrong, "--out", tmp_path / "no") == 2
        assert wrong.rpartition(".")[2].partition("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_assemble_joins_saved_parts(model, tmp_path, monkeypatch, capsys):
    words = [f"--{part}={model / part}" for part in ("encoder", "codebook", "vqgan", "prior")]
    words += ["--decoder", model / "decoder" / "ar", "--decoder", model / "decoder" / "masked"]
    assert run(monkeypatch, "assemble", *words, "--class-names", "a,b,c", "--out", tmp_path / "new") == 0
    assert run(monkeypatch, "generate", tmp_path / "new", "--num", 2, "--labels", "c", "--out", tmp_path / "o") == 0
    assert run(monkeypatch, "info", tmp_path / "new") == 0
    assert "prior" in capsys.readouterr().out
    assert DigitPipeline.from_pretrained(tmp_path / "new").name == "new", "without --name it is called as its folder"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "no/such/model/here"], "There is no model"),
        (["generate", "MODEL", "--labels", "7"], "The label 7 was given; this model knows 0 to 2"),
        (["generate", "MODEL", "--labels", "cow"],
        "'cow' is neither a number nor a class of this model; its classes: cat, dog"),
        (["generate", "MODEL", "--top-p", "1.7"], "top_p = 1.7: must be at most 1"),
        (["generate", "MODEL", "--decoder", "onestep"], "has no decoder 'onestep'"),
        (["generate", "MODEL", "--dtype", "fp8"], "expected one of: float32, bfloat16, float16, fp32, bf16, fp16"),
        (["generate", "MODEL", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["tokenize", "MODEL", "TMP/text.png"], "text.png is not an image"),
        (["tokenize", "MODEL", "TMP/missing.png"], "There is no image file"),
        (["reconstruct", "MODEL", "TMP/empty"], "holds no images"),
        (["decode", "MODEL", "TMP/text.png"],
        "is not a token file: expected the .npz of integer grids that digit tokenize writes."),
        (["decode", "MODEL", "TMP/wrong.npz"], "this model takes (B, 16)"),
        (["assemble", "--encoder", "MODEL/encoder", "--codebook", "TMP/book"],
        "feature width is 16 in the encoder and 5 in the codebook"),
        (["assemble", "--prior", "TMP/empty"], "is not a saved part"),
        (["train", "prior", "--preset", "cifar10-tiny-prior", "--data", "TMP/empty"], "empty"),
        (["data", "folder", "TMP/empty"], "empty"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_and_exit_code_2(model, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("not a picture")
    np.savez(tmp_path / "wrong.npz", semantic=np.zeros((1, 5), dtype=np.int32))
    tiny.codebook(5).save_pretrained(tmp_path / "book")
    words = [w.replace("MODEL", str(model)).replace("TMP", str(tmp_path)) for w in words]
    if words[0] not in ("tokenize",):
        words += ["--out", str(tmp_path / "out")]
    assert run(monkeypatch, *words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message.replace("TMP", str(tmp_path)) in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_sentence(model, tmp_path, monkeypatch, capsys):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert run(monkeypatch, "generate", model, "--num", 1, "--out", tmp_path / "out") == 2
    assert "the disk is full" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").glob("*.png"))


def test_ctrl_c_in_generate_says_how_to_go_on(model, tmp_path, monkeypatch, capsys):
    """The interrupt is a real one, while the third image is written."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    write, seen = Path.write_bytes, []

    def stop(self, data):
        seen.append(self)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return write(self, data)

    words = ["generate", model, "--num", 6, "--batch-size", 2, "--device", "cpu", "--out", tmp_path / "o"]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", stop)
        assert run(patched, *words) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert f"finished images are in {tmp_path / 'o'}. The same command makes the rest: digit generate" in said
    assert run(monkeypatch, *words) == 0
    assert len(list((tmp_path / "o").glob("0000?.png"))) == 6


def test_debug_shows_the_traceback(monkeypatch, capsys):
    assert run(monkeypatch, "--debug", "generate", "no/such/model/here") == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = "import sys, digit.cli.app; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_has_help(monkeypatch, capsys):
    names = typer.main.get_command(app).commands
    known = "generate tokenize decode reconstruct train fit-codebook cache-tokens info tour"
    assert set(known.split()) <= names.keys()
    for name in names:
        assert run(monkeypatch, name, "--help") == 0
        assert "Usage" in capsys.readouterr().out


def test_tokens_on_another_dtype_are_still_tokens(model, tmp_path, monkeypatch):
    assert run(monkeypatch, "generate", model, "--num", 2, "--dtype", "bf16", "--out", tmp_path / "o") == 0
    assert Image.open(tmp_path / "o" / "00000.png").size == (tiny.SIZE, tiny.SIZE)
