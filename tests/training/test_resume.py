"""A real process is stopped by a real signal, and goes on."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from digit.core.files import read_tensors
from digit.data.token_cache import TokenCache
from digit.training.logs import read_metrics
from digit.training.speed import SPEED

# the command alone: other commands import more than training needs
PROGRAM = "import torch, typer; torch.set_num_threads(1); from digit.cli.train import train; typer.run(train)"
CASES = [
    ("prior", "cifar10-tiny-prior-cond", signal.SIGTERM, 143),
    ("decoder", "cifar10-tiny-masked", signal.SIGINT, 130),
]


def command(component: str, preset: str, cache: TokenCache, out: Path, *more: str) -> list[str]:
    small = {
        "training.steps": 60, "training.batch_size": 16, "training.log_every": 1, "training.checkpoint_every": 25,
        "training.validate_every": 30, "training.accumulation": 2, "model.transformer.dim": 32, "model.transformer.depth": 2,
    }  # fmt: skip
    changes = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    options = ["--preset", preset, "--data", str(cache.folder), "--out", str(out), "--device", "cpu"]
    return [sys.executable, "-c", PROGRAM, component, *options, *changes, *more]


def lines(out: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in SPEED} for line in read_metrics(out)]


@pytest.mark.parametrize(("component", "preset", "signum", "code"), CASES)
def test_stopped_and_resumed_ends_in_the_same_weights(
    token_cache: TokenCache, tmp_path: Path, component: str, preset: str, signum: int, code: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run(command(component, preset, token_cache, whole), check=True, capture_output=True)
    process = subprocess.Popen(command(component, preset, token_cache, parts), stderr=subprocess.PIPE, text=True)
    wait_for = random.randint(1, 50)
    while len([line for line in read_metrics(parts) if "loss" in line]) < wait_for:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "the checkpoint is" in errors.replace("\n", " ")
    assert "--resume" in errors
    assert not (parts / "model").exists()
    subprocess.run(command(component, preset, token_cache, parts, "--resume"), check=True, capture_output=True)
    for file in ("model/model.safetensors", "checkpoints/step-0000060/modules.safetensors"):
        expected, found = read_tensors(whole / file), read_tensors(parts / file)
        assert expected.keys() == found.keys()
        assert all(expected[name].equal(found[name]) for name in expected)
    assert lines(parts) == lines(whole)
