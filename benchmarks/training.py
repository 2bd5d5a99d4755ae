"""Training speed: cached tokens against tokens made on the fly, and tokens/s and MFU of every token model's preset.

    python benchmarks/training.py [--device cuda] [--precision bf16] [--batch-size 64] [--presets NAME ...]

Without ``--presets`` on a CPU the small ones are measured, on a GPU the paper's. Models have the presets' shapes and
random weights; a step is forward, backward and AdamW, as in ``digit train``. "On the fly" runs encoder, codebook and
VQGAN on every batch of images before the same step. MFU counts matrix products that are needed
(digit/training/health.py) against the maker's figure on known GPUs and a measured product of 512 x 512 matrices on a
CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from digit.core.config import from_dict, load_preset
from digit.core.images import to_tensor
from digit.data.dataset import open_dataset
from digit.data.token_cache import Views, build_token_cache, open_token_cache
from digit.models.codebook import Codebook
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.training.engine import Engine
from digit.training.health import forward_flops, peak_flops, peak_memory
from digit.training.task import Step, TrainingConfig
from digit.training.tasks.encoder import model_from
from digit.training.tasks.tokens import TokenData, TokenTask, token_model_config

IMAGES = Path(__file__).resolve().parent.parent / "tests" / "assets" / "cifar512"
SMALL = (
    "cifar10-tiny-prior",
    "cifar10-tiny-prior-cond",
    "cifar10-tiny-ar",
    "cifar10-tiny-masked",
    "cifar10-tiny-vq-prior",
)
PAPER = ("imagenet256-base", "imagenet256-base-ar", "imagenet256-base-masked", "imagenet256-large")
CLUSTERS = 256  # of the small presets, as in digit tour
WARM_UP = 2


def tokenizers() -> DigitPipeline:
    """Encoder, codebook and VQGAN of the small presets, with random weights."""
    torch.manual_seed(0)
    encoder = model_from(load_preset("cifar10-tiny-encoder")["model"], "preset").build().eval()
    vqgan = VQGAN(from_dict(VQGANConfig, load_preset("cifar10-tiny-vqgan")["model"], "preset")).eval()
    return DigitPipeline(
        encoder=encoder, codebook=Codebook.from_centroids(torch.randn(CLUSTERS, encoder.dim)), vqgan=vqgan
    )


class Subject:
    """As much of a task as an engine needs."""

    def __init__(self, config: TokenModelConfig) -> None:
        self.model = TokenModel(config)
        self.modules = torch.nn.ModuleDict({"model": self.model})

    def parameters_by_optimizer(self) -> dict:
        """All of them."""
        return {"model": [{"params": list(self.model.parameters())}]}

    def to_device(self, device: str) -> None:
        """Move the model."""
        self.modules.to(device)


def timed(step: Callable[[], object], args: argparse.Namespace) -> float:
    """Median seconds of a step; at least five are made."""
    found: list[float] = []
    clock = time.process_time if args.core_seconds else time.perf_counter
    begun = clock()
    while len(found) < WARM_UP + 5 or clock() - begun < args.seconds:
        start = clock()
        step()
        if args.device != "cpu":
            torch.cuda.synchronize(args.device)
        found.append(clock() - start)
    return statistics.median(found[WARM_UP:])


def model_config(name: str) -> TokenModelConfig:
    """A preset's model; the small presets leave sizes to the token cache, which has those of :func:`tokenizers`."""
    preset = load_preset(name)
    if name not in SMALL:
        return from_dict(TokenModelConfig, preset["model"], name)
    parts, data = tokenizers(), preset["data"]
    semantic = {"vocab_size": CLUSTERS, "length": int(np.prod(parts.tokenizer.grid))}
    vq = {"vocab_size": parts.vqgan.config.codes, "length": parts.vqgan.num_tokens}
    sizes = {**(vq if data["target"] == "vq" else semantic), "num_classes": 10 if data["labels"] else 0}
    if data["prefix"]:
        sizes |= {f"prefix_{key}": value for key, value in semantic.items()}
    return from_dict(TokenModelConfig, {**preset["model"], **sizes}, name)


def measure_preset(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds, tokens/s and MFU of a step on random tokens, through the engine of ``digit train``."""
    config = model_config(name)
    batch = args.batch_size
    training = TrainingConfig(steps=1, batch_size=batch, precision=args.precision, compile=args.compile, warmup_steps=1)
    task = Subject(config)
    forward = task.model.loss
    engine = Engine(task, training, args.device)  # type: ignore[arg-type]
    if args.compile:
        forward = torch.compile(forward)
    engine.set_learning_rate(Step(0, 1))
    shape = (batch, config.length)
    tokens = torch.randint(config.vocab_size, shape, device=engine.device)
    labels = torch.randint(config.num_classes, (batch,), device=engine.device) if config.num_classes else None
    prefix = None
    if config.prefix_length:
        prefix = torch.randint(config.prefix_vocab_size, (batch, config.prefix_length), device=engine.device)
    mask = torch.rand(shape, device=engine.device) < 0.6 if config.role == "masked" else None

    def step() -> None:
        engine.optimizers["model"].zero_grad(set_to_none=True)
        with engine.accelerator.autocast():
            loss, _ = forward(tokens, labels, prefix, mask)
        engine.accelerator.backward(loss)
        engine.clip("model")
        engine.optimizers["model"].step()

    seconds = timed(step, args)
    needed = 3 * forward_flops(config) * batch
    return {
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "batch_size": batch,
        "images_per_second": round(batch / seconds, 2),
        "tokens_per_second": round(batch * config.length / seconds, 1),
        "teraflops": round(needed / seconds / 1e12, 5),
        "mfu": round(needed / seconds / peak_flops(engine.device, args.precision), 4),
        "peak_GiB": round(peak_memory(engine.device) / 2**30, 2),
    }


def measure_cache(args: argparse.Namespace) -> dict[str, float]:
    """Images/s of tokenizing, and of training steps from a cache and on the fly, for the small prior."""
    device = torch.device(args.device)
    pipe, images = tokenizers().to(device), open_dataset(IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time if args.core_seconds else time.perf_counter
        start = clock()
        build_token_cache(pipe, images, Path(folder) / "cache", Views(flip=True))
        views_per_second = 2 * len(images) / (clock() - start)
        cache = open_token_cache(Path(folder) / "cache")
        data = TokenData(held_out=0)
        model = TokenModel(token_model_config(load_preset("cifar10-tiny-prior")["model"], cache, data, "preset")).to(
            device
        )
        task, batch = TokenTask(model, cache, data), args.batch_size
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        generator, rng = torch.Generator(), np.random.default_rng(0)

        def learn(tokens: torch.Tensor) -> None:
            loss, _ = model.loss(tokens.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def from_cache() -> None:
            chosen = np.sort(rng.choice(len(images), batch, replace=False))
            learn(task._batch(chosen, rng.integers(2, size=batch), generator)["tokens"])

        def on_the_fly() -> None:
            chosen = rng.choice(len(images), batch, replace=False)
            pixels = torch.stack([to_tensor(images[int(i)].image) for i in chosen]).to(device)
            with torch.inference_mode():
                semantic = pipe.tokenizer.encode(pixels)
                pipe.vqgan.encode(pixels)  # the authors' loop makes both kinds in every step
            learn(semantic.clone())

        cached, fly = timed(from_cache, args), timed(on_the_fly, args)
        stored = sum(path.stat().st_size for path in (Path(folder) / "cache").rglob("*.npy"))
    return {
        "views_tokenized_per_second": round(views_per_second, 1),
        "cached_images_per_second": round(batch / cached, 1),
        "on_the_fly_images_per_second": round(batch / fly, 1),
        "times_faster": round(fly / cached, 2),
        "bytes_a_view": round(stored / (2 * len(images)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10, help="at least so long for each figure")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU")
    parser.add_argument(
        "--core-seconds",
        action="store_true",
        help="count processor time, not wall time: for one thread on a busy machine",
    )
    parser.add_argument("--presets", nargs="*", help="what to measure")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--no-cache", action="store_true", help="leave out cached against on the fly")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    results = {}
    print(f"{'preset':26} {'parameters':>12} {'images/s':>10} {'tokens/s':>12} {'TFLOP/s':>9} {'MFU':>6} {'GiB':>6}")
    for name in args.presets or (PAPER if device.type == "cuda" else SMALL):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found = results[name] = measure_preset(name, args)
        print(
            f"{name:26} {found['parameters']:12,} {found['images_per_second']:10,.1f} "
            f"{found['tokens_per_second']:12,.0f} "
            f"{found['teraflops']:9.3f} {found['mfu']:6.1%} {found['peak_GiB']:6.2f}", flush=True,
        )  # fmt: skip
    cache = None if args.no_cache else measure_cache(args)
    if cache:
        print(
            f"\ncifar10-tiny-prior, images/s: {cache['cached_images_per_second']:,.0f} from a cache, "
            f"{cache['on_the_fly_images_per_second']:,.0f} on the fly: {cache['times_faster']:.1f} times faster; "
            f"{cache['views_tokenized_per_second']:,.0f} views/s tokenized, {cache['bytes_a_view']:.0f} bytes each"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {
        "device": name, "precision": args.precision, "threads": args.threads, "core_seconds": args.core_seconds,
        "torch": torch.__version__,
        "python": platform.python_version(), "peak_flops": peak_flops(device, args.precision),
    }  # fmt: skip
    print(json.dumps({"benchmark": "training", "machine": machine, "presets": results, "cache": cache}))


if __name__ == "__main__":
    sys.exit(main())
