"""Unit-length codes of a VQGAN; the plain network is held by the parity tests."""

import torch
import torch.nn.functional as F

from digit.models.vqgan import VQGAN, VQGANConfig


def test_normalized_codes_are_found_by_cosine_and_survive_saving(tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(
        resolution=16, channels=8, multipliers=(1, 2), blocks=1, codes=32, code_dim=4, groups=4, normalize_codes=True
    )
    vqgan = VQGAN(config).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode():
        latents, tokens = vqgan.latents(images), vqgan.encode(images)
        assert tokens.shape == (2, 64)
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2, 64))
        assert torch.equal(tokens, (latents @ F.normalize(vqgan.codebook, dim=-1).T).argmax(-1))
        vqgan.save_pretrained(tmp_path / "vqgan")
        again = VQGAN.from_pretrained(tmp_path / "vqgan")
        assert again.config.normalize_codes
        assert torch.equal(again.encode(images), tokens)
