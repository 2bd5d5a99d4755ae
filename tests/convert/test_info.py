"""What ``digit info`` says is so: sizes from the files, memory from what PyTorch really allocates."""

import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from digit.convert.upstream import convert_upstream
from digit.core.config import from_dict, load_preset
from digit.core.errors import DigitError
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.native import norm
from digit.pipeline.info import (
    Part,
    cache_bytes,
    describe,
    folder_parts,
    matching_preset,
    model_tree,
    sampling_memory,
)
from digit.pipeline.pipeline import DigitPipeline


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive at the same time while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in self.known and key not in given:
                    self._add(tensor, key, storage.nbytes())
        return out

    def _add(self, tensor: torch.Tensor, key: int, size: int) -> None:
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.known.discard(key)
            self.now -= size

        weakref.finalize(tensor, gone)


@pytest.mark.parametrize("native", [True, False], ids=["C++", "PyTorch"])  # norms, where there is a compiler
@pytest.mark.parametrize("multipliers", [(1, 1, 2), (1, 2, 2), (2, 1, 1)])
def test_the_vqgan_estimate_is_what_decoding_allocates(multipliers, native, monkeypatch):
    config = VQGANConfig(resolution=64, channels=32, multipliers=multipliers, blocks=2, codes=8, code_dim=8)
    vqgan = VQGAN(config).eval()
    tokens = torch.zeros(2, vqgan.num_tokens, dtype=torch.long)
    if not native:
        monkeypatch.setattr(norm, "available", lambda: None)
    with torch.no_grad(), LiveBytes() as live:
        vqgan.decode(tokens)
    assert live.peak == pytest.approx(2 * config.activation_bytes(), rel=0.15)


def test_the_cache_estimate_is_the_cache():
    for name in ("imagenet256-base", "imagenet256-base-ar"):
        config = from_dict(TokenModelConfig, load_preset(name)["model"], name)
        with torch.device("meta"):
            cache = TokenModel(config).new_cache(3)
        assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 3 * cache_bytes(config, 4)


def test_masked_decoders_keep_no_cache():
    config = from_dict(TokenModelConfig, load_preset("imagenet256-base-masked")["model"], "preset")
    assert cache_bytes(config, 4) == 0


@pytest.mark.parametrize(
    "name", ["imagenet256-base", "imagenet256-large-cond", "imagenet256-large-ar", "imagenet256-base-vq"]
)
def test_a_network_finds_its_preset(name):
    values = load_preset(name)["model"]
    values |= {"label_smoothing": 0.0, "class_dropout": 0.2}
    assert matching_preset(Part("prior", "TokenModel", values, 0, 0, (), {})) == name
    values["transformer"] |= {"heads": 8}
    assert matching_preset(Part("prior", "TokenModel", values, 0, 0, (), {})) is None


@pytest.fixture
def model(upstream, tmp_path) -> Path:
    stage1 = upstream.save(tmp_path / "run [1]" / "stage1.pt", classes=1000)
    return convert_upstream(tmp_path / "model", stage1, upstream.save(tmp_path / "stage2.pt", "ar"))


def test_the_tree_counts_what_is_in_the_files(model):
    parts = {part.place: part for part in folder_parts(model)}
    assert list(parts) == ["encoder", "codebook", "prior", "decoder/ar", "vqgan"]
    pipe = DigitPipeline.from_pretrained(model)
    assert parts["prior"].parameters == sum(p.numel() for p in pipe.prior.parameters())
    assert parts["vqgan"].parameters == sum(p.numel() for p in pipe.vqgan.parameters())
    assert parts["prior"].bytes == (model / "prior" / "model.safetensors").stat().st_size
    console = Console(record=True, width=160)
    console.print(model_tree(model, batch=4))
    text = console.export_text()
    for word in [
        "1,000 classes, no guidance",
        "24 clusters of width 64",
        "run [1]/stage1.pt",
        "4 images at a time",
        "F32",
    ]:
        assert word in text
    assert "24 clusters" in describe(pipe)


def test_memory_grows_with_the_batch_and_shrinks_with_the_numbers(model):
    parts = folder_parts(model)
    one, many, half = sampling_memory(parts, 1, 4), sampling_memory(parts, 16, 4), sampling_memory(parts, 1, 2)
    assert many.caches == 16 * one.caches
    assert many.weights == one.weights
    assert half.caches * 2 == one.caches
    assert half.weights < one.weights


def test_a_single_component(model):
    console = Console(record=True, width=160)
    console.print(model_tree(model / "prior"))
    assert "2 blocks of width 32" in console.export_text()


def test_what_is_no_model(tmp_path):
    with pytest.raises(DigitError, match="is not a model"):
        model_tree(tmp_path)


def test_a_damaged_file_is_named(model):
    path = model / "prior" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DigitError, match=r"prior.*damaged"):
        model_tree(model)
