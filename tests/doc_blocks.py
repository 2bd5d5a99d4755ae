"""The blocks of code in the documentation, and how each is marked.

An HTML comment in the line before a block says what becomes of it: ``<!-- run -->`` (the tests run it),
``<!-- run, slow -->`` (the slow tests do, with short trainings), or ``<!-- needs: SOMETHING -->`` (it cannot run here,
and why).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from digit.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<kind>bash|sh|console|python)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Its lines as words; lines that end in a backslash go on in the next."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page.name, text[: match.start("kind")].count("\n") + 1, "python" if match["kind"] == "python" else "bash",
            match["mark"] or "", match["text"],
        )
        for match in _FENCE.finditer(text)
    ]  # fmt: skip


def digit_words(words: list[str]) -> list[str] | None:
    """What follows ``digit`` in a command line, also behind a launcher; None where it is another program."""
    while re.match(r"[A-Z_]+=", words[0]):  # variables in front
        words = words[1:]
    if Path(words[0]).name == "digit":
        return words[1:]
    for index, word in enumerate(words[:-1]):
        if word == "-m" and words[index + 1] == "digit":
            return words[index + 2 :]
    return None


@cache
def top() -> Any:
    """The command line as it parses words."""
    return typer.main.get_command(app)


def parse(words: list[str]) -> str:
    """Read a command line as ``digit`` would, without doing anything; what is wrong with it, or ""."""
    command, name = top(), "digit"
    words = words[1:] if words[:1] == ["--debug"] else words
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return f"{name} has no command {words[0]}"
        command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
    try:
        command.make_context(name, list(words), resilient_parsing=hasattr(command, "commands"))
    except Exception as error:
        return getattr(error, "message", None) or str(error)
    return ""


def unknown_options(words: list[str]) -> list[str]:
    """Options in a shortened command line (one in the text) that the command does not have."""
    command, rest = top(), list(words)
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command = command.commands[rest.pop(0)]
    context = command.make_context("digit", [], resilient_parsing=True)
    known = {name for param in command.get_params(context) for name in (*param.opts, *param.secondary_opts)}
    if hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z-]+", rest[0]):
        return rest[:1]  # no such command
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
