"""timm's ViTs as encoders: the features of timm's own network, on random weights."""

import pytest
import timm
import torch
from timm.models import save_for_hf

from digit.core.errors import DigitError
from digit.encoders import load_encoder

SIZES = {"embed_dim": 192, "depth": 4, "num_heads": 3, "num_classes": 0, "img_size": 56}
NAMES = {
    "vit_base_patch14_dinov2": 14,
    "vit_base_patch14_reg4_dinov2": 14,
    "vit_giant_patch14_reg4_dinov2": 14,
    "vit_small_patch16_224": 16,
    "deit3_small_patch16_224": 16,
}


def saved(folder, name: str, **changes):
    """A network of timm with random weights, in a folder as the Hub has it."""
    torch.manual_seed(0)
    sizes = SIZES | {"img_size": 4 * NAMES.get(name, 16)} | changes
    network = timm.create_model(name, **sizes).eval().requires_grad_(False)
    for value in network.parameters():  # fresh networks have zero biases, tokens and hardly any scale
        value.add_(torch.randn_like(value) * 0.1)
    save_for_hf(network, folder, safe_serialization=True)
    return network


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [-1, -3])
def test_features_are_those_of_timm(name, layer, tmp_path):
    network, size = saved(tmp_path, name), 4 * NAMES[name]
    encoder = load_encoder(tmp_path, layer=layer, image_size=size, resize=size)
    images = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = network.forward_intermediates(
        (images - mean) / std, [4 + layer], norm=True, output_fmt="NLC", intermediates_only=True
    )[0]
    assert encoder.grid == (4, 4)
    assert expected.std() > 0.5
    torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=1e-4)


def test_saved_it_is_an_encoder_as_every_other(tmp_path):
    saved(tmp_path / "timm", "vit_base_patch14_reg4_dinov2")
    encoder = load_encoder(tmp_path / "timm")
    assert encoder.config.positions == "dinov2-offset"
    assert encoder.config.layer == -3
    assert encoder.preprocessing.seen == 224
    assert encoder.provenance["source"] == str(tmp_path / "timm")
    encoder.save_pretrained(tmp_path / "ours")
    again = load_encoder(tmp_path / "ours")
    images = torch.rand(1, 3, 256, 256)
    assert torch.equal(again(images), encoder(images))


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "resnet18"])
def test_other_networks_are_refused_by_their_keys(name, tmp_path):
    if name == "resnet18":
        save_for_hf(timm.create_model(name, num_classes=0), tmp_path, safe_serialization=True)
    else:
        saved(tmp_path, name)
    with pytest.raises(DigitError, match=r"are not those of the published layout|no vision transformer"):
        load_encoder(tmp_path)
