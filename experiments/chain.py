"""Images a second of the paper's models at 256 px: prior, AR decoder and VQGAN with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from digit.core.config import from_dict, load_preset
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling import SampleRequest, SamplingParams
from digit.sampling.batching import begin, decoded_at_once, peak
from digit.sampling.engines.acceleration import accelerate, compile_seconds, release

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, float]:
    """What the machine gives now: bytes/s of reading and of copying, and flops/s of square matrix products."""
    numbers = torch.ones(1 << 26, device=device)  # 256 MB, beyond any cache
    into = torch.empty_like(numbers)

    def best(work: Callable[[], object], count: int) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            work()
            wait(device)
            times.append(time.perf_counter() - began)
        return min(times)

    read = 4 * len(numbers) / best(numbers.sum, 6)
    copied = 8 * len(numbers) / best(lambda: into.copy_(numbers), 6)
    found = {"read": read, "copy": copied, "bandwidth": max(read, copied)}
    side = 4096 if device == "cuda" else 1024
    for name, dtype in DTYPES.items():
        a = torch.randn(side, side, device=device, dtype=dtype)
        found[f"flops_{name}"] = 2 * side**3 / best(lambda a=a: a @ a, 8)
    return found


def step_weights(model: TokenModel) -> int:
    """Weights that one step reads: the matrices of all blocks and the head; of the tables a few rows."""
    return sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n)


def paper_pipeline(name: str, guided: bool, device: str = "cuda", smaller: dict | None = None):
    """The paper's model with AR decoder and VQGAN at 256 px, random weights, bfloat16.

    ``smaller`` are changes to the prior and the decoder, and make the VQGAN narrow: to see that the benchmark works.
    """

    def part(preset: str, **changes) -> TokenModel:
        values = {**load_preset(preset)["model"], **changes, **(smaller or {})}
        return TokenModel(from_dict(TokenModelConfig, values, preset)).eval().requires_grad_(False)

    pipe = DigitPipeline(
        prior=part(f"imagenet256-{name}-cond", class_dropout=0.1) if guided else part(f"imagenet256-{name}"),
        decoders={"ar": part(f"imagenet256-{name}-ar")},
        vqgan=VQGAN(VQGANConfig(channels=32) if smaller else VQGANConfig()).eval().requires_grad_(False).bfloat16(),
        settings={
            "prior": SamplingParams(top_k=200, cfg_scale=2.0 if guided else 1.0),
            "ar": SamplingParams(top_p=0.8),
        },
    )
    return pipe.to(device, torch.bfloat16)


def chain(pipe, batch: int, rounds: int, compile: bool, bandwidth: float) -> dict:
    """Images a second from labels to pixels, and the time of an average step against reading the weights once."""
    models = [pipe.prior, *pipe.decoders.values()]
    begin(pipe.device)
    for m in models:
        accelerate(m, compile=compile)
    labels = torch.zeros(batch, dtype=torch.long) if pipe.num_classes else None
    times = []
    for index in range(rounds + 1):
        began = time.perf_counter()
        tokens = pipe.sample_tokens(SampleRequest(range(batch), labels=labels))
        wait(pipe.device.type)
        sampled = time.perf_counter() - began
        for rows in torch.arange(batch).split(decoded_at_once(pipe.image_size)):  # as in digit generate
            pipe.to_pixels(tokens.take(rows))
        wait(pipe.device.type)
        if index:  # the first compiles and records
            times.append((time.perf_counter() - began, sampled))
    whole = statistics.median(t for t, _ in times)
    steps = sum(m.config.length for m in models)
    step = statistics.median(s for _, s in times) / steps
    moved = sum(2 * step_weights(m) * m.config.length for m in models) / steps
    result = {
        "batch": batch,
        "compiled": compile,
        "images_per_second": batch / whole,
        "milliseconds_per_step": 1e3 * step,
        "weight_bandwidth_share": moved / step / bandwidth,
        "peak_megabytes": peak(pipe.device) / 1e6,
        "compile_seconds": sum(compile_seconds(m) for m in models),
    }
    for m in models:
        release(m)
    return result
