"""What a processor is quick at."""

import pytest
import torch

from digit.core import devices
from digit.core.devices import bf16_is_fast


@pytest.mark.parametrize(
    ("processor", "amx", "avx512", "fast"),
    [
        ("AMD EPYC", False, True, True),
        ("AMD EPYC", False, False, False),
        ("Intel(R) Xeon(R) Processor", True, True, True),
        ("Intel(R) Xeon(R) Processor", False, True, False),  # it took 1.6 times as long for an image
    ],
)
def test_instructions_for_bfloat16_are_not_enough(monkeypatch, processor, amx, avx512, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(devices, "processor_name", lambda: processor)
    assert bf16_is_fast(torch.device("cpu")) == fast


def test_a_processor_that_is_held_to_avx2_makes_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not bf16_is_fast(torch.device("cpu"))
