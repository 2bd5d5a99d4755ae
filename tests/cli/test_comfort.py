"""What one sees at a prompt: reprs, completion, a model's tree."""

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import tiny
from terminal import run


def test_reprs_tell():
    pipe = tiny.pipeline()
    lines = repr(pipe).splitlines()
    assert lines[0] == "DigitPipeline 'tiny' on cpu"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "encoder", "codebook", "prior", "decoder/ar", "decoder/masked", "vqgan"
    ]  # fmt: skip
    assert repr(pipe.tokenizer) == "SemanticTokenizer(32 px -> 4 x 4 of 12 tokens)"
    assert repr(pipe.codebook) == "Codebook(12 clusters of width 16; 192 parameters)"
    assert repr(pipe.vqgan).startswith("VQGAN(32 px to 4 x 4 of 20 codes; width 8 x [1, 1, 1, 2]; ")
    assert "\n" not in repr(pipe.vqgan)


def test_types_are_part_of_the_package():
    assert (resources.files("digit") / "py.typed").is_file()


def complete(words: str) -> list[str]:
    """What a bash offers after these words; the last one is being typed."""
    program = Path(sys.executable).parent / "digit"
    asked = {"_DIGIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    result = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_the_shell_completes_commands_options_and_presets():
    assert complete("digit gen") == ["generate"]
    assert "--cfg-schedule" in complete("digit generate --cfg")
    assert complete("digit train prior --preset cifar10-tiny-prior") == [
        "cifar10-tiny-prior",
        "cifar10-tiny-prior-cond",
    ]


def test_the_tree_of_a_model(tmp_path, monkeypatch, capsys):
    tiny.pipeline().save_pretrained(tmp_path / "model")
    assert run(monkeypatch, "info", tmp_path / "model", "--batch", 4) == 0
    tree = capsys.readouterr().out
    for word in (
        "encoder",
        "codebook",
        "prior",
        "decoder/masked",
        "vqgan",
        "memory for sampling",
        "float32",
        "bfloat16",
    ):
        assert word in tree
