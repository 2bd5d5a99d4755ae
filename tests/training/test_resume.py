"""A run goes on from what it has in its folder: after a real signal to a real process, and longer than it was."""

import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from digit.cli.app import app
from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.data.token_cache import TokenCache
from runs import curve, lines, same

PROGRAM = "import torch; torch.set_num_threads(1); from digit.cli.app import app; app()"
SMALL = {
    "training.steps": 60, "training.batch_size": 16, "training.log_every": 1, "training.checkpoint_every": 25,
    "training.validate_every": 30, "training.accumulation": 2, "model.transformer.dim": 32,
    "model.transformer.depth": 2,
}  # fmt: skip


def arguments(component: str, preset: str, cache: TokenCache, out: Path, **more: object) -> list[str]:
    changes = [part for name, value in {**SMALL, **more}.items() for part in ("--set", f"{name}={value}")]
    options = ["--preset", preset, "--data", str(cache.folder), "--out", str(out), "--device", "cpu"]
    return ["train", component, *options, *changes]


def process(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cli(*arguments: str, error: str = "") -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if error:
        assert isinstance(result.exception, DigitError), result.output
        assert re.search(error, str(result.exception)), str(result.exception)
    else:
        assert result.exit_code == 0, result.exception
    return result


def assert_same_end(one: Path, other: Path, step: int) -> None:
    for file in ("model/model.safetensors", f"checkpoints/step-{step:07d}/modules.safetensors"):
        assert same(read_tensors(other / file), read_tensors(one / file))
    assert lines(one) == lines(other)


@pytest.mark.parametrize(
    ("component", "preset", "signum", "code"),
    [
        ("prior", "cifar10-tiny-prior-cond", signal.SIGTERM, 143),
        ("decoder", "cifar10-tiny-masked", signal.SIGINT, 130),
    ],
)
def test_the_command_that_a_stopped_run_prints_ends_in_the_same_weights(
    token_cache: TokenCache, tmp_path: Path, component: str, preset: str, signum: int, code: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "it's parts"
    cli(*arguments(component, preset, token_cache, whole))
    running = process(arguments(component, preset, token_cache, parts))
    wait_for = random.randint(1, 50)
    while len(curve(parts)) < wait_for:
        assert running.poll() is None, running.communicate()
        time.sleep(0.005)
    running.send_signal(signum)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors
    assert not (parts / "model").exists()
    said = re.search(r"the checkpoint is .*step-\d+\. Go on with: digit (train .*)\n", errors)
    assert said, errors
    again = process(shlex.split(said[1]))
    output, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"Trained: {parts}" in output
    assert_same_end(whole, parts, 60)


def test_a_run_that_is_extended_is_the_longer_run(token_cache: TokenCache, tmp_path: Path) -> None:
    """Where the schedule does not depend on the length; the preset's epochs give way to the steps."""
    constant = {"training.schedule": "constant", "training.steps": 10, "training.validate_every": 0}
    preset = "cifar10-tiny-prior"
    cli(*arguments("prior", preset, token_cache, tmp_path / "run", **constant))
    resumed = ["train", "prior", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]
    cli(*resumed, "--set", "training.steps=20")
    cli(*resumed)  # what was changed is what the run now is: nothing is left to do
    cli(*arguments("prior", preset, token_cache, tmp_path / "long", **{**constant, "training.steps": 20}))
    assert [line["step"] for line in lines(tmp_path / "run")] == [*range(1, 11), 10, *range(11, 21), 20]
    assert same(*(read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("run", "long")))
    epochs = ("--set", "training.epochs=1", "--set", "training.batch_size=16")
    cli(*resumed, *epochs)  # 461 images in 29 steps
    assert lines(tmp_path / "run")[-1]["step"] == 29


def test_a_cosine_run_is_extended_by_asking(token_cache: TokenCache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = {"training.steps": 10, "training.warmup_steps": 2, "training.schedule": "cosine"}
    cli(*arguments("prior", "cifar10-tiny-prior-cond", token_cache, out, **small))
    cli("train", "prior", "--resume", "--out", str(out), "--device", "cpu", "--set", "training.steps=15")
    rates = [line["lr"] for line in lines(out) if "lr" in line]
    assert len(rates) == 15
    assert rates[10] > rates[9]  # the rates from here on are those of the longer run


def test_what_a_run_is_not_gets_a_sentence(token_cache: TokenCache, tmp_path: Path) -> None:
    out, preset = tmp_path / "run", "cifar10-tiny-prior"
    resume = ["--resume", "--out", str(out), "--device", "cpu"]
    cli("train", "prior", *resume, error=r"needs --preset and --data; .*run holds no request\.json")
    cli("train", "prior", "--out", str(out), "--preset", preset, error="A training needs --preset and --data")
    begin = arguments("prior", preset, token_cache, out, **{"training.steps": 2})
    cli(*begin)
    cli(*begin, error="already holds a run")
    cli("train", "decoder", *resume, error="is of the component 'prior', but 'decoder' was given")
    cli("train", "prior", *resume, "--preset", "cifar10-prior", error="is of the preset 'cifar10-tiny-prior'")
    cli("train", "prior", *resume, "--set", "training.lr=1", error=r"another run: training\.lr is 1\.0, was")
    (out / "request.json").unlink()  # a run of an earlier release wants the whole command
    cli(*begin, "--resume")
    assert (out / "request.json").is_file()


def test_a_training_ends_with_what_it_reached_beside_the_packaged_run(token_cache: TokenCache, tmp_path: Path) -> None:
    out = tmp_path / "prior"
    said = cli(*arguments("prior", "cifar10-tiny-prior", token_cache, out, **{"training.steps": 3})).stdout
    reached = lines(out)[-1]["validation/perplexity"]
    assert re.search(rf"│ perplexity +│ +{reached:.2f} │", said), said
    assert "expected" not in said  # no packaged run has this width
    assert f"the curves are in {out / 'curves.png'}" in said
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert f"Next: digit assemble --base TOKENIZERS --prior {out} --out {tmp_path}/model" in said


def test_a_tiny_training_stands_beside_the_packaged_one(cifar512: Path, tmp_path: Path) -> None:
    """The preset's own shape, for two steps; then its codebook, which is told in the same way."""
    out = tmp_path / "encoder"
    small = ["training.steps=2", "training.batch_size=8", "data.held_out=100", "data.memory=100"]
    given = ["--data", str(cifar512), "--device", "cpu"]
    changes = [part for change in small for part in ("--set", change)]
    said = cli("train", "encoder", "--preset", "cifar10-tiny-encoder", "--out", str(out), *given, *changes).stdout
    assert re.search(r"20-NN accuracy +│ +0\.\d+ │ +0\.3789 │", said), said
    assert "expected is the end of the packaged run cifar10-tiny-encoder; data.name: cifar10, here cifar512; " in said
    assert "training.steps: 120, here 2" in said
    assert f"Next: digit fit-codebook --encoder {out} --data {cifar512}" in said
    said = cli("fit-codebook", "--encoder", str(out), "-k", "4", "--out", str(tmp_path / "codebook"), *given).stdout
    assert re.search(r"clusters in use +│ +4 │ +4 │", said), said
    assert f"Next: digit assemble --encoder {out} --codebook {tmp_path}/codebook --vqgan VQGAN" in said
