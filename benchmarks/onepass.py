"""What the one-pass decoder saves: seconds an image and peak memory of prior, AR decoder, VQGAN and one-pass decoders,
and of both ways.

    python benchmarks/onepass.py [--size cifar10|imagenet256] [--device cpu|cuda] [--dtype fp32|bf16] [--batch 4]
    [--repeats 1]

    cifar10      the presets of the study: 64 tokens, 32 px
    imagenet256  the paper's base models: 256 tokens, 256 px (and 512 px from the same tokens, and 1,024 tokens to 512
    px)

Networks have random weights: speed does not depend on the values. Each stage runs in a process of its own, so that its
    peak memory is
its own, that of its weights included; one batch before is not counted. ``--stages`` picks some. A way is the sum of its
stages. On a machine that others use too, the seconds of processor time (of all threads) say more than those of the
clock. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

K, V = {"cifar10": 1024, "imagenet256": 8192}, 1024
ONE_PASS = {
    "cifar10": {"one pass": "cifar10-onepass"},
    "imagenet256": {
        "one pass": "imagenet256-base-onepass",
        "one pass, 512 px": "imagenet256-base-onepass-512",
        "one pass, 1,024 tokens": "imagenet256-base-onepass-448",
    },
}
PRESETS = {
    "cifar10": {"prior": "cifar10-prior", "ar decoder": "cifar10-ar"},
    "imagenet256": {"prior": "imagenet256-base", "ar decoder": "imagenet256-base-ar"},
}
WAYS = {
    "prior + AR decoder + VQGAN": ("prior", "ar decoder", "vqgan decode"),
    "prior + one pass": ("prior", "one pass"),
}


def stages(size: str) -> list[str]:
    """Their names, in order."""
    return ["prior", "ar decoder", "vqgan decode", *ONE_PASS[size]]


def network(size: str, stage: str):
    """The network of a stage, with random weights."""
    from digit.core.config import from_dict, load_preset
    from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
    from digit.models.token_config import TokenModelConfig
    from digit.models.token_model import TokenModel
    from digit.models.vqgan import VQGAN, VQGANConfig

    if stage == "vqgan decode":
        values = load_preset("cifar10-vqgan")["model"] if size == "cifar10" else {"shortcut": "hidden"}  # MAGE's
        return VQGAN(from_dict(VQGANConfig, values, size))
    if stage in ONE_PASS[size]:
        values = load_preset(ONE_PASS[size][stage])["model"]
        shape = {"prefix_vocab_size": K[size], "grid": values.get("grid", (8, 8))}
        return FeedForwardDecoder(from_dict(FeedForwardConfig, {**values, **shape}, stage))
    values = load_preset(PRESETS[size][stage])["model"]
    length = 64 if size == "cifar10" else 256
    shape = {"vocab_size": K[size] if stage == "prior" else V, "length": length}
    if stage != "prior":
        shape |= {"prefix_vocab_size": K[size], "prefix_length": length}
    return TokenModel(from_dict(TokenModelConfig, {**values, **shape}, stage))


def work(model, size: str, stage: str, batch: int, device: str) -> Callable[[int], object]:
    """The function that makes batch number i of a stage."""
    import torch

    from digit.sampling import SamplingParams, sample
    from digit.sampling.rng import pixel_latents

    def tokens(vocab: int, length: int) -> torch.Tensor:
        return torch.randint(vocab, (batch, length), device=device)

    if stage == "vqgan decode":
        return lambda _: model.decode(tokens(V, model.num_tokens))
    if stage in ONE_PASS[size]:
        c = model.config
        return lambda i: model(
            tokens(c.prefix_vocab_size, c.prefix_length),
            pixel_latents(c, range(i * batch, (i + 1) * batch)).to(model.start),
        )
    settings = SamplingParams(top_k=200) if stage == "prior" else SamplingParams(top_p=0.8)
    prefix = tokens(K[size], model.config.prefix_length) if stage != "prior" else None
    return lambda i: sample(model, range(i * batch, (i + 1) * batch), 0, settings, prefix=prefix)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Time one stage, in this process."""
    import torch

    from digit.core.devices import quick_pixels

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cuda = args.device.startswith("cuda")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = network(args.size, args.stage).eval().requires_grad_(False)
    narrow = args.stage != "vqgan decode" or cuda  # on a CPU the VQGAN's weights are float32, as in the pipeline
    model = model.to(args.device, dtype if narrow else torch.float32)
    paints = args.stage == "vqgan decode" or args.stage in ONE_PASS[args.size]
    with (
        torch.inference_mode(),
        quick_pixels(torch.device(args.device)) if paints else nullcontext(),
    ):  # as in the pipeline
        function = work(model, args.size, args.stage, args.batch, args.device)
        function(0)
        if cuda:
            torch.cuda.synchronize()
        start, used = time.perf_counter(), time.process_time()
        for i in range(1, args.repeats + 1):
            function(i)
        if cuda:
            torch.cuda.synchronize()
    images = args.repeats * args.batch
    seconds, used = (time.perf_counter() - start) / images, (time.process_time() - used) / images
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_image": round(seconds, 5),
        "cpu_seconds_per_image": round(used, 5),
        "peak_MiB": round(peak),
    }


def machine(args: argparse.Namespace) -> dict[str, object]:
    """Where this runs."""
    import torch

    from digit.core.environment import hardware

    return {**hardware(), "threads": args.threads, "torch": torch.__version__}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(ONE_PASS), default="cifar10", help="which models (default cifar10)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default cpu)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of prior and decoders (default fp32)"
    )
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default 4)")
    parser.add_argument("--repeats", type=int, default=1, help="batches that are timed (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--stages", help="only these, comma separated with ; such as 'prior;one pass'")
    parser.add_argument("--stage", help="measure one stage, in this process")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.stage:
        print(json.dumps(measure(args)))
        return
    results: dict[str, dict[str, float]] = {}
    passed = [f"--{name}={getattr(args, name)}" for name in ("size", "device", "dtype", "batch", "repeats", "threads")]
    print(f"{'stage':28} {'parameters':>12} {'s / image':>10} {'CPU s':>9} {'peak MiB':>9}")
    for stage in args.stages.split(";") if args.stages else stages(args.size):
        command = [sys.executable, __file__, "--stage", stage, *passed]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[stage] = row = json.loads(done.stdout.splitlines()[-1])
        times = f"{row['seconds_per_image']:10.4f} {row['cpu_seconds_per_image']:9.4f}"
        print(f"{stage:28} {row['parameters']:12,} {times} {row['peak_MiB']:9,}", flush=True)
    ways, speedup = {}, {}
    for kind in ("seconds_per_image", "cpu_seconds_per_image"):
        ways[kind] = {
            w: sum(results[s][kind] for s in parts) for w, parts in WAYS.items() if set(parts) <= results.keys()
        }
        if len(ways[kind]) == 2:
            slow, fast = ways[kind].values()
            speedup[kind] = round(slow / fast, 2)
    for name, seconds in ways["seconds_per_image"].items():
        print(
            f"{name:28} {'':12} {seconds:10.4f} {ways['cpu_seconds_per_image'][name]:9.4f} {1 / seconds:8.2f} images/s"
        )
    if speedup:
        print(
            f"one pass: {speedup['seconds_per_image']} times as fast by the clock, {speedup['cpu_seconds_per_image']} "
            "by CPU time"
        )
    print(json.dumps({
        "benchmark": "onepass", "size": args.size, "device": args.device, "dtype": args.dtype, "batch": args.batch,
        "machine": machine(args), "stages": results, "ways": ways, "speedup": speedup,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
