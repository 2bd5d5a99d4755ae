"""Models with a feed-forward decoder: FID against the training images, KID, precision and recall against the test
images, all of the same features.

    python experiments/cifar10/feedforward.py MODEL ... --data data/cifar10 --num 10000 --out runs/feedforward

A result for the card, ``fid-NUMBER-MODEL.json``, lies beside ``feedforward.json``, which goes to ``results/second/``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from digit import DigitPipeline
from digit.core.files import write_json
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import open_extractor
from digit.evaluation.model_source import SamplingRun
from digit.pipeline.card import describe_model

TRAIN, TEST = FidelityOptions(metrics=("fid",)), FidelityOptions(metrics=("kid", "prc"))


def main() -> None:
    """Measure models, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="their default settings are used, and all classes in turns")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--num", type=int, default=10_000, help="images of a model, and of the test set")
    parser.add_argument("--temperature", type=float, help="deviation of the decoder's noise; default: the model's")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = {} if options.temperature is None else {"decoder_temperature": options.temperature}
    extractor, rows = open_extractor(), []
    train = measure("cifar10-train", extractor, TRAIN.metrics)
    test = measure(options.data, extractor, TEST.metrics, split="test", total=options.num)
    for name in options.models:
        pipe = DigitPipeline.from_pretrained(name)
        run = SamplingRun(pipe, options.num, decoder="onepass", settings=settings)
        images = measure(run.batches(), extractor, ("fid", "kid", "prc"), name=pipe.name, total=options.num)
        found = replace(compare(images, train, TRAIN), sampling=run.describe(), model=describe_model(pipe))
        write_json(options.out / f"fid-{len(rows)}-{pipe.name}.json", found.to_dict())
        weights = found.model["parts"]["decoder/onepass"]
        rows.append({"model": name, **weights, **found.values, **compare(images, test, TEST).values})
        print(rows[-1], flush=True)
        write_json(options.out / "feedforward.json", {"num": options.num, "models": rows})


if __name__ == "__main__":
    main()
