"""The codebook search against brute force, and the care of unused codes."""

import pytest
import torch

from model.vision_tokenizer import quantizer
from model.vision_tokenizer.quantizer import Quantizer, nearest_codes


def test_nearest_codes_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1001, 4, generator=generator)
    codebook = torch.randn(300, 4, generator=generator)
    expected = torch.cdist(latents.double(), codebook.double()).argmin(dim=1)
    assert torch.equal(nearest_codes(latents, codebook), expected)
    monkeypatch.setattr(quantizer, "DISTANCES_PER_CHUNK", 7 * 300)  # many chunks, the last one ragged
    assert torch.equal(nearest_codes(latents, codebook), expected)


def test_nearest_codes_ignore_autocast() -> None:
    codebook = torch.tensor([[1.0], [1.001], [1.002]])  # one number in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_codes(codebook.clone(), codebook).tolist() == [0, 1, 2]


def test_a_codebook_from_latents_is_used_in_full() -> None:
    latents = torch.randn(2, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 3 + 5
    published, placed = Quantizer(256, 4), Quantizer(256, 4)
    torch.nn.init.uniform_(published.embedding.weight, -1 / 256, 1 / 256)
    placed.init_codebook_from_latents(latents, torch.Generator().manual_seed(2))
    assert len(published(latents).unique()) < 40
    assert len(placed(latents).unique()) == 256
    again = Quantizer(256, 4)
    again.init_codebook_from_latents(latents, torch.Generator().manual_seed(2))
    assert torch.equal(again.embedding.weight, placed.embedding.weight)


def test_a_codebook_larger_than_the_latents_has_no_twins() -> None:
    quantize = Quantizer(100, 4)
    quantize.init_codebook_from_latents(torch.randn(1, 4, 1, 2, 3), torch.Generator().manual_seed(0))
    assert len(quantize.embedding.weight.unique(dim=0)) == 100


def test_only_dead_codes_move() -> None:
    quantize = Quantizer(8, 4)
    before = quantize.embedding.weight.detach().clone()
    uses = torch.tensor([5, 0, 3, 0, 1, 9, 9, 2])
    latents = torch.full((1, 4, 1, 2, 2), 7.0)
    moved = quantize.reset_dead_codes(uses, latents, torch.Generator().manual_seed(0), min_uses=2)
    assert moved == 3
    kept = [0, 2, 5, 6, 7]
    assert torch.equal(quantize.embedding.weight[kept], before[kept])
    torch.testing.assert_close(quantize.embedding.weight[[1, 3, 4]].detach(), torch.full((3, 4), 7.0))


def test_what_is_rare_gets_a_code_of_its_own() -> None:
    """Four colours on a ground that is 97 % of all latents: drawn evenly, a codebook of 16 misses some nearly always."""
    generator = torch.Generator().manual_seed(3)
    points = torch.eye(5)[:, :4] * 10  # the fifth is the ground, at zero
    which = torch.multinomial(torch.tensor([0.0075] * 4 + [0.97]), 2048, replacement=True, generator=generator)
    latents = (points[which] + 0.05 * torch.randn(2048, 4, generator=generator)).T.reshape(1, 4, 1, 32, 64)
    for seed in range(20):
        quantize = Quantizer(16, 4)
        quantize.init_codebook_from_latents(latents, torch.Generator().manual_seed(seed))
        gap = torch.cdist(points, quantize.embedding.weight).min(dim=1).values
        assert float(gap.max()) < 1, seed


def test_dead_codes_move_to_where_no_code_is() -> None:
    quantize = Quantizer(4, 2)
    with torch.no_grad():
        quantize.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 99.0], [98.0, 98.0]]))
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    latents = corners.repeat_interleave(torch.tensor([500, 500, 3, 3]), 0).T.reshape(1, 2, 1, 2, 503)
    quantize.reset_dead_codes(torch.tensor([9, 9, 0, 0]), latents, torch.Generator().manual_seed(0))
    gap = torch.cdist(corners, quantize.embedding.weight).min(dim=1).values
    assert float(gap.max()) < 1
