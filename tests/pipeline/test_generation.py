"""Runs of generation: resumed after a kill, divided among processes, and never mixed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from digit.core.errors import DigitError
from digit.core.grids import GAP
from digit.pipeline import generation
from digit.pipeline.generation import generate_folder
from digit.pipeline.tokens import load_tokens_file
from digit.sampling.engines.acceleration import engine_cache, engine_name


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def reference(pipe, tmp_path_factory):
    """An undisturbed run of eleven pictures."""
    out = tmp_path_factory.mktemp("reference") / "out"
    return out, generate_folder(pipe, out, 11, [0, 1, 2], seed=4, batch_size=4, save_tokens=True, top_k=5)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".npz")}


def test_a_killed_run_goes_on_where_it_was(pipe, reference, tmp_path, monkeypatch):
    out, calls = tmp_path / "out", []
    sample = type(pipe).sample_tokens

    def killed(self, request):
        calls.append(list(request.images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, request)

    monkeypatch.setattr(type(pipe), "sample_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        generate_folder(pipe, out, 11, [0, 1, 2], seed=4, batch_size=4, save_tokens=True, top_k=5)
    assert json.loads((out / "generation.json").read_text())["finished"] is False
    assert not (out / "grid.png").exists()
    (out / "00002.png").unlink()  # one that was not written to its end
    record = generate_folder(pipe, out, 11, [0, 1, 2], seed=4, batch_size=3, save_tokens=True, top_k=5)
    assert calls[3:] == [[2, 8, 9], [10]]
    assert record["made"] == 4
    assert record["finished"]
    assert record["tokens_sha256"] == reference[1]["tokens_sha256"]
    assert files(out) == files(reference[0])
    assert not (out / ".run").exists()


def test_the_grid_has_a_row_for_each_class(pipe, tmp_path):
    named = pipe.with_parts(class_names=["cat", "dog", "cow"])
    generate_folder(named, tmp_path / "few", 7, [2, 0], seed=4)
    grid = np.asarray(Image.open(tmp_path / "few" / "grid.png"))
    scale = grid.shape[0] // (2 * tiny.SIZE)
    rows = [[0, 2, 4, 6], [1, 3, 5]]  # pictures of class 2, then of class 0
    for row, pictures in enumerate(rows):
        for column, number in enumerate(pictures):
            picture = np.asarray(Image.open(tmp_path / "few" / f"{number:05d}.png")).repeat(scale, 0).repeat(scale, 1)
            side = len(picture)
            top, left = row * (side + GAP), grid.shape[1] - (4 - column) * (side + GAP) + GAP
            assert (grid[top : top + side, left : left + side] == picture).all()
    assert (grid[side + GAP :, -side:] == 255).all(), "class 0 has one picture less"


def test_a_finished_run_is_not_made_again(pipe, reference, monkeypatch):
    monkeypatch.setattr(type(pipe), "sample_tokens", None)
    record = generate_folder(pipe, reference[0], 11, [0, 1, 2], seed=4, save_tokens=True, top_k=5)
    assert record["made"] == 0
    assert record["tokens_sha256"] == reference[1]["tokens_sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "a run with seed = 4; now 5 was given"),
        ({"top_k": 6}, "a run with settings = "),
        ({"labels": [0]}, "a run with labels = "),
        ({"num": 12}, "a run with num = 11; now 12"),
        ({"decoder": "masked"}, "a run with decoder = "),
    ],
)
def test_other_settings_are_not_mixed_in(pipe, reference, change, message):
    before = files(reference[0])
    request = {"num": 11, "labels": [0, 1, 2], "seed": 4, "top_k": 5, **change}
    with pytest.raises(DigitError, match=message):
        generate_folder(pipe, reference[0], **request)
    assert files(reference[0]) == before


def test_other_weights_are_not_mixed_in(pipe, reference):
    other = tiny.pipeline()
    with torch.no_grad():
        other.prior.head.weight.mul_(2)
    with pytest.raises(DigitError, match="a run with weights = "):
        generate_folder(other, reference[0], 11, [0, 1, 2], seed=4, top_k=5)


def test_foreign_images_are_left_alone_and_overwrite_begins_anew(pipe, tmp_path):
    (tmp_path / "00000.png").write_bytes(b"mine")
    with pytest.raises(DigitError, match="holds images and no generation"):
        generate_folder(pipe, tmp_path, 2)
    assert (tmp_path / "00000.png").read_bytes() == b"mine"
    assert generate_folder(pipe, tmp_path, 2, overwrite=True)["made"] == 2
    assert generate_folder(pipe, tmp_path, 3, overwrite=True)["made"] == 3
    with pytest.raises(DigitError, match="is a file"):
        generate_folder(pipe, tmp_path / "00000.png", 2)


def test_two_processes_make_the_same_files(pipe, reference, tmp_path):
    """As torchrun sets them up: each makes its share by index, and the last one completes the folder."""
    model = pipe.save_pretrained(tmp_path / "model")
    code = (
        "import sys, torch; torch.set_num_threads(1)\nfrom digit import DigitPipeline; from digit.pipeline.generation "
        "import generate_folder\nr = generate_folder(DigitPipeline.from_pretrained(sys.argv[1]), sys.argv[2], 11, [0, "
        "1, 2], seed=4, batch_size=2, save_tokens=True, top_k=5)\nprint(r['made'], r['finished'])"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(model), str(tmp_path / "out")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=240)[0].split() for worker in workers]
    assert [words[0] for words in said] == ["6", "5"]
    assert sorted(words[1] for words in said) == ["False", "True"]
    assert files(tmp_path / "out") == files(reference[0])
    record = json.loads((tmp_path / "out" / "generation.json").read_text())
    assert record["processes"] == 2
    assert record["tokens_sha256"] == reference[1]["tokens_sha256"]


def test_measured_batches_make_the_same_images(pipe, reference, tmp_path):
    record = generate_folder(pipe, tmp_path / "out", 11, [0, 1, 2], seed=4, save_tokens=True, top_k=5)
    assert record["batch_size"] == 64
    assert files(tmp_path / "out") == files(reference[0])


def test_compiling_is_decided_by_the_work_that_is_left(pipe, tmp_path, monkeypatch):
    generate_folder(pipe, tmp_path / "short", 6, batch_size=2)
    assert not engine_cache(pipe.prior).options.compile
    monkeypatch.setattr(generation, "WORTH_COMPILING", 0.0)
    chosen = []
    monkeypatch.setattr(generation, "accelerate", lambda model, compile, quantize, native: chosen.append(compile))
    generate_folder(pipe, tmp_path / "long", 6, batch_size=2)
    models = 1 + len(pipe.decoders)
    assert chosen == [False] * models + [True] * models


def test_the_record_says_which_step_sampled(pipe, tmp_path, monkeypatch):
    assert generate_folder(pipe, tmp_path / "plain", 2, batch_size=2, compile=False)["engine"] == "plain"
    assert engine_cache(pipe.prior).options.native is False
    record = generate_folder(pipe, tmp_path / "default", 2, batch_size=2)
    assert engine_cache(pipe.prior).options.native is None
    assert record["engine"] == ", ".join(
        dict.fromkeys(engine_name(m) for m in (pipe.prior, *pipe.decoders.values()) if engine_name(m))
    )


def test_token_files_are_checked(tmp_path):
    with pytest.raises(DigitError, match="There is no token file"):
        load_tokens_file(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(DigitError, match="is not a token file"):
        load_tokens_file(tmp_path / "bad.npz")
