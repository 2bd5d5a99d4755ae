"""The precision of a run."""

import logging

import pytest
import torch

from digit.training import health
from digit.training.health import with_precision
from runs import settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "meant"), [(True, "bf16"), (False, "no")])
def test_auto_is_what_is_fast(monkeypatch, fast, meant):
    monkeypatch.setattr(health, "bf16_is_fast", lambda _: fast)
    assert with_precision(settings(precision="auto"), CPU).precision == meant
    assert with_precision(settings(precision="no"), CPU).precision == "no"


def test_slow_bfloat16_warns_with_both_speeds(monkeypatch, caplog):
    monkeypatch.setattr(health, "bf16_is_fast", lambda _: False)
    monkeypatch.setattr(health, "measured_flops", lambda _, dtype: {torch.bfloat16: 0.9e9, torch.float32: 139e9}[dtype])
    with caplog.at_level(logging.WARNING, "digit"):
        assert with_precision(settings(precision="bf16"), CPU).precision == "bf16"
    assert "0.9 GFLOP/s in bfloat16 and 139.0 in float32" in caplog.text
    assert "training.precision=auto" in caplog.text
