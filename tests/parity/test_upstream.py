"""Our numbers against those that the authors' own code gave, for every fixture folder there is.

Folders are read from ``tests/parity/fixtures`` (folders, and archives of folders), from ``../shared/upstream/fixtures``
beside the repository, and from ``$DIGIT_FIXTURES``. Nothing here knows their sizes: those come from the files.
"""

import json
import lzma
import os
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from digit.cli.convert import converters
from digit.convert.torchfile import read_torch_file
from digit.convert.upstream import convert_upstream
from digit.core.errors import DigitError
from digit.encoders import load_encoder
from digit.models.probe import LinearProbe, mean_states
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.assembly import assemble
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling import SamplingParams
from digit.sampling.sampler import sample

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
SPECIALS = 5
TOLERANCE = 1e-4  # of the largest value


def _roots() -> list[Path]:
    shared = HERE.parents[2] / "shared" / "upstream" / "fixtures"
    given = os.environ.get("DIGIT_FIXTURES")
    return [HERE / "fixtures", shared, *([Path(given)] if given else [])]


SCRATCH = tempfile.TemporaryDirectory(prefix="digit-parity-")  # removed when the tests end


def _unpacked(archive: Path) -> Path:
    folder = Path(SCRATCH.name) / archive.name.removesuffix(".tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def _folders() -> list[Path]:
    found: list[Path] = []
    for root in _roots():
        for place in [root, *(_unpacked(archive) for archive in sorted(root.glob("*.tar.xz")))]:
            found += sorted(path.parent for path in place.glob("*/io.npz"))
    return found


FOLDERS = _folders()
CHECKPOINTS = [folder for folder in FOLDERS if (folder / "checkpoint_last.pt").is_file()]
VQGANS = [folder for folder in FOLDERS if folder not in CHECKPOINTS]


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def having(*names: str) -> pytest.MarkDecorator:
    """Run a test on the checkpoints whose outputs have all these arrays."""
    folders = [folder for folder in CHECKPOINTS if set(names) <= set(np.load(folder / "io.npz").files)]
    return pytest.mark.parametrize("case", folders, ids=_name, indirect=True)


@dataclass
class Case:
    """A converted checkpoint and what the authors' code gave for it."""

    folder: Path
    model: DigitPipeline
    path: Path
    outputs: dict[str, np.ndarray]
    kind: str

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.outputs[name])

    @property
    def network(self) -> TokenModel:
        return self.model.prior or next(iter(self.model.decoders.values()))

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens to predict, (B, 256)."""
        return self.tensor("vq_ids" if "vq_ids" in self.outputs else "sem_ids")

    @property
    def labels(self) -> torch.Tensor | None:
        return self.tensor("class_ids") if self.network.config.num_classes else None

    @property
    def prefix(self) -> torch.Tensor | None:
        return self.tensor("sem_ids") if self.network.config.prefix_length else None

    @property
    def mask(self) -> torch.Tensor | None:
        """Masked places (B, 256) of the masked decoder: where the input is the unknown symbol."""
        return self.tensor("decoder_input_tokens")[:, -256:] == 3 if self.network.config.role == "masked" else None


def _option(kind: str) -> str:
    return (
        "--stage2-masked"
        if "nar" in kind
        else "--stage2"
        if kind.startswith("stage2") and "vq" not in kind
        else "--stage1"
    )


@cache
def _convert(folder: Path) -> Case:
    about = json.loads((folder / "meta.json").read_text())
    out = Path(tempfile.mkdtemp(dir=SCRATCH.name)) / "model"
    command = ["digit-upstream", _option(about["kind"]), str(folder / "checkpoint_last.pt"), "--out", str(out)]
    if about.get("vit"):
        command += ["--heads", str(about["vit"]["heads"])]
    result = CliRunner().invoke(converters, command)
    assert result.exit_code == 0, result.output or repr(result.exception)
    return Case(folder, DigitPipeline.from_pretrained(out), out, dict(np.load(folder / "io.npz")), about["kind"])


@pytest.fixture
def case(request) -> Case:
    return _convert(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def test_the_committed_fixtures_are_of_every_kind():
    own = [folder for folder in CHECKPOINTS if {HERE, Path(SCRATCH.name)} & set(folder.parents)]
    kinds = {json.loads((folder / "meta.json").read_text())["kind"] for folder in own}
    assert kinds >= {"stage1_uncond", "stage1_class", "stage1_linprobe", "stage2_ar", "stage2_nar", "stage2_vq"}
    assert VQGANS


@having("enc_patch_features")
@torch.inference_mode()
def test_encoder_features_and_semantic_tokens(case):
    images = case.tensor("images")
    seen = case.model.encoder.preprocessing(images)
    close(seen[:, :, ::7, ::7], case.tensor("resized_norm_sub"))
    close(case.model.tokenizer.features(images), case.tensor("enc_patch_features"))
    assert torch.equal(case.model.tokenizer.encode(images), case.tensor("sem_ids"))
    # in a decoder's vocabulary the semantic tokens come after the VQ tokens, with special symbols of their own
    before = case.network.config.vocab_size + SPECIALS if case.network.config.prefix_length else 0
    assert torch.equal(case.tensor("sem_ids") + before + SPECIALS, case.tensor("sem_tokens_upstream"))


def check_vqgan(vqgan: VQGAN, outputs: dict[str, np.ndarray]) -> None:
    images = torch.from_numpy(outputs["images"])
    first = vqgan.latents(images[:1]).transpose(1, 2).unflatten(2, vqgan.config.grid)  # (1, code_dim, h, w)
    close(first, torch.from_numpy(outputs["vq_encoder_out"]))
    assert np.array_equal(vqgan.encode(images).numpy(), outputs["vq_ids"])
    pixels = vqgan.decode(torch.from_numpy(outputs["dec_codes"]))
    close(pixels[:, :, ::7, ::7], torch.from_numpy(outputs["dec_pixels_sub7"]))
    close(pixels[:, :, 100:148, 30:78], torch.from_numpy(outputs["dec_pixels_crop"]))
    if "dec_pixels_chan_mean" in outputs:
        close(pixels.double().mean((0, 2, 3)), torch.from_numpy(outputs["dec_pixels_chan_mean"]))


@having("vq_ids")
@torch.inference_mode()
def test_vqgan_of_a_checkpoint(case):
    check_vqgan(case.model.vqgan, case.outputs)


@pytest.mark.parametrize("folder", VQGANS, ids=_name)
@torch.inference_mode()
def test_vqgan_alone(folder, tmp_path):
    packed = next(iter(folder.glob("*.ckpt.xz")), None)
    source = next(iter(folder.glob("*.ckpt")), tmp_path / "vqgan.ckpt")
    if packed is not None:
        source.write_bytes(lzma.decompress(packed.read_bytes()))
    result = CliRunner().invoke(converters, ["vqgan", str(source), "--out", str(tmp_path / "vqgan")])
    assert result.exit_code == 0, result.output or repr(result.exception)
    check_vqgan(VQGAN.from_pretrained(tmp_path / "vqgan"), dict(np.load(folder / "io.npz")))


@having("logits")
@torch.inference_mode()
def test_logits(case):
    ours = case.network(case.tokens, case.labels, case.prefix, case.mask)
    theirs = case.tensor("logits")[..., SPECIALS:]
    if case.network.config.role == "masked":
        theirs = theirs[:, 1:]  # their place of the end symbol has no counterpart
    close(ours, theirs)


@having("logits", "loss_mask")
@torch.inference_mode()
def test_loss_over_the_symbols_that_exist_here(case):
    """Theirs also spreads probability over five special symbols and predicts an end symbol; here those do not exist."""
    logits = case.tensor("logits")[..., SPECIALS:]
    counted = case.tensor("loss_mask") & (case.tensor("targets") >= SPECIALS)
    targets = case.tensor("targets")[counted] - SPECIALS
    smoothing = case.network.config.label_smoothing
    expected = F.cross_entropy(logits[counted], targets, label_smoothing=smoothing)
    loss, parts = case.network.loss(case.tokens, case.labels, case.prefix, case.mask)
    assert float(loss) == pytest.approx(float(expected), rel=TOLERANCE)
    assert float(parts["nll"]) == pytest.approx(float(F.cross_entropy(logits[counted], targets)), rel=TOLERANCE)


@having("loss")
@torch.inference_mode()
def test_their_loss_from_our_states(case):
    """With their output rows for the special symbols put back, our states give exactly the loss that they report."""
    rows = read_torch_file(case.folder / "checkpoint_last.pt")["model"]["decoder.output_projection.weight"]
    network = case.network
    states = network.transformer(network.embed(case.tokens, case.labels, case.prefix, case.mask))
    logits = states[:, network.config.prefix_length :] @ rows.T  # (B, 257, V + 5)
    close(logits, case.tensor("logits"))
    counted, targets = case.tensor("loss_mask"), case.tensor("targets")
    smoothing = network.config.label_smoothing
    assert float(F.cross_entropy(logits[counted], targets[counted])) == pytest.approx(
        float(case.outputs["nll_loss"]), rel=TOLERANCE
    )
    ours = F.cross_entropy(logits[counted], targets[counted], label_smoothing=smoothing)
    assert float(ours) == pytest.approx(float(case.outputs["loss"]), rel=TOLERANCE)


@having("inner_states_mean")
@torch.inference_mode()
def test_hidden_states(case):
    network = case.network
    if case.mask is None:
        states = network.states(case.tokens, case.labels, case.prefix)
    else:
        states = network.transformer.states(network.embed(case.tokens, case.labels, case.prefix, case.mask))
    close(mean_states(states), case.tensor("inner_states_mean"))
    if network.config.transformer.norm == "post":  # theirs is after the final norm of a pre-norm model
        close(states[-1][:, -3:].transpose(0, 1), case.tensor("inner_state_last_tokens"))


@having("probe_logits_0")
@torch.inference_mode()
def test_linear_probe(case):
    probe = LinearProbe.from_pretrained(case.path / "probe")
    assert probe.config.states == case.network.config.transformer.depth
    features = mean_states(case.network.states(case.tokens, case.labels))
    logits = probe(features[: probe.config.states])
    for index in range(probe.config.states):
        close(logits[index], case.tensor(f"probe_logits_{index}"))


@having("greedy_ids")
def test_greedy_tokens(case):
    prefix = case.tensor("given_sem_ids") if case.prefix is not None else None
    ids = sample(case.network, range(len(case.tokens)), 0, SamplingParams(temperature=0), case.labels, prefix)
    assert torch.equal(ids, case.tensor("greedy_ids"))
    assert torch.equal(ids + SPECIALS, case.tensor("greedy_tokens_upstream")[:, :256])


@having("nar_argmax_history")
def test_masked_trajectory(case):
    history = case.tensor("nar_argmax_history")[..., -256:]  # (S, B, 256), 3 where masked
    steps: list[torch.Tensor] = []

    def keep(done: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        steps.append((tokens + SPECIALS).masked_fill(mask, 3))

    settings = SamplingParams(temperature=0, steps=len(history), choice_temperature=0)
    ids = sample(case.network, range(history.shape[1]), 0, settings, prefix=case.tensor("given_sem_ids"), callback=keep)
    assert torch.equal(torch.stack(steps), history)
    assert torch.equal(ids, case.tensor("nar_argmax_ids"))
    masked = (torch.stack(steps) == 3).sum(-1)
    assert torch.equal(masked, case.tensor("nar_masked_per_step"))


def _assets(folder: Path) -> Path:
    about = json.loads((folder / "meta.json").read_text())
    return folder.parent / f"assets_{about['kind'].split('_')[0]}_{about['variant']}"


@pytest.mark.parametrize("folder", [folder for folder in CHECKPOINTS if _assets(folder).is_dir()], ids=_name)
def test_the_encoder_of_the_documented_command_makes_the_authors_tokens(folder, tmp_path):
    """``digit convert encoder dinov2_vitb14_reg4_pretrain.pth --out runs/encoder`` of docs/paper.md, and their
    centroids.
    """
    about, assets, outputs = json.loads((folder / "meta.json").read_text()), _assets(folder), np.load(folder / "io.npz")
    if "sem_ids" not in outputs:
        pytest.skip("this kind has no encoder")
    heads = ["--heads", str(about["vit"]["heads"])]  # published ones have width / 64
    encoder, weights = tmp_path / "encoder", str(next(assets.glob("*.pth")))
    result = CliRunner().invoke(converters, ["encoder", weights, "--out", str(encoder), *heads])
    assert result.exit_code == 0, result.output or repr(result.exception)
    convert_upstream(tmp_path / "book", codebook=next(assets.glob("*.npy")))
    pipe = assemble(encoder, tmp_path / "book" / "codebook")
    ours = pipe.tokenizer.encode(torch.from_numpy(outputs["images"]))
    assert np.array_equal(ours.numpy(), outputs["sem_ids"])
    other = load_encoder(encoder, positions="hub")
    with pytest.raises(
        DigitError, match=r"fitted on features of an encoder with positions 'dinov2-offset'.* has 'hub'"
    ):
        pipe.with_parts(encoder=other)


@pytest.mark.parametrize("folder", [folder for folder in CHECKPOINTS if _assets(folder).is_dir()], ids=_name)
def test_separate_files_give_the_same_model(folder, tmp_path):
    about, assets, case = json.loads((folder / "meta.json").read_text()), _assets(folder), _convert(folder)
    command = [
        "digit-upstream",
        _option(about["kind"]),
        str(folder / "checkpoint_last.pt"),
        "--out",
        str(tmp_path / "model"),
    ]
    if case.model.encoder is not None:
        command += ["--heads", str(about["vit"]["heads"]), "--encoder", str(next(assets.glob("*.pth")))]
        command += ["--codebook", str(next(assets.glob("*.npy")))]
    if case.model.vqgan is not None:
        command += ["--vqgan", str(next(assets.glob("*.ckpt")))]
    result = CliRunner().invoke(converters, command)
    assert result.exit_code == 0, result.output or repr(result.exception)
    assert DigitPipeline.from_pretrained(tmp_path / "model").fingerprint() == case.model.fingerprint()
