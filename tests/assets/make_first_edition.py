"""Wrote ``first_edition/``: models, token files and run folders, by the code of commit f5d9f53.

Run it with that commit's ``src`` on the path: ``PYTHONPATH=OLD/src python make_first_edition.py first_edition``.
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch
from digit.config import from_dict
from digit.generation import generate_folder
from digit.models.onepass import OnePassConfig, OnePassDecoder
from digit.sampling.settings import SamplingSettings
from digit.tokenizers.codebook import Codebook
from digit.tokenizers.vqgan import VQGAN, VQGANConfig

from digit.encoders.base import Preprocessing
from digit.encoders.conv import ConvEncoder, ConvEncoderConfig
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.pipeline import DigitPipeline

OUT = Path(sys.argv[1])
K, V, SIDE = 12, 20, 32
NETWORK = {"dim": 16, "depth": 1, "heads": 1, "ffn_dim": 32}
PREFIX = {"prefix_vocab_size": K, "prefix_length": 16}

torch.manual_seed(0)
torch.set_num_threads(1)


def token_model(role, vocab, **changes):
    values = {"role": role, "vocab_size": vocab, "length": 16, "transformer": {**NETWORK, "causal": role != "masked"}}
    model = TokenModel(from_dict(TokenModelConfig, {**values, **changes}, "fixture")).eval()
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return model


def onepass(head, **changes):
    values = {**PREFIX, "grid": (4, 4), "head": head, "noise_dim": 3, "transformer": {**NETWORK, "causal": False}}
    values.pop("prefix_length")
    model = OnePassDecoder(from_dict(OnePassConfig, {**values, **changes}, "fixture")).eval()
    torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
    return model


encoder = ConvEncoder(
    ConvEncoderConfig(widths=(4, 4, 4, 8), blocks=(1, 1, 1, 1), preprocessing=Preprocessing(image_size=SIDE))
).eval()
codebook = Codebook.from_centroids(torch.randn(K, encoder.dim), {"data": {"name": "noise", "split": "train"}})
vqgan = VQGAN(
    VQGANConfig(resolution=SIDE, channels=4, multipliers=(1, 1, 1, 1), blocks=1, codes=V, code_dim=2, groups=2)
).eval()
semantic = DigitPipeline(
    encoder=encoder,
    codebook=codebook,
    vqgan=vqgan,
    prior=token_model("prior", K, num_classes=3),
    decoders={
        "ar": token_model("ar", V, num_classes=3, **PREFIX),
        "masked": token_model("masked", V, **PREFIX),
        "onepass": onepass("pixels", pixels={"widths": (8, 8), "patch": 4}, num_classes=3),
    },
    class_names=["cat", "dog", "ship"],
    settings={"prior": SamplingSettings(top_k=8, cfg_scale=1.5), "ar": SamplingSettings(top_p=0.9)},
    default_decoder="ar",
    provenance={"note": "random weights"},
    name="first",
)
baseline = DigitPipeline(vqgan=vqgan, prior=token_model("prior", V, num_classes=3), space="vq", name="baseline")
tokens = DigitPipeline(
    vqgan=vqgan, prior=token_model("prior", K), decoders={"onepass": onepass("vq", vocab_size=V)}, name="tokens"
)
for pipe in (semantic, baseline, tokens):
    pipe.save_pretrained(OUT / pipe.name, torch.float16)
    saved = DigitPipeline.from_pretrained(OUT / pipe.name)
    for kind in list(pipe.decoders) or [None]:
        labels = [0, 2] if pipe.num_classes else None
        run = OUT / f"{pipe.name}-{kind}"
        generate_folder(saved, run, 2, labels, seed=5, decoder=kind, save_tokens=True)
        (run / "grid.png").unlink()
# a run that was killed after its first image: what it keeps aside is still there
sampled, calls = DigitPipeline.sample_tokens, []


def killed(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return sampled(self, *args, **kwargs)


DigitPipeline.sample_tokens = killed
with contextlib.suppress(KeyboardInterrupt):
    saved = DigitPipeline.from_pretrained(OUT / "first")
    generate_folder(saved, OUT / "killed", 2, [0, 2], seed=5, decoder="ar", batch_size=1)
names = ("first", "baseline", "tokens")
lines = [f"{name} {DigitPipeline.from_pretrained(OUT / name).fingerprint()}\n" for name in names]
(OUT / "fingerprint.txt").write_text("".join(lines))
for folder in OUT.rglob("__pycache__"):
    shutil.rmtree(folder)
