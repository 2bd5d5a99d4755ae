import torch
import torch.nn.functional as F
from torch import nn

from digit.training.losses.quantizer import EmaQuantizer, rotate


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantizer(codes: int = 16, dim: int = 4, **changes: object) -> EmaQuantizer:
    codebook = nn.Parameter(torch.zeros(codes, dim), requires_grad=False)
    return EmaQuantizer(codebook, **{"decay": 0.9, "dead_below": 0.03, "gradient": "straight-through", **changes})


def latents(batch: int = 8, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dim, 4, 4, generator=generator(seed))


def test_codes_are_the_nearest_and_the_gradient_passes_straight() -> None:
    torch.manual_seed(0)
    part, z = quantizer(), latents().requires_grad_()
    codes, tokens, commitment = part(z)
    flat = z.detach().flatten(2).transpose(1, 2)
    distances = torch.cdist(flat, part.codebook[None].expand(len(flat), -1, -1))
    torch.testing.assert_close(distances.gather(2, tokens[:, :, None]), distances.min(2, keepdim=True).values)
    torch.testing.assert_close(codes.flatten(2).transpose(1, 2), part.codebook[tokens])
    torch.testing.assert_close(commitment, F.mse_loss(codes.detach(), z))
    wanted = torch.randn(codes.shape, generator=generator(3))
    (codes * wanted).sum().backward()
    torch.testing.assert_close(z.grad, wanted)


def test_rotation_gives_the_codes_and_turns_the_gradient() -> None:
    z, codes = (
        torch.randn(5, 7, 4, generator=generator()).requires_grad_(),
        torch.randn(5, 7, 4, generator=generator(1)),
    )
    out = rotate(z, codes)
    torch.testing.assert_close(out, codes, atol=1e-5, rtol=1e-5)
    wanted = torch.randn(5, 7, 4, generator=generator(2))
    (out * wanted).sum().backward()
    scale = codes.norm(dim=-1) / z.detach().norm(dim=-1)
    # a rotation and a scaling keep lengths up to the scale, and the angle between gradient and code becomes that to the
    # latent
    torch.testing.assert_close(z.grad.norm(dim=-1), wanted.norm(dim=-1) * scale)
    torch.testing.assert_close(
        F.cosine_similarity(z.grad, z.detach(), dim=-1),
        F.cosine_similarity(wanted, codes, dim=-1),
        atol=1e-4,
        rtol=1e-4,
    )


def test_codebook_moves_by_the_closed_form() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=3, dead_below=0.0)
    part(latents(seed=0))
    part.update()
    uses, sums = part.uses.clone(), part.sums.clone()
    _, tokens, _ = part(latents(seed=1))
    part.update()
    decay = min(0.9, 2 / 11)
    flat = latents(seed=1).flatten(2).transpose(1, 2).reshape(-1, 4)
    for code in range(3):
        taken = flat[tokens.flatten() == code]
        expected_uses = decay * uses[code] + (1 - decay) * len(taken)
        expected_sums = decay * sums[code] + (1 - decay) * taken.sum(0)
        torch.testing.assert_close(part.uses[code], expected_uses)
        torch.testing.assert_close(part.codebook[code], expected_sums / expected_uses, atol=1e-4, rtol=1e-4)


def test_the_first_batch_places_the_codes_on_its_clusters() -> None:
    torch.manual_seed(0)
    centres = torch.randn(8, 4, generator=generator()) * 10
    which = torch.randint(8, (64, 16), generator=generator(1))
    noise = torch.randn(64, 16, 4, generator=generator(2)) * 0.1
    z = (centres[which] + noise).transpose(1, 2).unflatten(2, (4, 4))
    part = quantizer(codes=64)
    _, _, commitment = part(z)
    assert float(commitment) < 0.05  # clusters are 100 times farther apart


def test_parts_of_a_batch_move_the_codebook_like_the_whole() -> None:
    whole, parts = quantizer(), quantizer()
    z = latents(16)
    for part in (whole, parts):
        torch.manual_seed(0)
        part(z)
        part.update()
    torch.manual_seed(1)
    whole(z)
    whole.update()
    torch.manual_seed(1)
    parts(z[:8])
    parts(z[8:])
    parts.update()
    torch.testing.assert_close(parts.codebook, whole.codebook)


def test_dead_codes_are_revived() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=64)
    for step in range(10):
        part(latents(32, seed=step))
        part.update()
    with torch.no_grad():
        part.codebook[:40] = 1e3  # far from every latent
        part.sums[:40] = part.uses[:40, None] * 1e3
    before = part(latents(32, seed=100))[1].unique().numel()
    part._recent.clear()
    assert before <= 24
    for step in range(100):
        part(latents(32, seed=step))
        part.update()
    after = part.eval()(latents(32, seed=100))[1].unique().numel()
    assert after >= 58
    assert float(part.codebook.abs().max()) < 10
    assert float(part.statistics()["codebook_use"]) > 0.9
    assert 40 < float(part.statistics()["perplexity"]) <= 64


def test_without_revival_dead_codes_stay_dead() -> None:
    torch.manual_seed(0)
    part = quantizer(codes=64, dead_below=0.0)
    part(latents(32))
    with torch.no_grad():
        part.codebook[:40] = 1e3
        part.sums[:40] = part.uses[:40, None] * 1e3
    for step in range(30):
        part(latents(32, seed=step))
        part.update()
    assert part.eval()(latents(32, seed=100))[1].unique().numel() <= 24


def test_eval_changes_nothing() -> None:
    torch.manual_seed(0)
    part = quantizer()
    part(latents())
    part.update()
    before = {name: value.clone() for name, value in part.state_dict().items()}
    part.eval()(latents(seed=5))
    assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    assert not part._recent


def test_codes_of_unit_length_stay_so_and_are_chosen_by_cosine() -> None:
    codebook = nn.Parameter(F.normalize(torch.randn(16, 4, generator=generator()), dim=-1))
    quantizer = EmaQuantizer(codebook, 0.9, 0.03, "straight-through", normalize=True).train()
    for step in range(3):
        latents = 3 * torch.randn(2, 4, 6, 6, generator=generator(step))
        codes, tokens, _ = quantizer(latents)
        flat = codes.flatten(2).transpose(1, 2).detach()
        torch.testing.assert_close(flat.norm(dim=-1), torch.ones(2, 36))
        used = (F.normalize(latents, dim=1).flatten(2).transpose(1, 2).unsqueeze(2) * flat.unsqueeze(2)).sum(-1)
        assert used.mean() > 0.5
        torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(16))
    quantizer.eval()
    _, tokens, _ = quantizer(latents)
    cosine = F.normalize(latents, dim=1).flatten(2).transpose(1, 2) @ codebook.T
    assert torch.equal(tokens, cosine.argmax(-1))
