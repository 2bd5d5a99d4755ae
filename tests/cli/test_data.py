import shutil

import pytest
from PIL import Image

from digit.data.dataset import open_dataset
from terminal import run


def test_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.txt").write_text("hello")
    assert run(monkeypatch, "data", "folder", tmp_path / "photos", "--size", 16, "--out", tmp_path / "out") == 0
    assert "2 files: 1 used, 1 skipped" in capsys.readouterr().out
    assert open_dataset(tmp_path / "out")[0].image.size == (16, 16)


@pytest.mark.parametrize("content", [None, "nothing", "text"])
def test_useless_folder_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, content):
    source = tmp_path / "photos"
    if content:
        source.mkdir()
    if content == "text":
        (source / "b.txt").write_text("hello")
    assert run(monkeypatch, "data", "folder", source, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert str(source) in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_cifar10_from_a_folder_that_is_something_else(cifar512, tmp_path, monkeypatch, capsys):
    shutil.copytree(cifar512, tmp_path / "source")
    assert run(monkeypatch, "data", "cifar10", "--source", tmp_path / "source", "--out", tmp_path / "out") == 2
    assert "does not hold CIFAR-10; expected" in capsys.readouterr().err


def test_export_writes_pngs_in_a_folder_for_each_class(cifar512, tmp_path, monkeypatch, capsys):
    out = tmp_path / "photos"
    assert run(monkeypatch, "data", "export", cifar512, "--num", 20, "--out", out) == 0
    assert "20 images in" in capsys.readouterr().out
    dataset, again = open_dataset(cifar512, "train"), open_dataset(out)
    assert len(again) == 20
    chosen = sorted(
        (dataset.classes[dataset[i * 512 // 20].label], dataset[i * 512 // 20].image.tobytes()) for i in range(20)
    )
    assert sorted((again.classes[s.label], s.image.tobytes()) for s in (again[i] for i in range(20))) == chosen
    assert run(monkeypatch, "data", "export", cifar512, "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err
