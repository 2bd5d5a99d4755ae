"""What the paper reports: tables and figures of arXiv 2410.12490 as data, for results to stand beside.

Figures of Tables 2 to 4 are also in the authors' README (DAMO-NLP-SG/DiGIT at cd6d8ca). The curves of figures 3b, 4b, 5
and 6 were published as pictures only and are not repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2410.12490"
FID_REFERENCE = "the 50,000 ImageNet validation images, short side to 256, centre crop; 50,000 samples; torch-fidelity"
"""How the paper's own FID and IS were measured; rows of other papers in its tables used their own references."""

SNRS = (30.0, 25.0, 20.0, 15.0, 10.0, 5.0, 1.0, 0.01)
"""Levels of Table 1; decibel is the natural reading, the paper gives no unit."""

STABILITY = {
    "vq": {
        "changed": (0.187, 0.317, 0.487, 0.663, 0.805, 0.901, 0.948, 0.956),
        "cosine": (0.972, 0.949, 0.910, 0.853, 0.777, 0.682, 0.594, 0.571),
    },
    "semantic": {
        "changed": (0.114, 0.178, 0.260, 0.355, 0.457, 0.570, 0.687, 0.721),
        "cosine": (0.975, 0.960, 0.940, 0.916, 0.888, 0.855, 0.816, 0.803),
    },
}
"""Table 1 at the levels of :data:`SNRS`: ImageNet, MAGE's VQGAN and DINOv2 with k-means."""


@dataclass(frozen=True)
class ProbeRow:
    """A row of Table 2.

    Attributes:
        method: its name.
        tokens: of an image.
        width: of the probed features.
        parameters: in millions.
        accuracy: top-1 on ImageNet in percent.
    """

    method: str
    tokens: str
    width: int
    parameters: float
    accuracy: float


PROBE = (
    ProbeRow("iGPT-L", "32x32", 1536, 1362, 60.3),
    ProbeRow("iGPT-XL", "64x64", 3072, 6801, 68.7),
    ProbeRow("VIM+VQGAN", "32x32", 1024, 650, 61.8),
    ProbeRow("VIM+dVAE", "32x32", 1024, 650, 63.8),
    ProbeRow("VIM+ViT-VQGAN", "32x32", 1024, 650, 65.1),
    ProbeRow("VIM+ViT-VQGAN", "32x32", 2048, 1697, 73.2),
    ProbeRow("AIM", "16x16", 1536, 600, 70.5),
    ProbeRow("DiGIT", "16x16", 1024, 219, 71.7),
    ProbeRow("DiGIT", "16x16", 1536, 732, 80.3),
)
"""Table 2: linear probes on ImageNet."""


@dataclass(frozen=True)
class FidelityRow:
    """A row of Table 3 or 4.

    Attributes:
        family: GAN, diffusion, masked (MIM) or autoregressive (AR).
        method: its name; "(guided)" where the paper marks classifier-free guidance.
        parameters: in millions; None where the paper has none.
        epochs: as the paper has them.
        fid, inception: FID and Inception Score; None where the paper has none.
    """

    family: str
    method: str
    parameters: float | None
    epochs: str
    fid: float
    inception: float | None


UNCONDITIONAL = (
    FidelityRow("GAN", "BigGAN", 70, "", 38.6, 24.70),
    FidelityRow("Diffusion", "LDM", 395, "", 39.1, 22.83),
    FidelityRow("Diffusion", "ADM", 554, "", 26.2, 39.70),
    FidelityRow("MIM", "MAGE", 200, "1600", 11.1, 81.17),
    FidelityRow("MIM", "MAGE", 463, "1600", 9.10, 105.1),
    FidelityRow("MIM", "MaskGIT", 227, "300", 20.7, 42.08),
    FidelityRow("MIM", "DiGIT+MaskGIT", 219, "200", 9.04, 75.04),
    FidelityRow("AR", "VQGAN", 214, "200", 24.38, 30.93),
    FidelityRow("AR", "DiGIT+VQGAN", 219, "400", 9.13, 73.85),
    FidelityRow("AR", "DiGIT+VQGAN", 732, "200", 4.59, 141.29),
)
"""Table 3: class-unconditional ImageNet 256 x 256."""

CONDITIONAL = (
    FidelityRow("GAN", "BigGAN", 160, "", 6.95, 198.2),
    FidelityRow("Diffusion", "ADM", 554, "", 10.94, 101.0),
    FidelityRow("Diffusion", "LDM-4", 400, "", 10.56, 103.5),
    FidelityRow("Diffusion", "DiT-XL/2", 675, "", 9.62, 121.50),
    FidelityRow("Diffusion", "L-DiT-7B", 7000, "", 6.09, 153.32),
    FidelityRow("MIM", "CQR-Trans", 371, "300", 5.45, 172.6),
    FidelityRow("MIM+AR", "VAR", 310, "200", 4.64, None),
    FidelityRow("MIM+AR", "VAR (guided)", 310, "200", 3.60, 257.5),
    FidelityRow("MIM+AR", "VAR (guided)", 600, "250", 2.95, 306.1),
    FidelityRow("MIM", "MAGVIT-v2", 307, "1080", 3.65, 200.5),
    FidelityRow("AR", "VQVAE-2", 13500, "", 31.11, 45),
    FidelityRow("AR", "RQ-Trans", 480, "", 15.72, 86.8),
    FidelityRow("AR", "RQ-Trans", 3800, "", 7.55, 134.0),
    FidelityRow("AR", "ViT-VQGAN", 650, "360", 11.20, 97.2),
    FidelityRow("AR", "ViT-VQGAN", 1700, "360", 5.3, 149.9),
    FidelityRow("MIM", "MaskGIT", 227, "300", 6.18, 182.1),
    FidelityRow("MIM", "DiGIT+MaskGIT", 219, "200", 4.62, 146.19),
    FidelityRow("AR", "VQGAN", 227, "300", 18.65, 80.4),
    FidelityRow("AR", "DiGIT+VQGAN", 219, "200", 4.79, 142.87),
    FidelityRow("AR", "DiGIT+VQGAN", 732, "200", 3.39, 205.96),
)
"""Table 4: class-conditional ImageNet 256 x 256. The authors' README now says 400 epochs for the 219M row, the paper
200."""

CEILING = (
    FidelityRow("validation data", "DiGIT + VQ", None, "", 1.92, 184.40),
    FidelityRow("validation data", "VQ only", None, "", 1.67, 175.56),
)
"""The last rows of Tables 3 and 4, read here as real images through both decoders and through the VQGAN alone."""

ADDITIVE = (
    FidelityRow("AR", "VQ tokens", 214, "200", 24.38, 30.93),
    FidelityRow("AR", "+ discriminative tokens", 219, "200", 9.66, 69.15),
    FidelityRow("AR", "+ 400 epochs", 219, "400", 9.13, 73.85),
    FidelityRow("AR", "+ 732M, DINOv2-L, K = 16,000", 732, "200", 4.59, 141.29),
)
"""Figure 3a: additive ablation, class-unconditional."""


@dataclass(frozen=True)
class EncoderRow:
    """A row of figure 4a: tokens of one encoder family.

    Attributes:
        encoder: its name.
        kind: P patch, R reconstructive, G global, D discriminative.
        fid, inception: of generation.
        probe: top-1 in percent of a small prior (39M, 100 epochs) on its tokens.
        own: top-1 in percent of the encoder itself.
    """

    encoder: str
    kind: str
    fid: float
    inception: float
    probe: float | None
    own: float | None


ENCODERS = (
    EncoderRow("MAE", "P+R", 45.51, 18.39, 31.40, 75.8),
    EncoderRow("MoCo", "G+D", 20.38, 45.02, 59.22, 76.7),
    EncoderRow("iBOT", "P+D", 16.81, 57.88, 61.10, 76.0),
    EncoderRow("VQGAN", "", 24.38, 30.93, None, None),
)
"""Figure 4a: the choice of the encoder."""


@dataclass(frozen=True)
class Bubble:
    """A model in figure 1: what it knows against what it makes.

    Attributes:
        name: of the model.
        accuracy: linear probe, top-1 in percent.
        fid: class-unconditional.
        parameters: in millions; None where unknown.
        read_off: read off the printed figure, and so not exact.
    """

    name: str
    accuracy: float
    fid: float
    parameters: float | None
    read_off: bool = False


BUBBLES = (
    Bubble("DiGIT 219M", 71.7, 9.13, 219),
    Bubble("DiGIT 732M", 80.3, 4.59, 732),
    Bubble("MAGE 463M", 78.9, 9.10, 463, read_off=True),
    Bubble("GIVT", 65.0, 17.7, None, read_off=True),
)
"""Figure 1, as far as its points have both numbers."""
