from __future__ import annotations

import json

import pytest
from PIL import Image

from digit.evaluation.studies.tour import SHARES, _Stages, run_tour
from digit.pipeline.pipeline import DigitPipeline

SHORT = ["training.steps=8", "training.warmup_steps=2", "training.log_every=2", "training.batch_size=16"]


def test_each_stage_says_its_number_its_command_and_the_time_left(tmp_path, capsys):
    stages = _Stages(tmp_path, {})
    stages.run("images", "digit data", lambda: None)
    stages.done, stages.spent = 0.28, 20.0  # 0.72 of the work are left, at 71 s for all
    stages.run("codebook", "digit fit-codebook", lambda: None)
    first, other = (" ".join(line.split()) for line in capsys.readouterr().err.splitlines())
    assert first == "Stage 1 of 9: images digit data"
    assert other == "Stage 3 of 9: codebook, about 1 min left digit fit-codebook"
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_tour_leaves_models_and_images_and_resumes(cifar512, tmp_path):
    summary = run_tour(tmp_path, cifar512, overrides=SHORT)
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        assert Image.open(tmp_path / name).width > 300
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert set(summary["parts"]) == {"encoder", "vqgan", "prior", "ar", "masked"}
    pipe = DigitPipeline.from_pretrained(tmp_path / "model")
    assert pipe.class_names[3] == "cat"
    assert set(pipe.decoders) == {"ar", "masked"}

    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/model/model.safetensors")}
    assert len(written) == 5
    run_tour(tmp_path, cifar512, overrides=SHORT)
    assert written == {p: p.stat().st_mtime_ns for p in written}, "a second tour trains nothing again"
