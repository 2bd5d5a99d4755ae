"""The command line, in this process."""

from __future__ import annotations

import sys

from digit.cli.app import main


def run(monkeypatch, *words) -> int:
    """Run ``digit`` with these words, or with one command line; its exit code."""
    words = words[0].split() if len(words) == 1 else words
    monkeypatch.setattr(sys, "argv", ["digit", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0
