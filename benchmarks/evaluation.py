"""How much memory does measuring FID take, and how fast are the two backends of the FID network?

    python benchmarks/evaluation.py             memory alone: 1,000 against 20,000 random images
    python benchmarks/evaluation.py --network   images a second of torch and of ONNX Runtime as well (needs the weights)

Memory is measured in a fresh process for each count. The images pass through the same collector as in `digit evaluate
fidelity`, with a fixed random projection to 2048 features in place of InceptionV3, which holds one batch whatever the
count. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import psutil
import torch

from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.inception import (
    Activations,
    InceptionWeights,
    OnnxExtractor,
    TorchExtractor,
    load_inception,
)

BATCH, SIDE, WIDTH, SPATIAL = 50, 32, 2048, 2023


class RandomProjection:
    """(B, 3, 32, 32) uint8 to 2048 features by a fixed random matrix."""

    width, backend = WIDTH, "random projection"
    weights = InceptionWeights({}, "random projection", "none")

    def __init__(self) -> None:
        self.matrix = torch.randn(3 * SIDE * SIDE, WIDTH, generator=torch.Generator().manual_seed(0))

    def __call__(self, images: torch.Tensor) -> Activations:  # noqa: D102
        features = images.flatten(1).float() @ self.matrix / 1000
        return Activations(features, None, features[:, :SPATIAL])


class RandomImages:
    """Batches of random images, which note the largest resident memory seen between two of them."""

    def __init__(self, count: int) -> None:
        self.count, self.peak, self.process = count, 0, psutil.Process()

    def __iter__(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.count // BATCH):
            yield torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
            self.peak = max(self.peak, self.process.memory_info().rss)


def peak_memory(count: int) -> dict[str, float]:
    """Peak MiB, how much of it came with the images, and seconds, of a fresh process that gathers the statistics of
    ``count`` images.
    """
    done = subprocess.run([sys.executable, __file__, "--count", str(count)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def gather(count: int) -> dict[str, float]:
    began, images = time.monotonic(), RandomImages(count)
    before = images.process.memory_info().rss
    statistics = measure(images, RandomProjection(), ("fid", "sfid"), total=count).statistics
    assert statistics.n == count
    found = {"peak_mib": images.peak, "above_start_mib": images.peak - before}
    return {name: round(value / 2**20, 1) for name, value in found.items()} | {
        "seconds": round(time.monotonic() - began, 2)
    }


def speed(count: int) -> dict[str, float]:
    """Images a second of both backends on the CPU, after one batch to warm up."""
    weights, found = load_inception("auto"), {}
    images = torch.randint(0, 256, (16, 3, SIDE, SIDE), dtype=torch.uint8)
    for name, extractor in (("torch", TorchExtractor(weights)), ("onnx", OnnxExtractor(weights))):
        extractor(images)
        began = time.monotonic()
        for _ in range(count // 16):
            extractor(images)
        found[f"{name}_images_per_second"] = round(count // 16 * 16 / (time.monotonic() - began), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="store_true", help="measure the speed of the FID network too")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        print(json.dumps(gather(options.count)))
        return
    few, many = peak_memory(1_000), peak_memory(20_000)
    result = {"threads": torch.get_num_threads(), "peak_mib_1k": few["peak_mib"], "peak_mib_20k": many["peak_mib"]}
    result |= {"above_start_mib_1k": few["above_start_mib"], "above_start_mib_20k": many["above_start_mib"]}
    result |= {"growth_mib": round(many["peak_mib"] - few["peak_mib"], 1), "seconds_20k": many["seconds"]}
    if options.network:
        result |= speed(64)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
