"""The C++ step against the plain one, over every kind of transformer, format and number of rows; and what happens
without a compiler."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from digit.native import library
from digit.sampling import SamplingParams, sample
from digit.sampling.engines import native
from digit.sampling.engines.acceleration import accelerate, engine_name, release
from digit.sampling.engines.decode import quantized
from digit.sampling.engines.native import NativeStep, _pointers, pack, suits
from tiny import loud

pytestmark = pytest.mark.usefixtures("compiler")

SHAPES = {
    "pre": {},
    "post": {"norm": "post"},
    "a decoder": {"role": "ar", "prefix": 6, "norm": "post"},
    "narrow": {"dim": 32, "heads": 2, "ffn_dim": 48, "vocab": 9},
    "wide heads": {"dim": 160, "heads": 2, "depth": 1},
    "long": {"length": 70},
    "another epsilon": {"norm_eps": 0.1},
}
ROWS = [1, 2, 6, 7, 8, 13]
GUIDED = SamplingParams(top_k=10, cfg_scale=2.5, cfg_interval=(0.3, 0.8))


build = partial(loud, dim=64, heads=2)


class Step(NativeStep):
    """The C++ step without the draw, which sampling does in the same call."""

    def step(self, cache, token, index):
        """As TokenModel.step: feed token number ``index``, ids (B,); float32 logits (B, vocab) of the next."""
        model, place, threads = self._model, int(index) + 1, self._threads()
        x = model.embed_tokens(token) + model.position_embedding.weight[place]  # (B, D)
        x, rows = x.float().contiguous(), len(x)
        logits = torch.empty(rows, self._network.head.outputs)
        room = self._make_room(self._library.digit_room(self._pointer, rows, threads, cache.length))
        position = model.config.prefix_length + place
        buffers = (x.data_ptr(), room, logits.data_ptr())
        self._library.digit_step(self._pointer, _pointers(cache), threads, rows, position, *buffers)
        return logits[:, : model.config.vocab_size]


@torch.inference_mode()
def distance(model, plain, step, rows):
    """The largest relative distance of the logits over all tokens of ``rows`` sequences, each step with a cache of its
    own."""
    caches = [model.new_cache(rows) for _ in range(2)]
    prefix = torch.arange(rows * 6).view(rows, 6) % 9 if model.config.prefix_length else None
    for cache in caches:
        model.prefill(cache, rows, None, prefix)
    worst = 0.0
    for i in range(model.config.length - 1):
        token = (torch.arange(rows) * 5 + i) % model.config.vocab_size
        a, b = (s.step(c, token, torch.tensor(i)).float() for s, c in zip((plain, step), caches, strict=True))
        assert b.shape == (rows, model.config.vocab_size)
        worst = max(worst, ((a - b).norm() / a.norm()).item())
    return worst


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_plain_step(shape, rows):
    """In float32 up to the order of the sums; in bfloat16 nearer to float32 than the plain step's; int8 differs by its
    rounding."""
    full, half = build(**shape), build(dtype=torch.bfloat16, **shape)
    assert suits(full)
    assert suits(half)
    assert distance(full, full, Step(full), rows) < 3e-6
    assert distance(half, half, Step(half), rows) < 0.02
    assert distance(full, quantized(full), Step(full, "int8"), rows) < 0.02


def test_bfloat16_is_no_further_from_the_truth_than_the_plain_step():
    half = build(dtype=torch.bfloat16)
    exact = build(dtype=torch.bfloat16).float()  # the same rounded weights
    step = Step(half)
    caches = [m.new_cache(4) for m in (exact, half, half)]
    errors = torch.zeros(2)
    with torch.inference_mode():
        for m, c in zip((exact, half, half), caches, strict=True):
            m.prefill(c, 4)
        for i in range(11):
            token = (torch.arange(4) * 5 + i) % 24
            truth, *others = (
                s.step(c, token, torch.tensor(i)).float() for s, c in zip((exact, half, step), caches, strict=True)
            )
            errors += torch.stack([(x - truth).norm() for x in others])
    assert errors[1] < errors[0]


@pytest.mark.parametrize("shape", ["pre", "post", "a decoder"])
def test_float32_tokens_are_those_of_the_plain_step(shape):
    model = build(**SHAPES[shape])
    labels = torch.arange(40) % 4
    prefix = torch.arange(240).view(40, 6) % 9 if model.config.prefix_length else None
    for settings in (SamplingParams(top_k=10), SamplingParams(top_p=0.8, temperature=1.3), GUIDED):
        accelerate(model)
        fast = sample(model, range(40), 3, settings, labels, prefix)
        assert engine_name(model) == "C++"
        accelerate(model, native=False)
        assert torch.equal(sample(model, range(40), 3, settings, labels, prefix), fast)
        assert engine_name(model) == "plain"


@pytest.mark.parametrize("kind", [{}, {"dtype": torch.bfloat16}, {"quantize": "int8"}], ids=["fp32", "bf16", "int8"])
def test_an_image_is_the_same_in_any_batch_and_on_any_number_of_threads(kind):
    """To the last bit: a sum's order depends on neither."""
    model = build(dtype=kind.get("dtype", torch.float32), depth=3)
    step = Step(model, kind.get("quantize"))
    token = torch.arange(37) % 24

    @torch.inference_mode()
    def logits(rows, threads):
        cache = model.new_cache(len(rows))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return [step.step(cache, (token[rows] + i) % 24, torch.tensor(i)) for i in range(8)][-1]
        finally:
            torch.set_num_threads(before)

    whole = logits(list(range(37)), 1)
    for rows, threads in (([4], 1), ([3, 9], 2), (list(range(7)), 3), (list(range(13)), 2), (list(range(37)), 2)):
        assert torch.equal(logits(rows, threads), whole[rows])


def test_changed_weights_are_packed_again():
    model = build()
    before = sample(model, range(3))
    with torch.no_grad():
        model.transformer.blocks[0].ffn_in.weight.mul_(-1)
    changed = sample(model, range(3))
    assert engine_name(model) == "C++"
    accelerate(model, native=False)
    assert torch.equal(changed, sample(model, range(3)))
    assert not torch.equal(before, changed)


def test_weights_are_packed_once_for_all_batch_sizes(monkeypatch):
    model, packed = build(), []
    monkeypatch.setattr(native, "pack", lambda w, strip: (packed.append(w.shape), pack(w, strip))[1])
    for batch in (3, 4, 1):
        sample(model, range(batch))
    assert len(packed) == 2 * 4 + 1
    release(model)
    assert engine_name(model) == ""
    sample(model, [0])
    assert len(packed) == 2 * (2 * 4 + 1)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (build(heads=8), "heads of 8"),
        (build(ffn_dim=100), "a hidden width of 100"),
        (build(dtype=torch.float16), "float16"),
        (build().train(), "training"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_it_does_not_cover_runs_the_plain_step(other, why):
    assert not suits(other)
    sample(other, range(2), params=SamplingParams(top_k=5))
    assert engine_name(other) == "plain"


def test_training_mode_is_noticed_between_calls():
    model = build(dropout=0.5)
    sample(model, range(2))
    assert engine_name(model) == "C++"
    sample(model.train(), range(2))
    assert engine_name(model) == "plain"
    sample(model.eval(), range(2))
    assert engine_name(model) == "C++"


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from tiny import loud
from digit.sampling import sample
from digit.sampling.engines.acceleration import compile_seconds, engine_name
model = loud(dim=64, heads=2)
tokens = sample(model, range(3))
print(engine_name(model), compile_seconds(model), tokens.flatten().tolist(), sep="|")
"""


def in_another_process(cache, **environment):
    script = SCRIPT.format(folder=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "DIGIT_CACHE": str(cache), **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    name, seconds, tokens = done.stdout.strip().split("|")
    return name, float(seconds), tokens


@pytest.mark.parametrize(
    ("level", "arguments"),
    [
        ("x86-64", " -DUNUSED"),
        pytest.param("native", "", marks=pytest.mark.slow),  # every run builds it once, for the other tests
        pytest.param("x86-64-v3", "", marks=pytest.mark.slow),  # `make test-avx2` builds it
    ],
)
def test_it_is_built_once_for_a_level_and_kept_for_later_processes(tmp_path, level, arguments):
    """Other levels have narrower vectors than this processor may have, and stand beside the usual library, not in its
    place. The compiler may be given with arguments."""
    if level != "native" and platform.machine() != "x86_64":
        pytest.skip("a level of x86-64")
    compiler = next(filter(shutil.which, ("g++", "clang++", "c++")))
    given = {"DIGIT_NATIVE_MARCH": level, "CXX": compiler + arguments}
    first, again = (in_another_process(tmp_path, **given) for _ in range(2))
    assert first[0] == again[0] == "C++"
    assert first[2] == again[2] == str(sample(build(), range(3)).flatten().tolist())
    built, choices = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (built.suffix, choices.suffix) == (".so", ".json")  # which step is quicker is kept beside it
    assert built.stem == choices.stem
    usual = os.environ.get("DIGIT_NATIVE_MARCH") or "native"
    assert (built.name == Path(library()._name).name) == (level == usual and not arguments)
    assert first[1] > 2 * again[1]


def test_without_a_compiler_the_plain_step_runs(tmp_path):
    name, seconds, tokens = in_another_process(tmp_path, CXX="no-such-compiler")
    assert (name, seconds) == ("plain", 0.0)
    model = build()
    accelerate(model, native=False)
    assert tokens == str(sample(model, range(3)).flatten().tolist())


def test_a_cache_folder_that_cannot_be_used_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    assert in_another_process(tmp_path / "cache")[0] == "plain"


def test_panels_hold_the_matrix_in_reading_order():
    weight = torch.arange(70 * 6, dtype=torch.float32).view(70, 6)
    full, pairs = pack(weight, 64), pack(weight.bfloat16(), 16)
    assert full.shape == (2, 6, 64, 1)
    assert pairs.shape == (8, 3, 16, 2)
    assert full[1, 5, 5, 0] == weight[69, 5]
    assert full[1, 5, 6, 0] == 0
    assert pairs[3, 2, 15, 1] == weight[63, 5].bfloat16()


LARGE = {"dim": 512, "depth": 2, "heads": 8}  # more than 8 MB of weights: threads share every step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("shape", [{}, LARGE, {"role": "ar", "prefix": 6}], ids=["small", "large", "a decoder"])
def test_all_tokens_in_one_call_are_those_of_single_steps(shape, dtype, scale):
    """With guidance in a part of the sequence, places that are kept, and whatever the batch."""
    model = build(**{**shape, "dtype": dtype, "length": 24})
    model.config = replace(model.config, embedding_scale=scale)
    given, mask = torch.arange(7 * 24).view(7, 24) % 24, torch.rand(7, 24, generator=torch.manual_seed(0)) < 0.7
    request = {"seed": 3, "params": GUIDED, "labels": torch.arange(7) % 4, "given": given, "mask": mask}
    if model.config.prefix_length:
        request["prefix"] = torch.arange(42).view(7, 6) % 9
    whole = sample(model, range(7), **request)
    assert engine_name(model) == "C++"
    told = []
    single = sample(model, range(7), **request, callback=lambda index, _: told.append(index))
    assert torch.equal(single, whole)
    assert told == list(range(told[0], 25))


@pytest.mark.parametrize("kind", [{}, {"dtype": torch.bfloat16}, {"quantize": "int8"}], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("codes", [{}, {"codebook_depth": 2}], ids=["one codebook", "residual"])
def test_tokens_of_large_networks_depend_neither_on_batch_nor_threads(kind, codes):
    model = build(**{**LARGE, **codes, "dtype": kind.get("dtype", torch.float32)})
    accelerate(model, quantize=kind.get("quantize"), native=True)
    before, labels = torch.get_num_threads(), torch.arange(20) % 4
    whole = sample(model, range(20), 3, GUIDED, labels)
    assert engine_name(model) == "C++"
    try:
        for threads, rows in ((1, range(20)), (3, range(20)), (2, range(1)), (3, range(5, 8))):
            torch.set_num_threads(threads)
            assert torch.equal(sample(model, rows, 3, GUIDED, labels[rows.start : rows.stop]), whole[rows])
    finally:
        torch.set_num_threads(before)
    if not kind:
        accelerate(model, native=False)
        assert torch.equal(sample(model, range(20), 3, GUIDED, labels), whole)


def test_threads_that_lose_their_cores_change_nothing():
    """More threads than cores, beside programs that compute: others take over what a late thread was to do."""
    model = build(**LARGE)
    accelerate(model, native=True)
    before, labels = torch.get_num_threads(), torch.arange(3) % 4
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        torch.set_num_threads(1)
        alone = sample(model, range(3), 3, GUIDED, labels)
        torch.set_num_threads(2 * (os.cpu_count() or 1))
        for _ in range(10):
            assert torch.equal(sample(model, range(3), 3, GUIDED, labels), alone)
    finally:
        torch.set_num_threads(before)
        for other in others:
            other.kill()
            other.wait()
