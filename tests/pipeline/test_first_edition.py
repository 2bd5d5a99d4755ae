"""What commit f5d9f53 wrote opens and gives the same tokens and images; see ``assets/make_first_edition.py``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from digit import DigitPipeline
from digit.pipeline.generation import generate_folder
from digit.pipeline.tokens import load_tokens_file

pytestmark = pytest.mark.usefixtures("pixels_in_bfloat16")  # as on the machine that wrote the images
ROOT = Path(__file__).parents[1] / "assets" / "first_edition"
RUNS = [
    ("first", "ar"),
    ("first", "masked"),
    ("first", "onepass"),  # pixels
    ("tokens", "onepass"),  # VQ tokens in one pass
    ("baseline", None),  # a prior of VQ tokens
]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# what a masked decoder took by itself then; now it goes with the number of tokens
THEN = {"masked": {"steps": 8, "choice_temperature": 4.5}}


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_model_makes_the_same_tokens_and_images(name, kind, tmp_path):
    before = ROOT / f"{name}-{kind}"
    pipe = DigitPipeline.from_pretrained(ROOT / name)
    record = json.loads((before / "generation.json").read_text())
    settings = {f"decoder_{name}": value for name, value in THEN.get(kind, {}).items()}
    generate_folder(pipe, tmp_path / "out", 2, record["labels"], record["seed"], kind, save_tokens=True, **settings)
    old, new = (load_tokens_file(folder / "tokens.npz") for folder in (before, tmp_path / "out"))
    for grid in ("semantic", "vq", "labels"):
        assert (getattr(old, grid) is None) == (getattr(new, grid) is None), grid
        assert getattr(old, grid) is None or torch.equal(getattr(old, grid), getattr(new, grid)), grid
    for index in range(2):
        # processors round differently
        assert abs(pixels(tmp_path / "out" / f"{index:05d}.png") - pixels(before / f"{index:05d}.png")).max() <= 5


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_a_token_file_decodes_with_its_labels(name, kind):
    pipe, tokens = DigitPipeline.from_pretrained(ROOT / name), load_tokens_file(ROOT / f"{name}-{kind}" / "tokens.npz")
    grid = tokens.vq if tokens.semantic is None else tokens.semantic
    decoded = pipe.decode(grid, 5, kind, labels=tokens.labels, **THEN.get(kind, {}))
    for index, image in enumerate(decoded):
        assert abs(image.movedim(0, -1).numpy() * 255 - pixels(ROOT / f"{name}-{kind}" / f"{index:05d}.png")).max() <= 5


def test_what_the_model_says_of_itself_is_kept():
    pipe = DigitPipeline.from_pretrained(ROOT / "first")
    assert pipe.class_names == ["cat", "dog", "ship"]
    assert pipe.default_decoder == "ar"
    assert pipe.settings["prior"].top_k == 8
    assert pipe.settings["ar"].top_p == pytest.approx(0.9)
    assert pipe.provenance == {"note": "random weights"}
    assert pipe.codebook.provenance["data"]["name"] == "noise"


def test_token_caches_are_keyed_as_before():
    kept = dict(line.split() for line in (ROOT / "fingerprint.txt").read_text().splitlines())
    assert len(kept) == 3
    for name, value in kept.items():
        assert DigitPipeline.from_pretrained(ROOT / name).fingerprint() == value


def test_a_killed_run_of_then_goes_on(tmp_path):
    shutil.copytree(ROOT / "killed", tmp_path / "out")
    first = (tmp_path / "out" / "00000.png").read_bytes()
    pipe = DigitPipeline.from_pretrained(ROOT / "first")
    record = generate_folder(pipe, tmp_path / "out", 2, [0, 2], seed=5, decoder="ar")
    assert record["made"] == 1
    assert record["tokens_sha256"] == json.loads((ROOT / "first-ar" / "generation.json").read_text())["tokens_sha256"]
    assert (tmp_path / "out" / "00000.png").read_bytes() == first
    assert (tmp_path / "out" / "grid.png").is_file()
