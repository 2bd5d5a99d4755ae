"""Group norm and SiLU in C++: what PyTorch computes, in every layout that it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from digit.native import norm as native_norm
from digit.native.norm import arranged, channels_last, norm_silu

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def calls(monkeypatch):
    """How often C++ was asked."""
    made, fast = [], native_norm._fast
    monkeypatch.setattr(native_norm, "_fast", lambda *a: (made.append(1), fast(*a))[1])
    return made


def layer(channels=48, groups=4) -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def numbers(*shape, mean=0.0, scale=1.0, dtype=torch.float32):
    torch.manual_seed(1)
    return (mean + scale * torch.randn(*shape)).to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "groups", "mean", "scale"),
    [
        ((3, 48, 5, 7), 4, 0.0, 1.0),
        ((1, 16, 1, 1), 1, 2.0, 1.0),
        ((2, 96, 8, 8), 8, 50.0, 0.1),  # far from zero: sums of squares would lose the deviation
        ((5, 32, 4, 4), 32, 0.0, 1e-4),  # a group of one channel, near the epsilon
        ((2, 64, 3, 3), 2, 0.0, 300.0),
    ],
)
def test_the_numbers_are_those_of_pytorch(shape, groups, mean, scale, calls):
    norm, x = layer(shape[1], groups), numbers(*shape, mean=mean, scale=scale)
    with torch.inference_mode():
        y = norm_silu(norm, x)
        exact = F.silu(norm.double()(x.double()))
    assert calls
    assert y.is_contiguous(memory_format=torch.channels_last)
    # a number of 50 has lost the digits below 2e-6, forty times as much after division by the deviation
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=5e-4 if mean else 1e-5)


def test_gain_and_offset_of_every_image():
    norm, x = layer(), numbers(3, 48, 4, 4)
    gain, offset = torch.randn(3, 96).chunk(2, 1)  # views: their rows lie apart
    with torch.inference_mode():
        y = norm_silu(norm, x, gain, offset)
        plain = norm(x) * (1 + gain[:, :, None, None]) + offset[:, :, None, None]
        torch.testing.assert_close(y, F.silu(plain), rtol=1e-5, atol=1e-5)
        shifted = norm(x) + offset[:, :, None, None]
        torch.testing.assert_close(norm_silu(norm, x, offset=offset), F.silu(shifted), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once():
    norm, x = layer(), numbers(2, 48, 6, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        y = norm_silu(norm, x)
        exact = F.silu(norm(x.float()))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), exact, rtol=2**-8, atol=1e-6
    )  # half of the last of 8 bits, and float32's own error


def test_extreme_numbers_stay_finite():
    norm = layer(16, 1)
    norm.weight.data.fill_(1e4)
    x = numbers(1, 16, 4, 4)
    with torch.inference_mode():
        y = norm_silu(norm, x)
    assert y.isfinite().all()
    assert y.min() <= 0
    assert y.max() > 1e3


def test_an_image_is_the_same_in_any_batch_and_on_any_number_of_threads():
    norm, x = layer(), numbers(7, 48, 4, 4)
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = norm_silu(norm, x)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(norm_silu(norm, x), whole)
                assert torch.equal(norm_silu(norm, x[2:3]), whole[2:3])
        finally:
            torch.set_num_threads(before)


def test_one_image_gets_the_layout_too(calls):
    """Its strides may say nothing: convolutions then answered in the usual layout, and the norms behind them were
    PyTorch's."""
    states = torch.randn(1, 16, 48)
    x = states.transpose(1, 2).unflatten(2, (4, 4))  # (1, 48, 4, 4), channels side by side
    conv, norm = nn.Conv2d(48, 48, 3, padding=1).to(memory_format=torch.channels_last), layer()
    with torch.inference_mode():
        for one in (channels_last(x), arranged(x, norm), channels_last(x.contiguous())):
            assert torch.equal(one, x)
            norm_silu(norm, conv(one))
    assert len(calls) == 3
    whole = torch.randn(1, 48, 2, 2, requires_grad=True)
    channels_last(whole.transpose(2, 3)).sum().backward()
    assert torch.equal(whole.grad, torch.ones(1, 48, 2, 2))


def test_what_it_does_not_cover_is_pytorchs(calls):
    norm, x = layer(), numbers(2, 48, 4, 4)
    plain = F.silu(norm(x))
    assert plain.requires_grad
    assert torch.equal(norm_silu(norm, x), plain)  # somebody asks for gradients
    assert norm_silu(norm, x).requires_grad
    assert arranged(x.contiguous(), norm).is_contiguous()
    with torch.inference_mode():
        usual = x.contiguous()
        assert torch.equal(norm_silu(norm, usual), F.silu(norm(usual)))
        odd = layer(12, 2)
        assert arranged(numbers(2, 12, 4, 4).contiguous(), odd).is_contiguous()
        norm_silu(odd, numbers(2, 12, 4, 4))
        doubles = layer().double()
        norm_silu(doubles, numbers(2, 48, 4, 4, dtype=torch.float64))
        assert not calls
        norm_silu(norm, arranged(usual, norm))
        assert calls


def test_without_a_compiler_all_is_pytorchs(monkeypatch, calls):
    monkeypatch.setattr(native_norm, "available", lambda: None)
    norm, x = layer(), numbers(2, 48, 4, 4)
    with torch.inference_mode():
        assert torch.equal(norm_silu(norm, x), F.silu(norm(x)))
        assert arranged(x.contiguous(), norm).is_contiguous()
    assert not calls
