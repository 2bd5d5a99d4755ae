"""LPIPS: the distance of two images in the features of AlexNet or VGG16 (Zhang et al., CVPR 2018, arXiv 1801.03924).

The package `lpips` brings the network's structure and its trained heads; the ImageNet backbone is torchvision's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.models.weights import PublishedWeights

_ADDRESS = "https://download.pytorch.org/models"
BACKBONES = {
    "alex": PublishedWeights(
        "torchvision", f"{_ADDRESS}/alexnet-owt-7be5be79.pth", "7be5be79", ("lpips-alex.safetensors",), "features."
    ),
    "vgg": PublishedWeights(
        "torchvision", f"{_ADDRESS}/vgg16-397923af.pth", "397923af", ("lpips-vgg.safetensors",), "features."
    ),
}


@dataclass(frozen=True)
class Lpips:
    """The ``network`` of the package `lpips`, with its version, backbone and the origin of the weights."""

    network: nn.Module
    description: str
    device: torch.device

    @torch.inference_mode()
    def __call__(self, originals: Tensor, others: Tensor) -> Tensor:
        """Distances (B,) of two batches (B, 3, H, W) uint8; 0 for equal images."""
        pair = (images.to(self.device).float() / 127.5 - 1 for images in (originals, others))
        distances: Tensor = self.network(*pair).flatten().cpu()
        return distances


def load_lpips(net: str = "alex", weights: str | Path = "auto", device: str = "cpu") -> Lpips:
    """LPIPS with "alex" (what the authors advise for measuring) or "vgg"; values of the two are not comparable. For
    ``weights`` see :meth:`~digit.models.weights.PublishedWeights.load`; a DigitError says what is missing.
    """
    if net not in BACKBONES:
        raise DigitError(f"LPIPS with '{net}' was asked for; there are: {', '.join(BACKBONES)}.")
    network = untrained(net)
    tensors, source = BACKBONES[net].load(weights)
    own = dict(network.net.state_dict())
    # "slice2.3.weight" is torchvision's "features.3.weight"
    wanted = {key: "features." + key.split(".", 1)[1] for key in own}
    wrong = [name for key, name in wanted.items() if name not in tensors or tensors[name].shape != own[key].shape]
    if wrong:
        raise DigitError(
            f"{source} does not hold the backbone of LPIPS '{net}': {wrong[0]} is missing or of another shape."
        )
    network.net.load_state_dict({key: tensors[name] for key, name in wanted.items()})
    text = f"lpips {version('lpips')} ({net}), backbone: {source}"
    return Lpips(network.to(device).eval().requires_grad_(False), text, torch.device(device))


def untrained(net: str) -> Any:
    """The network of the package `lpips` with its trained heads and a random backbone."""
    package = require("lpips", "eval", "Measuring LPIPS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        return package.LPIPS(net=net, pnet_rand=True, verbose=False)
