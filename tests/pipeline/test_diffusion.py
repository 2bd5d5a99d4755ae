"""A saved model in diffusers' own DiffusionPipeline, from its folder and from a Hub."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import tiny
from digit import DigitPipeline
from digit.core.errors import DigitError
from hub_server import serve

SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
made = pipe(class_labels=[0, 2], generator=torch.Generator().manual_seed(1), output_type="pt")
torch.save(made.images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def pipe(folder, tmp_path_factory):
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:  # where diffusers keeps the code of others
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


def test_images_are_those_of_our_pipeline(pipe, folder):
    ours = DigitPipeline.from_pretrained(folder)
    made = pipe(class_labels=[0, "ship"], guidance_scale=50, generator=torch.Generator().manual_seed(3))
    settings = {"cfg_scale": 50, "generator": torch.Generator().manual_seed(3)}
    expected = ours([0, 2], **settings)
    assert type(made).__name__ == "ImagePipelineOutput"
    assert all(np.array_equal(a, b) for a, b in zip(made.images, expected, strict=True))
    plain = pipe(class_labels=[0, 2], generator=torch.Generator().manual_seed(3))
    assert not np.array_equal(plain.images[0], made.images[0])


def test_steps_are_those_of_the_masked_decoder(pipe, folder):
    ours = DigitPipeline.from_pretrained(folder)
    few, many = (
        pipe(class_labels=1, num_inference_steps=steps, decoder="masked", output_type="np", return_dict=False)[0]
        for steps in (2, 8)
    )
    assert few.shape == (1, 32, 32, 3)
    assert np.array_equal(few, ours(1, steps=2, decoder="masked", output_type="np"))
    assert not np.array_equal(few, many)
    with pytest.raises(DigitError, match="has no steps"):
        pipe(class_labels=1, num_inference_steps=2, decoder="ar")


@pytest.mark.usefixtures("pixels_in_bfloat16")
def test_generators_and_output_types(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipe(class_labels=[1, 1], generator=generators, output_type="pt").images
    assert both.shape == (2, 3, 32, 32)
    one = pipe(class_labels=[1], generator=[torch.Generator().manual_seed(6)], output_type="pt").images
    assert torch.equal(one[0], both[1])
    with pytest.raises(DigitError, match="output_type 'latent'"):
        pipe(class_labels=[1], output_type="latent")


def test_moved_and_saved(pipe, folder, tmp_path):
    from diffusers import DiffusionPipeline

    assert pipe.device.type == "cpu"
    other = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)  # the index names the code too
    assert other.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert pipe.dtype == torch.float32
    pipe.save_pretrained(tmp_path / "again")
    again = DigitPipeline.from_pretrained(tmp_path / "again")
    assert again.class_names == ["cat", "dog", "ship"]
    assert list(again.decoders) == ["ar", "masked"]
    assert torch.equal(again([1], output_type="pt"), pipe([1], generator=None, output_type="pt").images)


@pytest.mark.slow  # diffusers is imported in a process of its own
def test_from_a_hub(folder, tmp_path):
    with serve() as hub:
        hub.add("somebody/tiny", folder)
        places = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", SCRIPT, "somebody/tiny", str(tmp_path / "made.pt")]
        subprocess.run(command, env={**os.environ, **places}, check=True, timeout=280)
    expected = DigitPipeline.from_pretrained(folder)(
        [0, 2], generator=torch.Generator().manual_seed(1), output_type="pt"
    )
    assert torch.equal(torch.load(tmp_path / "made.pt"), expected)
