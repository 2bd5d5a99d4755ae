"""What is asked of a model: the checks before anything is sampled, and labels on their way to decoders that know
classes.
"""

import pytest
import torch

import tiny
from digit.core.errors import DigitError
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokens import Tokens, load_tokens_file, save_tokens_file
from digit.sampling.request import SampleRequest
from digit.sampling.sampler import sample
from terminal import run


@pytest.fixture(scope="module")
def pipe():
    """A model whose AR decoder knows classes and was trained with label dropout."""
    plain = tiny.pipeline()
    decoder = tiny.token_model("ar", 1, num_classes=tiny.CLASSES, class_dropout=0.1)
    torch.nn.init.normal_(decoder.class_embedding.weight, std=3.0)
    return plain.with_parts(decoders={"ar": decoder, "masked": plain.decoders["masked"]})


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    return pipe.save_pretrained(tmp_path_factory.mktemp("request") / "model")


def test_guidance_of_the_decoder_is_accepted_with_labels_and_needs_them(pipe):
    asked = {"decoder_cfg_scale": 2.0}
    request = SampleRequest.of_run(2, labels=[0, 1], settings=asked).validate(pipe)
    assert request.params["ar"].cfg_scale == 2
    with pytest.raises(DigitError, match="needs class labels"):
        SampleRequest.of_run(2, settings=asked).validate(pipe)


def test_steps_are_refused_where_nothing_has_steps(pipe):
    request = SampleRequest.of_run(1, settings={"steps": 4})
    with pytest.raises(DigitError, match="the ar decoder has no steps"):
        request.validate(pipe)
    assert SampleRequest.of_run(1, decoder="masked", settings={"steps": 4}).validate(pipe).params["masked"].steps == 4


@pytest.mark.parametrize("role", ["masked", "random"])
def test_steps_are_those_of_a_prior_that_takes_steps(pipe, role):
    stepped = pipe.with_parts(prior=tiny.prior(role))
    asked = SampleRequest.of_run(1, decoder="masked", settings={"steps": 4, "decoder_steps": 3})
    params = asked.validate(stepped).params
    assert (params["prior"].steps, params["masked"].steps) == (4, 3)
    assert asked.validate(stepped, prior=False).params["masked"].steps == 3
    alone = SampleRequest.of_run(1, settings={"steps": 4}).validate(stepped)  # the ar decoder takes none
    assert alone.params["prior"].steps == 4
    with pytest.raises(DigitError, match="the ar decoder has no steps"):
        SampleRequest.of_run(1, settings={"decoder_steps": 4}).validate(stepped)
    unread = "order" if role == "masked" else "choice_temperature"
    with pytest.raises(DigitError, match=f"{unread} = .* was given, but the prior does not read it"):
        SampleRequest.of_run(1, settings={unread: "raster" if role == "masked" else 2.0}).validate(stepped)


def test_a_masked_prior_and_a_masked_decoder_have_random_numbers_of_their_own(pipe):
    decoder = tiny.prior("masked")
    both = pipe.with_parts(prior=tiny.prior("masked"))
    first = both.sample_prior(SampleRequest.of_run(8))
    assert not torch.equal(first, sample(decoder, range(8)))
    assert torch.equal(first, sample(decoder, range(8), stage="prior"))


def test_decode_of_a_token_file_gives_the_labels_to_the_decoder(model, tmp_path, monkeypatch):
    out = tmp_path / "made"
    words = ["generate", model, "--labels", "0,1,2", "--num", 3, "--save-tokens", "--device", "cpu", "--out", out]
    assert run(monkeypatch, *words) == 0
    tokens = tmp_path / "semantic.npz"
    pipe = DigitPipeline.from_folder(model)
    kept = load_tokens_file(out / "tokens.npz")
    assert kept.labels.tolist() == [0, 1, 2]
    save_tokens_file(tokens, Tokens(kept.semantic, None, labels=kept.labels))
    assert run(monkeypatch, "decode", model, tokens, "--device", "cpu", "--out", tmp_path / "decoded") == 0
    for index in range(3):
        made, again = (folder / f"{index:05d}.png" for folder in (out, tmp_path / "decoded"))
        assert made.read_bytes() == again.read_bytes()
    without = pipe.decode(kept.semantic)
    assert not torch.equal(without, pipe.decode(kept.semantic, labels=kept.labels))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "-1"], "none"),
        (["--steps", "4"], "has no steps"),
        (["--out", "/proc/nope/x"], "/proc/nope/x"),
    ],
)
def test_mistakes_get_a_sentence(model, tmp_path, monkeypatch, capsys, words, message):
    assert run(monkeypatch, "generate", model, "--num", 1, "--device", "cpu", "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_no_class_is_said_in_words(model, tmp_path, monkeypatch):
    words = ["generate", model, "--num", 1, "--labels", "none", "--device", "cpu", "--out", tmp_path / "out"]
    assert run(monkeypatch, *words) == 0
