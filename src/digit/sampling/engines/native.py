"""One token step on a CPU in C++: all layers in one call (``native/step.cpp``), and the draw (``native/draw.cpp``).

At small batches a step then costs no more than reading the weights once. It does what :meth:`TokenModel.step` and
:func:`digit.sampling.logits.draw` do, which stay the definition and run wherever this cannot: on other devices, in
float16, in training mode, without a compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from ctypes import POINTER, c_float, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.token_model import Labels, Prefix, TokenModel
from digit.models.transformer import Block, KVCache
from digit.native import library
from digit.sampling.engines.decode import DecodeEngine, Int8Linear, State, quantized
from digit.sampling.logits import DrawParams

LANES, PANEL = 16, 64  # as in the source
_DRAWS_A_THREAD = 8192  # numbers that are worth another thread
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _Matrix(ctypes.Structure):
    _fields_ = (*((n, c_void_p) for n in ("weight", "scale", "bias")), ("inputs", c_int64), ("outputs", c_int64))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (("qkv", _Matrix), ("out", _Matrix), ("ffn_in", _Matrix), ("ffn_out", _Matrix))


class _Network(ctypes.Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)),
        ("norms", POINTER(_Norm)),
        ("head", _Matrix),
        *((name, c_int64) for name in ("depth", "width", "heads", "hidden", "post_norm", "weights", "half_cache")),
        ("epsilon", c_float),
    )


class _Cache(ctypes.Structure):
    _fields_ = (("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)), ("row", c_int64), ("head", c_int64))


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("table", "places")),
        ("embedding_scale", c_float),
        *((name, c_int64) for name in ("rows", "length", "vocab", "depth", "prefix")),
        *((name, c_void_p) for name in ("tokens", "free", "uniform", "scale", "starts")),
        *((name, c_float) for name in ("temperature", "top_p")),
        ("top_k", c_int64),
    )


def suits(model: TokenModel) -> bool:
    """Whether the C++ step covers this model: on the CPU, in float32 or bfloat16, row by row, with heads and
    feed-forward layers of multiples of 16, and not in training, for it knows no dropout.
    """
    config = model.config.transformer
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    known = kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})
    if config is None:
        return False
    return known and config.causal and not model.training and not (config.head_dim % LANES or config.hidden_dim % LANES)


class NativeStep:
    """The packed weights of one model that :func:`suits`, and its step; they do not follow later changes."""

    def __init__(self, model: TokenModel, quantize: str | None = None) -> None:
        self._library = library()
        self._model = weakref.proxy(model)
        self._kept: list[Tensor] = []  # what the structures below point to
        self._room = torch.empty(0, dtype=torch.uint8)
        source = quantized(model) if quantize else model
        network = source.transformer
        assert network is not None
        config, last = network.config, network.norm
        blocks = [b for b in network.blocks if isinstance(b, Block)]
        linears = [m for b in blocks for m in (b.attention.qkv, b.attention.out, b.ffn_in, b.ffn_out)]
        self._free = _memory(sum(_size(m.weight) for m in (*linears, source.head)))
        matrices = [self._matrix(m) for m in linears]
        layers = [_Layer(*matrices[i : i + 4]) for i in range(0, len(matrices), 4)]
        inside = [self._norm(norm) for b in blocks for norm in (b.attention_norm, b.ffn_norm)]
        # pre: before each half of a block, and a last one; post: after each half, which is before the next
        norms = [*inside, self._norm(last)] if isinstance(last, nn.LayerNorm) else [_Norm(), *inside]
        self._network = _Network(
            layers=(_Layer * len(layers))(*layers),
            norms=(_Norm * len(norms))(*norms),
            head=self._matrix(source.head),
            depth=config.depth,
            width=config.dim,
            heads=config.heads,
            hidden=config.hidden_dim,
            post_norm=config.norm == "post",
            weights=FORMATS[source.head.weight.dtype],
            half_cache=model.start.dtype == torch.bfloat16,
            epsilon=config.norm_eps,
        )
        self._pointer = ctypes.byref(self._network)

    def draw_tokens(
        self,
        cache: KVCache,
        state: State,
        start: int,
        end: int,
        guided: bool,
        params: DrawParams,
        starts: Tensor | None = None,
    ) -> None:
        """Draw tokens ``start`` to ``end`` - 1 of a batch; ``starts`` (B or 2B, D) stands before token 0, if that is
        drawn.
        """
        config, (rows, length) = self._model.config, state.tokens.shape
        tensors = (self._model.token_embedding.weight, self._model.position_embedding.weight)
        starts = torch.empty(0) if starts is None else starts.float().contiguous()
        numbers = (state.tokens, state.free, state.uniform, state.scale, starts)
        batch = _Batch(
            *(t.data_ptr() for t in tensors), config.embedding_scale,
            rows, length, config.codes, config.codebook_depth, config.prefix_length,
            *(t.data_ptr() for t in numbers), float(params.temperature), float(params.top_p), params.top_k,
        )  # fmt: skip
        where, threads = ctypes.byref(batch), self._threads()
        room = self._make_room(self._library.digit_tokens_room(self._pointer, where, threads))
        self._library.digit_tokens(self._pointer, _pointers(cache), where, threads, start, end, guided, room)

    def _threads(self) -> int:
        """Threads that find something to do in a step."""
        return max(1, min(torch.get_num_threads(), int(self._network.hidden) // PANEL))

    def _make_room(self, size: int) -> int:
        """The address of so many bytes."""
        if len(self._room) < size:
            self._room = torch.empty(size, dtype=torch.uint8)
        return self._room.data_ptr()

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._keep(norm.weight.float()), self._keep(norm.bias.float()))

    def _matrix(self, linear: nn.Linear | Int8Linear) -> _Matrix:
        panels, size = pack(linear.weight, self._library.digit_strip()), _size(linear.weight)
        place, self._free = self._free[:size], self._free[size:]
        place.view(panels.dtype).view(panels.shape).copy_(panels)
        outputs = _padded(len(linear.weight))
        extra = outputs - len(linear.weight)
        bias = torch.zeros(outputs) if linear.bias is None else F.pad(linear.bias.float(), (0, extra))
        scale = F.pad(linear.scale.float(), (0, extra)) if isinstance(linear, Int8Linear) else bias  # read by int8 only
        return _Matrix(self._keep(place), self._keep(scale), self._keep(bias), linear.weight.shape[1], outputs)


class NativeEngine(DecodeEngine):
    """The C++ step and draw. The host knows where it is, which spares looking up places by tensors."""

    name = "C++"

    def __init__(self, model: TokenModel, batch: int, guided: bool, step: NativeStep, seconds: float = 0.0) -> None:
        """``seconds`` were spent on building and packing."""
        super().__init__(model, batch, guided)
        self.step, self.setup_seconds = step, seconds

    def prefill(
        self, model: TokenModel, known: int, labels: Labels, prefix: Prefix, params: DrawParams, guided: bool
    ) -> None:
        """Run what is known through the network and draw token ``known``; in C++ where nothing is known."""
        if known == 0 and prefix is None:
            kinds = [labels, None] if guided else [labels]
            starts = torch.cat([model.embed_start(kind, self.batch) for kind in kinds])[:, 0]  # (B or 2B, D)
            starts = starts + model.position_embedding.weight[0]
            self.step.draw_tokens(self.cache, self.state, 0, 1, guided, params, starts)
            self.state.place.fill_(1)
        else:
            super().prefill(model, known, labels, prefix, params, guided)

    def decode_tokens(self, _model: TokenModel, start: int, end: int, guided: bool, params: DrawParams) -> None:
        """Draw tokens ``start`` to ``end`` - 1."""
        self.step.draw_tokens(self.cache, self.state, start, end, guided, params)
        self.state.place.add_(end - start)

    def _write(self, logits: Tensor, index: int, guided: bool, params: DrawParams) -> None:
        state = self.state
        logits, unguided = logits.chunk(2) if guided else (logits, None)  # (B, V)
        drawn = fast_draw(logits, state.uniform[:, index], params, unguided, float(state.scale[index]))  # (B,)
        drawn += state.first[index]
        state.tokens[:, index] = torch.where(state.free[:, index], drawn, state.tokens[:, index])


def fast_draw(
    logits: Tensor, uniform: Tensor, params: DrawParams, unguided: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """As :func:`digit.sampling.logits.draw`, on the CPU, for logits (B, V), guided by ``unguided`` ones (B, V), if
    given.
    """
    logits = _rows(logits)
    rows, vocab = logits.shape
    unguided = None if unguided is None else _rows(unguided)
    if unguided is not None and unguided.stride() != logits.stride():
        logits, unguided = logits.contiguous(), unguided.contiguous()
    uniform, tokens = uniform.contiguous(), torch.empty(rows, dtype=torch.long)
    threads = max(1, min(torch.get_num_threads(), rows * vocab // _DRAWS_A_THREAD))
    without = None if unguided is None else unguided.data_ptr()
    size, how = (rows, vocab, logits.stride(0)), (float(params.temperature), params.top_k, float(params.top_p))
    library().digit_draw(logits.data_ptr(), without, scale, *size, threads, uniform.data_ptr(), *how, tokens.data_ptr())
    return tokens


def _pointers(cache: KVCache) -> Any:
    """A cache as the C++ step takes it."""
    pointers = c_void_p * len(cache.keys)
    keys, values = (pointers(*(t.data_ptr() for t in part)) for part in (cache.keys, cache.values))
    return ctypes.byref(_Cache(keys, values, *cache.keys[0].stride()[:2]))


def _rows(logits: Tensor) -> Tensor:
    """In float32, with the numbers of a row side by side; rows may lie apart."""
    logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _memory(size: int) -> Tensor:
    """Bytes in large pages where the system has them: else a step looks up thousands of pages within a millisecond."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
    area = mmap.mmap(-1, size, **private)
    with contextlib.suppress(AttributeError, OSError):
        area.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(area, dtype=torch.uint8)


def _padded(outputs: int) -> int:
    return -(-outputs // PANEL) * PANEL


def _size(weight: Tensor) -> int:
    """Bytes of a packed matrix."""
    return _padded(len(weight)) * weight.shape[1] * weight.element_size()


def pack(weight: Tensor, strip: int) -> Tensor:
    """Matrix (out, in) to strips (out / strip, in / g, strip, g), filled up with zeros to whole panels.

    g is 1 for float32, else 2: so many inputs of an output lie side by side.
    """
    group = 1 if weight.dtype == torch.float32 else 2
    filled = F.pad(weight, (0, 0, 0, _padded(len(weight)) - len(weight)))
    return filled.view(-1, strip, weight.shape[1] // group, group).transpose(1, 2).contiguous()
