import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
import transformers
from huggingface_hub import constants
from typer.testing import CliRunner

from digit.cli.convert import converters
from digit.core.errors import DigitError
from digit.encoders import Preprocessing, load_encoder, small_conv, small_vit

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf") / "model"
    transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).save_pretrained(folder)
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("make", [small_vit, small_conv])
def test_small_encoders_round_trip(make, tmp_path):
    torch.manual_seed(0)
    made = make()
    assert any(p.requires_grad for p in made.parameters())
    assert made.grid == (8, 8)
    made.eval()
    images = torch.rand(4, 3, 32, 32)
    features = made(images)
    assert features.shape == (4, 64, made.dim)
    made.save_pretrained(tmp_path / "e")
    loaded = load_encoder(tmp_path / "e")
    assert type(loaded) is type(made)
    assert loaded.config == made.config
    assert torch.equal(loaded(images), features)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trained_with_all_blocks_used_at_an_earlier_one(tmp_path):
    made = small_vit(depth=3, dim=48)
    made.save_pretrained(tmp_path / "e")
    third = load_encoder(tmp_path / "e", layer=-3)
    third.save_pretrained(tmp_path / "short")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_encoder(tmp_path / "short")(images), third(images))
    with pytest.raises(
        DigitError, match=r"lack 36 tensors of block 1 and later ones, such as .*ask for an earlier layer"
    ):
        load_encoder(tmp_path / "short", layer=-1)


def test_transformers_folder_takes_the_papers_choices(transformers_folder):
    loaded = load_encoder(transformers_folder)
    assert loaded.config.layer == -3
    assert loaded.config.final_norm
    assert loaded.preprocessing == Preprocessing(image_size=256, resize=224, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert loaded.grid == (28, 28)
    assert load_encoder(transformers_folder, image_size=44).preprocessing.resize == 40
    assert load_encoder(transformers_folder, image_size=44, resize=32, layer=-1).grid == (4, 4)


def whole_models():
    """Networks as they are published: with heads, poolers, decoders, a text half."""
    t, sizes = transformers, {**TINY, "intermediate_size": 64}
    decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    staged = {**TINY, "out_features": ["stage4"]}
    return {
        "dinov2 classifier": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**TINY)),
        "dinov2 giant": lambda: t.Dinov2Model(t.Dinov2Config(**TINY, use_swiglu_ffn=True)),
        "dinov2 backbone": lambda: t.Dinov2WithRegistersBackbone(t.Dinov2WithRegistersConfig(**staged)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**sizes)),
        "mae": lambda: t.ViTMAEForPreTraining(t.ViTMAEConfig(**sizes, **decoder)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config={**text, "vocab_size": 50}, vision_config=sizes)),
    }


@pytest.mark.parametrize("kind", ["dinov2 classifier", "dinov2 giant", "dinov2 backbone", "vit", "mae", "siglip"])
def test_published_models_with_all_that_hangs_on_them(kind, tmp_path):
    torch.manual_seed(0)
    model = whole_models()[kind]()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2)
    model.save_pretrained(tmp_path / "m")
    loaded = load_encoder(tmp_path / "m", layer=-2, image_size=32)
    assert loaded.grid == (4, 4)
    mine = {name.removeprefix("vision_model."): value for name, value in loaded.network.named_parameters()}
    # whatever wraps it, the backbone of the model is the one whose names ours has
    theirs = dict(getattr(model, "vision_model", getattr(model, model.base_model_prefix, model)).named_parameters())
    assert len(mine) > 40
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_damaged_folders(transformers_folder, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(transformers_folder, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(DigitError, match=r"weights of .*m could not be read.*truncated"):
        load_encoder(folder)
    weights.unlink()
    with pytest.raises(DigitError, match="could not be read"):
        load_encoder(folder)
    weights.write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(DigitError, match=r"do not fit its config: wrong shape: "):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(DigitError, match="'bert' network"):
        load_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DigitError, match="not valid JSON"):
        load_encoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DigitError, match=r"no config\.json"):
        load_encoder(folder)


def test_blocks_of_a_conv_encoder(tmp_path):
    made = small_conv(widths=(8, 16, 24)).eval()
    made.save_pretrained(tmp_path / "e")
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for block in made.blocks:
        block.register_forward_hook(lambda _module, _given, output: outputs.append(output))
    last = made(images)  # (2, 64, 24)
    layers = {number: outputs[number].flatten(2).mT for number in (-2, -1)}
    layers[-3] = outputs[-3].unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).flatten(2).mT  # from 16 x 16 places to 8 x 8
    normed = {number: torch.nn.functional.layer_norm(layer, layer.shape[2:]) for number, layer in layers.items()}
    expected = {
        ((-1,), "sum"): last,
        ((-3,), "sum"): normed[-3],
        ((-2, -1), "sum"): normed[-2] + last,
        ((-2, -1), "mean"): (normed[-2] + last) / 2,
        ((-1, -3), "concat"): torch.cat([last, normed[-3]], 2),
    }
    for (chosen, how), features in expected.items():
        encoder = load_encoder(tmp_path / "e", layers=chosen, combine=how)
        encoder.save_pretrained(tmp_path / "other")
        for one in (encoder, load_encoder(tmp_path / "other")):
            assert one.dim == features.shape[2]
            torch.testing.assert_close(one(images), features)
    assert torch.equal(load_encoder(tmp_path / "e", layer=-3)(images), encoder.taking(layers=(-3,))(images))
    assert "layers" not in json.loads((tmp_path / "e" / "config.json").read_text())["config"]  # as the first edition
    with pytest.raises(DigitError, match="blocks -4 to -1"):
        load_encoder(tmp_path / "e", layer=-5)
    with pytest.raises(DigitError, match="needs blocks of one width"):
        load_encoder(tmp_path / "e", layers=(-3, -1))


def test_conv_options_are_fixed(tmp_path):
    small_conv().save_pretrained(tmp_path / "e")
    with pytest.raises(DigitError, match="all but its layers is fixed"):
        load_encoder(tmp_path / "e", image_size=64)
    with pytest.raises(DigitError, match="not a multiple of 4"):
        small_conv(image_size=30)
    with pytest.raises(DigitError, match="one entry for each level"):
        small_conv(widths=(8, 8))
    group = small_conv(norm="group", widths=(8, 16, 24)).train()
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(group(images)[:1], group(images[:1]), atol=1e-5, rtol=1e-5)


def fake_cache(monkeypatch, tmp_path, folder):
    """A hub cache, laid out as the client lays it out, that holds ``folder`` as owner/name."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return snapshot


def test_hub_id_comes_from_the_cache(monkeypatch, tmp_path, transformers_folder):
    fake_cache(monkeypatch, tmp_path, transformers_folder)
    loaded = load_encoder("owner/name", image_size=32, layer=-1)
    assert loaded.grid == (4, 4)
    assert loaded.provenance == {"source": "owner/name"}


def test_nothing_found_says_at_once_where_it_looked(monkeypatch, tmp_path):
    began = time.monotonic()
    with pytest.raises(DigitError, match=r"no such local folder, and it is not in the cache .*HF_HUB_OFFLINE is set"):
        load_encoder("facebook/dinov2-with-registers-giant")
    with pytest.raises(DigitError, match="no such file or folder, and it is not a Hub id"):
        load_encoder("./nowhere")
    with pytest.raises(DigitError, match="no such file or folder"):
        load_encoder("models/dinov2_vitb14_reg4_pretrain.pth")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DigitError, match=r"the Hub \(http://127.0.0.1:9\) is out of reach: "):
        load_encoder("facebook/dinov2-with-registers-giant")
    assert time.monotonic() - began < 6


def test_importing_the_encoders_brings_no_heavy_package():
    code = "import sys, digit.encoders, digit.clustering.kmeans; print([m for m in %r if m in sys.modules])"
    heavy = ["transformers", "torchvision", "lightly", "timm"]
    done = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_several_layers_from_the_command_line(transformers_folder, tmp_path):
    given = ["encoder", str(transformers_folder), "--image-size", "32", "--out", str(tmp_path / "e")]
    result = CliRunner().invoke(
        converters, [*given, "--layers", "-4,-2", "--combine", "concat"], catch_exceptions=False
    )
    assert "4 x 4 features of width 64 an image" in result.output
    made = load_encoder(tmp_path / "e")
    assert (made.config.layers, made.config.combine, made.dim) == ((-4, -2), "concat", 64)
    singles = [load_encoder(transformers_folder, layer=layer, image_size=32) for layer in (-4, -2)]
    images = torch.rand(2, 3, 32, 32)
    expected = torch.cat([one(images) for one in singles], -1)
    torch.testing.assert_close(made(images), expected, atol=1e-5, rtol=1e-5)
    assert CliRunner().invoke(converters, [*given, "--layers", "-2", "--combine", "max"]).exit_code == 2
