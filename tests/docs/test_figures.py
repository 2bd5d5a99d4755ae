"""The figures of the documentation are made by a script that runs."""

import runpy
import sys
from pathlib import Path

from PIL import Image

import tiny

SCRIPT = Path(__file__).parent.parent.parent / "docs" / "figures" / "concepts.py"


def test_every_figure_of_the_concepts_is_made_anew(cifar512, tmp_path, monkeypatch):
    model = tiny.pipeline().save_pretrained(tmp_path / "model")
    words = [model, cifar512, "--split", "train", "--num", 16, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    made = {path.name: Image.open(path) for path in (tmp_path / "out").iterdir()}
    page = (SCRIPT.parent.parent / "concepts.md").read_text()
    assert {name for name in made if f"images/concepts/{name}" in page} == set(made), "the page shows them all"
    assert {path.name for path in (SCRIPT.parent.parent / "images" / "concepts").iterdir()} == set(made)
    assert all(len(picture.convert("RGB").getcolors(1 << 20)) > 20 for picture in made.values())
