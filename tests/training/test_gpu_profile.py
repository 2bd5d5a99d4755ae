"""The GPU profile of the CIFAR-10 study: its schedules hold together, and every step of it runs."""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from digit.cli.app import app
from digit.core.config import from_dict
from digit.data.dataset import open_dataset, write_dataset
from digit.evaluation.metrics.inception import untrained
from digit.training.build import change, load_preset
from digit.training.task import TrainingConfig

SPEC = importlib.util.spec_from_file_location(
    "gpu_study", Path(__file__).parents[2] / "experiments" / "cifar10" / "study.py"
)
study = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_study"] = study  # dataclasses look their module up
SPEC.loader.exec_module(study)
IMAGES = {"gpu": 50_000, "short": 20_000}
# what makes two steps of a training small without touching its networks
TRAIN = {
    "training.steps": 2, "training.batch_size": 2, "training.precision": "no", "training.workers": 0,
    "training.sample_every": 0,
    "data.held_out": 4,
}  # fmt: skip
EVALUATE = {"--num": "4", "--batch-size": "4", "--epochs": "1", "--images": "64"}


def trainings(profile: str):
    steps = study.Study(Path("out"), Path("data"), Path("reference.npz"), 10_000, profile).steps()
    for step in steps:
        words = shlex.split(step.command)
        if words[0] == "train":
            yield step.name, words, [words[i + 1] for i, word in enumerate(words) if word == "--set"]


@pytest.mark.parametrize("profile", ["gpu", "short"])
def test_every_training_outlasts_its_warm_up_and_does_not_learn_by_heart(profile: str) -> None:
    images = IMAGES[profile]
    for name, words, changes in trainings(profile):
        preset = change(load_preset(words[words.index("--preset") + 1]), changes, name)
        config = from_dict(TrainingConfig, preset["training"], name)
        assert config.total_steps(images) >= 4 * config.warmup_steps, name
        passes = config.total_steps(images) * config.batch_size / images
        network = preset["model"].get("transformer")
        if network and passes > 5:
            assert network["dropout"] > 0 or (profile, name) == ("short", "onepass"), name
        if network and preset["model"]["role"] != "onepass":
            assert config.patience, name
            assert network["dim"] == 512, name


def test_the_half_hour_has_every_step_in_an_order_in_which_it_finds_what_it_needs() -> None:
    script = Path(__file__).parents[2] / "experiments" / "gpu.sh"
    stages = subprocess.run([script, "plan"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(stages) == 4
    study_steps = study.Study(Path("out"), Path("data"), script, 5_000, "short").steps()
    commands = {step.name: shlex.split(step.command) for step in study_steps}
    made: list[str] = []
    for name in " ".join(stages).split():
        words = commands[name]
        out = words[words.index("--out") + 1]
        for word in words:
            path = word.rpartition("=")[2]
            if path.startswith("out/") and path != out:
                assert any(path == earlier or path.startswith(f"{earlier}/") for earlier in made), (name, path)
        made.append(out)
    assert {"out/models/semantic-s0", "out/models/vq-s0"} <= set(made)


@pytest.fixture
def few(cifar512: Path, tmp_path: Path) -> Path:
    """80 images to train on and 20 to test with."""
    dataset = open_dataset(cifar512)
    with write_dataset(tmp_path / "data", "few", dataset.classes, "of CIFAR-10", "") as writer:
        for i in range(100):
            label = int(dataset.labels[i * 5])
            data = dataset.source.read(i * 5)
            writer.add("train" if i % 5 else "test", f"image{i}", data, "png", (32, 32), label)
    return tmp_path / "data"


def prepared(words: list[str], weights: Path) -> list[str]:
    """A command of the study, with all that takes long made small."""
    short = []
    for word in words:
        before = short[-1] if short else ""
        if before in EVALUATE and words[0] in ("evaluate", "fit-codebook"):
            word = EVALUATE[before]
        elif before == "--vary":
            word = word.split(",")[0]
        elif before == "--shares":
            word = "0.5"
        short.append(word)
    if words[0] == "train":
        short += [part for name, value in TRAIN.items() for part in ("--set", f"{name}={value}")]
        if "encoder" in words[1]:
            short += ["--set", "data.memory=16"]
        short += ["--device", "cpu"]
    if words[:2] in (
        ["evaluate", "fidelity"],
        ["evaluate", "sweep"],
        ["evaluate", "prefix"],
        ["evaluate", "statistics"],
    ):
        short += ["--weights", str(weights), "--backend", "torch"]
    return short


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_of_the_gpu_profile_runs(few: Path, tmp_path: Path) -> None:
    """The networks are as large as on the GPU; two optimizer steps, a handful of images and untrained Inception weights
    take the place of hours."""
    weights, out = tmp_path / "inception.pth", tmp_path / "out"
    torch.manual_seed(0)
    torch.save(untrained(["2048"]).state_dict(), weights)
    runner = CliRunner()
    for step in study.Study(out, few, out / "reference.npz", 5_000, "gpu").steps():
        result = runner.invoke(app, prepared(shlex.split(step.command), weights))
        assert result.exit_code == 0, f"{step.name}: {step.command}\n{result.output[-2000:]}\n{result.exception!r}"
        if "prior" in step.name or step.name.startswith(("ar", "masked", "maskgit")):
            shutil.rmtree(out / step.name / "checkpoints", ignore_errors=True)  # half a gigabyte each
