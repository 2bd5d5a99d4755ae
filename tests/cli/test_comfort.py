"""What one sees at a prompt: reprs, completion, a model's tree."""

import shutil
from importlib import resources

import pytest

import tiny
from digit.core.config import load_preset, preset_names
from terminal import run

PRIORS = [f"cifar10-tiny-prior{kind}" for kind in ("", "-cond", "-masked", "-random")]


def test_reprs_tell():
    pipe = tiny.pipeline()
    lines = repr(pipe).splitlines()
    assert lines[0] == "DigitPipeline 'tiny' on cpu in float32"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "encoder", "codebook", "prior", "decoder/ar", "decoder/masked", "vqgan"
    ]  # fmt: skip
    assert repr(pipe.tokenizer) == "SemanticTokenizer(32 px -> 4 x 4 of 12 tokens)"
    assert repr(pipe.codebook) == "Codebook(12 clusters of width 16; 192 parameters)"
    assert repr(pipe.vqgan).startswith("VQGAN(32 px to 4 x 4 of 20 codes; width 8 x [1, 1, 1, 2]; ")
    assert "\n" not in repr(pipe.vqgan)


def test_types_are_part_of_the_package():
    assert (resources.files("digit") / "py.typed").is_file()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("digit gen", ["generate"]),
        ("digit generate --cfg-sch", ["--cfg-schedule"]),
        ("digit train prior --preset cifar10-tiny-prior", PRIORS),
        ("digit presets cifar10-tiny-prior cifar10-tiny-prior", PRIORS),
        ("digit generate ci", ["cifar10"]),
        ("digit generate runs/", ["runs/deep/model", "runs/model"]),
        ("digit generate cifar10 --decoder ", ["ar", "onepass"]),
        ("digit generate runs/model --decoder ", ["ar", "masked"]),
        ("digit generate nothing --decoder a", ["ar"]),
        ("digit generate cifar10 --labels s", ["ship"]),
        ("digit generate --labels cat,d", ["cat,deer", "cat,dog"]),
        ("digit edit runs/model photo.png --labels d", ["dog"]),
        ("digit generate --device c", ["cpu", "cuda"]),
        ("digit generate --dtype b", ["bfloat16"]),
    ],
)
def test_the_shell_completes(words, offered, model, tmp_path, monkeypatch, capsys):
    for place in ("runs/model", "runs/deep/model"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(model / "model_index.json", tmp_path / place)
    monkeypatch.chdir(tmp_path)
    asked = {"_DIGIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch) == 0
    assert capsys.readouterr().out.split() == offered


def test_the_tree_of_a_model(model, monkeypatch, capsys):
    assert run(monkeypatch, "info", model, "--batch", 4) == 0
    tree = capsys.readouterr().out
    for word in [
        "encoder",
        "codebook",
        "prior",
        "decoder/masked",
        "vqgan",
        "memory for sampling",
        "float32",
        "bfloat16",
    ]:
        assert word in tree
    assert "classes: cat, dog, ship" in tree


def test_presets_are_listed_shown_and_compared(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["imagenet256-base", "prior"] and "219M parameters." in line for line in lines)
    assert any(line.split()[:2] == ["cifar10-clusters", "ablation"] for line in lines)
    assert len(lines) == 1 + len(preset_names()) + len(preset_names("ablations"))

    assert run(monkeypatch, "presets", "cifar10-tiny-prior") == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert load_preset(str(mine)) == load_preset("cifar10-tiny-prior")

    mine.write_text("extends: cifar10-tiny-prior\ntraining: {steps: 7}\n")
    assert run(monkeypatch, "presets", "cifar10-tiny-prior", mine) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["training.steps", "300", "7"]]
    assert run(monkeypatch, "presets", "cifar10-tiny-prior", "cifar10-tiny-prior") == 0
    assert "hold the same settings" in capsys.readouterr().out
    assert run(monkeypatch, "presets", "cifar10-tiny-pior") == 2
    assert "did you mean cifar10-tiny-prior" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["presets"], ["info"]])
def test_tables_in_a_pipe_are_not_cut_at_the_width_of_a_terminal(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert run(monkeypatch, *words) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 100
