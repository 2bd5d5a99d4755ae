import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.encoders import Encoder, EncoderConfig, Preprocessing, TransformersEncoder, load_encoder, weights_checksum
from digit.encoders.families import FAMILIES

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4, "image_size": 24}
CONFIGS = {
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {"intermediate_size": 64, "num_register_tokens": 2},
    "vit": {"intermediate_size": 64},
    "vit_mae": {"intermediate_size": 64},
    "ijepa": {"intermediate_size": 64},
    "siglip_vision_model": {"intermediate_size": 64},
}
NORMS = {"dinov3_vit": "norm", "siglip_vision_model": "post_layernorm"}  # after the last block; else "layernorm"


def hf_config(family: str) -> dict:
    return {"model_type": family, **SIZES, **CONFIGS[family]}


def encoder(family: str, seed: int = 0, **fields) -> TransformersEncoder:
    torch.manual_seed(seed)
    fields.setdefault("preprocessing", Preprocessing(image_size=24))
    made = TransformersEncoder(EncoderConfig(hf_config=hf_config(family), **fields)).eval().requires_grad_(False)
    for name, value in made.network.named_parameters():
        # fresh networks have zero biases, tokens and positions: nothing could be seen to go wrong with them
        value.copy_(torch.randn_like(value) * 0.3 + ("norm" in name and name.endswith("weight")))
    return made


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(3, 3, 24, 24)


def reference(name: str, images: torch.Tensor) -> tuple[TransformersEncoder, list[torch.Tensor], torch.nn.Module, int]:
    """An encoder with every block; all hidden states, by transformers' own output_hidden_states; the network's final
    norm; and how many tokens are no patches."""
    family = FAMILIES[name]
    whole = encoder(name, layer=-1, preprocessing=Preprocessing(image_size=24, mean=family.mean, std=family.std))
    pixels = (images - torch.tensor(family.mean)[:, None, None]) / torch.tensor(family.std)[:, None, None]
    arguments = {"interpolate_pos_encoding": True} if family.interpolate else {}
    if name == "vit_mae":
        arguments["noise"] = torch.arange(36).expand(len(images), -1)
    states = whole.network(pixels, output_hidden_states=True, **arguments).hidden_states
    norm = whole.network.get_submodule(NORMS.get(name, "layernorm"))
    return whole, list(states), norm, family.prefix + CONFIGS[name].get("num_register_tokens", 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_is_that_hidden_state_of_transformers(family, images, tmp_path):
    whole, states, norm, prefix = reference(family, images)
    assert len(states) == 1 + SIZES["num_hidden_layers"]  # the reference has every block
    assert states[0].shape == (3, prefix + 36, 32)
    whole.save_pretrained(tmp_path / "whole")
    for layer in (-1, -3):
        with_norm = load_encoder(tmp_path / "whole", layer=layer)
        assert isinstance(with_norm, Encoder)
        features = with_norm(images)
        assert features.shape == (3, 36, 32) == (3, with_norm.grid[0] * with_norm.grid[1], with_norm.dim)
        expected = states[layer][:, prefix:]
        torch.testing.assert_close(features, norm(expected), atol=2e-5, rtol=1e-4)
    raw = load_encoder(tmp_path / "whole", layer=-3, final_norm=False)
    torch.testing.assert_close(raw(images), states[-3][:, prefix:], atol=2e-5, rtol=1e-4)
    # what is left out is not kept
    assert sum(p.numel() for p in raw.parameters()) < 0.6 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_loaded_and_images_do_not_feel_each_other(family, images, tmp_path):
    made = encoder(family, layer=-2)
    made.provenance = {"source": "random"}
    features = made(images)
    made.save_pretrained(tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.config == made.config
    assert loaded.provenance == {"source": "random"}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(images), features)
    assert weights_checksum(loaded) == weights_checksum(made)
    torch.testing.assert_close(loaded(images[1:2]), features[1:2], atol=1e-5, rtol=1e-5)
    # the input matters, patch by patch
    changed = images.clone()
    changed[0, :, :4, :4] = 1 - changed[0, :, :4, :4]
    assert (loaded(changed)[0] - features[0]).abs().max() > 1e-3
    assert torch.equal(loaded(changed)[1:], loaded(images)[1:])
    made.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = load_encoder(tmp_path / "half")
    assert next(half.parameters()).dtype == torch.float32
    torch.testing.assert_close(half(images), features, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "vit", "siglip_vision_model", "dinov3_vit"])
@pytest.mark.parametrize("size", [16, 24, 40])
def test_other_resolutions(family, size):
    made = encoder(family, preprocessing=Preprocessing(image_size=size))
    assert made.grid == (size // 4, size // 4)
    assert made(torch.rand(1, 3, size, size)).shape == (1, (size // 4) ** 2, 32)


@pytest.mark.parametrize("image_size", [224, 256, 336, 448, 512])
@pytest.mark.parametrize("patch", [14, 16])
def test_published_resolutions(image_size, patch, tmp_path):
    changes = {"patch_size": patch, "image_size": 518 if patch == 14 else 224, "num_hidden_layers": 1}
    config = hf_config("dinov2") | changes
    made = TransformersEncoder(EncoderConfig(hf_config=config, layer=-1))
    made.save_pretrained(tmp_path / "e")
    loaded = load_encoder(tmp_path / "e", image_size=image_size)
    side = image_size // patch
    assert loaded.grid == (side, side)
    assert loaded.preprocessing.resize == side * patch
    assert loaded(torch.rand(1, 3, image_size, image_size)).shape == (1, side * side, 32)


def test_offset_positions_sample_where_the_original_code_does(images):
    made = encoder(
        "dinov2_with_registers", preprocessing=Preprocessing(image_size=24, resize=16), positions="dinov2-offset"
    )
    table = made.network.embeddings.position_embeddings  # (1, 37, 32)
    pixels = F.interpolate((images - 0.5), size=16)
    found = made.network.embeddings.interpolate_pos_encoding(None, 16, 16)
    # by hand: output d reads the table at (d + 0.5) * 6 / 4.1 - 0.5 with the cubic kernel, a = -0.75, edges repeated
    weights = torch.zeros(4, 6)
    for d in range(4):
        at = (d + 0.5) * 6 / 4.1 - 0.5
        for tap in range(-1, 3):
            place = int(at // 1) + tap
            t = abs(at - place)
            a = -0.75
            value = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            weights[d, min(max(place, 0), 5)] += value
    expected = torch.einsum("ij,jkd,lk->ild", weights, table[0, 1:].view(6, 6, 32), weights).flatten(0, 1)
    torch.testing.assert_close(found[0, 1:], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0, 0], table[0, 0])
    assert made.network.embeddings(pixels).shape == (3, 1 + 3 + 16, 32)
    hub = TransformersEncoder(dataclasses.replace(made.config, positions="hub"), made.network)
    assert copy.deepcopy(made)(images).equal(made(images))
    assert hub.grid == (4, 4)


def test_preprocessing_is_normalise_then_resize(images):
    seen = {}
    made = encoder("dinov2", preprocessing=Preprocessing(image_size=24, resize=16))
    made.network.register_forward_pre_hook(lambda module, args: seen.update(pixels=args[0]))
    made(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = F.interpolate((images - mean) / std, scale_factor=16 / 24, mode="bicubic", antialias=False)
    torch.testing.assert_close(seen["pixels"], expected)
    # an image of the size seen goes straight in
    made(images[:, :, :16, :16])
    torch.testing.assert_close(seen["pixels"], ((images - mean) / std)[:, :, :16, :16])


def test_refusals(images):
    made = encoder("dinov2")
    for wrong in (images[0], images[:, :2], images[:, :, :20], torch.rand(1, 3, 28, 28)):
        with pytest.raises(DigitError, match=r"takes images \(B, 3, 24, 24\); .* was given"):
            made(wrong)
    with pytest.raises(DigitError, match="layer=-5 was given; this network has 4 blocks"):
        encoder("dinov2", layer=-5)
    with pytest.raises(DigitError, match="layer=0 was given"):
        encoder("dinov2", layer=0)
    with pytest.raises(DigitError, match=r"26 x 26 pixels.*patches of 4.*resize=24 or resize=28"):
        encoder("dinov2", preprocessing=Preprocessing(image_size=24, resize=26))
    with pytest.raises(DigitError, match="'clip' network; encoders are of the families: dinov2"):
        TransformersEncoder(EncoderConfig(hf_config={"model_type": "clip"}))
    with pytest.raises(DigitError, match="dinov2-offset"):
        encoder("ijepa", positions="dinov2-offset")
    with pytest.raises(DigitError, match="transformers refuses"):
        TransformersEncoder(EncoderConfig(hf_config={"model_type": "dinov2", "hidden_size": "wide"}))


def test_the_network_is_the_one_of_transformers():
    """Nothing of ours replaces a network of theirs."""
    for family in FAMILIES:
        made = encoder(family).network
        assert type(made) is getattr(transformers, type(made).__name__)
        assert made.config.model_type == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("combine", ["sum", "mean", "concat"])
def test_several_layers_are_those_hidden_states_of_transformers(family, combine, images, tmp_path):
    whole, states, norm, prefix = reference(family, images)
    whole.save_pretrained(tmp_path / "whole")
    for final_norm in (True, False):
        made = load_encoder(tmp_path / "whole", layers=(-4, -2, -3), combine=combine, final_norm=final_norm)
        parts = [(norm(states[n]) if final_norm else states[n])[:, prefix:] for n in (-4, -2, -3)]
        expected = {"sum": sum(parts), "mean": sum(parts) / 3, "concat": torch.cat(parts, -1)}[combine]
        assert made(images).shape == (3, 36, made.dim) == (3, 36, 96 if combine == "concat" else 32)
        torch.testing.assert_close(made(images), expected, atol=5e-5, rtol=1e-4)
    made.save_pretrained(tmp_path / "several")
    again = load_encoder(tmp_path / "several")
    assert again.config == made.config
    assert torch.equal(again(images), made(images))
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in whole.parameters())  # up to -2
    assert f"{combine} of layers (-4, -2, -3)" in made.config.describe()


def test_one_layer_is_written_as_before(images):
    """Token caches of the first edition are compared with it; and one layer by either name is the same."""
    assert set(to_dict(encoder("dinov2").config)) == {"hf_config", "layer", "final_norm", "positions", "preprocessing"}
    one = encoder("dinov2", layers=(-3,))
    assert to_dict(one.config)["layers"] == [-3]
    assert torch.equal(one(images), encoder("dinov2", layer=-3)(images))
    with pytest.raises(DigitError, match=r"layer=-5 was given; this network has 4 blocks"):
        encoder("dinov2", layers=(-5, -1))
