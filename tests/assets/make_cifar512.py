"""Makes ``cifar512`` beside this file: the first training images of each class of CIFAR-10, 512 in all (52 of the first
two classes, 51 of the others), in the authors' order.

    digit data cifar10 --out data/cifar10
    python tests/assets/make_cifar512.py data/cifar10
"""

import sys
from pathlib import Path

import numpy as np

from digit.data.dataset import open_dataset, write_dataset


def main(cifar10: str) -> None:
    dataset = open_dataset(cifar10, "train")
    wanted = [52 if label < 2 else 51 for label in range(10)]
    chosen = np.sort(
        np.concatenate([np.flatnonzero(dataset.labels == label)[:count] for label, count in enumerate(wanted)])
    )
    out = Path(__file__).parent / "cifar512"
    licence = "No licence was stated; cite: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
    with write_dataset(out, "cifar512", dataset.classes, "512 training images of CIFAR-10", licence) as writer:
        for i in chosen.tolist():
            writer.add("train", dataset.source.key(i), dataset.source.read(i), "png", (32, 32), int(dataset.labels[i]))


if __name__ == "__main__":
    main(sys.argv[1])
