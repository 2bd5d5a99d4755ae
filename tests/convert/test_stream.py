"""The streaming writer makes the same files as safetensors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from digit.convert import stream
from digit.convert.stream import Component, write_component, write_parts
from digit.convert.upstream import codebook_component
from digit.core.errors import DigitError
from digit.core.files import sha256_of
from digit.models.codebook import Codebook, CodebookConfig


def test_parts_read_back_as_their_concatenation(tmp_path):
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    parts = {
        "joined": [a, b],
        "transposed": [torch.randn(4, 7).T],
        "half": [torch.randn(6).half()],
        "brain": [torch.randn(2, 2).bfloat16()],
        "count": [torch.tensor(5)],
        "flag": [torch.tensor([True, False])],
        "slice": [torch.randn(10, 3)[5:]],
        "nothing": [torch.empty(0, 3)],
    }
    write_parts(tmp_path / "m.safetensors", parts)
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == parts.keys()
    for name, pieces in parts.items():
        expected = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        assert read[name].dtype == expected.dtype
        assert torch.equal(read[name], expected)


def test_the_file_is_what_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(4, 3), "a": torch.randn(7), "h": torch.randn(3).half()}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_parts(tmp_path / "ours.safetensors", {name: [value] for name, value in tensors.items()})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_large_tensors_are_written_in_pieces(tmp_path):
    value = torch.randn(3000, 4000)
    write_parts(tmp_path / "m.safetensors", {"w": [value]})
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], value)


def test_a_component_knows_its_file(tmp_path):
    source = tmp_path / "a" / "b" / "c" / "km.npy"
    source.parent.mkdir(parents=True)
    source.write_bytes(b"something")
    write_component(tmp_path / "codebook", codebook_component(torch.randn(4, 3), False, source))
    book = Codebook.from_pretrained(tmp_path / "codebook")
    assert book.provenance == {"source": "b/c/km.npy", "sha256": sha256_of(source)}


def test_a_failure_leaves_the_old_component(tmp_path, monkeypatch):
    config = CodebookConfig(clusters=2, dim=3)
    good = Component("Codebook", config, {"centroids": [torch.ones(2, 3)]})
    write_component(tmp_path / "codebook", good)

    def fail(tensor: torch.Tensor) -> None:
        raise DigitError("the disk is gone")

    monkeypatch.setattr(stream, "release", fail)
    with pytest.raises(DigitError, match="the disk is gone"):
        write_component(tmp_path / "codebook", Component("Codebook", config, {"centroids": [torch.zeros(2, 3)]}))
    assert [path.name for path in tmp_path.iterdir()] == ["codebook"]
    assert float(Codebook.from_pretrained(tmp_path / "codebook").centroids.sum()) == 6
