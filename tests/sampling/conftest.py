"""Small random models of every role."""

import pytest
import torch

from digit.models.token_model import TokenModel, TokenModelConfig
from digit.models.transformer import TransformerConfig


@pytest.fixture(scope="session")
def tiny():
    """Build a model: ``tiny("prior", classes=4)``; large random weights, so that predictions are far from uniform."""

    def build(role="prior", prefix=0, classes=4, vocab=24, length=12, dim=32, depth=2) -> TokenModel:
        torch.manual_seed(0)
        config = TokenModelConfig(
            role=role,
            vocab_size=vocab,
            length=length,
            prefix_vocab_size=9 if prefix else 0,
            prefix_length=prefix,
            num_classes=classes,
            transformer=TransformerConfig(dim=dim, depth=depth, heads=4, causal=role != "masked"),
        )
        model = TokenModel(config).eval().requires_grad_(False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        return model

    return build
