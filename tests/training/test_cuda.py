"""Trainings of 20 steps by the launchers of the manual on one device: their curves are those of a process on the
CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devices import DEVICES
from digit.core.files import read_tensors
from digit.data.token_cache import TokenCache
from digit.models.token_model import TokenModel
from digit.training.logs import read_metrics
from runs import curve

SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), *DEVICES[1:]]
STEPS = 20
SETTINGS = {
    "training.steps": STEPS, "training.batch_size": 32, "training.log_every": 1, "training.validate_every": 10,
    "training.checkpoint_every": 10, "training.warmup_steps": 2, "training.ema_decay": 0.9, "training.lr": 3e-3,
    "training.schedule": "constant", "training.sample_every": 20, "training.workers": 0,
    "model.transformer.dim": 32, "model.transformer.depth": 2, "model.transformer.dropout": 0.0,
}  # fmt: skip
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--main_process_port", "0"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
# digit, which says how many of its parameters were cut
SHARDED = """
from torch.distributed.tensor import DTensor
from digit.cli.app import main
from digit.training import sharding
cut = sharding.shard
def told(network, device):
    cut(network, device)
    print("cut:", sum(isinstance(p, DTensor) for p in network.parameters()), "of", len(list(network.parameters())))
sharding.shard = told
main()
"""


def train(launcher: list[str], program: list[str], cache: TokenCache, out: Path, device: str, **changes: object) -> str:
    """What the training printed."""
    settings = {**SETTINGS, **{f"training.{name}": value for name, value in changes.items()}}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    ours = ["train", "prior", "--preset", "cifar10-tiny-prior-cond", "--data", str(cache.folder), "--out", str(out)]
    command = [sys.executable, "-m", *launcher, *program, *ours, "--device", device, *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def check(out: Path, expected: Path, device: str, tolerance: float) -> None:
    """The curve is the expected one but for a share of each loss, and the run left what one on the CPU leaves."""
    losses = curve(out)
    assert len(losses) == STEPS
    assert losses == pytest.approx(curve(expected), rel=tolerance)
    assert curve(out, "validation/nll") == pytest.approx(curve(expected, "validation/nll"), rel=tolerance)
    assert sum(losses[-3:]) < sum(losses[:3])
    lines = [line for line in read_metrics(out) if "mfu" in line]
    assert len(lines) == STEPS
    assert all(line["mfu"] > 0 and line["memory_gib"] > 0 for line in lines)
    assert (out / "samples" / f"step-{STEPS:07d}.png").is_file()
    model = TokenModel.from_pretrained(out / "model")
    assert model.start.device.type == "cpu"
    state = read_tensors(out / "checkpoints" / f"step-{STEPS:07d}" / "modules.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.fixture(scope="module")
def alone(token_cache: TokenCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process on the CPU, in float32."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train([], ["digit"], token_cache, out, "cpu")
    return out


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 0.005), ("bf16", 0.03)])
@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_accelerate_launches_a_training(
    token_cache: TokenCache, alone: Path, tmp_path: Path, device: str, precision: str, tolerance: float
) -> None:
    launcher = [*ACCELERATE, "--mixed_precision", precision, *(["--cpu"] if device == "cpu" else [])]
    out = tmp_path / "run"
    printed = train(launcher, ["-m", "digit"], token_cache, out, device, precision=precision)
    assert printed.count("Trained:") == 1
    check(out, alone, device, tolerance)


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_fsdp2_on_one_device(token_cache: TokenCache, alone: Path, tmp_path: Path, device: str) -> None:
    """All that FSDP2 does but for the exchange with others, with gradients of two parts of a batch; and a run goes on
    without it."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    program, out = [str(tmp_path / "sharded.py")], tmp_path / "run"
    printed = train(TORCHRUN, program, token_cache, out, device, shard="true", accumulation=2, precision="no")
    count = len(read_tensors(out / "checkpoints" / f"step-{STEPS:07d}" / "modules.safetensors"))
    assert f"cut: {count} of {count}" in printed
    check(out, alone, device, 0.005)


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_compiled_training(token_cache: TokenCache, alone: Path, tmp_path: Path, device: str) -> None:
    out = tmp_path / "run"
    train([], ["digit"], token_cache, out, device, compile="true", precision="no")
    check(out, alone, device, 0.005)
