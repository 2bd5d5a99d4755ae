"""kill -9 at random moments: whatever was being written, the next start goes on, and the end is as if nothing had
happened."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from digit.core.files import read_tensors
from digit.data.dataset import open_dataset
from digit.data.token_cache import TokenCache, open_token_cache
from digit.training import checkpoint
from runs import lines, same

KILLS = 15  # of training, and as many of caching
STEPS = 400
# The parent imports everything once and forks a process that works; a signal kills that one at once, as it would any
# other.
WORKER = """
import os, sys, torch
torch.set_num_threads(1)
from digit.data.dataset import open_dataset
from digit.data.token_cache import Views, build_token_cache
from digit.pipeline.pipeline import DigitPipeline
from digit.core.config import load_preset
from digit.training.build import build_task
from digit.training.loop import train
import accelerate, tensorboard, torch.utils.tensorboard

def cache(model, data, out):
    build_token_cache(DigitPipeline.from_pretrained(model), open_dataset(data), out, Views(), shard_size=16,
    batch_size=8)

def learn(data, out, *changes):
    task, config = build_task("prior", load_preset("cifar10-tiny-prior-cond", changes), data, "test")
    train(task, config, out, resume=True, device="cpu", show=False)

work = {"cache": cache, "learn": learn}[sys.argv[1]]
for line in sys.stdin:
    child = os.fork()
    if not child:
        work(*sys.argv[2:])
        sys.stdout.flush()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Worker:
    """Starts the same work again and again, in a process of its own each time."""

    def __init__(self, *arguments: object, errors: Path) -> None:
        self.errors = open(errors, "w")  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def start(self) -> int:
        """Begin; the process's id."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Its exit code, -9 if it was killed."""
        return int(self.process.stdout.readline())

    def seconds(self) -> float:
        """How long the work takes when it is left alone."""
        begun = time.perf_counter()
        self.start()
        assert self.wait() == 0, Path(self.errors.name).read_text()[-3000:]
        return time.perf_counter() - begun

    def kill_after(self, seconds: float) -> bool:
        """Work for so long; whether it was killed and not done before."""
        child = self.start()
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = self.wait()
        assert code in (0, -signal.SIGKILL), Path(self.errors.name).read_text()[-3000:]
        return code != 0

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def whole_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_caching_survives_kill_9(cifar512: Path, tmp_path: Path) -> None:
    """No image is cached twice or lost: every shard that is there is whole, is never made again, and all of them come
    to be."""
    tiny.pipeline().save_pretrained(tmp_path / "model")
    undisturbed = Worker("cache", tmp_path / "model", cifar512, tmp_path / "whole", errors=tmp_path / "whole.txt")
    seconds = undisturbed.seconds()
    undisturbed.close()
    out, rng, kills, made = tmp_path / "parts", random.Random(), 0, {}
    worker = Worker("cache", tmp_path / "model", cifar512, out, errors=tmp_path / "parts.txt")
    while kills < KILLS:
        kills += worker.kill_after(rng.uniform(0, seconds / 4))
        shards = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
        assert made.items() <= shards.items()  # none was made again
        made = shards
        if len(made) == 32:  # all done: another round from the beginning, until it was killed often enough
            assert whole_files(out) == whole_files(tmp_path / "whole")
            shutil.rmtree(out)
            made = {}
    worker.seconds()
    worker.close()
    assert whole_files(out) == whole_files(tmp_path / "whole")
    cache = open_token_cache(out)
    cache.verify()
    assert np.array_equal(cache.labels, open_dataset(cifar512).labels)


def end_of(out: Path) -> dict[str, torch.Tensor]:
    files = [out / "model" / "model.safetensors", *sorted(checkpoint.path_of(out, STEPS).glob("*.safetensors"))]
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in read_tensors(file).items()}


@pytest.mark.slow
def test_training_survives_kill_9(token_cache: TokenCache, tmp_path: Path) -> None:
    """Every start goes on from a whole checkpoint, and the last weights are those of a run that was left alone, bit for
    bit."""
    small = [
        f"training.steps={STEPS}", "training.batch_size=8", "training.log_every=20", "training.checkpoint_every=5",
        "data.held_out=16",
        "training.validate_every=100", "model.transformer.dim=32", "model.transformer.depth=1",
        "model.transformer.heads=2",
    ]  # fmt: skip
    undisturbed = Worker("learn", token_cache.folder, tmp_path / "whole", *small, errors=tmp_path / "whole.txt")
    seconds = undisturbed.seconds()
    undisturbed.close()
    out, rng, kills, reached = tmp_path / "parts", random.Random(), 0, 0
    worker = Worker("learn", token_cache.folder, out, *small, errors=tmp_path / "parts.txt")
    while kills < KILLS:
        kills += worker.kill_after(rng.uniform(0, seconds / 4))
        newest = checkpoint.latest(out)
        if newest is not None:
            for folder in newest.parent.glob("step-*"):
                checkpoint.load(folder)  # whole, and of its step
            assert checkpoint.load(newest).step >= reached
            reached = checkpoint.load(newest).step
        if reached == STEPS and (out / "model").is_dir():
            assert same(end_of(out), end_of(tmp_path / "whole"))
            shutil.rmtree(out)
            reached = 0
    worker.seconds()
    worker.close()
    assert same(end_of(out), end_of(tmp_path / "whole"))
    assert lines(out) == lines(tmp_path / "whole")
    assert not [path for path in (out / "checkpoints").iterdir() if not path.name.startswith("step-")]
