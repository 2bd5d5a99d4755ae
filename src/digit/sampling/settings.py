"""How tokens are drawn: one flat, validated set of knobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from digit.core.config import config
from digit.models.transformer import PositiveInt


@config
class SamplingSettings:
    """Knobs of a sampling run; each engine reads the ones it knows.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all. The paper: 200 (base), 400 (large), 300 (class-conditional).
        top_p: keep the smallest set of most likely tokens whose probability reaches p; 1 keeps all. The paper's AR
            decoder: 0.8.
        cfg_scale: classifier-free guidance; 1 is none.
        cfg_schedule: how the scale grows from 1 over the sequence (or the steps); see :mod:`digit.sampling.guidance`.
        cfg_power: exponent of the power-cosine schedule.
        cfg_interval: fractions of the sequence (or of the steps) between which guidance is on.
        steps: iterations of the masked engine.
        mask_schedule: how many tokens stay masked after each iteration.
        choice_temperature: noise in the masked engine's choice of which tokens to keep, falling to 0. The paper: 4.5.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    cfg_scale: Annotated[float, Field(ge=0)] = 1.0
    cfg_schedule: Literal["constant", "linear", "cosine", "power-cosine"] = "constant"
    cfg_power: Annotated[float, Field(gt=0)] = 2.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    steps: PositiveInt = 8
    mask_schedule: Literal["cosine", "linear", "sqrt"] = "cosine"
    choice_temperature: Annotated[float, Field(ge=0)] = 4.5

    def __post_init__(self) -> None:
        low, high = self.cfg_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"cfg_interval={self.cfg_interval}: expected two fractions 0 <= low < high <= 1")
