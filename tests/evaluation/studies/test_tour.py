from __future__ import annotations

import json

import pytest
from PIL import Image

from digit.evaluation.studies.tour import run_tour
from digit.pipeline.pipeline import DigitPipeline

SHORT = ["training.steps=8", "training.warmup_steps=2", "training.log_every=2", "training.batch_size=16"]


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
