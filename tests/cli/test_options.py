"""The shape of all commands: what was there stays, and what is alike is called alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from digit.cli.app import app

HERE = Path(__file__).parent
FIRST = json.loads((HERE / "verbs.json").read_text())
"""Arguments and options of every verb at the end of the first edition (commit f5d9f53)."""


def verbs(command=None, path=""):
    """Every command with its parameters, by its full name."""
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        return {path: command.params}
    return {k: v for name, each in command.commands.items() for k, v in verbs(each, f"{path} {name}".strip()).items()}


VERBS = verbs()


def flags(parameter) -> set[str]:
    return {*parameter.opts, *parameter.secondary_opts}


@pytest.mark.parametrize("verb", FIRST)
def test_verbs_and_options_of_the_first_edition_stay(verb):
    assert verb in VERBS
    known = set().union(*(flags(parameter) for parameter in VERBS[verb]))
    assert set(FIRST[verb].split()) <= known


@pytest.mark.parametrize("page", ["docs/compatibility.md", "CONTRIBUTING.md"])
def test_verbs_that_are_promised_exist(page):
    for words in re.findall(r"`digit ([a-z][a-z -]*)", (HERE.parents[1] / page).read_text()):
        assert any(f"{words.strip()} ".startswith(f"{verb} ") or verb.startswith(words.strip()) for verb in VERBS), (
            words
        )


SHORT = {"--out": "-o", "--num": "-n"}


@pytest.mark.parametrize("verb", VERBS)
def test_common_options_have_their_short_names(verb):
    for parameter in VERBS[verb]:
        for long, short in SHORT.items():
            assert long not in flags(parameter) or short in flags(parameter), f"{verb} {long}"


# runs take random --labels, assemble takes folders as --decoder, push writes to a --variant, and the mini-batches of
# fit-codebook depend on --batch-size
@pytest.mark.parametrize(
    ("option", "texts"), {"--device": 1, "--labels": 2, "--decoder": 2, "--variant": 2, "--batch-size": 2}.items()
)
def test_an_option_says_the_same_everywhere(option, texts):
    assert len({p.help for params in VERBS.values() for p in params if option in flags(p)}) == texts
