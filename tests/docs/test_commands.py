"""Every command in README and documentation: run here, or marked with what it needs; and each one is a command that
exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from digit.core.images import encode_png, save_png
from digit.data.dataset import open_dataset, write_dataset
from doc_blocks import PAGES, ROOT, blocks, digit_words, parse, unknown_options
from terminal import run

ALL = [block for page in PAGES for block in blocks(page)]
SHORT = {
    r"training\.steps=\d+": "training.steps=2",
    r"training\.warmup_steps=\d+": "training.warmup_steps=1",
    r"training\.sample_every=\d+": "training.sample_every=2",
    r"training\.batch_size=\d+": "training.batch_size=8",
    r"--clusters 64": "--clusters 16",
    r"--num 16": "--num 2",
}
"""What the slow blocks say, and what the test says instead: the commands are the same, the trainings are not worth
having."""


@pytest.mark.parametrize("block", ALL, ids=str)
def test_it_is_run_or_says_what_it_needs(block):
    assert re.fullmatch(r"run|run, slow|needs: \S.*", block.mark), f"{block} is not marked; see tests/doc_blocks.py"


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "bash"], ids=str)
def test_its_commands_exist(block):
    for words in block.commands():
        own = digit_words(words)
        if own is not None and "..." not in own:
            assert parse(own) == "", shlex.join(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for words in re.findall(r"`((?:[\w./-]+ -m )?digit [^`]*)`", text):
        own = digit_words(shlex.split(words)) or []
        own = [word for word in own if word != "..."]
        if own and own[0].islower():
            assert unknown_options(own) == [], words


def test_python_blocks_are_python():
    for block in ALL:
        if block.kind == "python":
            compile(block.text, str(block), "exec")


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """What somebody has who has just cloned the repository, as far as the pages name its files."""
    folder = tmp_path / "clone"
    samples = Path("docs", "images", "samples")
    shutil.copytree(ROOT / samples, folder / samples)
    for name in (".gitignore", "Makefile"):
        shutil.copy(ROOT / name, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def place(clone, cifar512) -> Path:
    """A clone with what later pages suppose: a model, a dataset, and a folder of the reader's own."""
    images = open_dataset(cifar512, "train")
    classes = list(images.classes)
    pipe = tiny.pipeline().with_parts(prior=tiny.token_model("prior", num_classes=len(classes)), class_names=classes)
    pipe.save_pretrained(clone / "runs" / "model")
    with write_dataset(clone / "data" / "cifar10", "cifar10", classes, "CIFAR-10", "none stated") as writer:
        for index in range(192):
            split, sample = "train" if index < 128 else "test", images[index]
            writer.add(split, f"{index:05d}", encode_png(sample.image), "png", (32, 32), sample.label)
            if index < 96:
                save_png(sample.image, clone / "images" / classes[sample.label] / f"{index}.png")
    return clone


def run_block(block, monkeypatch, shorten=False):
    if block.kind == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        return
    text = block.text
    for pattern, value in SHORT.items() if shorten else ():
        text = re.sub(pattern, value, text)
    for words in replace(block, text=text).commands():
        for own in [digit_words(words)] if words[0] != "make" else map(digit_words, recipe(words[1])):
            assert own is not None, f"{block}: only digit commands are run here, not {words[0]}"
            assert run(monkeypatch, *own) == 0, shlex.join(own)


def recipe(target: str) -> list[list[str]]:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [shlex.split(line) for line in found[1].replace("$(BIN)/", "").splitlines()]


def test_what_a_newcomer_types_in_the_order_of_the_pages(clone, monkeypatch):
    """The README and the quickstart in a clone where nothing else was done, each in the state that the others leave."""
    run_words = [block for block in ALL if block.page in FIRST_PAGES and block.mark == "run"]
    assert [block.page for block in run_words] == sorted((b.page for b in run_words), key=FIRST_PAGES.index)
    for block in run_words:
        run_block(block, monkeypatch)
    assert (clone / "runs" / "demo" / "grid.png").is_file()
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    asked = ["git", "status", "--porcelain", "--untracked-files=all"]
    left = subprocess.run(asked, cwd=clone, capture_output=True, text=True, check=True).stdout.split()[1::2]
    assert all(path.startswith("docs/") or path in (".gitignore", "Makefile") for path in left), "git ignores the rest"


FIRST_PAGES = ["README.md", "quickstart.md"]
OTHERS = sorted({block.page for block in ALL if block.mark == "run"} - set(FIRST_PAGES))


@pytest.mark.parametrize("page", OTHERS)
def test_the_blocks_of_a_page_run_one_after_the_other(page, place, monkeypatch):
    for block in ALL:
        if block.page == page and block.mark == "run":
            run_block(block, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.mark == "run, slow"}))
def test_the_long_blocks_run_with_short_trainings(page, place, monkeypatch):
    for block in ALL:
        if block.page == page and block.mark == "run, slow":
            run_block(block, monkeypatch, shorten=True)


def test_wrong_commands_would_be_noticed():
    assert parse(["generate", "MODEL", "--out", "x"]) == ""
    for words in (
        ["generate", "--cfg", "2"],
        ["paint"],
        ["evaluate", "beauty"],
        ["train", "prior"],
        ["generate", "--num", "many"],
    ):
        assert parse(words), words
    assert unknown_options(["generate", "--num", "4", "--guidance=2"]) == ["--guidance=2"]
    assert unknown_options(["evaluate", "beauty"]) == ["beauty"]
