"""No step waits for the device: losses are computed on tensors without values, of which nothing can be read."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tiny
from digit.core.config import from_dict
from digit.data.dataset import ImageDataset
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.vqgan import VQGANConfig
from digit.training.task import Step, Stream, Task
from digit.training.tasks.encoder import EncoderTask, model_from, objective_from
from digit.training.tasks.feedforward import OnePassObjective, OnePassTask
from digit.training.tasks.vqgan import VqganObjective, VqganTask

GAN = {
    "gan_weight": 0.1,
    "gan_start": 0.0,
    "gan_adaptive": 10.0,
    "shift": 2,
    "discriminator": {"channels": 8, "lecam": 0.1},
}


def vqgan(images: ImageDataset) -> Task:
    model = VQGANConfig(resolution=32, channels=16, multipliers=(1, 2, 2), blocks=1, codes=64, code_dim=8, groups=8)
    return VqganTask(model, from_dict(VqganObjective, {**GAN, "gradient": "rotation"}, "test"), images)


def feedforward(images: ImageDataset) -> Task:
    values = {
        "prefix_vocab_size": 12, "grid": (4, 4), "head": "pixels", "noise_dim": 8,
        "transformer": {"dim": 32, "depth": 2, "heads": 2, "causal": False},
        "pixels": {"widths": (16, 16, 8), "patch": 2},
    }  # fmt: skip
    model = FeedForwardDecoder(from_dict(FeedForwardConfig, values, "test"))
    objective = from_dict(OnePassObjective, {**GAN, "prefix_noise": 0.5}, "test")
    return OnePassTask(model, objective, tiny.pipeline().tokenizer, images)


def encoder(images: ImageDataset) -> Task:
    """A masked autoencoder: the losses of lightly pick by masks, which waits once a step."""
    values = {"kind": "vit", "dim": 16, "depth": 1, "heads": 2}
    return EncoderTask(model_from(values, "test"), objective_from({"method": "mae"}, "test"), images)


@pytest.mark.parametrize("build", [vqgan, feedforward, encoder])
def test_no_step_reads_a_value(images: ImageDataset, build: Callable[[ImageDataset], Task]) -> None:
    torch.manual_seed(0)
    task = build(images)
    first, second = task.batches(Stream(start=0, stop=2, batch_size=8))
    for loss in task.losses(first, Step(0, 10)):  # a codebook is put on the first batch, which may look at it
        loss.value.backward()
    task.after_step(Step(0, 10))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = {name: fake.from_tensor(tensor) for name, tensor in second.items()}
        for loss in task.losses(batch, Step(5, 10)):
            task.modules.zero_grad()
            loss.value.backward()
        task.after_step(Step(5, 10))
