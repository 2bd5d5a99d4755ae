"""Every command in README and documentation: run here, or marked with what it needs; and each one is a command that
exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tiny
from digit.data.dataset import open_dataset
from digit.data.writer import write_dataset
from doc_blocks import PAGES, blocks, digit_words, parse, unknown_options
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


@pytest.fixture(scope="module")
def place(tmp_path_factory, cifar512) -> Path:
    """Where the short blocks of all pages run."""
    return as_supposed(tmp_path_factory.mktemp("reader"), cifar512)


@pytest.fixture
def own_place(tmp_path, cifar512) -> Path:
    """Where a page's long blocks run, without what other pages left behind."""
    return as_supposed(tmp_path / "reader", cifar512)


def as_supposed(folder: Path, cifar512: Path) -> Path:
    """A folder as the pages suppose it: a model, a dataset with two splits, a photograph, a folder of pictures."""
    folder.mkdir(exist_ok=True)
    images = open_dataset(cifar512, "train")
    classes = list(images.classes)
    pipe = tiny.pipeline().with_parts(prior=tiny.token_model("prior", num_classes=len(classes)), class_names=classes)
    pipe.save_pretrained(folder / "runs" / "model")
    photo = images[0].image
    photo.save(folder / "photo.jpg")
    with write_dataset(folder / "data" / "cifar10", "cifar10", classes, "CIFAR-10", "none stated") as writer:
        for index in range(192):
            path = folder / "one.png"
            images[index].image.save(path)
            split = "train" if index < 128 else "test"
            writer.add(split, f"{index:05d}", path.read_bytes(), "png", (32, 32), images[index].label)
    for index in range(96):
        sample = images[index]
        where = folder / "pictures" / classes[sample.label]
        where.mkdir(parents=True, exist_ok=True)
        sample.image.save(where / f"{index}.png")
    return folder


def run_block(block, place, monkeypatch, shorten=False):
    monkeypatch.chdir(place)
    if block.kind == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
        return
    text = block.text
    for pattern, value in SHORT.items() if shorten else ():
        text = re.sub(pattern, value, text)
    shortened = type(block)(block.page, block.line, block.kind, block.mark, text)
    for words in shortened.commands():
        own = digit_words(words)
        assert own is not None, f"{block}: only digit commands are run here, not {words[0]}"
        assert run(monkeypatch, *own) == 0, shlex.join(words)


PAGES_THAT_RUN = sorted({block.page for block in ALL if block.mark == "run"})


@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_blocks_of_a_page_run_one_after_the_other(page, place, monkeypatch):
    for block in ALL:
        if block.page == page and block.mark == "run":
            run_block(block, place, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.mark == "run, slow"}))
def test_the_long_blocks_run_with_short_trainings(page, own_place, monkeypatch):
    for block in ALL:
        if block.page == page and block.mark == "run, slow":
            run_block(block, own_place, monkeypatch, shorten=True)


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
