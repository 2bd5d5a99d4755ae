"""Two real processes train like one: DDP and FSDP2, resumed from each other's checkpoints, started by accelerate and by
hand."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.data.token_cache import TokenCache
from digit.training.engine import Engine, check_launch
from digit.training.task import TrainingConfig
from runs import curve

# Sums of gradients are rounded in another order, and AdamW's first steps pass that on; 12 steps of float32 leave this
# much.
TOLERANCE = 2e-5
PROGRAM = """
import json, sys, torch
from digit.core.config import load_preset
from digit.training.build import build_task
from digit.training.loop import train
torch.set_num_threads(1)
for out, preset, data, changes, resume in json.loads(sys.argv[1]):
    task, config = build_task("decoder" if "masked" in preset else "prior", load_preset(preset, changes), data, preset)
    train(task, config, out, resume=resume, device="cpu", show=False)
"""
SMALL = [
    "training.steps=12", "training.batch_size=16", "training.log_every=1", "training.checkpoint_every=4",
    "training.keep_checkpoints=9", "training.validate_every=4", "training.warmup_steps=4", "training.ema_decay=0.9",
    "model.transformer.dim=32", "model.transformer.depth=2", "model.transformer.dropout=0.0",
    "training.schedule=constant",
]  # fmt: skip
Run = tuple[str, str, str, list[str], bool]


def run(
    cache: TokenCache, out: Path, *changes: str, preset: str = "cifar10-tiny-prior-cond", resume: bool = False
) -> Run:
    return (str(out), preset, str(cache.folder), [*SMALL, *changes], resume)


def start(runs: Sequence[Run], processes: int) -> None:
    """Do the runs one after the other in one process, or in several that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs)]
    names = {} if processes == 1 else {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            command, env={**os.environ, **names, **({"RANK": str(i), "LOCAL_RANK": str(i)} if names else {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]


def assert_same_run(found: Path, expected: Path) -> None:
    """Loss curves, gradient norms, validation and final weights agree."""
    for name in ("loss", "gradient_norm", "validation/nll"):
        assert curve(found, name) == pytest.approx(curve(expected, name), abs=TOLERANCE), name
    assert len(curve(found)) == 12
    for file in ("model/model.safetensors", "checkpoints/step-0000012/modules.safetensors"):
        ours, theirs = read_tensors(found / file), read_tensors(expected / file)
        assert ours.keys() == theirs.keys()
        worst = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
        assert worst < 10 * TOLERANCE, (file, worst)


@pytest.fixture(scope="module")
def whole(token_cache: TokenCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    start([run(token_cache, out)], 1)
    return out


def test_two_processes_are_one(token_cache: TokenCache, whole: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 give the curve of one process, and a run goes on from one process to two, sharded and not."""
    moved = tmp_path / "moved"
    shutil.copytree(whole / "checkpoints" / "step-0000004", moved / "checkpoints" / "step-0000004")
    shutil.copy(whole / "metrics.jsonl", moved)
    fsdp = ["training.shard=true", "training.accumulation=2", "training.sample_every=6"]
    runs = [
        run(token_cache, tmp_path / "ddp"),
        run(token_cache, tmp_path / "fsdp", *fsdp),
        run(token_cache, moved, "training.steps=8", resume=True),
        run(token_cache, moved, *fsdp, resume=True),
    ]
    start(runs, 2)
    for out in ("ddp", "fsdp", "moved"):
        assert_same_run(tmp_path / out, whole)
    assert sum(curve(moved)[-3:]) < sum(curve(moved)[:3])
    assert (tmp_path / "fsdp" / "samples" / "step-0000012.png").is_file()


def test_one_process_where_two_were_asked_for_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one process, with this environment (accelerate 1.0 to
    1.15)."""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DigitError, match=r"started one process.*accelerate launch --multi_gpu.*torchrun"):
        check_launch()


@pytest.mark.parametrize(
    ("names", "precision", "words"),
    [(["model", "discriminator"], "no", r"trains 2 \(model, discriminator\)"), (["model"], "fp16", "'bf16' or 'no'")],
)
def test_what_cannot_be_sharded_gets_a_sentence(names: list[str], precision: str, words: str) -> None:
    engine = object.__new__(Engine)  # as far as it is when it decides; two processes cannot be had in a test of one
    engine.config = TrainingConfig(steps=1, batch_size=2, shard=True, precision=precision)
    engine.networks = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    engine._asked_to_shard, engine.world = False, 2
    with pytest.raises(DigitError, match=words):
        engine._shard()


ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
LAUNCHERS = {
    "accelerate, DDP": [*ACCELERATE, "--mixed_precision", "no", "--multi_gpu"],
    "accelerate, FSDP2": [*ACCELERATE, "--mixed_precision", "no", "--use_fsdp", "--fsdp_version", "2"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_the_launchers_of_the_manual(token_cache: TokenCache, whole: Path, tmp_path: Path, launcher: list[str]) -> None:
    """The commands of docs/training.md."""
    out, preset, data, changes, _ = run(token_cache, tmp_path / "run")
    settings = [part for change in changes for part in ("--set", change)]
    ours = ["digit", "train", "prior", "--preset", preset, "--data", data, "--out", out, "--device", "cpu", *settings]
    command = [sys.executable, "-m", *launcher, "-m", *ours]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained:") == 1
    assert_same_run(Path(out), whole)
