"""Foreign torch files: settings objects are read without their packages, and nothing is ever run."""

import argparse
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from digit.convert.stream import release
from digit.convert.torchfile import plain, read_torch_file
from digit.core.errors import DigitError

DATA = Path(__file__).parent / "data"


def refusal(path: Path) -> str:
    with pytest.raises(DigitError) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_settings_objects_become_plain():
    values = plain(read_torch_file(DATA / "settings_objects.pt"))
    assert values["cfg"]["model"]["decoder_attention_heads"] == 4
    assert values["cfg"]["model"]["flags"] == [1, 2.5, None, True, "x"]
    assert values["args"] == {"arch": "stlm", "lr": [3e-4]}
    assert values["numbers"] == [2.5, -1.5, -3, True, 0.5]
    assert values["history"] == {1: [2]}
    assert values["weight"].tolist() == [0, 1, 2]


def test_reading_settings_imports_nothing_of_theirs():
    code = (
        "import sys; from digit.convert.torchfile import read_torch_file; read_torch_file(sys.argv[1]);"
        "assert not [m for m in sys.modules if m.startswith('omegaconf')]"
    )
    subprocess.run([sys.executable, "-c", code, str(DATA / "settings_objects.pt")], check=True)


def test_stubs_are_only_allowed_while_reading():
    before = set(torch.serialization.get_safe_globals())
    read_torch_file(DATA / "settings_objects.pt")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(tmp_path, zipped):
    path = tmp_path / "old.pt"
    torch.save(
        {"w": torch.arange(6.0).view(2, 3), "args": argparse.Namespace(a=1)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    values = read_torch_file(path)
    assert values["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert plain(values["args"]) == {"a": 1}


class Command:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Evaluate(Command):
    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("kind", "name"), [(Command, "posix.system"), (Evaluate, "eval")])
def test_code_is_refused_by_name_and_not_run(tmp_path, zipped, protocol, kind, name):
    path, trace = tmp_path / "evil.pt", tmp_path / "was-run"
    torch.save(
        {"model": {"w": torch.ones(1)}, "extra": kind(trace)},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    text = refusal(path)
    assert (name in text and "code" in text) if protocol == 2 else "pickle protocol other than 2" in text
    assert not trace.exists()


def test_code_behind_an_allowed_object_is_refused(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "was-run"
    torch.save(argparse.Namespace(model=Command(trace)), path)
    assert "posix.system" in refusal(path)
    assert not trace.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pt")


def test_a_numpy_object_scalar_stays_inert(tmp_path):
    """Through NumPy's own scalar function an object dtype would hand the payload on; the stub keeps it as it is."""
    path = tmp_path / "object.pt"

    class Objects:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (np.dtype("O"), b"x")

    torch.save({"n": Objects()}, path)
    assert type(plain(read_torch_file(path))["n"]).__name__ == "scalar"


def contents() -> dict[str, tuple[bytes, str]]:
    return {
        "empty": (b"", "empty"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "git-LFS"),
        "html": (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        "numpy": (b"\x93NUMPY\x01\x00" + b"x" * 100, "--codebook"),
        "gzip": (b"\x1f\x8b\x08" + b"\x00" * 50, "compressed"),
        "xz": (b"\xfd7zXZ\x00" + b"\x00" * 50, "compressed"),
        "safetensors": (b'\x50\x00\x00\x00\x00\x00\x00\x00{"w":{"dtype":"F32","shape":[1]}}', "safetensors"),
        "text": (b"hello\nworld\n", "text"),
        "noise": (bytes(range(129, 229)), "not a torch checkpoint"),
        "cut zip": (b"PK\x03\x04" + bytes(200), "truncated"),
        "cut pickle": (b"\x80\x02" + b"}q\x00X\x05", "damaged"),
    }


@pytest.mark.parametrize("name", contents())
def test_other_files_are_named(tmp_path, name):
    data, word = contents()[name]
    path = tmp_path / "file.pt"
    path.write_bytes(data)
    assert word in refusal(path)


def test_archives_missing_files_and_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme", "x")
    assert "no data.pkl" in refusal(tmp_path / "a.pt")
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "b.pt", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(tmp_path / "x", "x")
    assert "tar archive" in refusal(tmp_path / "b.pt")
    assert "no file" in refusal(tmp_path / "none.pt")
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "cut.pt"
    for zipped in (True, False):
        torch.save({"w": torch.randn(5000)}, path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        assert "truncated" in (text := refusal(path)) or "damaged" in text


def test_damage_anywhere_in_the_pickle_is_a_sentence(tmp_path):
    torch.save({"w": torch.randn(4), "cfg": {"a": [1, 2]}}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        entries = {item: archive.read(item) for item in archive.infolist()}
    for position in range(0, 120, 3):
        path = tmp_path / "bad.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for item, data in entries.items():
                if item.filename.endswith("data.pkl"):
                    data = data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
                archive.writestr(item.filename, data)
        # some flips fall into names and numbers and do no harm; every other must be a sentence
        with suppress(DigitError):
            read_torch_file(path)


def test_a_plain_pickle_is_not_a_checkpoint(tmp_path):
    with open(tmp_path / "plain.pkl", "wb") as handle:
        pickle.dump({"w": 1}, handle)
    refusal(tmp_path / "plain.pkl")


def test_released_memory_is_read_again(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.arange(1 << 20)}, path)
    mapped, own = read_torch_file(path)["w"], torch.arange(1 << 20)
    for value in (mapped, own):
        release(value)
        assert int(value.sum()) == (1 << 19) * ((1 << 20) - 1)
