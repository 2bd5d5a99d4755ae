"""A pipeline whose decoder needs one pass: beside the other decoders, without a VQGAN, and wherever pictures are
made."""

from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import tiny
from digit import DigitPipeline
from digit.core.errors import DigitError
from digit.evaluation.metrics.reconstruction import paths
from digit.evaluation.model_source import SamplingRun, as_uint8
from digit.models.component import save_component
from digit.pipeline.assembly import assemble
from digit.pipeline.editing import continue_rows, edit_region, vary
from digit.pipeline.generation import generate_folder
from digit.pipeline.info import describe, folder_parts, model_tree, sampling_memory
from digit.pipeline.stage2 import FITTED
from digit.pipeline.tokens import PixelLatents, Tokens, load_tokens_file
from digit.sampling.rng import pixel_latents


@pytest.fixture(scope="module")
def pipe() -> DigitPipeline:
    """All three decoders on one prior."""
    whole = tiny.pipeline()
    return whole.with_parts(decoders={**whole.decoders, "onepass": tiny.onepass()})


@pytest.fixture(scope="module")
def lean(pipe: DigitPipeline) -> DigitPipeline:
    """The one-pass decoder alone, and no VQGAN."""
    return pipe.with_parts(decoders={"onepass": pipe.decoders["onepass"]}, vqgan=None)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))


def test_every_decoder_decodes_the_same_prior_tokens(pipe: DigitPipeline) -> None:
    made = {kind: pipe.sample_tokens(tiny.request(range(3), [0, 1, 2], 5, kind)) for kind in pipe.decoders}
    assert len({tokens.semantic.numpy().tobytes() for tokens in made.values()}) == 1
    assert made["onepass"].vq is None
    pixels = [pipe.to_pixels(tokens) for tokens in made.values()]
    assert all(p.shape == (3, 3, 32, 32) and float(p.min()) >= 0 and float(p.max()) <= 1 for p in pixels)
    assert not torch.allclose(pixels[0], pixels[2])


def test_saved_and_loaded_it_paints_the_same(pipe: DigitPipeline, lean: DigitPipeline, tmp_path) -> None:
    for name, model in (("all", pipe), ("lean", lean)):
        folder = model.save_pretrained(tmp_path / name)
        again = DigitPipeline.from_pretrained(folder)
        one, other = (m(labels=[0, 2], seed=3, decoder="onepass") for m in (model, again))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert list(again.decoders) == ["onepass"]
    assert again.vqgan is None
    assert again.image_size == 32


def test_an_image_does_not_depend_on_its_batch(lean: DigitPipeline, tmp_path) -> None:
    settings = {"labels": [0, 1, 2], "seed": 4, "save_tokens": True}
    for size in (8, 3, 1):
        generate_folder(lean, tmp_path / str(size), 11, batch_size=size, **settings)
    files = [sorted((tmp_path / str(size)).glob("0*.png")) for size in (8, 3, 1)]
    for triple in zip(*files, strict=True):
        first, *others = (np.asarray(Image.open(file)) for file in triple)
        assert all(np.array_equal(first, other) for other in others)
    tokens = load_tokens_file(tmp_path / "3" / "tokens.npz")
    assert tokens.vq is None
    again = lean.decode(tokens.semantic, seed=4)  # as digit decode does
    assert int((np.asarray(Image.open(files[0][5])).transpose(2, 0, 1) - (again[5] * 255).round().numpy()).max()) <= 1


def test_the_noise_is_the_decoders_temperature(lean: DigitPipeline) -> None:
    semantic = torch.zeros(2, 16, dtype=torch.long)
    varied, still = lean.decode(semantic), lean.decode(semantic, temperature=0)
    assert not torch.allclose(varied[0], varied[1], atol=1e-3)
    torch.testing.assert_close(still[0], still[1])
    through = lean.sample_tokens(tiny.request([0, 1], seed=1, decoder_temperature=0))
    assert float(through.latents.noise.abs().max()) == 0


def test_a_class_reaches_a_decoder_that_knows_classes(lean: DigitPipeline) -> None:
    knowing = lean.with_parts(decoders={"onepass": tiny.onepass(num_classes=tiny.CLASSES)})
    torch.nn.init.normal_(knowing.decoders["onepass"].class_embedding.weight)
    tokens = knowing.sample_tokens(tiny.request(range(2), [0, 1]))
    assert tokens.labels.tolist() == [0, 1]
    semantic = torch.zeros(1, 16, dtype=torch.long)
    made = [as_uint8(knowing.decode(semantic, labels=torch.tensor([c]))) for c in (-1, 0, 1)]
    assert len({m.numpy().tobytes() for m in made}) == 3
    run = SamplingRun(knowing, 4, labels=[0, 1])
    run.check()
    assert next(iter(run.batches())).shape == (4, 3, 32, 32)


def test_kept_pixels_are_kept_and_the_noise_suits_them(lean: DigitPipeline) -> None:
    painter = lean.decoders["onepass"]
    semantic = torch.randint(12, (3, 16), generator=torch.Generator().manual_seed(2))
    given = lean.decode(semantic, seed=9)
    region = torch.zeros(32, 32, dtype=torch.bool)
    region[8:16, 8:24] = True  # two cells
    tokens = edit_region(lean, given, region, tiny.request(range(3), seed=1))
    pixels = lean.to_pixels(tokens)
    assert torch.equal(pixels[:, :, ~region], given[:, :, ~region])
    assert (pixels != given)[:, :, region].any()

    def rebuilt(noise):
        return lean.to_pixels(Tokens(lean.tokenizer.encode(given), None, PixelLatents("onepass", noise)))

    tries = [pixel_latents(painter.config, range(3), 1, stage=f"onepass-{i}") for i in range(FITTED)]
    errors = (torch.stack([*map(rebuilt, tries)]) - given).square()[:, :, :, ~region].mean((2, 3))  # (16, 3)
    chosen = rebuilt(tokens.latents.noise)
    torch.testing.assert_close((chosen - given).square()[:, :, ~region].mean((1, 2)), errors.min(0).values)
    alone = lean.to_pixels(edit_region(lean, given[1:2], region, tiny.request([1], seed=1)))
    torch.testing.assert_close(alone, pixels[1:2])
    assert painter.config.noise_dim == tokens.latents.noise.shape[1]


def test_other_ways_to_edit(lean: DigitPipeline, images: torch.Tensor) -> None:
    assert vary(lean, images, 0.25, tiny.request(range(3))).latents.kept is None
    assert continue_rows(lean, images, 2, tiny.request(range(3))).latents.kept is None
    kept = continue_rows(lean, images, 2, tiny.request(range(3)), keep_pixels=True)
    assert torch.equal(lean.to_pixels(kept)[:, :, :16], images[:, :, :16])
    decoder = tiny.onepass(pixels={"resolution": 64, "widths": (16, 8), "patch": 8})
    large = lean.with_parts(decoders={"onepass": decoder})
    kept = continue_rows(large, images, 2, tiny.request(range(3)), keep_pixels=True)
    assert large.to_pixels(kept).shape == (3, 3, 64, 64)


def test_vq_tokens_in_one_pass_are_tokens_like_others(pipe: DigitPipeline, images: torch.Tensor) -> None:
    vq = pipe.with_parts(decoders={"onepass": tiny.onepass("vq")})
    tokens = vq.sample_tokens(tiny.request(range(5), seed=2))
    assert tokens.latents is None
    assert tokens.vq.shape == (5, 16)
    assert torch.equal(vq.sample_tokens(tiny.request([3], seed=2)).vq, tokens.vq[3:4])
    assert vq.to_pixels(tokens).shape == (5, 3, 32, 32)
    seen = []
    vq.sample_tokens(tiny.request([0]), lambda stage, done, _: seen.append((stage, done)))
    assert seen[-1] == ("onepass", 16)
    region = torch.zeros(32, 32, dtype=torch.bool)
    region[:8, :8] = True
    edited = edit_region(vq, images, region, tiny.request(range(3)))
    assert torch.equal(edited.vq[:, 1:], vq.vqgan.encode(images)[:, 1:])


def test_measurements_take_it(lean: DigitPipeline, pipe: DigitPipeline, images: torch.Tensor) -> None:
    assert list(paths(lean)) == ["semantic tokens, onepass decoder"]
    assert list(paths(pipe))[-1] == "semantic tokens, onepass decoder"
    rebuilt = paths(lean)["semantic tokens, onepass decoder"](images, [0, 1, 2])
    assert rebuilt.shape == (3, 3, 32, 32)
    assert torch.equal(rebuilt, paths(pipe, 0)["semantic tokens, onepass decoder"](images, [0, 1, 2]))


def test_it_is_described(pipe: DigitPipeline, tmp_path) -> None:
    folder = pipe.save_pretrained(tmp_path / "model")
    console = Console(width=200, record=True, file=StringIO())
    console.print(model_tree(folder))
    text = console.export_text()
    assert "32 px through widths [16, 8, 8] and patches of 2 from 16 of 12, noise of 6" in describe(pipe)
    assert "in one pass, 2 blocks of width 32" in text
    parts = {part.place: part for part in folder_parts(folder)}
    lean = [part for place, part in parts.items() if place in ("prior", "decoder/onepass")]
    memory = sampling_memory(lean, 3, 4)
    assert memory.weights == 4 * sum(part.parameters for part in lean)
    # so many images of 32 pixels are decoded at once, however many there are
    assert memory.pixels == 64 * 4 * max(3 * 16 * 4**2, (16 + 3 * 8) * 8**2, 3 * 8 * 16**2)
    assert sampling_memory(lean, 3, 2).pixels == memory.pixels // 2


def test_prior_and_decoder_alone_fill_a_folder(pipe: DigitPipeline, tmp_path) -> None:
    alone = DigitPipeline(prior=pipe.prior, decoders={"onepass": pipe.decoders["onepass"]})
    assert alone.image_size == 32
    assert generate_folder(alone, tmp_path / "out", 2)["finished"]


def test_it_is_put_together_from_its_folder(pipe: DigitPipeline, tmp_path) -> None:
    base = pipe.with_parts(decoders={}).save_pretrained(tmp_path / "base")
    decoder = pipe.decoders["onepass"]
    save_component(tmp_path / "run" / "model", decoder, decoder.config)
    made = assemble(base=str(base), decoders=[tmp_path / "run"])
    assert list(made.decoders) == ["onepass"]


def test_what_it_cannot_do_gets_a_sentence(pipe: DigitPipeline, lean: DigitPipeline, tmp_path) -> None:
    semantic = torch.zeros(1, 16, dtype=torch.long)
    with pytest.raises(DigitError, match="straight to pixels"):
        lean.decode_tokens(semantic)
    with pytest.raises(DigitError, match="let a decoder finish them"):
        lean.to_pixels(Tokens(semantic))
    with pytest.raises(DigitError, match="guidance needs both"):
        lean.decode(semantic, cfg_scale=2.0)
    with pytest.raises(DigitError, match="range from 0 to 12"):
        lean.decode(torch.full((1, 16), 12).index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(DigitError, match="no vqgan"):
        generate_folder(pipe.with_parts(vqgan=None), tmp_path / "out", 1, decoder="ar")
    with pytest.raises(DigitError, match="semantic tokens K is 12 in the prior and 9 in the onepass decoder"):
        lean.with_parts(decoders={"onepass": tiny.onepass(prefix_vocab_size=9)})
    with pytest.raises(DigitError, match="semantic tokens an image N is 16 in the prior and 4"):
        lean.with_parts(decoders={"onepass": tiny.onepass(grid=(2, 2), pixels={"widths": (16, 8), "patch": 8})})
    with pytest.raises(DigitError, match="VQ codes V is 20 in the vqgan and 7"):
        pipe.with_parts(decoders={"onepass": tiny.onepass("vq", vocab_size=7)})
