"""What a processor is quick at."""

import pytest
import torch

from digit.core import devices
from digit.core.devices import bf16_is_fast


@pytest.mark.parametrize(("bf16", "fp32", "fast"), [(428e9, 193e9, True), (79e9, 133e9, False)])
def test_instructions_for_bfloat16_are_not_enough(monkeypatch, bf16, fp32, fast):
    """An Intel Xeon with AVX-512 BF16 and without AMX (the second row) made images in 1.6 times the time."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(devices, "measured_flops", lambda _, dtype: {torch.bfloat16: bf16, torch.float32: fp32}[dtype])
    assert bf16_is_fast(torch.device("cpu")) == fast


def test_a_processor_without_the_instructions_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(devices, "measured_flops", lambda *_: pytest.fail("bfloat16 takes seconds there"))
    assert not bf16_is_fast(torch.device("cpu"))
