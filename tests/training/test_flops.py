import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from digit.training.health import forward_flops, measured_flops, peak_flops, token_model_in


def test_flops_of_a_state_space_model_are_what_torch_counts() -> None:
    shape = {"dim": 32, "depth": 2, "state_dim": 12, "head_dim": 16}
    model = tiny.token_model("prior", transformer=None, state_space=shape)
    config, length = model.config, model.config.length
    with FlopCounterMode(display=False) as counter:
        model.loss(torch.zeros(3, length, dtype=torch.long))
    c = config.state_space
    thrown_away = length * c.depth * length * (c.state_dim + c.inner_dim)  # the masked half, as of attention
    assert 3 * (forward_flops(config) + thrown_away) == counter.get_total_flops()


@pytest.mark.parametrize("role", ["prior", "ar", "masked", "random"])
def test_flops_are_what_torch_counts(role: str) -> None:
    model = tiny.token_model(role)
    config = model.config
    tokens = torch.zeros(3, config.length, dtype=torch.long)
    prefix = None if role in ("prior", "random") else torch.zeros(3, config.prefix_length, dtype=torch.long)
    mask = torch.ones(3, config.length, dtype=torch.bool) if role == "masked" else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(tokens, None, prefix, mask)
    positions = config.prefix_length + config.length * (1 + (role == "random")) + (role == "masked")
    shape = config.transformer
    # torch computes, and counts, the half of causal attention that is thrown away
    thrown_away = positions * shape.depth * 2 * positions * shape.dim if shape.causal else 0
    assert 3 * (forward_flops(config) + thrown_away) == counter.get_total_flops()


def test_the_backward_pass_is_twice_the_forward_pass() -> None:
    model = tiny.token_model("prior")
    tokens = torch.zeros(2, model.config.length, dtype=torch.long)
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss, _ = model.loss(tokens)
            if backward:
                loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(3 * counts[0], rel=0.01)


def test_the_base_prior_of_the_paper() -> None:
    """201 M weights in matrices, 2 FLOPs each and token, and attention of 16 layers over 256 positions."""
    from digit.core.config import from_dict, load_preset
    from digit.models.token_config import TokenModelConfig

    config = from_dict(TokenModelConfig, load_preset("imagenet256-base")["model"], "test")
    weights = 16 * 12 * 1024**2 + 1024 * 8192
    assert forward_flops(config) == 256 * (2 * weights + 16 * 2 * 256 * 1024)


def test_a_cpu_is_measured() -> None:
    cpu = torch.device("cpu")
    rate = measured_flops(cpu, torch.float32)
    assert 1e8 < rate < 1e13
    assert peak_flops(cpu, "no") == rate  # once a process
    a = torch.ones(512, 512)
    import time

    start = time.perf_counter()
    for _ in range(5):
        a @ a
    assert 5 * 2 * 512**3 / (time.perf_counter() - start) < 3 * rate  # nothing is much faster than the best


def test_the_model_is_found_inside_other_networks() -> None:
    model = tiny.token_model("prior")
    assert token_model_in(torch.nn.ModuleDict({"model": torch.nn.Sequential(model)})) is model
    assert token_model_in(torch.nn.Linear(2, 2)) is None
