"""The codebook: the nearest vector of each latent, the training losses, and the care of unused codes.

Shapes: B clips, C channels, t h w code grid, N latents in a row, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES_PER_CHUNK = 1 << 24  # 64 MiB of float32 distances at a time, whatever the image's size


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
        """Place the codebook on real latents, so that a network trained from scratch uses all of it from the start.

        The published initialisation, uniform in +-1/K, puts every code at one point as seen from random latents, and
        training then keeps to a handful of them. Where there are fewer latents than codes, the copies get a little
        noise. `generator` is a CPU generator: the outcome depends on the seed and the latents alone.
        """
        picks_KC = self._pick(latents_BCthw, len(self.embedding.weight), generator)
        self.embedding.weight.copy_(picks_KC)

    @torch.no_grad()
    def reset_dead_codes(
        self, uses_K: Tensor, latents_BCthw: Tensor, generator: torch.Generator, *, min_uses: int = 1
    ) -> int:
        """Move every code used fewer than `min_uses` times onto a latent; the number moved.

        `uses_K` counts how often each code was chosen since the last reset, `latents_BCthw` is a recent batch.
        """
        dead = (uses_K < min_uses).nonzero().squeeze(1).to(self.embedding.weight.device)
        if len(dead):
            self.embedding.weight[dead] = self._pick(latents_BCthw, len(dead), generator)
        return len(dead)

    def _pick(self, latents_BCthw: Tensor, count: int, generator: torch.Generator) -> Tensor:
        latents_NC = latents_BCthw.movedim(1, -1).flatten(0, 3).to(self.embedding.weight)
        order = torch.randperm(len(latents_NC), generator=generator)
        order = order.repeat(-(-count // len(order)))[:count].to(latents_NC.device)
        spread = latents_NC.std(dim=0, correction=0).clamp_min(1e-6)
        noise = torch.randn(count, latents_NC.shape[1], generator=generator).to(latents_NC)
        return latents_NC[order] + 0.01 * spread * noise


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
