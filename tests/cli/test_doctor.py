"""``digit doctor`` on this machine, and on ones where something is wrong."""

import pytest

from digit import native
from digit.cli import diagnosis as doctor
from digit.cli.diagnosis import examine, packages
from terminal import run


def test_this_installation_is_examined(monkeypatch, capsys, tmp_path):
    """And every trouble that is found has advice."""
    monkeypatch.chdir(tmp_path)
    found = []
    monkeypatch.setattr(doctor, "examine", lambda: found.extend(examine()) or found)
    assert run(monkeypatch, "doctor") == 0
    assert found
    assert all(one.advice for one in found if one.state != "ok")
    shown = " ".join(capsys.readouterr().out.split())
    for topic in ("device cpu", "C++ step", "compiler", "[train]", "cache", "working folder", "Hub", "model"):
        assert topic in shown
    assert "HF_HUB_OFFLINE is set" in shown  # as in every test
    assert "Everything that is needed works." in shown
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_broken(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "file" / "cache"))
    assert run(monkeypatch, "doctor") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "cannot be written: Not a directory" in shown
    assert "name another folder in the variable DIGIT_CACHE" in shown
    assert "1 thing is broken" in shown


def test_packages_that_are_missing_or_old():
    lines = [
        "no-such-package>=2; extra == 'train'",
        'torch>=999.1 ; extra == "train"',
        "rich>=1; extra == 'eval'",
        "numpy>=1.26",
    ]
    found = {one.topic: one for one in packages(lines)}
    assert set(found) >= {"[train]", "[eval]"}
    assert found["[train]"].state == "note"
    assert "missing: no-such-package, torch >=999.1 (" in found["[train]"].what
    assert found["[train]"].advice == "for training: pip install 'digit-ar[train]'"
    assert found["[eval]"].state == "ok"


def test_no_compiler_is_a_note_with_advice(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = [one for one in doctor.compiler() if one.topic == "compiler"]
    assert found.state == "note"
    assert "apt-get install g++" in found.advice


def test_a_compiler_that_fails_is_a_note(monkeypatch, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    native.library.cache_clear()
    (found,) = [one for one in doctor.compiler() if one.topic == "C++ step"]
    native.library.cache_clear()
    assert found.state == "note"
    assert "this compiler is broken" in found.what


def test_little_room_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "LITTLE_ROOM", 1 << 60)
    assert {one.state for one in doctor.places()} == {"note"}
    monkeypatch.setattr(doctor, "NO_ROOM", 1 << 60)
    assert {one.state for one in doctor.places()} == {"broken"}


@pytest.mark.parametrize(
    ("version", "least", "state"),
    [("2.5.1", "2.6", "note"), ("2.14.1+cpu", "2.6", "ok"), ("3", "3.0.1", "note"), ("1.0rc2", "1.0rc1", "ok")],
)
def test_versions_are_compared_by_numbers(version, least, state, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    (found,) = [one for one in packages([f"rich>={least}; extra == 'eval'"]) if one.topic == "[eval]"]
    assert found.state == state
