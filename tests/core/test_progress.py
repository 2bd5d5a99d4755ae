import os
import pty
import subprocess
import sys

import pytest

from digit.core import progress


def test_track_passes_everything_on_and_is_quiet_in_a_pipe(capsys):
    assert list(progress.track(range(5), "Counting")) == [0, 1, 2, 3, 4]
    assert list(progress.track(iter("ab"), "Counting")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 10.0, 14.0, 18.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar("Fitting", total=4000, unit="vectors") as bar:
        bar.advance(500)
        bar.advance(500, note="inertia 3.1")
        bar.advance(1000)
        bar.advance(2000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Fitting: 1,000/4,000 vectors, 100 vectors/s, 0:00:30 left, inertia 3.1",
        "Fitting: 4,000/4,000 vectors, 200 vectors/s, inertia 3.1",
    ]


def test_hidden_bar_prints_nothing(capsys):
    with progress.bar("Hidden", total=2, show=False) as bar:
        bar.advance(2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_on_a_terminal_bars_are_nested_and_go_to_stderr():
    script = """
from digit.core.progress import bar, track
with bar("Outer", total=3, unit="steps") as outer:
    for _ in range(3):
        for _ in track(range(10), "Inner"):
            pass
        outer.advance(note="loss 1.5")
print("done")
"""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=secondary, env=environment, timeout=60
    )
    os.close(secondary)
    screen = b""
    try:
        while block := os.read(primary, 65536):
            screen += block
    except OSError:  # the other end is closed
        pass
    os.close(primary)
    assert process.stdout == b"done\n"
    text = screen.decode()
    assert "Outer" in text
    assert "3/3 steps" in text
    assert "loss 1.5" in text
    assert "Inner" in text
