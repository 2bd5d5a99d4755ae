"""The decoder of an RAE behind our tokens: the images of diffusers' own class, and refusals of what does not fit."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderRAE
from typer.testing import CliRunner

import tiny
from digit import DigitPipeline
from digit.cli.app import app
from digit.convert.rae import convert_rae
from digit.core.errors import DigitError
from digit.encoders import EncoderConfig, Preprocessing, TransformersEncoder
from digit.encoders.families import final_norm_name
from digit.models.codebook import Codebook
from digit.pipeline.assembly import assemble
from digit.pipeline.editing import edit_region
from digit.pipeline.info import describe, folder_parts, sampling_memory

NETWORK = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 3, "decoder_hidden_size": 32}
NETWORK |= {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 48}
KINDS = {
    "dinov2": {"encoder_patch_size": 14, "encoder_input_size": 56, "patch_size": 8},
    "mae": {"encoder_patch_size": 16, "encoder_input_size": 64, "patch_size": 8},
}


def autoencoder(kind: str = "dinov2", **changes) -> AutoencoderRAE:
    """Random weights, and latents that are normalised for every place."""
    torch.manual_seed(0)
    latents = {"latents_mean": torch.randn(64, 4, 4), "latents_std": torch.rand(64, 4, 4) + 0.5, "scaling_factor": 0.7}
    model = (
        AutoencoderRAE(encoder_type=kind, **NETWORK, **KINDS[kind], **latents | changes).eval().requires_grad_(False)
    )
    for value in model.parameters():  # fresh networks have zero biases, tokens and positions
        value.add_(torch.randn_like(value) * 0.1)
    return model


def encoder_of(model: AutoencoderRAE, **changes) -> TransformersEncoder:
    """The autoencoder's encoder as ours, with a gain and an offset in the final norm as published networks have."""
    seen = model.config.encoder_input_size
    fields = {"layer": -1, "preprocessing": Preprocessing(image_size=seen + 8, resize=seen), **changes}
    hf_config = {**model.encoder.config.to_dict(), "image_size": model.encoder.config.image_size}
    made = TransformersEncoder(EncoderConfig(hf_config=hf_config, **fields)).eval().requires_grad_(False)
    made.network.load_state_dict(model.encoder.state_dict(), strict=False)
    if made.config.final_norm:
        norm = made.network.get_submodule(final_norm_name(made.network))
        torch.manual_seed(1)
        norm.weight.copy_(torch.rand(64) + 0.5)
        norm.bias.copy_(torch.randn(64))
    return made


@pytest.fixture
def folder(tmp_path):
    autoencoder().save_pretrained(tmp_path / "rae")
    return tmp_path / "rae"


def whole(encoder: TransformersEncoder, clusters: int = tiny.CLUSTERS) -> DigitPipeline:
    prior = tiny.token_model(num_classes=tiny.CLASSES, vocab_size=clusters)
    return DigitPipeline(encoder=encoder, codebook=tiny.codebook(64), prior=prior)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_diffusers_own_class(kind, tmp_path):
    model = autoencoder(kind)
    model.save_pretrained(tmp_path)
    encoder = encoder_of(model)
    size = encoder.preprocessing.image_size
    images = torch.rand(3, 3, size, size)
    # a codebook of every feature: each token's centroid is the feature itself
    features = encoder(images)  # (3, 16, 64)
    book = Codebook.from_centroids(features.flatten(0, 1))
    decoder = convert_rae(tmp_path, encoder, book)
    made = decoder(torch.arange(48).view(3, 16))
    expected = model.decode(model.encode(images).latent).sample
    assert made.shape == (3, 3, 32, 32)
    assert float(expected.std()) > 0.05
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_centroids_are_means_of_what_the_decoder_reads(folder):
    model = autoencoder()
    encoder = encoder_of(model)
    images = torch.rand(4, 3, 64, 64)
    centroid = encoder(images).mean((0, 1))  # (64,)
    decoder = convert_rae(folder, encoder, Codebook.from_centroids(centroid[None]))
    raw = model._denormalize_latents(model.encode(images).latent / 0.7).mean((0, 2, 3))
    torch.testing.assert_close(decoder.features[0], raw, atol=1e-5, rtol=0)


def test_assembled_saved_and_loaded_it_makes_the_same_images(folder, tmp_path):
    whole(encoder_of(autoencoder())).save_pretrained(tmp_path / "base")
    command = f"assemble --base {tmp_path / 'base'} --decoder rae:{folder} --out {tmp_path / 'out'}"
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    pipe = assemble(base=str(tmp_path / "base"), decoders=[f"rae:{folder}"])
    again = DigitPipeline.from_pretrained(tmp_path / "out")
    assert list(again.decoders) == ["rae"]
    assert again.decoders["rae"].provenance == {"source": str(folder)}
    one, other = (m(labels=[0, 2], seed=3, output_type="pt") for m in (pipe, again))
    assert one.shape == (2, 3, 32, 32)
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    alone = again.with_parts(encoder=None, codebook=None)  # neither is needed any more
    assert torch.equal(alone(labels=[0, 2], seed=3, output_type="pt"), one)
    assert "RAE, 2 blocks of width 32, 4 heads; 32 px from 16 of 12 centroids of width 64" in describe(again)
    full, half = (sampling_memory(folder_parts(tmp_path / "out"), batch=2, item=item).weights for item in (4, 2))
    numbers = sum(p.numel() for p in again.decoders["rae"].parameters())
    assert full - half >= 2 * numbers
    tokens = torch.arange(16)[None] % 12
    half = again.to(dtype=torch.bfloat16)
    torch.testing.assert_close(half.decode(tokens), pipe.decode(tokens), atol=0.05, rtol=0)


def test_editing_keeps_the_pixels_of_kept_cells(folder):
    pipe = whole(encoder_of(autoencoder()))
    pipe = pipe.with_parts(decoders={"rae": convert_rae(folder, pipe.encoder, pipe.codebook)})
    images = torch.rand(1, 3, 64, 64)
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[1:3, 1:3] = True
    made = pipe.to_pixels(edit_region(pipe, images, region, tiny.request([0], [1])))
    small = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(made[..., :8, :], small[..., :8, :])
    assert not torch.equal(made, small)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": -2}, "num_hidden_layers is 3 there and 2 here; layer is -1 there and -2 here"),
        ({"positions": "dinov2-offset"}, "positions is hub there and dinov2-offset here"),
        ({"final_norm": False}, "final_norm is True there and False here"),
        ({"preprocessing": Preprocessing(image_size=70)}, "pixels seen is 56 there and 70 here"),
        ({"preprocessing": Preprocessing(image_size=64, resize=56, mean=(0.1, 0.1, 0.1))}, "other preprocessing"),
    ],
)
def test_features_that_it_was_not_trained_on_are_refused(changes, message, folder):
    encoder = encoder_of(autoencoder(), **changes)
    with pytest.raises(DigitError, match=message):
        convert_rae(folder, encoder, tiny.codebook(64))


def test_registers_and_weights_are_checked(folder):
    model = autoencoder()
    encoder = encoder_of(model)
    plain = {**encoder.config.hf_config, "model_type": "dinov2"}
    del plain["num_register_tokens"]
    without = TransformersEncoder(dataclasses.replace(encoder.config, hf_config=plain))
    with pytest.raises(
        DigitError, match=r"model_type is dinov2_with_registers .*num_register_tokens is 4 there and 0 here"
    ):
        convert_rae(folder, without, tiny.codebook(64))
    fewer = {**encoder.config.hf_config, "num_register_tokens": 2}
    with pytest.raises(DigitError, match="num_register_tokens is 4 there and 2 here"):
        convert_rae(
            folder, TransformersEncoder(dataclasses.replace(encoder.config, hf_config=fewer)), tiny.codebook(64)
        )
    book = Codebook.from_centroids(torch.randn(4, 64), {"encoder": {"layer": -3, "final_norm": True}})
    with pytest.raises(DigitError, match="layer is -1 there and -3 here"):
        convert_rae(folder, encoder, book)
    with pytest.raises(DigitError, match="other weights"):
        convert_rae(folder, TransformersEncoder(encoder.config), tiny.codebook(64))
    with pytest.raises(DigitError, match="a ConvEncoder"):
        convert_rae(folder, tiny.encoder(), tiny.codebook(16))
    convert_rae(folder, encoder.half().float(), tiny.codebook(64))  # rounding is no other network


def test_what_is_no_autoencoder_is_told(tmp_path):
    encoder = encoder_of(autoencoder())
    with pytest.raises(DigitError, match=r"cannot read .* as an AutoencoderRAE"):
        convert_rae(tmp_path, encoder, tiny.codebook(64))
    with pytest.raises(DigitError, match="no decoder 'no/such/folder'"):
        convert_rae("no/such/folder", encoder, tiny.codebook(64))
    with pytest.raises(DigitError, match="has no encoder, which this needs"):
        assemble(decoders=[f"rae:{tmp_path}"])
