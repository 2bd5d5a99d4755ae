"""FSDP2: weights, gradients and optimizer state cut over the processes, and whole where somebody must read them.

A cut parameter is a ``DTensor`` (Zhao et al. 2023, arXiv 2304.11277; ``torch.distributed.fsdp.fully_shard``).
Checkpoints and exported models hold whole tensors, so the number of processes may change in the course of a run. Every
process must call :func:`whole`, :func:`like` and :func:`assembled` at the same time if something is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from digit.models.state_space import StateSpaceBlock
from digit.models.transformer import Block


def shard(network: nn.Module, device: torch.device) -> None:
    """Cut a network's parameters over all processes, in place: block by block, and the rest in one piece."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in network.modules():
        if isinstance(module, Block | StateSpaceBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor cut as ``model`` is, if it is."""
    if not isinstance(model, DTensor):
        return tensor
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; writing there is writing to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def assembled(network: nn.Module) -> Iterator[None]:
    """In the block the parameters of a cut network are whole and plain, in every process by itself. Changes are
    lost.
    """
    cut = [module for module in network.modules() if isinstance(module, FSDPModule)]
    if not cut:
        yield
        return
    for part in cut:
        part.reshard()
    before = [
        (m, m._parameters.copy(), m._forward_pre_hooks.copy(), m._forward_hooks.copy()) for m in network.modules()
    ]
    full = {p: nn.Parameter(whole(p.detach()), requires_grad=False) for p in network.parameters()}  # some are shared
    for module, parameters, *_ in before:
        module._parameters.update({name: full[p] for name, p in parameters.items() if p is not None})
        if isinstance(module, FSDPModule):  # its hooks would gather and cut the parameters around every forward pass
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, parameters, first, last in before:
            module._parameters.update(parameters)
            module._forward_pre_hooks.update(first)
            module._forward_hooks.update(last)
