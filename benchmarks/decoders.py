"""Images a second of a saved model with each of its decoders, end to end: prior, decoder, pixels, as `pipe(...)` runs
them.

    python benchmarks/decoders.py MODEL [--num 256] [--batch 64] [--rounds 5] [--threads 2] [--device cpu] [--dtype
    fp32|bf16]

The decoders take turns, round after round in one process, without guidance and with the model's own (a guided prior
computes everything twice, which no decoder can save). Medians; one round before is not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from digit import DigitPipeline
from digit.core.environment import hardware, versions
from digit.sampling import SampleRequest


def seconds(pipe: DigitPipeline, decoder: str, first: int, args: argparse.Namespace, **settings: float) -> float:
    """How long the pictures ``first``, ``first + 1`` ... of a run take, up to their pixels."""
    labels = torch.arange(args.num) % pipe.num_classes if pipe.num_classes else None
    began = time.perf_counter()
    for start in range(0, args.num, args.batch):
        part = slice(start, min(start + args.batch, args.num))
        images = range(first + part.start, first + part.stop)
        request = SampleRequest(images, 0, None if labels is None else labels[part], decoder, settings)
        tokens = pipe.sample_tokens(request)
        pipe.to_pixels(tokens).cpu()
    return time.perf_counter() - began


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a packaged model, a folder, or a Hub id")
    parser.add_argument("--num", type=int, default=256, help="pictures a round (default 256)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ... (default cpu)")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of prior and decoders (default fp32)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    pipe = DigitPipeline.from_pretrained(args.model).to(args.device, dtype)
    ways = {"no guidance": {"cfg_scale": 1.0}, "the model's own settings": {}}
    cases = [(way, decoder) for way in ways for decoder in pipe.decoders]
    taken: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    for turn in range(args.rounds + 1):
        for way, decoder in cases:
            duration = seconds(pipe, decoder, turn * args.num, args, **ways[way])
            if turn:  # the first compiles, and fills caches
                taken[way, decoder].append(duration)
    rates = {case: args.num / statistics.median(all_) for case, all_ in taken.items()}
    print(f"{'settings':26} {'decoder':8} {'images/s':>9} {'over AR':>8}")
    rows = []
    for (way, decoder), rate in rates.items():
        ratio = rate / rates[way, "ar"] if "ar" in pipe.decoders else None
        print(f"{way:26} {decoder:8} {rate:9.1f} {'-' if ratio is None else f'{ratio:.2f}':>8}")
        rows.append(
            {
                "settings": way,
                "decoder": decoder,
                "images_per_second": round(rate, 2),
                "over_ar": ratio and round(ratio, 3),
            }
        )
    print(
        json.dumps(
            {"benchmark": "decoders", **vars(args), "machine": hardware(), "versions": versions(), "rates": rows}
        )
    )


if __name__ == "__main__":
    main()
