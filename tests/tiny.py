"""Tiny models with random weights and real parts: what many tests need."""

from __future__ import annotations

import torch

from digit.core.config import from_dict
from digit.encoders.base import Preprocessing
from digit.encoders.conv import ConvEncoder, ConvEncoderConfig
from digit.models.codebook import Codebook
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling import SampleRequest

CLASSES, CLUSTERS, CODES, TOKENS, SIZE = 3, 12, 20, 16, 32
TRANSFORMER = {"dim": 32, "depth": 2, "heads": 2}


def token_model(role: str = "prior", seed: int = 0, **changes) -> TokenModel:
    """A token model of 16 tokens; decoders take 16 semantic tokens in front."""
    values = {
        "role": role,
        "vocab_size": CLUSTERS if role in ("prior", "random") else CODES,
        "length": TOKENS,
        "transformer": {**TRANSFORMER, "causal": role != "masked"},
    }
    if role in ("ar", "masked"):
        values |= {"prefix_vocab_size": CLUSTERS, "prefix_length": TOKENS}
    torch.manual_seed(seed)
    model = TokenModel(from_dict(TokenModelConfig, {**values, **changes}, "tiny")).eval()
    # untrained logits are nearly flat; spread them, so that different inputs give different tokens
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return model


def loud(
    role="prior",
    prefix=0,
    classes=4,
    vocab=24,
    length=12,
    scale=1.0,
    dtype=torch.float32,
    state_space=None,
    codebook_depth=1,
    **transformer,
) -> TokenModel:
    """A token model of large random weights, biases and norms too: predictions are far from uniform."""
    values = {"role": role, "vocab_size": vocab, "length": length, "num_classes": classes, "embedding_scale": scale}
    if prefix:
        values |= {"prefix_vocab_size": 9, "prefix_length": prefix}
    shape = {"dim": 32, "depth": 2, "heads": 4, "causal": role != "masked", **transformer}
    values |= {"codebook_depth": codebook_depth}
    values |= {"state_space": state_space} if state_space else {"transformer": shape}
    torch.manual_seed(0)
    model = TokenModel(from_dict(TokenModelConfig, values, "loud")).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype)


def onepass(head: str = "pixels", seed: int = 3, **changes) -> FeedForwardDecoder:
    """A one-pass decoder of 4 x 4 semantic tokens, to 32 px or to VQ tokens."""
    values = {"prefix_vocab_size": CLUSTERS, "grid": (4, 4), "head": head, "noise_dim": 6}
    values |= {"pixels": {"widths": (16, 8, 8), "patch": 2}} if head == "pixels" else {"vocab_size": CODES}
    values["transformer"] = {**TRANSFORMER, "causal": False}
    torch.manual_seed(seed)
    model = FeedForwardDecoder(from_dict(FeedForwardConfig, {**values, **changes}, "tiny")).eval()
    for table in (model.token_embedding, model.noise_embedding):  # tell the inputs apart, untrained as it is
        torch.nn.init.normal_(table.weight, std=1.0)
    if head == "vq":
        torch.nn.init.normal_(model.head.weight, std=1.0)
    return model


def vqgan(seed: int = 0) -> VQGAN:
    """32 px to 4 x 4 of 20 codes."""
    torch.manual_seed(seed)
    config = VQGANConfig(
        resolution=SIZE, channels=8, multipliers=(1, 1, 1, 2), blocks=1, codes=CODES, code_dim=4, groups=4
    )
    return VQGAN(config).eval()


def encoder(seed: int = 0) -> ConvEncoder:
    """32 px to 4 x 4 features."""
    torch.manual_seed(seed)
    return ConvEncoder(
        ConvEncoderConfig(widths=(8, 8, 8, 16), blocks=(1, 1, 1, 1), preprocessing=Preprocessing(image_size=SIZE))
    ).eval()


def codebook(dim: int, seed: int = 0) -> Codebook:
    """12 random centroids."""
    torch.manual_seed(seed)
    return Codebook.from_centroids(torch.randn(CLUSTERS, dim))


def prior(role: str = "prior", **changes) -> TokenModel:
    """A prior over semantic tokens, of any role."""
    values = {"vocab_size": CLUSTERS, "prefix_vocab_size": 0, "prefix_length": 0, "num_classes": CLASSES}
    return token_model(role, **{**values, **changes})


def pipeline(conditional: bool = True, role: str = "prior") -> DigitPipeline:
    """A whole model, class-conditional or not, with a prior of this role and both decoders."""
    eyes = encoder()
    return DigitPipeline(
        encoder=eyes,
        codebook=codebook(eyes.dim),
        prior=prior(role, num_classes=CLASSES if conditional else 0),
        decoders={"ar": token_model("ar", 1), "masked": token_model("masked", 2)},
        vqgan=vqgan(),
        class_names=["cat", "dog", "ship"] if conditional else [],
        name="tiny",
    )


def request(images, labels=None, seed=0, decoder=None, **settings) -> SampleRequest:
    """A request for some images of a run; labels as a list or a tensor."""
    return SampleRequest(images, seed, None if labels is None else torch.as_tensor(labels), decoder, settings)
