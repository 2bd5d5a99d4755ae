"""The C++ step built for ARM (NEON) and run by an emulator, against PyTorch; where there is a cross compiler."""

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from digit.models.transformer import Block
from digit.sampling import SamplingParams, sample
from digit.sampling.engines.acceleration import accelerate
from digit.sampling.engines.decode import Int8Linear, quantized
from digit.sampling.engines.native import FORMATS, PANEL, pack
from digit.sampling.rng import uniforms
from tiny import loud

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROWS, LENGTH, VOCAB, STRIP = 5, 12, 24, 16  # of vectors of 16 bytes a strip has 16 outputs


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = tmp_path_factory.mktemp("arm") / "driver"
    flags = ["-O2", "-static", "-std=c++17", "-fopenmp-simd", "-pthread", "-Wno-psabi", "-march=armv8-a"]
    subprocess.run([COMPILER, *flags, str(Path(__file__).with_name("step_driver.cpp")), "-o", str(program)], check=True)
    return program


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def matrix(linear) -> bytes:
    extra = -len(linear.weight) % PANEL
    bias = torch.zeros(len(linear.weight)) if linear.bias is None else linear.bias.float()
    scale = linear.scale.float() if isinstance(linear, Int8Linear) else bias
    return b"".join([raw(pack(linear.weight, STRIP)), raw(F.pad(scale, (0, extra))), raw(F.pad(bias, (0, extra)))])


@torch.no_grad()
def widened(model):
    """The same weights in float32 and in PyTorch's own layers."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Int8Linear):
                linear = torch.nn.Linear(child.weight.shape[1], len(child.weight), bias=child.bias is not None)
                linear.weight.copy_(child.weight.float() * child.scale.float()[:, None])
                if child.bias is not None:
                    linear.bias.copy_(child.bias)
                setattr(module, name, linear)
    return model.float()


@pytest.mark.parametrize(
    ("dtype", "quantize", "limit"),
    [(torch.float32, None, 1e-5), (torch.bfloat16, None, 2e-2), (torch.float32, "int8", 2e-3)],
    ids=["fp32", "bf16", "int8"],
)
@torch.inference_mode()
def test_logits_and_tokens(driver, dtype, quantize, limit):
    model = loud(dim=64, heads=2, length=LENGTH, vocab=VOCAB, dtype=dtype)
    source = quantized(model) if quantize else model
    t = source.transformer
    blocks = [b for b in t.blocks if isinstance(b, Block)]
    norms = [n for b in blocks for n in (b.attention_norm, b.ffn_norm)] + [t.norm]
    tokens = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % VOCAB
    inputs = source.embed(tokens).float()  # (B, 1 + n, D)
    uniform = uniforms(3, range(ROWS), "prior", (LENGTH,))
    shape = [len(blocks), 64, 2, t.config.hidden_dim, FORMATS[source.head.weight.dtype], dtype == torch.bfloat16]
    given = [
        raw(torch.tensor([*map(int, shape), ROWS, LENGTH, VOCAB, 0])),
        *(matrix(m) for b in blocks for m in (b.attention.qkv, b.attention.out, b.ffn_in, b.ffn_out)),
        *(raw(part.float()) for n in norms for part in (n.weight, n.bias)),
        matrix(source.head),
        *(raw(inputs[:, i]) for i in range(LENGTH)),
        *(raw(table.weight) for table in (source.token_embedding, source.position_embedding)),
        raw(inputs[:, 0]),
        raw(uniform),
    ]
    done = subprocess.run([EMULATOR, str(driver)], input=b"".join(given), capture_output=True, check=True).stdout
    outputs = VOCAB + -VOCAB % PANEL
    size = 4 * LENGTH * ROWS * outputs
    logits = torch.frombuffer(bytearray(done[:size]), dtype=torch.float32).view(LENGTH, ROWS, outputs)[..., :VOCAB]
    expected = widened(source)(tokens)[:, :LENGTH].transpose(0, 1)  # (n, B, V)
    assert ((logits - expected).norm() / expected.norm()).item() < limit
    drawn = torch.frombuffer(bytearray(done[size:]), dtype=torch.int64).view(ROWS, LENGTH)
    accelerate(model, quantize=quantize, native=quantize is not None or None)
    wanted = sample(model, range(ROWS), 3, SamplingParams(top_k=5))
    assert (drawn == wanted).float().mean() > (0.99 if dtype == torch.float32 else 0.5)
