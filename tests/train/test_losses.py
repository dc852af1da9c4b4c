import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.vision_tokenizer.quantizer import Quantizer
from model.vision_tokenizer.tokenizer import TokenizerOutput
from train.head_loss import HeadLossConfig
from train.losses import (
    Term,
    codes_used,
    hinge_discriminator_loss,
    hinge_generator_loss,
    next_token_loss,
    psnr,
    vision_tokenizer_loss,
)

OFFSET = 20  # ids 20..31 are vision tokens


def _batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 32, (3, 7), generator=generator)
    weights = torch.where(labels >= OFFSET, 0.5, 1.0)
    weights[0, 3:] = 0.0
    return logits.requires_grad_(), labels, weights


def _terms(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict[str, Term]:
    """Logits as hidden states before a head that changes nothing."""
    head = torch.eye(logits.shape[-1])
    return next_token_loss(logits.float(), head, labels, weights, OFFSET, HeadLossConfig(chunk_tokens=4))


def test_loss_is_the_definition() -> None:
    logits, labels, weights = _batch()
    total = 0.0
    vision: list[float] = []
    text: list[float] = []
    for row in range(3):
        for place in range(7):
            nll = -torch.log_softmax(logits[row, place].float(), -1)[labels[row, place]].item()
            weight = weights[row, place].item()
            total += weight * nll
            if weight:
                (vision if labels[row, place] >= OFFSET else text).append(nll)
    terms = _terms(logits, labels, weights)
    assert terms["loss"].mean.item() == pytest.approx(total / weights.sum().item(), rel=1e-6)
    assert terms["vision"].mean.item() == pytest.approx(sum(vision) / len(vision), rel=1e-6)
    assert terms["text"].mean.item() == pytest.approx(sum(text) / len(text), rel=1e-6)


def test_loss_and_gradient_are_torchs_class_weighted_cross_entropy() -> None:
    # What UniVLA computes: one weight per class, normalised by the sum of weights.
    logits, labels, weights = _batch()
    terms = _terms(logits, labels, weights)
    (ours,) = torch.autograd.grad(terms["loss"].mean, logits)
    class_weights = torch.where(torch.arange(32) >= OFFSET, 0.5, 1.0)
    ignored = torch.where(weights > 0, labels, -100)
    theirs_loss = F.cross_entropy(logits.float().flatten(0, 1), ignored.flatten(), weight=class_weights)
    (theirs,) = torch.autograd.grad(theirs_loss, logits)
    assert terms["loss"].mean.item() == pytest.approx(theirs_loss.item(), rel=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_equal_weights_are_the_transformers_packages_loss() -> None:
    losses = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels, _ = _batch()
    ours = _terms(logits, labels, torch.ones(3, 7))["loss"].mean
    theirs = losses.ForCausalLMLoss(logits, None, vocab_size=32, shift_labels=labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_parts_of_a_batch_add_up() -> None:
    logits, labels, weights = _batch()
    whole = _terms(logits, labels, weights)
    parts = [_terms(logits[rows], labels[rows], weights[rows]) for rows in (slice(1), slice(1, 3))]
    for name, term in whole.items():
        total = sum(float(part[name].total.detach()) for part in parts)
        weight = sum(float(part[name].weight) for part in parts)
        assert total / weight == pytest.approx(term.mean.item(), rel=1e-6)


def test_only_the_weighted_loss_has_gradients() -> None:
    terms = _terms(*_batch())
    assert terms["loss"].total.requires_grad
    assert not terms["text"].total.requires_grad
    assert not terms["vision"].total.requires_grad


def test_rows_without_weight_have_gradients_of_zero() -> None:
    logits, labels, _ = _batch()
    term = _terms(logits, labels, torch.zeros(3, 7))["loss"]
    (gradient,) = torch.autograd.grad(term.total, logits)
    assert float(term.weight) == float(term.total.detach()) == 0.0
    assert not gradient.any()


def test_the_sum_is_divided_by_weights_or_by_tokens() -> None:
    logits, labels, weights = _batch()
    terms = [
        next_token_loss(logits.float(), torch.eye(32), labels, weights, OFFSET, HeadLossConfig(), normalise)["loss"]
        for normalise in ("weights", "tokens")
    ]
    assert terms[0].total.item() == terms[1].total.item()
    assert [float(term.weight) for term in terms] == [float(weights.sum()), float((weights > 0).sum())]


def test_tokenizer_loss_is_the_weighted_sum_of_its_parts() -> None:
    pixels = torch.zeros(2, 4, 3, 8, 8)
    output = TokenizerOutput(
        torch.full_like(pixels, 0.5), torch.tensor(2.0), torch.tensor(3.0), torch.zeros(2, 1, 1, 1, dtype=torch.int64)
    )
    terms = vision_tokenizer_loss(output, pixels, codebook_weight=0.25, commitment_weight=1.0)
    assert terms["loss"].mean.item() == pytest.approx(0.25 + 0.25 * 2.0 + 3.0)
    assert terms["pixels"].mean.item() == pytest.approx(0.25)
    assert terms["commitment"].mean.item() == pytest.approx(3.0)
    assert terms["loss"].weight.item() == 2.0


def test_squared_error_codebook_and_commitment_are_vq_vaes() -> None:
    # van den Oord et al. 2017, equation 3, in MoVQGAN's form: the weight on the codebook's term.
    generator = torch.Generator().manual_seed(0)
    quantize = Quantizer(7, 4)
    latents = torch.randn(2, 4, 1, 3, 5, generator=generator).requires_grad_()
    drawn, pixels = (torch.randn(2, 4, 3, 8, 8, generator=generator) for _ in range(2))
    straight, codes, codebook_loss, commitment_loss = quantize.quantize(latents)
    terms = vision_tokenizer_loss(TokenizerOutput(drawn, codebook_loss, commitment_loss, codes), pixels, 0.25, 1.0)
    z = latents.detach().double().numpy().transpose(0, 2, 3, 4, 1).reshape(-1, 4)
    e = quantize.embedding.weight.detach().double().numpy()
    nearest = ((z[:, None] - e[None]) ** 2).sum(-1).argmin(1)
    distance = float(((z - e[nearest]) ** 2).mean())
    squared = float(((drawn.double() - pixels.double()) ** 2).mean())
    assert terms["loss"].mean.item() == pytest.approx(squared + 0.25 * distance + distance, rel=1e-6)
    to_latents, to_codes = torch.autograd.grad(terms["loss"].mean, [latents, quantize.embedding.weight])
    flat = to_latents.movedim(1, -1).reshape(-1, 4).double().numpy()
    np.testing.assert_allclose(flat, 2 * (z - e[nearest]) / z.size, rtol=1e-5, atol=1e-9)
    pulled = np.zeros_like(e)
    np.add.at(pulled, nearest, 0.25 * 2 * (e[nearest] - z) / z.size)
    np.testing.assert_allclose(to_codes.double().numpy(), pulled, rtol=1e-5, atol=1e-9)
    (through,) = torch.autograd.grad(straight.square().sum(), latents)
    torch.testing.assert_close(through, 2 * straight.detach())  # gradients pass the codebook as if it were not there


def test_hinge_losses_are_those_of_the_papers() -> None:
    # Lim and Ye 2017; Miyato et al. 2018, equations 16 and 17, halved as in VQGAN.
    generator = torch.Generator().manual_seed(0)
    real, drawn = (2 * torch.randn(3, 1, 5, 4, generator=generator) for _ in range(2))
    of_real = [min(0.0, -1.0 + value) for value in real.flatten().double().tolist()]
    of_drawn = [min(0.0, -1.0 - value) for value in drawn.flatten().double().tolist()]
    assert 0 < of_real.count(0.0) < 60  # both sides of the hinge
    expected = -0.5 * (math.fsum(of_real) / 60 + math.fsum(of_drawn) / 60)
    assert hinge_discriminator_loss(real, drawn).item() == pytest.approx(expected, rel=1e-6)
    assert hinge_generator_loss(drawn).item() == pytest.approx(-math.fsum(drawn.flatten().tolist()) / 60, rel=1e-5)


def test_psnr_is_that_of_a_picture_on_its_own_scale() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 4, 3, 8, 8, generator=generator) * 2 - 1
    drawn = pixels + torch.tensor([0.1, 0.5]).view(2, 1, 1, 1, 1) * torch.randn(pixels.shape, generator=generator)
    found = psnr(drawn, pixels)
    for clip in range(2):
        pair = pixels[clip].numpy(), drawn[clip].clamp(-1, 1).numpy()
        assert found[clip].item() == pytest.approx(metrics.peak_signal_noise_ratio(*pair, data_range=2.0), rel=1e-5)
    assert math.isfinite(psnr(pixels, pixels).max().item())


def test_codes_in_use_are_those_chosen_at_least_once() -> None:
    assert codes_used(torch.tensor([3, 0, 1, 0, 0])).item() == pytest.approx(0.4)
