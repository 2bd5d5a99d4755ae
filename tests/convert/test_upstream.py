"""The authors' checkpoints: what is read from them, and what is refused with which words. The numbers are
tests/parity's."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from digit.cli.convert import converters
from digit.convert.upstream import convert_upstream, read_centroids
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.pipeline.pipeline import DigitPipeline


def refusal(out: Path, **files: object) -> str:
    """The sentence; and nothing is left behind."""
    out.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(out.parent.iterdir())
    with pytest.raises(DigitError) as error:
        convert_upstream(out, **files)
    assert sorted(out.parent.iterdir()) == before
    return str(error.value)


def changed(upstream, path: Path, change, kind: str = "stage1", **options) -> Path:
    values = upstream.values(kind, **options)
    change(values)
    torch.save(values, path)
    return path


def test_two_checkpoints_make_a_whole_model(upstream, tmp_path):
    stage1 = upstream.save(tmp_path / "one/checkpoint_last.pt", classes=1000)
    stage2 = upstream.save(tmp_path / "two/checkpoint_last.pt", "ar")
    masked = upstream.save(tmp_path / "three/checkpoint_last.pt", "masked")
    out = convert_upstream(tmp_path / "model", stage1, stage2, masked)
    pipe = DigitPipeline.from_pretrained(out)
    assert (pipe.num_classes, sorted(pipe.decoders)) == (1000, ["ar", "masked"])
    assert pipe.tokenizer.vocab_size == 24
    assert not pipe.prior.config.can_guide  # their labels are never dropped
    assert torch.equal(pipe.codebook.centroids, upstream.centroids)
    sources = {
        read_json(out / place / "config.json")["provenance"]["source"]
        for place in ("prior", "decoder/ar", "decoder/masked")
    }
    assert {source.split("/")[-2] for source in sources} == {"one", "two", "three"}
    assert [p.size for p in pipe(labels=[3], seed=1)] == [(256, 256)]


@pytest.mark.parametrize("clusters", [24, 37])
def test_the_vocabulary_is_read_from_the_file(upstream_class, tmp_path, clusters):
    path = upstream_class(clusters=clusters).save(tmp_path / "km_16k.pt")
    assert DigitPipeline.from_pretrained(convert_upstream(tmp_path / "m", path)).prior.config.vocab_size == clusters


def test_the_vq_baseline_has_its_own_space(upstream, tmp_path):
    pipe = DigitPipeline.from_pretrained(convert_upstream(tmp_path / "m", upstream.save(tmp_path / "c.pt", "vq")))
    assert (pipe.space, pipe.encoder, pipe.codebook, pipe.prior.config.vocab_size) == ("vq", None, None, 16)


def test_parts_alone(upstream, tmp_path):
    torch.save(upstream.vit, tmp_path / "dinov2_vitb14_reg4_pretrain.pth")
    torch.save({"state_dict": upstream.vqgan}, tmp_path / "vqgan_jax_strongaug.ckpt")
    np.save(tmp_path / "km_8k.npy", upstream.centroids.numpy())
    out = convert_upstream(
        tmp_path / "m",
        encoder=tmp_path / "dinov2_vitb14_reg4_pretrain.pth",
        vqgan=tmp_path / "vqgan_jax_strongaug.ckpt",
        codebook=tmp_path / "km_8k.npy",
        half_precision_tokens=True,
    )
    pipe = DigitPipeline.from_pretrained(out)
    assert pipe.codebook.config.half_precision
    assert pipe.tokenizer.encode(torch.rand(1, 3, 256, 256)).shape == (1, 256)
    assert pipe.prior is None


def test_missing_extra_and_misshapen_keys_are_all_named(upstream, tmp_path):
    def change(values):
        model = values["model"]
        del model["decoder.layers.1.fc1.bias"], model["pretrained_encoder.blocks.2.ls1.gamma"]
        model["decoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 31)
        model["decoder.project_in_dim.weight"] = torch.zeros(3)
        model["decoder.layers.0.note"] = "no tensor"

    text = refusal(tmp_path / "m" / "out", stage1=changed(upstream, tmp_path / "c.pt", change))
    for part in [
        "missing: decoder.layers.1.fc1.bias (48,)",
        "missing: pretrained_encoder.blocks.2.ls1.gamma (64,)",
        "wrong shape: decoder.layers.0.self_attn.q_proj.weight is (32, 31), expected (32, 32)",
        "unexpected: decoder.project_in_dim.weight (3,)",
        "unexpected: decoder.layers.0.note",
        "c.pt",
    ]:
        assert part in text


def test_a_missing_layer_is_noticed(upstream, tmp_path):
    def change(values):
        for name in [n for n in values["model"] if n.startswith("decoder.layers.1.")]:
            del values["model"][name]

    assert "missing: decoder.layers.1.self_attn.q_proj.weight" in refusal(
        tmp_path / "m" / "out", stage1=changed(upstream, tmp_path / "c.pt", change)
    )


def test_keys_of_a_vqgan_inside_are_named_with_their_prefix(upstream, tmp_path):
    path = changed(upstream, tmp_path / "c.pt", lambda v: v["model"].pop("vqgan.decoder.conv_out.bias"), "ar")
    assert "missing: vqgan.decoder.conv_out.bias (3,)" in refusal(tmp_path / "m" / "out", stage2=path)


def test_optimizer_state_is_left_alone(upstream, tmp_path):
    state = {n: {"exp_avg": torch.randn(100_000), "exp_avg_sq": torch.randn(100_000)} for n in range(20)}
    path = upstream.save(
        tmp_path / "c.pt", last_optimizer_state={"state": state, "param_groups": [{"lr": np.float64(1e-3)}]}
    )
    out = convert_upstream(tmp_path / "m", path)
    assert sum(p.stat().st_size for p in out.rglob("*.safetensors")) < path.stat().st_size / 5


def test_settings_in_a_flat_namespace(upstream, tmp_path):
    """fairseq before 0.10 writes "args" instead of "cfg"."""
    settings = argparse.Namespace(
        arch="stlm", decoder_attention_heads=4, decoder_layers=2, label_smoothing=0.1, dropout=0.2
    )
    path = upstream.save(tmp_path / "c.pt", cfg=None, args=settings)
    config = DigitPipeline.from_pretrained(convert_upstream(tmp_path / "m", path)).prior.config
    assert (config.transformer.heads, config.transformer.norm, config.label_smoothing) == (4, "post", 0.1)


def test_without_heads_there_is_no_guess(upstream, tmp_path):
    path = upstream.save(tmp_path / "c.pt", cfg=None)
    assert "decoder_attention_heads" in refusal(tmp_path / "m" / "out", stage1=path)


@pytest.mark.parametrize(
    ("setting", "value"), [("activation_fn", "relu"), ("layernorm_embedding", True), ("decoder_learned_pos", False)]
)
def test_other_arithmetic_is_refused_by_name(upstream, tmp_path, setting, value):
    def change(values):
        values["cfg"]["model"][setting] = value

    text = refusal(tmp_path / "m" / "out", stage1=changed(upstream, tmp_path / "c.pt", change))
    assert f"{setting}={value!r}" in text


def test_sizes_that_the_task_denies(upstream, tmp_path):
    path = changed(upstream, tmp_path / "c.pt", lambda v: v["cfg"]["task"].update(target_vocab_size=25))
    assert "target_vocab_size = 25" in refusal(tmp_path / "m" / "out", stage1=path)


@pytest.mark.parametrize(
    ("kind", "given", "right"),
    [
        ("stage1", "stage2", "--stage1"),
        ("ar", "stage1", "--stage2"),
        ("ar", "stage2_masked", "--stage2"),
        ("masked", "stage2", "--stage2-masked"),
        ("vq", "stage2", "--stage1"),
    ],
)
def test_a_checkpoint_given_as_another_kind(upstream, tmp_path, kind, given, right):
    text = refusal(tmp_path / "m" / "out", **{given: upstream.save(tmp_path / "c.pt", kind)})
    assert f"give it as {right}." in text


def test_files_given_for_each_other(upstream, tmp_path):
    torch.save({"state_dict": upstream.vqgan}, tmp_path / "v.ckpt")
    torch.save(upstream.vit, tmp_path / "e.pth")
    np.save(tmp_path / "km.npy", upstream.centroids.numpy())
    stage1 = upstream.save(tmp_path / "c.pt")
    out = tmp_path / "m" / "out"
    assert "--vqgan" in refusal(out, stage1=tmp_path / "v.ckpt")
    assert "--codebook" in refusal(out, stage1=tmp_path / "km.npy")
    assert "e.pth is not a VQGAN" in refusal(out, vqgan=tmp_path / "e.pth")
    assert "c.pt is not a NumPy array" in refusal(out, codebook=stage1)
    assert "v.ckpt" in refusal(out, encoder=tmp_path / "v.ckpt")
    assert "No file to convert" in refusal(out)


def test_stages_of_different_models_do_not_mix(upstream, upstream_class, tmp_path):
    stage1 = upstream.save(tmp_path / "one.pt")
    other = upstream_class(seed=50)
    stage2 = other.save(tmp_path / "two.pt", "ar")
    text = refusal(tmp_path / "m" / "out", stage1=stage1, stage2=stage2)
    assert "one.pt" in text
    assert "two.pt" in text
    assert "differ" in text
    larger = upstream_class(clusters=30).save(tmp_path / "three.pt", "ar")
    assert "'clusters' is 24 in the one and 30 in the other" in refusal(
        tmp_path / "m" / "out", stage1=stage1, stage2=larger
    )


def test_half_precision_rounding_is_no_disagreement(upstream, tmp_path):
    """The authors' runs round the frozen parts; their own files are exact, and are taken where given."""
    exact = upstream.centroids.clone()
    np.save(tmp_path / "km.npy", exact.numpy())
    upstream.centroids = exact.half().float()
    upstream.vit = {name: value.half().float() for name, value in upstream.vit.items()}
    out = convert_upstream(tmp_path / "m", upstream.save(tmp_path / "c.pt"), codebook=tmp_path / "km.npy")
    assert torch.equal(DigitPipeline.from_pretrained(out).codebook.centroids, exact)
    np.save(tmp_path / "km.npy", (exact * 1.01).numpy())
    assert "codebook" in refusal(tmp_path / "n" / "out", stage1=tmp_path / "c.pt", codebook=tmp_path / "km.npy")


def test_a_failure_keeps_the_model_that_was_there(upstream, tmp_path):
    good = upstream.save(tmp_path / "good.pt")
    out = convert_upstream(tmp_path / "m" / "out", good)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bad = tmp_path / "bad.pt"
    bad.write_bytes(good.read_bytes()[:-2000])
    assert "truncated" in refusal(out, stage1=bad)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_disk_that_fills_up_leaves_nothing(upstream, tmp_path, monkeypatch):
    import errno

    from digit.convert import upstream as module

    written: list[Path] = []

    def write(folder, component):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(folder)

    monkeypatch.setattr(module, "write_component", write)
    assert "disk is full" in refusal(tmp_path / "m" / "out", stage1=upstream.save(tmp_path / "c.pt"))
    assert written


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (np.zeros((4, 3, 2), np.float32), "shape (4, 3, 2)"),
        (np.zeros((4, 3), np.int64), "int64"),
        (np.array([[object()]]), "Python objects"),
    ],
)
def test_codebooks_that_are_none(tmp_path, values, word):
    np.save(tmp_path / "km.npy", values, allow_pickle=True)
    with pytest.raises(DigitError, match=r"km\.npy") as error:
        read_centroids(tmp_path / "km.npy")
    assert word in str(error.value)


def test_a_cut_codebook(tmp_path):
    np.save(tmp_path / "km.npy", np.zeros((40, 30), np.float32))
    data = (tmp_path / "km.npy").read_bytes()
    (tmp_path / "km.npy").write_bytes(data[:1000])
    with pytest.raises(DigitError, match="truncated"):
        read_centroids(tmp_path / "km.npy")


def test_a_vqgan_of_another_architecture(upstream, tmp_path):
    torch.save({"state_dict": {**upstream.vqgan, "quant_conv.weight": torch.zeros(1)}}, tmp_path / "taming.ckpt")
    text = refusal(tmp_path / "m" / "out", vqgan=tmp_path / "taming.ckpt")
    assert "quant_conv.weight" in text
    assert "another architecture" in text


def test_the_command(upstream, tmp_path):
    upstream.save(tmp_path / "c.pt")
    result = CliRunner().invoke(
        converters,
        ["digit-upstream", "--stage1", str(tmp_path / "c.pt"), "--out", str(tmp_path / "model"), "--name", "mine"],
    )
    assert result.exit_code == 0, result.output
    assert "mine" in result.output
    assert "memory for sampling" in result.output
