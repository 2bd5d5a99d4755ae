"""The paper's numbers, and the command behind every table, figure and claim, run on tiny models of random weights."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import tiny
from digit.cli.app import app
from digit.core.config import load_preset
from digit.core.files import read_json
from digit.core.images import encode_png, save_png
from digit.data.dataset import open_dataset, write_dataset
from digit.encoders.base import Preprocessing
from digit.encoders.transformers_encoder import EncoderConfig, TransformersEncoder
from digit.evaluation import paper

ROOT = Path(__file__).parents[2]
COMMANDS = {
    f"{claim.part}, {scale}": command
    for claim in paper.CLAIMS
    for scale, command in (("paper", claim.command), ("small", claim.small))
    if command and not command.startswith("digit report")
}
SHORT = [
    (r"--num \d+", "--num 10"),
    (r"--labels \S+", "--labels 207,974"),
    (r"--layers all.*? --out", "--layers all --out"),
]
FEW = ["training.steps=2", "training.epochs=null", "training.batch_size=8", "training.warmup_steps=1"]
FEW += ["training.validate_every=0", "training.accumulation=1"]
TOKENS = [*FEW, "data.held_out=4", "model.transformer.dim=16", "model.transformer.depth=2", "model.transformer.heads=2"]
IMAGES = [*FEW, "data.held_out_split=null", "data.held_out=8"]
SMALLER = {
    "prior_set": TOKENS, "decoder_set": TOKENS, "vqgan_set": [*IMAGES, "model.channels=8", "model.groups=4"],
    "encoder_set": IMAGES,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(pipe, vq_pipe, cifar512, tmp_path_factory) -> Path:
    """The folders that the commands name: models, data sets of 32 pixels, encoders, a VQGAN and an image."""
    folder = tmp_path_factory.mktemp("paper")
    parts = {"num_classes": 1000}, {"num_classes": 0}
    cond, free = (pipe.with_parts(prior=tiny.token_model("prior", **part), class_names=[]) for part in parts)
    masked = tiny.token_model("masked", num_classes=10, prefix_vocab_size=0, prefix_length=0)
    for name, model in {
        "digit-base": free, "digit-large": free, "digit-base-cond": cond, "digit-large-cond": cond,
        "cifar10-tiny": pipe,
        "digit-base-vq": vq_pipe, "cifar10-vq": vq_pipe, "digit-base-vq-masked": vq_pipe.with_parts(prior=masked),
        "cifar10-vq-masked": vq_pipe.with_parts(prior=masked), "digit-base-vq-cond": vq_pipe,
        "digit-base-vq-masked-cond": vq_pipe.with_parts(prior=masked),
    }.items():  # fmt: skip
        model.save_pretrained(folder / "models" / name)
    images = open_dataset(cifar512, "train")
    for name, counts in {
        "cifar10": {"train": 64, "test": 24}, "imagenet-train": {"train": 100}, "imagenet-val256": {"train": 24}
    }.items():  # fmt: skip
        with write_dataset(folder / "data" / name, name, list(images.classes), "CIFAR-10", "none stated") as writer:
            for split, count in counts.items():
                for index in range(count):
                    sample = images[index]
                    writer.add(split, f"{index:05d}", encode_png(sample.image), "png", (32, 32), sample.label)
    save_png(images[0].image, folder / "IMAGE.png")
    pipe.vqgan.save_pretrained(folder / "runs" / "vqgan")
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
    config = {"model_type": "vit", **sizes, "intermediate_size": 32}
    torch.manual_seed(0)
    encoder = TransformersEncoder(EncoderConfig(hf_config=config, layer=-1, preprocessing=Preprocessing(image_size=32)))
    names = "dinov2-with-registers-base", "dinov2-with-registers-large", "vit-mae-base"
    for name in (
        *(f"facebook/{name}" for name in names),
        "checkpoints/vit-b-300ep.pth.tar",
        "checkpoints/ibot_vitb16.pth",
    ):
        encoder.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(place, pooling, monkeypatch):
    """Run a command of the table, with few images, short trainings and a small network in place of InceptionV3."""
    monkeypatch.chdir(place)
    for module in ("digit.evaluation.metrics.inception", "digit.evaluation.studies.ablation"):
        monkeypatch.setattr(f"{module}.open_extractor", lambda *_, **__: pooling)

    def call(command: str) -> Path:
        for pattern, value in SHORT:
            command = re.sub(pattern, value, command)
        words = shlex.split(command.replace("IMAGE", "IMAGE.png"))[1:]
        if words[1] == "ablation":
            words[2] = _shortened(words[2])
        more = {"generate": ["--overwrite"], "probe": ["--epochs", "1"], "reconstruction": ["--lpips", "none"]}
        words += more.get(words[0] if words[0] == "generate" else words[1], [])
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (done.output, done.exception)
        return Path(words[words.index("--out") + 1])

    return call


def _shortened(name: str) -> str:
    """A copy of an ablation whose trainings, of the same presets, are two steps of small models."""
    values = load_preset(name, [], "ablations")
    for recipe in (values["base"], *values["variants"]):
        changed = [key for key in SMALLER if recipe is values["base"] or key in recipe]
        recipe.update({key: [*recipe.get(key, []), *SMALLER[key]] for key in changed})
    values["base"] |= {"clusters": 8, "fit_images": 16}
    for number, variant in enumerate(values["variants"]):
        variant |= {"clusters": 4 + number} if "clusters" in variant else {}
    values |= {"fid_images": 8, "probe": {**values["probe"], "epochs": 1}}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
    return f"{name}.yaml"


ABLATIONS = {name: command for name, command in COMMANDS.items() if "evaluate ablation" in command}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ABLATIONS])
def test_the_command_runs(name, run):
    assert run(COMMANDS[name]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_the_ablation_runs(name, run):
    result = read_json(run(ABLATIONS[name]) / "result.json")
    assert all("fid" in line for line in result["values"])


def test_figure_1_is_drawn_from_what_its_commands_measured(run, place, tmp_path, monkeypatch):
    """Both halves, from the commands of Tables 2 to 4 and the one of figure 1."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    reports = [claim.command for claim in paper.CLAIMS if claim.command.startswith("digit report")]
    for name in ("Table 2, paper", "Table 3, DiGIT+VQGAN 219M, paper", "Table 4, DiGIT+VQGAN 219M, paper"):
        run(COMMANDS[name])
    text = run(reports[0]).read_text(encoding="utf-8")
    assert len(set(reports)) == 1
    for title in ("FID against linear probe (figure 1a)", "Inception Score against FID (figure 1b)"):
        assert f"<h3>{title}</h3>" in text


def test_every_table_figure_and_row_has_a_command():
    parts = [claim.part for claim in paper.CLAIMS]
    assert len(set(parts)) == len(parts)
    wanted = {"Table 1", "Table 2", "Tables 3 and 4, validation data", "Figures 7 and 8"}
    wanted |= {f"Figure {name}" for name in ("1a", "1b", "2", "3a", "3b", "4a", "4b", "5", "6")}
    own = ("VQGAN", "MaskGIT", "DiGIT")  # the rows that are measured by others are not ours to repeat
    for table, rows in (("Table 3", paper.UNCONDITIONAL), ("Table 4", paper.CONDITIONAL)):
        wanted |= {f"{table}, {row.method} {row.parameters:g}M" for row in rows if row.method.startswith(own)}
    assert wanted <= set(parts)
    for claim in paper.CLAIMS:
        if row := re.fullmatch(r"Table (\d), (\S+) (\d+)M", claim.part):
            table = {"3": paper.UNCONDITIONAL, "4": paper.CONDITIONAL}[row[1]]
            found = [(r.fid, r.inception) for r in table if (r.method, r.parameters) == (row[2], float(row[3]))]
            assert tuple(map(float, claim.says.split(" / "))) in found


def test_the_page_holds_the_table_as_the_code_makes_it():
    assert paper.claims_table() in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["evaluate", "paper"]).stdout == paper.claims_table()


def test_the_papers_tables_agree_with_each_other():
    table_3 = {(row.method, row.parameters, row.epochs): (row.fid, row.inception) for row in paper.UNCONDITIONAL}
    steps = paper.ADDITIVE
    assert (steps[0].fid, steps[0].inception) == table_3["VQGAN", 214, "200"]
    assert (steps[2].fid, steps[2].inception) == table_3["DiGIT+VQGAN", 219, "400"]
    assert (steps[3].fid, steps[3].inception) == table_3["DiGIT+VQGAN", 732, "200"]
    assert (paper.ENCODERS[-1].fid, paper.ENCODERS[-1].inception) == table_3["VQGAN", 214, "200"]
    probes = {row.parameters: row.accuracy for row in paper.PROBE if row.method == "DiGIT"}
    for bubble in paper.BUBBLES[:2]:
        assert bubble.accuracy == probes[bubble.parameters]
        assert bubble.fid == min(
            row.fid for row in paper.UNCONDITIONAL if row.parameters == bubble.parameters and row.family == "AR"
        )
    for values in (values for space in paper.STABILITY.values() for values in space.values()):
        assert len(values) == len(paper.SNRS)
        assert list(values) in (sorted(values), sorted(values, reverse=True))  # more noise, always less stable
