"""What Python users type: the arguments that users of diffusers know, images and labels of every kind, and sentences
for mistakes.
"""

from __future__ import annotations

import inspect
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import digit
import tiny
from digit import DigitPipeline
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.pipeline.generation import generate_folder
from digit.sampling import SampleRequest, SamplingParams


@pytest.fixture(scope="module")
def pipe():
    found = tiny.pipeline()
    torch.nn.init.normal_(found.prior.class_embedding.weight, std=1.0)  # classes and guidance count, untrained as it is
    return found


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    return pipe.save_pretrained(tmp_path_factory.mktemp("python") / "model")


def bytes_of(images):
    return [image.tobytes() for image in images]


# -- images in


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["pil", "path", "text", "numpy", "uint8", "float"])
def test_every_kind_of_image_gives_the_same_tokens(pipe, photo, tmp_path, kind, batched):
    square = photo.crop((2, 4, 34, 36))  # what the model cuts out of a picture of 32 px at the shorter side
    square.save(tmp_path / "a.png")
    array = np.asarray(square)
    chw = torch.from_numpy(array.copy()).movedim(-1, 0)
    image = {
        "pil": square,
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "numpy": array,
        "uint8": chw,
        "float": chw / 255,
    }[kind]
    expected = pipe.tokenizer.encode([square])
    if batched and kind in ("numpy", "uint8", "float"):
        batch = np.stack([image, image]) if kind == "numpy" else torch.stack([image, image])
    else:
        batch = [image, image] if batched else image
    assert torch.equal(pipe.tokenizer.encode(batch), expected.repeat(2 if batched else 1, 1))


def test_uint8_of_any_size_is_scaled_as_an_image_is(pipe, photo):
    expected = pipe.tokenizer.encode(photo)
    array = np.asarray(photo)
    assert torch.equal(pipe.tokenizer.encode(array), expected)
    assert torch.equal(pipe.tokenizer.encode(torch.from_numpy(array.copy()).movedim(-1, 0)), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 3, 32, 32) * 255, r"from .* to 2.*; expected floats in 0..1, as from images / 255"),
        (torch.rand(1, 3, 32, 32) * 2 - 1, r"expected floats in 0..1, as from \(images \+ 1\) / 2"),
        (torch.full((1, 3, 32, 32), float("nan")), "expected floats in 0..1"),
        (torch.randint(256, (1, 3, 32, 32)), "type torch.int64 was given as an image"),
        (np.zeros((32, 32), np.uint8), r"of shape \(32, 32\) and type uint8"),
        (np.zeros((1, 32, 32, 3)), "float64 was given as an image"),
        (torch.zeros(4, 32, 32, dtype=torch.uint8), "was given as an image"),
        (["nothing.png"], "There is no image file nothing.png"),
        ([3], "A int was given as an image"),
        ([], "No images were given"),
    ],
)
def test_what_is_no_image_in_range_is_refused(pipe, images, message):
    with pytest.raises(DigitError, match=message):
        pipe.tokenizer.encode(images)
    with pytest.raises(DigitError, match=message):
        pipe.with_parts(space="vq", prior=None, decoders={}).prior_tokenizer.encode(images)


# -- labels, seeds, generators


def test_labels_by_name_number_array_and_none(pipe):
    expected = bytes_of(pipe(labels=[0, 2, -1], num=3))
    for labels in (["cat", "ship", "none"], np.array([0, 2, -1]), torch.tensor([0, 2, -1]), [np.int64(0), "ship", -1]):
        assert bytes_of(pipe(labels=labels, num=3)) == expected
    assert bytes_of(pipe(labels="cat")) == expected[:1]


def test_a_seed_for_each_image_is_the_first_image_of_that_seed(pipe):
    one, two = (pipe(labels="dog", seed=seed)[0].tobytes() for seed in (1, 2))
    assert bytes_of(pipe(labels="dog", num=3, seed=[2, 1, 2], batch_size=2)) == [two, one, two]
    assert bytes_of(pipe(labels="dog", seed=[1, 2])) == [one, two], "one image a seed"
    assert len({one, two}) == 2


@pytest.mark.usefixtures("pixels_in_bfloat16")
def test_generators_decide_the_seed(pipe):
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    first = pipe(num=2, generator=generator(7))
    assert bytes_of(first) == bytes_of(pipe(num=2, generator=generator(7)))
    assert bytes_of(first) != bytes_of(pipe(num=2, generator=generator(8)))
    moving = generator(7)
    assert bytes_of(pipe(num=2, generator=moving)) != bytes_of(pipe(num=2, generator=moving))
    both = pipe(num=2, generator=[generator(3), generator(4)])
    assert bytes_of(both)[1] == pipe(num=1, generator=[generator(4)])[0].tobytes()


# -- settings and results


def test_every_sampling_setting_is_a_named_argument():
    named = inspect.signature(DigitPipeline.__call__).parameters
    assert set(to_dict(SamplingParams())) | {"guidance_scale"} <= set(named)
    for name in ("generator", "output_type", "callback_on_step_end", "seed", "labels"):
        assert name in named


def test_guidance_scale_is_cfg_scale(pipe):
    plain = bytes_of(pipe(labels=[0, 1]))
    assert bytes_of(pipe(labels=[0, 1], guidance_scale=3.0)) == bytes_of(pipe(labels=[0, 1], cfg_scale=3.0)) != plain
    with pytest.raises(DigitError, match="are the same setting; give one"):
        pipe(labels=[0], guidance_scale=2.0, cfg_scale=2.0)


def test_output_types(pipe):
    pil = pipe(num=3, output_type="pil")
    tensor, array = pipe(num=3, output_type="pt"), pipe(num=3, output_type="np")
    assert tensor.shape == (3, 3, tiny.SIZE, tiny.SIZE)
    assert tensor.dtype == torch.float32
    assert array.shape == (3, tiny.SIZE, tiny.SIZE, 3)
    assert array.dtype == np.float32
    assert np.array_equal(array, tensor.movedim(1, -1).numpy())
    assert np.array_equal((array * 255).round().astype(np.uint8), np.stack([np.asarray(image) for image in pil]))
    with pytest.raises(DigitError, match="output_type 'latent' was given; expected pil, np or pt"):
        pipe(num=1, output_type="latent")


@pytest.mark.parametrize(("decoder", "last"), [("ar", 16), ("masked", 2), ("onepass", 16)])
def test_the_callback_fires_for_every_decoder(pipe, decoder, last):
    full = pipe.with_parts(decoders={**pipe.decoders, "onepass": tiny.onepass()})
    seen = []
    full(num=2, decoder=decoder, callback_on_step_end=lambda *told: seen.append(told))
    owner, steps, times, facts = zip(*seen, strict=True)
    assert all(one is full for one in owner)
    assert list(steps) == list(range(len(seen)))
    stages = [fact["stage"] for fact in facts]
    assert list(dict.fromkeys(stages)) == ["prior", decoder]
    assert stages.count("prior") == tiny.TOKENS
    assert times[-1] == last
    assert facts[-1]["tokens"].shape == (2, tiny.TOKENS)


def test_dtype_device_and_components(pipe, folder):
    half = DigitPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.prior.head.weight.dtype == half.decoders["ar"].head.weight.dtype == torch.bfloat16
    assert half.codebook.centroids.dtype == torch.float32, "tokenizing stays exact"
    assert set(half.components) == {"encoder", "codebook", "prior", "decoder/ar", "decoder/masked", "vqgan"}
    assert repr(half).startswith("DigitPipeline 'tiny' on cpu in bfloat16")
    assert half.to(torch.float32) is half
    assert half.dtype == torch.float32
    assert half.to("cpu", "bf16").dtype == torch.bfloat16
    assert DigitPipeline.from_pretrained(folder).dtype == torch.float32
    assert len(half(num=1)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_gets_a_sentence(pipe, folder):
    for call in (lambda: pipe.to("cuda"), lambda: DigitPipeline.from_pretrained(folder, device="cuda")):
        with pytest.raises(DigitError, match="The device 'cuda' cannot be used here"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: p(labels=["cow"]),
            "The label 'cow' is neither a number nor a class of this model; its classes: cat",
        ),
        (lambda p: p(labels=[0.5]), "The label 0.5 was given; expected a class by its number or its name"),
        (lambda p: p(num=3, seed=[1, 2]), "2 seeds were given for 3 images"),
        (lambda p: p(num=1, seed=[1.5]), "The seed 1.5 was given"),
        (lambda p: p(num=1, seed="one"), "The seed"),
        (lambda p: p.decode(torch.zeros(1, tiny.TOKENS)), "of type float32 were given; expected integers from 0 to 11"),
        (lambda p: p.decode(np.zeros((1, tiny.TOKENS))), "of type float64 were given"),
        (lambda p: p.decode([[0, 1]]), r"shape \(1, 2\)"),
    ],
)
def test_mistakes_get_a_sentence(pipe, call, message):
    with pytest.raises(DigitError, match=message):
        call(pipe)


def test_decode_takes_what_numpy_loads(pipe):
    tokens = pipe.tokenizer.encode(torch.rand(2, 3, tiny.SIZE, tiny.SIZE))
    assert torch.equal(pipe.decode(tokens.numpy().astype(np.int32)), pipe.decode(tokens))


def test_the_package_offers_its_public_names():
    assert {"DigitError", "DigitPipeline", "SemanticTokenizer", "VQGAN", "load_images"} <= set(dir(digit))
    assert not [name for name in dir(digit) if name in ("Any", "TYPE_CHECKING", "annotations", "importlib", "sys")]


def test_the_record_says_all_that_made_the_images(pipe, tmp_path, monkeypatch):
    tuned = pipe.with_parts(settings={"prior": SamplingParams(top_k=5), "masked": SamplingParams(steps=6)})
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/digit", "generate", "my model", "--top-p", "0.9"])
    record = generate_folder(tuned, tmp_path / "out", 2, ["cat", 2], decoder="masked", top_p=0.9)
    assert record == {**json.loads((tmp_path / "out" / "generation.json").read_text())}
    assert record["labels"] == [0, 2]
    assert record["settings"] == {"top_p": 0.9}
    assert record["stages"] == {
        "prior": to_dict(SamplingParams(top_k=5, top_p=0.9)),
        "masked": to_dict(SamplingParams(steps=6).of("masked", tiny.TOKENS)),
    }
    assert record["command"] == "digit generate 'my model' --top-p 0.9"
    assert record["date"][:2] == "20"
    assert record["date"].endswith("+00:00")
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"] == "cpu"
    assert record["engine"] in ("C++", "plain")
    with pytest.raises(DigitError, match="a run with stages = "):
        generate_folder(pipe, tmp_path / "out", 2, ["cat", 2], decoder="masked", top_p=0.9)


def test_a_request_slices_its_seeds():
    request = SampleRequest.of_run(labels=[0, 1, 0], seed=[5, 6, 7])
    assert [list(part.seed) for part in request.batches(2)] == [[5, 6], [7]]
    assert request.take([2, 0]).seed == [7, 5]
