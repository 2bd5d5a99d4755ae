"""Options that several commands share, and those of sampling, made from the fields of a request."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from digit.sampling.request import sampling_settings

if TYPE_CHECKING:
    from torch import Tensor

    from digit.pipeline.pipeline import DigitPipeline

Model = Annotated[
    str | None, typer.Argument(help="A model folder, a Hub id, or a packaged model; the packaged one if left out.")
]
RequiredModel = Annotated[str, typer.Argument(help="A model folder, a Hub id, or the name of a packaged model.")]
Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Seed = Annotated[int, typer.Option(min=0, help="Image i of a seed is always the same image.")]
Decoder = Annotated[str | None, typer.Option(help="Kind of decoder: ar, masked, onepass. Default: the model's.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="Numbers that prior and decoder compute in: fp32, bf16, fp16.")]
Variant = Annotated[str | None, typer.Option(help="Which model of a Hub repository with several.")]


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command with ``**settings`` an option for each of these sampling settings."""

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "settings"]
        options = [
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[setting.type | None, typer.Option(help=setting.help)],
            )
            for setting in sampling_settings(*names).values()
        ]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return command

    return extend


def load(
    model: str | None, device: str | None = None, dtype: str = "fp32", variant: str | None = None
) -> DigitPipeline:
    """A pipeline on its device, from what the user typed."""
    import torch

    from digit.core.devices import pick_device, pick_dtype
    from digit.pipeline.pipeline import DigitPipeline

    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one device a process, as torchrun numbers them
    where = pick_device(device)
    kind = pick_dtype(dtype)
    return DigitPipeline.from_pretrained(model, variant=variant).to(where, None if kind == torch.float32 else kind)


def parse_labels(text: str | None, pipe: DigitPipeline) -> list[int] | None:
    """Classes by number or name, such as "3,5", "cat,ship" or "none", to numbers, -1 for none.

    Raises:
        DigitError: a name that is not a class.
    """
    return None if text is None else [pipe.class_number(word.strip()) for word in text.split(",")]


def read_images(paths: list[Path], size: int) -> tuple[list[Path], Tensor]:
    """Paths of images and folders, and the images (B, 3, size, size)."""
    from digit.core.errors import DigitError
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
