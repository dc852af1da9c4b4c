"""The codebook: the nearest vector of each latent, the training losses, and the care of unused codes.

Shapes: B clips, C channels, t h w code grid, N latents in a row, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES_PER_CHUNK = 1 << 24  # 64 MiB of float32 distances at a time, whatever the image's size
SPREAD_ROUNDS = 64
SPREAD_LATENTS = 1 << 16


class Quantizer(nn.Module):
    """Nearest neighbour in Euclidean distance over a plain codebook: no projection, no normalisation."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)

    def forward(self, latents_BCthw: Tensor) -> Tensor:
        """Latents -> the code of the nearest codebook vector, (B, t, h, w) int64."""
        latents_NC = latents_BCthw.movedim(1, -1).flatten(0, 3)
        codes_N = nearest_codes(latents_NC, self.embedding.weight)
        return codes_N.view(len(latents_BCthw), *latents_BCthw.shape[2:])

    def lookup(self, codes_Bthw: Tensor) -> Tensor:
        """Codes -> their vectors, (B, C, t, h, w)."""
        vectors: Tensor = self.embedding(codes_Bthw)
        return vectors.movedim(-1, 1)

    def quantize(self, latents_BCthw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents -> vectors (straight-through: gradients pass to the latents), codes, codebook loss, commitment loss.

        The losses are mean squared distances without weights; the trainer weighs them.
        """
        codes_Bthw = self(latents_BCthw)
        vectors_BCthw = self.lookup(codes_Bthw)
        codebook_loss = F.mse_loss(vectors_BCthw.float(), latents_BCthw.detach().float())
        commitment_loss = F.mse_loss(latents_BCthw.float(), vectors_BCthw.detach().float())
        straight_BCthw = latents_BCthw + (vectors_BCthw - latents_BCthw).detach()
        return straight_BCthw, codes_Bthw, codebook_loss, commitment_loss

    @torch.no_grad()
    def init_codebook_from_latents(self, latents_BCthw: Tensor, generator: torch.Generator) -> None:
        """Place the codebook on real latents, far from one another, so that a network trained from scratch uses all of it.

        The published initialisation, uniform in +-1/K, puts every code at one point as seen from random latents, and
        training then keeps to a handful of them. Latents drawn evenly are nearly all of whatever is common, so that what is
        rare shares a code with something else, often to the end. `generator` is a CPU generator: the outcome depends on
        the seed and the latents alone.
        """
        weight_KC = self.embedding.weight
        weight_KC.copy_(
            _spread(latents_BCthw.movedim(1, -1).flatten(0, 3).to(weight_KC), None, len(weight_KC), generator)
        )

    @torch.no_grad()
    def reset_dead_codes(
        self, uses_K: Tensor, latents_BCthw: Tensor, generator: torch.Generator, *, min_uses: int = 1
    ) -> int:
        """Move every code used fewer than `min_uses` times onto a latent far from the codes in use; the number moved.

        `uses_K` counts how often each code was chosen since the last reset, `latents_BCthw` is a recent batch.
        """
        weight_KC = self.embedding.weight
        is_dead_K = (uses_K < min_uses).to(weight_KC.device)
        count = int(is_dead_K.sum())
        if count:
            latents_NC = latents_BCthw.movedim(1, -1).flatten(0, 3).to(weight_KC)
            weight_KC[is_dead_K] = _spread(latents_NC, weight_KC[~is_dead_K], count, generator)
        return count


def _spread(latents_NC: Tensor, taken_MC: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the latents far from one another and from what is taken, with a little noise so that none are twins.

    k-means++ (Arthur and Vassilvitskii 2007): each is drawn by its squared distance to the nearest one already there. Many
    codes are drawn some at a time, which is nearly the same and takes at most `SPREAD_ROUNDS` passes.
    """
    order = torch.randperm(len(latents_NC), generator=generator)[:SPREAD_LATENTS].to(latents_NC.device)
    latents_NC = latents_NC[order]
    spread_C = latents_NC.std(dim=0, correction=0).clamp_min(1e-6)
    picked: list[Tensor] = []
    if taken_MC is None or not len(taken_MC):
        taken_MC = latents_NC[:1]  # the order is random
        picked.append(taken_MC)
    nearest_N = _square_to_nearest(latents_NC, taken_MC)
    left = count - len(picked)
    per_round = -(-left // SPREAD_ROUNDS)
    while left:
        # A latent that equals a taken one is drawn only when there is no other.
        chances_N = nearest_N.double().cpu() + 1e-12 * float(spread_C.square().sum())
        num_drawn = min(left, per_round)
        again = num_drawn > len(chances_N)
        drawn = torch.multinomial(chances_N, num_drawn, replacement=again, generator=generator)
        new_KC = latents_NC[drawn.to(latents_NC.device)]
        picked.append(new_KC)
        nearest_N = torch.minimum(nearest_N, _square_to_nearest(latents_NC, new_KC))
        left -= len(drawn)
    noise = torch.randn(count, latents_NC.shape[1], generator=generator).to(latents_NC)
    return torch.cat(picked) + 0.01 * spread_C * noise


def _square_to_nearest(latents_NC: Tensor, codes_KC: Tensor) -> Tensor:
    """Latents and codes -> squared distance of each latent to the nearest code."""
    return (latents_NC - codes_KC[nearest_codes(latents_NC, codes_KC)]).square().sum(dim=1)


@torch.no_grad()
def nearest_codes(latents_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Latents and codebook -> index of the nearest codebook vector of each latent, int64; the first one on a tie.

    In float32 whatever the autocast setting, and in chunks: the full matrix of a 1024 x 1024 image against 32,768 codes
    is 2.1 GB.
    """
    with torch.autocast(latents_NC.device.type, enabled=False):
        latents_NC, codebook_KC = latents_NC.float(), codebook_KC.float()
        # The latent's own square shifts all its distances alike and is left out.
        squares_K = codebook_KC.square().sum(dim=1)
        chunk = max(1, DISTANCES_PER_CHUNK // len(codebook_KC))
        parts = torch.split(latents_NC, chunk)
        return torch.cat([torch.addmm(squares_K, part, codebook_KC.T, alpha=-2).argmin(dim=1) for part in parts])
