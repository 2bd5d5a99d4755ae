"""The networks of `transformers` that serve as encoders: one row of facts a family, and how such a network is built and
filled.

Files are written and read through `transformers`' own save and load, so tensors on disk carry the names that the public
hub uses, whatever names the installed version gives them in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from digit.core.errors import DigitError, require
from digit.encoders.base import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Family:
    """What differs between the networks.

    Attributes:
        prefix: tokens before the patches, registers not counted.
        interpolate: positions of another grid must be asked for in the call.
        options: fields of the network's config that are always set so.
        arguments: further arguments of the network's constructor.
    """

    prefix: int = 1
    interpolate: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


_HALF = (0.5, 0.5, 0.5)
FAMILIES = {
    "dinov2": Family(),
    "dinov2_with_registers": Family(),
    "dinov3_vit": Family(),
    # DINO v1, iBOT and MoCo v3 are plain ViTs
    "vit": Family(interpolate=True, arguments={"add_pooling_layer": False}),
    "vit_mae": Family(interpolate=True, options={"mask_ratio": 0.0}),
    "ijepa": Family(prefix=0, interpolate=True),
    "siglip_vision_model": Family(
        prefix=0, interpolate=True, options={"vision_use_head": False}, mean=_HALF, std=_HALF
    ),
}
"""By "model_type", the name that transformers has for a family."""

# written by transformers about a whole network, its outputs or its file; wrong or idle for a part of its blocks
_IDLE_FIELDS = {
    *("out_features", "out_indices", "stage_names", "architectures", "transformers_version", "torch_dtype", "dtype"),
    *("_name_or_path", "_attn_implementation_autoset", "id2label", "label2id"),
}


def plain_config(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The vision network's own config out of a `transformers` config.json; a DigitError for unknown families."""
    if "vision_config" in values:  # SigLIP: an image and a text network in one file
        parent = str(values.get("model_type"))
        values = {"model_type": f"{parent}_vision_model", **values["vision_config"]}
    if values.get("model_type") not in FAMILIES:
        raise DigitError(
            f"{where} is a '{values.get('model_type')}' network; encoders are of the families: {', '.join(FAMILIES)}."
        )
    return {name: value for name, value in values.items() if name not in _IDLE_FIELDS}


def network_config(hf_config: Mapping[str, Any], blocks: int | None = None) -> Any:
    """A `transformers` config of given fields and the family's defaults, with the first ``blocks``; or a DigitError."""
    transformers = _transformers()
    values = plain_config(hf_config, "The encoder config")
    values |= FAMILIES[values["model_type"]].options
    if blocks is not None:
        values["num_hidden_layers"] = blocks
    try:
        return transformers.AutoConfig.for_model(**values)
    except Exception as error:  # the exception's class differs between versions of transformers
        raise DigitError(
            f"transformers refuses this '{values['model_type']}' config: {error}. This is transformers "
            f"{transformers.__version__}; newer ones know more networks: pip install -U transformers"
        ) from error


def patch_side(config: Any) -> int:
    """Pixels along a side of a patch of a network's config, or of its embeddings."""
    side: int | Sequence[int] = config.patch_size
    return side if isinstance(side, int) else side[0]


def build_network(family: Family, config: Any) -> nn.Module:
    """A network with random weights; on the meta device where that is torch's default."""
    network: nn.Module = _network_class(config)(config, **family.arguments)
    return network


def load_network(
    family: Family, config: Any, source: Path | Mapping[str, Tensor], where: str, final_norm: bool = True
) -> nn.Module:
    """A network with weights, in float32. Tensors of blocks that the config leaves out, of heads and poolers are not
    read.

    Args:
        config: from :func:`network_config`.
        source: a folder with ``model.safetensors`` (or what else transformers reads), or tensors by their names on the
            hub.
        final_norm: the norm after the last block is needed; an encoder without it is saved without its tensors.

    Raises:
        DigitError: tensors are missing or of another shape, or the file of ``where`` cannot be read.
    """
    folder, tensors = (None, dict(source)) if isinstance(source, Mapping) else (str(source), None)
    how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    try:
        with quiet_transformers():
            kind = _network_class(config)
            network, info = kind.from_pretrained(folder, config=config, state_dict=tensors, **how, **family.arguments)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError) as error:
        raise DigitError(
            f"The weights of {where} could not be read: {str(error).strip().splitlines()[0]} "
            "The file may be missing, truncated, or of another kind."
        ) from error
    if not final_norm:
        unused = final_norm_name(network) + "."
        info["missing_keys"] = {name for name in info["missing_keys"] if not name.startswith(unused)}
    _check_loading(info, where)
    result: nn.Module = network.float()
    return result


def _check_loading(info: Mapping[str, Any], where: str) -> None:
    missing = sorted(info["missing_keys"])
    blocks = [int(found[1]) for name in missing if (found := re.search(r"layers?\.(\d+)\.", name))]
    if blocks and len(blocks) == len(missing):
        raise DigitError(
            f"The weights of {where} lack {len(missing)} tensors of block {min(blocks)} and later ones, such as "
            f"{missing[0]}. If it was saved with fewer blocks, ask for an earlier layer (layer=-3 or below)."
        )
    problems = [f"missing: {name}" for name in missing]
    problems += [f"wrong shape: {' '.join(map(str, item))}" for item in sorted(info["mismatched_keys"])]
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise DigitError(f"The weights of {where} do not fit its config: {'; '.join(problems[:12])}{more}.")


def final_norm_name(network: nn.Module) -> str:
    """Where the norm after the last block lives: its dotted name in this version of transformers."""
    norms: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)]
    return min((name for name in norms if not re.search(r"\d", name)), key=lambda name: (name.count("."), name))


def _network_class(config: Any) -> Any:
    return _transformers().MODEL_MAPPING[type(config)]


def _transformers() -> Any:
    return require("transformers", "encoders", "A pretrained encoder")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Heads and blocks that we leave out are no news to the user; neither is a bar for half a second."""
    logging = require("transformers.utils.logging", "encoders", "A pretrained encoder")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
