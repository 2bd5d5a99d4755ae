"""The CIFAR-10 study: its commands are ones that the command line takes, and its page follows from its records."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest
import torch

from digit import DigitPipeline
from digit.core.config import load_preset
from digit.pipeline.assembly import assemble
from digit.sampling.rng import pixel_latents
from doc_blocks import parse

HERE = Path(__file__).parents[1] / "experiments" / "cifar10"


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


study, results, growth = load("study"), load("results"), load("grow")


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_step_is_a_command_that_parses(profile):
    steps = list(study.Study(Path("out"), Path("data"), Path("missing.npz"), 10_000, profile).steps())
    assert len({step.name for step in steps}) == len(steps) > 50
    for step in steps:
        words = shlex.split(step.command)
        assert parse(words) == ""
        if words[0] == "train":
            changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            assert load_preset(words[words.index("--preset") + 1], changes)["component"] == words[1]


def test_a_step_finds_what_it_needs_made_before():
    seen = set()
    for step in study.Study(Path("out"), Path("data"), Path("missing.npz"), 10_000, "cpu").steps():
        words = shlex.split(step.command)
        made = words[words.index("--out") + 1] if "--out" in words else ""
        for word in words:
            path = word.partition("=")[2] if "=" in word else word
            if path.startswith("out/") and path != made:
                assert any(path == earlier or path.startswith(f"{earlier}/") for earlier in seen), (step.name, path)
        seen.add(made)


def test_a_lost_study_goes_on_from_the_packaged_model(tmp_path):
    for _ in range(2):  # what is there stays
        study.restore(tmp_path)
    steps = {
        step.name: step for step in study.Study(tmp_path, Path("data"), Path("missing.npz"), 10_000, "cpu").steps()
    }
    done = {name for name, step in steps.items() if study.is_done(step, tmp_path)}
    assert done == {"encoder", "codebook-1024", "vqgan", "ar", "onepass", "prior-cond-quarter"}
    folders = [tmp_path / name for name in ("encoder", "codebook-1024", "vqgan", "prior-cond-quarter")]
    whole = assemble(*folders, decoders=[tmp_path / "ar", tmp_path / "onepass"])
    packaged = DigitPipeline.from_pretrained("cifar10")
    assert whole.fingerprint() == packaged.fingerprint()
    assert whole.class_names == packaged.class_names
    assert str(whole.prior) == str(packaged.prior)


def test_every_result_has_the_command_of_its_step():
    steps = study.Study(Path("runs/study"), Path("data/cifar10"), HERE / "README.md", 5_000, "cpu").steps()
    commands = {step.name: f"digit {step.command}" for step in steps}
    for name, found in results.Results().steps.items():
        command = found["command"].replace("runs/study/train-statistics.npz", str(HERE / "README.md"))
        assert command == commands[name]


def test_the_page_is_made_from_the_records():
    kept = results.Results()
    assert (HERE / "RESULTS.md").read_text() == results.page(kept)
    assert f"{results.MARKS[0]}\n{kept.headline()}{results.MARKS[1]}" in results.README.read_text()


def test_spread_and_ratio():
    kept = results.Results.__new__(results.Results)
    kept.steps = {
        f"fidelity-{name}": {"result": {"values": {"fid": fid}, "source": {"images": 100}}}
        for name, fid in {
            "vq-s0": 40.0,
            "vq-s1": 44.0,
            "semantic-s0-ar": 20.0,
            "semantic-s1-ar": 22.0,
            "semantic-s0-onepass": 28.0,
            "cond-ar": 12.5,
            "vq-masked": 45.0,
            "semantic-s0-masked": 30.0,
        }.items()
    }
    text = kept.headline()
    assert "| VQ prior (baseline) | 42.00 ± 2.83 | 2 | 100 |" in text
    assert (
        "**2.00 (2.00, 2.00 seed by seed) with the AR decoder, 1.33 with the masked decoder, 1.43 with the "
        "feed-forward decoder**" in text
    )
    assert "| semantic prior + AR decoder, with a class | 12.50 | 1 | 100 |" in text
    assert "FID(MaskGIT) / FID(semantic prior + masked decoder): **1.50**" in text


def test_curves_are_tables_once_they_are_measured():
    kept = results.Results.__new__(results.Results)
    kept.steps = {}
    assert {kept.layers(), kept.settings(), kept.prefixes()} == {"Not measured yet.\n"}

    def step(values):
        return {"result": {"values": values}}

    score = {"state": 0, "accuracy": 0.25, "knn": None}
    kept.steps = {
        "evaluate-probe": step({"layers": [score, {**score, "state": 1, "knn": 0.5}], "encoder": score}),
        "evaluate-sweep": step({"points": [{"settings": {"top_k": 50}, "values": {"fid": 12.5}}]}),
        "evaluate-prefix": step([{"name": "vq-s0", "points": [{"share": 0.25, "values": {"fid": 9.0}}]}]),
    }
    assert (
        "| embeddings | 25.0 | - |\n| after block 1 | 25.0 | 50.0 |\n| the encoder's features | 25.0 | - |"
        in kept.layers()
    )
    assert "| top_k 50 | 12.50 |" in kept.settings()
    assert "| given of the tokens | 25% |" in kept.prefixes()
    assert "| vq-s0 | 9.00 |" in kept.prefixes()


def test_a_larger_decoder_begins_with_the_same_images():
    small = DigitPipeline.from_pretrained("cifar10").decoders["onepass"]
    grown = growth.grow(small, depth=6, blocks=3)
    assert (grown.config.transformer.depth, grown.config.pixels.blocks) == (6, 3)
    tokens = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    noise = pixel_latents(small.config, range(2))
    with torch.no_grad():
        assert torch.equal(grown.eval()(tokens, noise), small(tokens, noise))
    with pytest.raises(SystemExit, match="more blocks, not fewer"):
        growth.grow(small, depth=6, blocks=1)
