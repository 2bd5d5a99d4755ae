"""Options that several commands share, their completion in the shell, and those of sampling, made from a request's
fields.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from digit.core.config import preset_names
from digit.core.errors import DigitError
from digit.core.hub import INDEX, packaged_models
from digit.pipeline.index import read_index
from digit.sampling.request import sampling_settings

if TYPE_CHECKING:
    from torch import Tensor

    from digit.pipeline.pipeline import DigitPipeline

# ---- what the tab key offers -----------------------------------------------------------------------------------------


def _models(incomplete: str) -> list[str]:
    """Packaged models, and models in folders up to two below what was typed."""
    found = [path for pattern in ("*", "*/*", "*/*/*") for path in Path().glob(f"{pattern}/{INDEX}")]
    return sorted(
        name for name in (*packaged_models(), *(str(path.parent) for path in found)) if name.startswith(incomplete)
    )


def _index() -> dict[str, Any]:
    """The index of the model in the line that is being typed, else of the packaged one; {} where there is none here.

    Typer's context does not hold what stands before an option without its value, so the shell's words are read.
    """
    packaged = packaged_models()
    words = (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()
    named = (packaged.get(word, Path(word)) / INDEX for word in [*words, *packaged])
    index: dict[str, Any] = next((read_index(file.parent) for file in named if file.is_file()), {})
    return index


def _decoders(incomplete: str) -> list[str]:
    return _starting(incomplete, _index().get("decoders") or ("ar", "masked", "onepass", "rae"))


def _labels(incomplete: str) -> list[str]:
    """Class names after the last comma."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _starting(last, [*_index().get("class_names", ()), "none"])]


def _starting(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def complete_presets(incomplete: str) -> list[str]:
    """Completion of packaged presets."""
    return _starting(incomplete, preset_names())


# ---- options ---------------------------------------------------------------------------------------------------------


def option(help: str, *names: str, words: Sequence[str] = (), **how: Any) -> Any:
    """An option, its help first; ``words`` complete it in the shell, and ``how`` is Typer's."""
    if words:
        how["autocompletion"] = lambda incomplete: _starting(incomplete, words)
    return typer.Option(*names, help=help, **how)


def argument(help: str, **how: Any) -> Any:
    """An argument, its help first."""
    return typer.Argument(help=help, **how)


def out(help: str) -> Any:
    """``--out``, ``-o``."""
    return option(help, "--out", "-o")


def num(help: str, least: int = 1) -> Any:
    """``--num``, ``-n``."""
    return option(help, "--num", "-n", min=least)


def changes(help: str) -> Any:
    """``--set``, which may be repeated."""
    return option(f"{help}; may be repeated.", "--set")


def _dtype(help: str) -> Any:
    names = ("float32", "bfloat16", "float16")
    return option(f"{help}: {', '.join(names)} (or fp32, bf16, fp16).", words=names)


def _classes(other: str = "") -> Any:
    words = f'Classes by number or name, comma separated, taken in turns;{other} or "none". Default: all.'
    return option(words, autocompletion=_labels)


_MODEL = "A model folder, a Hub id, or the name of a packaged model"
Model = Annotated[str | None, argument(f"{_MODEL}; the packaged one if left out.", autocompletion=_models)]
RequiredModel = Annotated[str, argument(f"{_MODEL}.", autocompletion=_models)]
Images = Annotated[list[Path], argument("Image files, or folders of them.")]
Out = Annotated[Path, out("Folder for the results.")]
Data = Annotated[str, option("Images: a dataset made by digit data, a folder, tar shards, or a Hub id.", "--data")]
Split = Annotated[str, option("Split of the images.")]
Num = Annotated[int | None, num("How many images, spread over the dataset; all if left out.", 2)]
Labels = Annotated[str | None, _classes()]
RunLabels = Annotated[str | None, _classes(' "random";')]
LabelsPerClass = Annotated[int | None, option("So many images of each class: balanced labels.", min=1)]
Seed = Annotated[int, option("Image i of a seed is always the same image.", min=0)]
Decoder = Annotated[str | None, option("ar, masked, onepass or rae. Default: the model's.", autocompletion=_decoders)]
Device = Annotated[
    str | None,
    option("cpu, cuda, cuda:1, mps ... Default: auto, a GPU if there is one.", words=("auto", "cpu", "cuda", "mps")),
]
Dtype = Annotated[str, _dtype("Compute dtype")]
StoredDtype = Annotated[str, _dtype("Dtype of the stored weights")]
BatchSize = Annotated[int, option("Images at a time; does not change the results.", min=1)]
Workers = Annotated[int, option("Threads that read and crop images.", min=0)]
Variant = Annotated[str | None, option("Which model of a Hub repository with several.")]
Weights = Annotated[str, option("InceptionV3 weights: auto, public, a file, or hf://OWNER/NAME/FILE.")]
Backend = Annotated[str, option("What runs Inception: auto, torch or onnx.", words=("auto", "torch", "onnx"))]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command with ``**settings`` an option for each of these sampling settings."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "settings"]
        only = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)
        options = [
            only(name, annotation=Annotated[kind | None, option(help)])
            for name, kind, help in sampling_settings(*names)
        ]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return command

    return extend


# ---- what was typed, as the library takes it -------------------------------------------------------------------------


def load(
    model: str | None, device: str | None = None, dtype: str = "float32", variant: str | None = None
) -> DigitPipeline:
    """A pipeline on its device."""
    import torch

    from digit.core.devices import pick_device, pick_dtype
    from digit.pipeline.pipeline import DigitPipeline

    if device in (None, "auto") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one device for each process, as torchrun numbers them
    where, kind = pick_device(device), pick_dtype(dtype)
    return DigitPipeline.from_pretrained(model, variant=variant, torch_dtype=kind, device=where)


def parse_labels(text: str | None, pipe: DigitPipeline) -> list[int] | None:
    """Classes by number or name, such as "3,5", "cat,ship" or "none", to numbers, -1 for none."""
    return None if text is None else pipe.class_numbers([word.strip() for word in text.split(",")])


def numbers(text: str, option: str) -> list[float]:
    """Comma separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise DigitError(f"{option} {text} was given; expected numbers separated by commas, such as 0.5,1.") from error


def read_images(paths: list[Path], size: int) -> tuple[list[Path], Tensor]:
    """Paths of images and folders, and the images (B, 3, size, size)."""
    from digit.core.images import EXTENSIONS, load_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower().lstrip(".") in EXTENSIONS)
            if not inside:
                raise DigitError(f"The folder {path} holds no images.")
            files += inside
        else:
            files.append(path)
    return files, load_images(files, size)
