"""Feed-forward decoders behind the packaged prior: FID against the training images, KID, precision and recall against
the test images, all of the same features.

    python experiments/cifar10/feedforward.py OLD NEW --data data/cifar10 --num 10000 --out runs/feedforward
"""

from __future__ import annotations

import argparse
from pathlib import Path

import digit
from digit.core.files import write_json
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import open_extractor
from digit.evaluation.model_source import SamplingRun
from digit.pipeline.assembly import assemble

PACKAGED = Path(digit.__file__).parent / "packaged" / "cifar10"
TRAIN, TEST = FidelityOptions(metrics=("fid",)), FidelityOptions(metrics=("kid", "prc"))


def main() -> None:
    """Measure decoders, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoders", type=Path, nargs="+", help="saved decoders, or their runs")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--num", type=int, default=10_000, help="images a decoder, and test images")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    extractor, rows = open_extractor(), []
    train = measure("cifar10-train", extractor, TRAIN.metrics)
    test = measure(options.data, extractor, TEST.metrics, split="test", total=options.num)
    for decoder in options.decoders:
        parts = (PACKAGED / part for part in ("encoder", "codebook", "vqgan", "prior"))
        run = SamplingRun(assemble(*parts, [decoder], name=str(decoder)), options.num, decoder="onepass")
        images = measure(run.batches(), extractor, ("fid", "kid", "prc"), name=str(decoder), total=options.num)
        values = {**compare(images, train, TRAIN).values, **compare(images, test, TEST).values}
        rows.append({"decoder": str(decoder), **values})
        print(rows[-1], flush=True)
        write_json(options.out / "feedforward.json", {"num": options.num, "decoders": rows})


if __name__ == "__main__":
    main()
