"""What a CUDA graph demands of a step, checked without a GPU: by fake tensors, and by a stand-in for graphs.

:func:`on_a_fake_gpu` runs code on tensors that have shapes and the device "cuda", and no numbers: what asks for a
number, or for a shape that depends on numbers, fails. :func:`stub_cuda_graphs` lets the CPU record operations and
replay them as graphs do, without the code that made them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HostSync(AssertionError):
    """An operation for which the host waits for the device."""


def tensors(*parts: object) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]


class _NoTransfers(TorchDispatchMode):
    """Fake tensors let numbers pass between devices, and masks select values to write; a recording lets neither."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = {tensor.device.type for tensor in tensors(args, kwargs, out)}
        if places - {"cuda"}:
            raise HostSync(f"{func} is between {' and '.join(sorted(places))}")
        if "index_put" in str(func) and any(index.dtype == torch.bool for index in tensors(args[1])):
            raise HostSync(f"{func} looks for the places of a mask")
        return out


@contextmanager
def on_a_fake_gpu(*models: nn.Module) -> Iterator[None]:
    """Tensors made in the block have no numbers, and the models are on "cuda" for good; HostSync if a number is asked
    for."""
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        for module in (module for model in models for module in model.modules()):
            for table in (module._parameters, module._buffers):
                for name, old in table.items():
                    if old is not None:
                        new = torch.empty(old.shape, dtype=old.dtype)
                        table[name] = nn.Parameter(new, False) if table is module._parameters else new
        yield


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Within :func:`on_a_fake_gpu`: HostSync where an operation could not be recorded."""
    try:
        with _NoTransfers():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise HostSync(str(error)) from error


class Graph:
    """In the place of ``torch.cuda.CUDAGraph``: the operations of a step, with the tensors that they read and wrote."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        """Do the operations again, into the same memory."""
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # else a view, or what was written in place
                    old.copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # recorded, not run: nothing outside is written to
        out = args[0] if func._schema.is_mutable else func(*args, **kwargs)
        self.graph.operations.append((func, args, kwargs, out))
        return out


def stub_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let :class:`Graph` stand in for CUDA graphs, and nothing for streams."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stubs = {
        "CUDAGraph": Graph,
        "graph": lambda graph, pool: _Capture(graph),
        "graph_pool_handle": lambda: (0, 0),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
