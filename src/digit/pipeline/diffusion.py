"""A saved model as a pipeline of diffusers, by ``pipeline.py`` in its folder; see :data:`digit.pipeline.index.CODE`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from digit.core.errors import require
from digit.pipeline.pipeline import DigitPipeline, Label

diffusers: Any = require("diffusers", "diffusers", "A pipeline of diffusers")


class DigitDiffusionPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]  # diffusers has no types
    """``DiffusionPipeline.from_pretrained(ID, custom_pipeline=ID, trust_remote_code=True)``.

    diffusers tells a pipeline where it is from after it was made, so components are loaded at their first use; of a Hub
    repository, those of its main branch.
    """

    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Of the index, what is diffusers' own; it would warn of the rest."""
        own = {name: value for name, value in config_dict.items() if name.startswith("_")}
        return super().extract_init_dict(own, **kwargs)

    @functools.cached_property
    def model(self) -> DigitPipeline:
        """The model itself, with all that it can do."""
        return DigitPipeline.from_pretrained(self.name_or_path)

    @property
    def device(self) -> torch.device:
        """Where the components are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of prior and decoders."""
        return self.model.dtype

    def to(self, *args: Any, device: Any = None, dtype: Any = None, **_options: Any) -> Self:
        """Move to a device or a number format; see :meth:`digit.pipeline.model.Model.to`."""
        for value in (*args, device, dtype):
            if value is not None:
                self.model.to(value)
        return self

    def save_pretrained(self, save_directory: str | Path, **_options: Any) -> None:
        """Write the model as a folder, with this pipeline."""
        self.model.save_pretrained(save_directory)

    def __call__(
        self,
        class_labels: Sequence[Label] | Label | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Any = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """Generate images: :meth:`digit.pipeline.pipeline.DigitPipeline.__call__` by the names that diffusers has.

        ``num_inference_steps`` are those of a masked decoder. Without ``return_dict`` the answer is a tuple (images,).
        """
        images = self.model(
            class_labels, guidance_scale=guidance_scale, steps=num_inference_steps, generator=generator,
            output_type=output_type, **settings,
        )  # fmt: skip
        return diffusers.ImagePipelineOutput(images=images) if return_dict else (images,)
