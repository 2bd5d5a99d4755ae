"""Make the packaged model from the study's: card, patches of its clusters, and the picture of the README.

    python experiments/cifar10/ship.py runs/study/models/cond --data data/cifar10 --results runs/study/results

Nothing is measured here: the results are those of the same weights, or the card does not take them. What the model's
card says already stays where no new result has the same name, so a part that changed has to be measured again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from digit import DigitPipeline
from digit.core.errors import DigitError
from digit.core.grids import image_grid
from digit.core.images import save_png
from digit.pipeline.card import with_facts

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "src" / "digit" / "packaged" / "cifar10"
PICTURE = ROOT / "docs" / "images" / "classes.png"
EACH = 10  # pictures a class in the README
NOTES = {
    "recipe": "experiments/cifar10 of the repository: presets, commands, records",
    "data": "CIFAR-10 (Krizhevsky 2009), training split. Its images come from the web and have no stated licence; "
    "the weights' licence covers the weights alone",
    "losses": "the feed-forward decoder learned from distances in LPIPS's VGG16, which was trained on ImageNet",
}


def main() -> None:
    """Ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--results", type=Path, default=None, help="measurements for the card")
    options = parser.parse_args()
    pipe = DigitPipeline.from_pretrained(options.model).with_parts(name="cifar10", provenance=NOTES)
    before = {one.name: one for one in pipe.card.results}
    try:
        pipe = with_facts(pipe, [options.results] if options.results else [], "mit", ["uoft-cs/cifar10"])
    except DigitError as error:
        sys.exit(str(error))
    both = before | {one.name: one for one in pipe.card.results}
    pipe = pipe.with_parts(card=replace(pipe.card, results=tuple(both.values())))
    pipe.save_pretrained(PACKAGED, torch.float16)  # as it is stored already
    subprocess.run(
        [sys.executable, "-m", "digit", "atlas", PACKAGED, "--data", options.data, "--each", "4"], check=True
    )
    labels = [label for label in range(pipe.num_classes) for _ in range(EACH)]
    save_png(image_grid(pipe(labels, seed=0), EACH, 2, row_titles=pipe.class_names), PICTURE)
    size = sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file())
    print(f"{PACKAGED}: {size / 1e6:.1f} MB; {PICTURE}")


if __name__ == "__main__":
    main()
