from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from digit import DigitPipeline
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.models.component import save_component
from digit.pipeline import reconstruction
from digit.pipeline.assembly import assemble
from digit.pipeline.generation import generate_folder
from digit.pipeline.tokens import load_tokens_file
from digit.sampling import SamplingParams


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def test_a_saved_model_is_the_same_model(pipe, tmp_path):
    pipe.settings["prior"] = SamplingParams(top_k=5)
    folder = pipe.save_pretrained(tmp_path / "model")
    again = DigitPipeline.from_pretrained(folder)
    labels = torch.tensor([0, 1, 2])
    one, other = (p.sample_tokens(tiny.request(range(3), labels, seed=3)) for p in (pipe, again))
    assert one.sha256() == other.sha256()
    assert torch.equal(pipe.to_pixels(one), again.to_pixels(other))
    images = torch.rand(2, 3, tiny.SIZE, tiny.SIZE)
    assert torch.equal(pipe.tokenizer.encode(images), again.tokenizer.encode(images))
    assert again.class_names == pipe.class_names
    assert again.settings == pipe.settings
    assert again.fingerprint() == pipe.fingerprint()
    assert {p.name for p in folder.iterdir()} == {
        "model_index.json", "README.md", "pipeline.py", "encoder", "codebook", "prior", "decoder", "vqgan"
    }  # fmt: skip


def test_half_precision_halves_the_files_and_keeps_the_model(pipe, tmp_path):
    full, half = pipe.save_pretrained(tmp_path / "a"), pipe.save_pretrained(tmp_path / "b", torch.float16)

    def size(folder):
        return (folder / "prior" / "model.safetensors").stat().st_size

    assert size(half) < 0.6 * size(full)
    weights = (DigitPipeline.from_pretrained(f).prior.head.weight for f in (full, half))
    assert torch.allclose(*weights, atol=4e-3)


@pytest.mark.parametrize("decoder", ["ar", "masked"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_an_image_does_not_depend_on_its_batch(pipe, decoder, cfg_scale):
    labels = torch.arange(64) % tiny.CLASSES

    request = tiny.request(range(64), labels, 7, decoder, cfg_scale=cfg_scale, top_k=6, decoder_top_p=0.8)

    def run(batch):
        parts = [pipe.sample_tokens(part) for part in request.batches(batch)]
        return torch.cat([p.semantic for p in parts]), torch.cat([p.vq for p in parts])

    whole = run(64)
    assert len({tuple(row.tolist()) for row in whole[0]}) > 32  # the pictures differ, so the comparison means something
    for batch in (1, 7):
        assert all(torch.equal(a, b) for a, b in zip(run(batch), whole, strict=True)), batch


def test_labels_seed_and_decoder_matter(pipe):
    def run(label=0, seed=0, decoder="ar", **settings):
        return pipe.sample_tokens(tiny.request([0], [label], seed, decoder, **settings)).sha256()

    assert run() == run()
    changes = [{}, {"label": 1}, {"seed": 1}, {"decoder": "masked"}, {"temperature": 0.2}]
    assert len({run(**change) for change in (*changes, {"decoder": "masked", "steps": 3})}) == 6


def test_a_default_of_guidance_is_for_images_with_a_class(pipe):
    guided = pipe.with_parts(settings={"prior": SamplingParams(cfg_scale=3.0)})
    plain = pipe.with_parts(settings={})
    one, other = (p.sample_tokens(tiny.request(range(4), seed=1)).sha256() for p in (guided, plain))
    assert one == other
    labelled = tiny.request(range(4), [0, 0, 0, 0])
    assert guided.sample_tokens(labelled).sha256() != plain.sample_tokens(labelled).sha256()
    with pytest.raises(DigitError, match="needs class labels"):
        guided(num=1, cfg_scale=2.0)


def test_calling_gives_images(pipe):
    pictures = pipe(labels=[0, 2], num=5, seed=1)
    assert [p.size for p in pictures] == [(tiny.SIZE, tiny.SIZE)] * 5
    assert len(tiny.pipeline(conditional=False)(num=2)) == 2


def test_images_of_any_size_are_tokenized(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    tokens = pipe.tokenizer.encode([picture, picture.rotate(90, expand=True)])
    assert tokens.shape == (2, tiny.TOKENS)
    assert pipe.reconstruct([picture]).shape == (1, 3, tiny.SIZE, tiny.SIZE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(labels=[3]), "The label 3 was given; this model knows 0 to 2"),
        (lambda p: p(labels=[]), "list of labels is empty"),
        (lambda p: p(num=0), "expected at least 1"),
        (lambda p: p(labels=0, top_p=1.7), "top_p = 1.7: must be at most 1"),
        (lambda p: p(labels=0, topk=3), "unknown field 'topk'; did you mean 'top_k'"),
        (lambda p: p(labels=0, decoder="diffusion"), "has no decoder 'diffusion'; it has: ar, masked"),
        (lambda p: p(labels=0, seed=-1), "seed -1"),
        (lambda p: p.decode(torch.full((1, tiny.TOKENS), 99)), "range from 99 to 99; expected 0 to 11"),
        (lambda p: p.tokenizer.encode(torch.rand(1, 3, 8, 8)), r"expected \(B, 3, 32, 32\)"),
    ],
)
def test_bad_input_gets_a_sentence(pipe, call, message):
    with pytest.raises(DigitError, match=message):
        call(pipe)


def test_parts_that_do_not_fit_are_refused():
    eyes = tiny.encoder()
    with pytest.raises(DigitError, match="feature width is 16 in the encoder and 5 in the codebook"):
        DigitPipeline(encoder=eyes, codebook=tiny.codebook(5))
    with pytest.raises(DigitError, match="number of semantic tokens K"):
        DigitPipeline(codebook=tiny.codebook(eyes.dim), prior=tiny.token_model(vocab_size=13))
    with pytest.raises(DigitError, match="VQ codes V"):
        DigitPipeline(vqgan=tiny.vqgan(), decoders={"ar": tiny.token_model("ar", vocab_size=21)})
    with pytest.raises(DigitError, match="class names"):
        tiny.pipeline().with_parts(class_names=["one"])


def test_a_baseline_in_vq_space_needs_no_decoder(tmp_path):
    prior = tiny.token_model(vocab_size=tiny.CODES, num_classes=2)
    pipe = DigitPipeline(prior=prior, vqgan=tiny.vqgan(), space="vq")
    assert len(DigitPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "m"))(labels=[0, 1])) == 2


def test_maskgit_is_a_masked_model_in_vq_space_without_a_prefix(tmp_path):
    alone = tiny.token_model("masked", prefix_vocab_size=0, prefix_length=0)
    save_component(tmp_path / "maskgit", alone, alone.config, {"space": "vq"})
    tiny.vqgan().save_pretrained(tmp_path / "vqgan")
    pipe = assemble(vqgan=tmp_path / "vqgan", prior=tmp_path / "maskgit")
    pictures = DigitPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "m"))(num=3, steps=4)
    assert len(pictures) == 3
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_a_damaged_model_is_named(pipe, tmp_path):
    folder = pipe.save_pretrained(tmp_path / "model")
    weights = folder / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DigitError, match=r"prior/model\.safetensors"):
        DigitPipeline.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    write_json(folder / "model_index.json", {**index, "format": 99})
    with pytest.raises(DigitError, match="format 99"):
        DigitPipeline.from_pretrained(folder)
    with pytest.raises(DigitError, match=r"no model_index\.json"):
        DigitPipeline.from_folder(tmp_path)


def test_generating_a_folder_leaves_images_a_grid_and_a_record(pipe, tmp_path):
    record = generate_folder(pipe, tmp_path / "out", 5, [0, 1], seed=2, batch_size=2, save_tokens=True)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {f"{i:05d}.png" for i in range(5)} | {"grid.png", "generation.json", "tokens.npz"}
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["tokens_sha256"] == record["tokens_sha256"]
    tokens = load_tokens_file(tmp_path / "out" / "tokens.npz")
    assert tokens.sha256() == record["tokens_sha256"]
    pixels = pipe.to_pixels(tokens)
    stored = np.asarray(Image.open(tmp_path / "out" / "00004.png"), dtype=np.float32) / 255
    assert math.isclose(np.abs(pixels[4].permute(1, 2, 0).numpy() - stored).max(), 0, abs_tol=0.51 / 255)


def test_reconstructions_have_a_title_above_each_column(pipe, monkeypatch):
    told = []
    drawn = reconstruction.image_grid
    monkeypatch.setattr(
        reconstruction, "image_grid", lambda *args, **how: told.append(how["column_titles"]) or drawn(*args, **how)
    )
    images = torch.rand(2, 3, tiny.SIZE, tiny.SIZE)
    sheet, found = reconstruction.reconstruction_sheet(pipe, images)
    assert told == [["image", "semantic\ntokens", "VQGAN\nalone", "ar\ndecoder"]]
    assert len(found) == 2
    bare = drawn(found * 4, columns=4)
    assert sheet.width == bare.width
    assert np.asarray(sheet)[: sheet.height - bare.height].min() < 128, "the titles' ink stands above the images"
