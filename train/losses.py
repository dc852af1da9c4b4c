"""Losses as sums with their weights, so that the parts of a batch, on one worker or many, add up exactly.

Shapes: B rows or clips, L tokens, V vocabulary, T frames, C channels, H W pixels, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vision_tokenizer.tokenizer import TokenizerOutput
from train.head_loss import HeadLossConfig, VocabularyShard, weighted_nll

PEAK_TO_PEAK = 2.0  # of pixels in [-1, 1]
SMALLEST_ERROR = 1e-12  # equal pixels have 126 dB, not infinity

Normaliser = Literal["weights", "tokens"]


@dataclass(frozen=True)
class Term:
    """One figure of a step: a sum over a share of the batch, and the weight to divide by once all shares are added."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The figure itself; NaN where nothing was weighed."""
        return self.total / self.weight


def sum_of(terms: Sequence[Term]) -> Term:
    """The same figure of several parts -> that of all of them."""
    return Term(torch.stack([term.total for term in terms]).sum(), torch.stack([term.weight for term in terms]).sum())


def next_token_loss(
    hidden_BLD: Tensor,
    head_VD: Tensor,
    labels_BL: Tensor,
    weights_BL: Tensor,
    vision_offset: int,
    config: HeadLossConfig,
    normalise: Normaliser = "weights",
    shard: VocabularyShard | None = None,
    quarters_BL: Tensor | None = None,
) -> dict[str, Term]:
    """Hidden states, head, labels and their weights -> `loss`, the weighted cross-entropy, and plain ones of `text` and
    `vision`, and of each quarter of the documents if it is known.

    `loss` is divided by the sum of weights, or by the number of tokens that have one (the paper does not say which). Labels
    from `vision_offset` on are vision tokens; control tokens count as text. Only `loss` carries gradients. Tokens without
    weight cost nothing; rows may be without any.

    Paper: Emu3 report, section 2.4. The weights are decided in schemas.document, not here.
    """
    counted_N = weights_BL.flatten().nonzero().squeeze(1)
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, counted_N)
    labels_N, weights_N = labels_BL.flatten()[counted_N], weights_BL.flatten()[counted_N]
    if len(labels_N):
        total, nll_N = weighted_nll(hidden_ND, head_VD, labels_N, weights_N, config, shard)
    else:  # the share of one worker: its gradients are zero, not absent
        total, nll_N = 0.0 * (hidden_BLD.sum() + head_VD.sum()).float(), weights_N
    vision_N = labels_N >= vision_offset
    terms = {
        "loss": Term(total, weights_N.sum() if normalise == "weights" else (weights_N > 0).sum()),
        "text": Term(nll_N[~vision_N].sum(), (~vision_N).sum()),
        "vision": Term(nll_N[vision_N].sum(), vision_N.sum()),
    }
    if quarters_BL is not None:
        quarters_N = quarters_BL.flatten()[counted_N]
        for quarter in range(4):
            inside_N = quarters_N == quarter
            terms[f"quarter_{quarter + 1}"] = Term(nll_N[inside_N].sum(), inside_N.sum())
    return terms


def vision_tokenizer_loss(
    output: TokenizerOutput, pixels_BTCHW: Tensor, codebook_weight: float, commitment_weight: float
) -> dict[str, Term]:
    """A training forward and its pixels in [-1, 1] -> `loss` and its parts, each a mean over clips; `psnr` in dB.

    Squared error, plus what pulls the codebook to the latents and the latents to the codebook.
    Paper: Emu3 report, section 2.2 names L2 and commitment among the objectives; the weights are MoVQGAN's.
    """
    drawn_BTCHW = output.reconstruction_BTCHW.float()
    pixels = F.mse_loss(drawn_BTCHW, pixels_BTCHW)
    quantizing = codebook_weight * output.codebook_loss + commitment_weight * output.commitment_loss
    figures = {
        "pixels": pixels,
        "commitment": output.commitment_loss,
        "psnr": psnr(drawn_BTCHW.detach(), pixels_BTCHW).mean(),
    }
    return {
        "loss": clip_mean(pixels + quantizing, pixels_BTCHW),
        **{name: clip_mean(figure.detach(), pixels_BTCHW) for name, figure in figures.items()},
    }


def clip_mean(mean: Tensor, pixels_BTCHW: Tensor, counts: bool = True) -> Term:
    """A mean over these clips -> a term, weighed by their number; a term of nothing where it does not count."""
    num_clips = torch.tensor(float(len(pixels_BTCHW) if counts else 0), device=pixels_BTCHW.device)
    return Term(mean * num_clips, num_clips)


def hinge_generator_loss(drawn_logits: Tensor) -> Tensor:
    """A discriminator's logits of what was drawn -> what the generator has to lower.

    Paper: Lim and Ye 2017, "Geometric GAN", section 3: -E[D(G)].
    """
    return -drawn_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, drawn_logits: Tensor) -> Tensor:
    """Logits of real and of drawn pictures -> what the discriminator has to lower.

    Paper: Lim and Ye 2017, section 3: E[max(0, 1 - D(x))] + E[max(0, 1 + D(G))]; halved, as VQGAN and MoVQGAN do.
    """
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + drawn_logits.float()).mean())


def psnr(drawn_BTCHW: Tensor, pixels_BTCHW: Tensor) -> Tensor:
    """Reconstructions, clipped to [-1, 1] as a picture is, and pixels in [-1, 1] -> dB of each clip, (B,)."""
    error_B = (drawn_BTCHW.float().clamp(-1, 1) - pixels_BTCHW).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(PEAK_TO_PEAK**2 / error_B.clamp_min(SMALLEST_ERROR))


def codes_used(uses_K: Tensor) -> Tensor:
    """How often each code was chosen -> the share of codes that were chosen at all, 0..1."""
    return (uses_K > 0).float().mean()
