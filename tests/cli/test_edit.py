"""``digit edit`` as a user meets it."""

import numpy as np
import pytest
from PIL import Image

import tiny
from terminal import run


def test_each_way_leaves_images_and_a_sheet(model, photo, tmp_path, monkeypatch, capsys):
    hole = np.zeros((64, 64), dtype=np.uint8)
    hole[16:40, 16:40] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    ways = {
        "masked": ["--mask", tmp_path / "hole.png", "--decoder", "masked"],
        "rows": ["--prefix", 2],
        "varied": ["--vary", 0.3],
    }
    for name, way in ways.items():
        out = tmp_path / name
        assert run(monkeypatch, "edit", model, photo, "--num", 3, "--labels", "cat", *way, "--out", out) == 0
        assert {p.name for p in out.iterdir()} == {"photo-0.png", "photo-1.png", "photo-2.png", "edits.png"}
        assert Image.open(out / "photo-0.png").size == (tiny.SIZE, tiny.SIZE)
        assert "edits.png" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of --mask FILE, --prefix ROWS or --vary FRACTION"),
        (["--prefix", 1, "--vary", 0.5], "exactly one of"),
        (["--prefix", 4], "this model's grid has 4"),
        (["--vary", 1.5], "A fraction of 1.5"),
    ],
)
def test_mistakes_get_a_sentence(model, photo, tmp_path, monkeypatch, capsys, words, message):
    assert run(monkeypatch, "edit", model, photo, *words, "--out", tmp_path / "out") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
