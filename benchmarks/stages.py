"""Images a second and peak memory of every stage, at the demo's size, on this machine.

    python benchmarks/stages.py [--images 512] [--threads 2]

Networks have the shapes of the cifar10-tiny presets and random weights: speed does not depend on the values. Each stage
runs in a process of its own, so that its peak memory is its own; one warm-up batch is not counted. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent / "tests" / "assets" / "cifar512"
STAGES = ("decode images", "encoder", "codebook fit", "tokenize", "vqgan encode", "prior", "ar decoder",
    "masked decoder",
          "vqgan decode", "generate (ar)", "generate (masked)", "train prior", "train vqgan")  # fmt: skip


def networks():
    """A pipeline of the demo's shape with random weights."""
    import torch

    from digit.core.config import from_dict, load_preset
    from digit.models.codebook import Codebook
    from digit.models.token_config import TokenModelConfig
    from digit.models.token_model import TokenModel
    from digit.models.vqgan import VQGAN, VQGANConfig
    from digit.pipeline.pipeline import DigitPipeline
    from digit.training.tasks.encoder import model_from

    torch.manual_seed(0)
    encoder = model_from(load_preset("cifar10-tiny-encoder")["model"], "preset").build().eval()
    vqgan = VQGAN(from_dict(VQGANConfig, load_preset("cifar10-tiny-vqgan")["model"], "preset")).eval()
    clusters, length = 256, encoder.grid[0] * encoder.grid[1]

    def token_model(preset: str, **sizes: int) -> TokenModel:
        return TokenModel(from_dict(TokenModelConfig, {**load_preset(preset)["model"], **sizes}, preset)).eval()

    stage2 = {
        "vocab_size": vqgan.config.codes, "length": vqgan.num_tokens, "prefix_vocab_size": clusters,
        "prefix_length": length
    }  # fmt: skip
    return DigitPipeline(
        encoder=encoder,
        codebook=Codebook.from_centroids(torch.randn(clusters, encoder.dim)),
        prior=token_model("cifar10-tiny-prior-cond", vocab_size=clusters, length=length, num_classes=10),
        decoders={
            "ar": token_model("cifar10-tiny-ar", **stage2),
            "masked": token_model("cifar10-tiny-masked", **stage2),
        },
        vqgan=vqgan,
        name="benchmark",
    )


def work(stage: str, images) -> Callable[[int, int], object]:
    """The function of a stage over images start..stop."""
    import torch

    from digit.data.dataset import open_dataset

    if stage == "decode images":
        dataset = open_dataset(IMAGES)
        return lambda a, b: [dataset[i].image for i in range(a, b)]
    pipe = networks()
    semantic = torch.randint(0, 256, (len(images), pipe.prior.config.length))
    vq = torch.randint(0, pipe.vqgan.config.codes, (len(images), pipe.vqgan.num_tokens))
    labels = torch.arange(len(images)) % 10
    if stage.startswith("train "):
        return training(stage.removeprefix("train "), pipe, images, semantic, labels)
    if stage == "codebook fit":
        from digit.clustering.kmeans import fit_codebook

        return lambda a, b: fit_codebook(pipe.encoder, images[a:b].split(64), 64, show=False)
    from digit.pipeline.pipeline import Tokens
    from digit.sampling import SamplingParams, sample

    settings = SamplingParams(top_k=100)

    def infer(function):
        return lambda a, b: torch.inference_mode()(function)(a, b)

    return infer({
        "encoder": lambda a, b: pipe.encoder(images[a:b]),
        "tokenize": lambda a, b: pipe.tokenizer.encode(images[a:b]),
        "vqgan encode": lambda a, b: pipe.vqgan.encode(images[a:b]),
        "prior": lambda a, b: sample(pipe.prior, range(a, b), 0, settings, labels[a:b]),
        "ar decoder": lambda a, b: pipe.decode_tokens(semantic[a:b], decoder="ar"),
        "masked decoder": lambda a, b: pipe.decode_tokens(semantic[a:b], decoder="masked"),
        "vqgan decode": lambda a, b: pipe.to_pixels(Tokens(None, vq[a:b])),
        "generate (ar)": lambda a, b: pipe(labels[a:b].tolist(), decoder="ar"),
        "generate (masked)": lambda a, b: pipe(labels[a:b].tolist(), decoder="masked"),
    }[stage])  # fmt: skip


def training(what: str, pipe, images, semantic, labels) -> Callable[[int, int], object]:
    """Forward, backward and an optimizer step; of the VQGAN the reconstruction part alone."""
    import torch

    model = (pipe.prior if what == "prior" else pipe.vqgan).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def step(a: int, b: int) -> None:
        if what == "prior":
            loss, _ = model.loss(semantic[a:b], labels[a:b])
        else:
            loss = (model.decode_latents(model.latents(images[a:b])) - images[a:b]).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(stage: str, count: int, threads: int, batch: int = 64) -> dict[str, float]:
    """Run a stage over ``count`` images, in this process."""
    import torch

    from digit.core.images import to_tensor
    from digit.data.dataset import open_dataset

    torch.set_num_threads(threads)
    pixels, _ = open_dataset(IMAGES).arrays()
    images = to_tensor(pixels)
    function = work(stage, images)
    function(0, batch)
    start, done = time.perf_counter(), 0
    while done < count:
        first = done % (len(images) - batch + 1)
        function(first, first + batch)
        done += batch
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"images_per_second": round(done / seconds, 1), "peak_MiB": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="images a stage (default 512)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--stage", choices=STAGES, help="measure one stage, in this process")
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(measure(args.stage, args.images, args.threads)))
        return
    results = {}
    print(f"{'stage':20} {'images/s':>10} {'peak MiB':>10}")
    for stage in STAGES:
        command = [
            sys.executable,
            __file__,
            "--stage",
            stage,
            "--images",
            str(args.images),
            "--threads",
            str(args.threads),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[stage] = json.loads(output.splitlines()[-1])
        print(f"{stage:20} {results[stage]['images_per_second']:10,.1f} {results[stage]['peak_MiB']:10,}", flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "stages", "machine": machine, "images": args.images, "stages": results}))


if __name__ == "__main__":
    main()
