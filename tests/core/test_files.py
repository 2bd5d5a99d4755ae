from __future__ import annotations

import errno

import pytest
import torch

from digit.core.errors import DigitError, MissingPackageError, require
from digit.core.files import (
    read_json,
    read_tensors,
    sha256_of,
    write_bytes,
    write_file,
    write_folder,
    write_json,
    write_tensors,
)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_values_come_back(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": [1, "ü"]})
    assert read_json(tmp_path / "deep" / "a.json") == {"a": [1, "ü"]}
    tensors = {"x": torch.randn(3, 4), "y": torch.arange(5)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "n"})
    loaded = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert len(sha256_of(tmp_path / "t.safetensors")) == 64


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_bytes(tmp_path / "a", b"old")
    with pytest.raises(DigitError, match="disk is full"):
        write_file(path, full_disk)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_folder_and_nothing_else(tmp_path):
    def write(text, fail):
        with write_folder(tmp_path / "f") as aside:
            (aside / "a").write_text(text)
            if fail:
                full_disk()

    write("old", fail=False)
    with pytest.raises(DigitError, match="disk is full"):
        write("new", fail=True)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f" / "a").read_text() == "old"
    write("new", fail=False)
    assert (tmp_path / "f" / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_in_the_way_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((DigitError, FileExistsError)):
        write_json(tmp_path / "file" / "a.json", {})


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DigitError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    write_tensors(tmp_path / "t.safetensors", {"x": torch.randn(100)})
    data = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(data[:-50])
    with pytest.raises(DigitError, match=r"t\.safetensors is not a readable safetensors file"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(DigitError, match="There is no file"):
        read_tensors(tmp_path / "none.safetensors")


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(MissingPackageError, match=r"pip install 'digit-ar\[train\]'"):
        require("no_such_package_here", "train", "fitting a codebook")
