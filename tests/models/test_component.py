"""Loading a saved component."""

import subprocess
import sys

import torch

from digit.models.component import without_weights
from tiny import token_model, vqgan

SCRIPT = """
import sys
from digit.pipeline.pipeline import DigitPipeline
DigitPipeline.from_pretrained("cifar10")
slow = {"torch._dynamo", "sympy", "huggingface_hub.repocard", "transformers", "matplotlib"}
print(*slow & set(sys.modules))
"""


def test_shapes_without_weights():
    for module in (token_model(), vqgan()):
        with without_weights():
            empty = type(module)(module.config)
        assert all(p.is_meta for p in empty.parameters())
        assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
    assert torch.nn.Linear(2, 2).weight.std() > 0  # outside, layers are initialised as ever


def test_loading_a_model_imports_no_compiler():
    """PyTorch's compiler takes two seconds to import and its algebra half of one: too long for a first image."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
