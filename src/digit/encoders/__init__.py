"""Frozen encoders: images in, patch features out."""

from digit.encoders.base import Encoder, Preprocessing, weights_checksum
from digit.encoders.conv import ConvEncoder, ConvEncoderConfig
from digit.encoders.loading import load_encoder, small_conv, small_vit
from digit.encoders.transformers_encoder import EncoderConfig, TransformersEncoder

__all__ = [
    "ConvEncoder",
    "ConvEncoderConfig",
    "Encoder",
    "EncoderConfig",
    "Preprocessing",
    "TransformersEncoder",
    "load_encoder",
    "small_conv",
    "small_vit",
    "weights_checksum",
]
