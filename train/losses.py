"""Losses as sums with their weights, so that the parts of a batch, on one worker or many, add up exactly.

Shapes: B rows or clips, L tokens, V vocabulary, T frames, C channels, H W pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vision_tokenizer.tokenizer import TokenizerOutput
from schemas.errors import SchemaError


@dataclass(frozen=True)
class Term:
    """One figure of a step: a sum over a share of the batch, and the weight to divide by once all shares are added."""

    total: Tensor
    weight: Tensor

    @property
    def mean(self) -> Tensor:
        """The figure itself; NaN where nothing was weighed."""
        return self.total / self.weight


def weighted_next_token_loss(
    logits_BLV: Tensor, labels_BL: Tensor, weights_BL: Tensor, vision_offset: int
) -> dict[str, Term]:
    """Logits, labels and their weights -> `loss`, the weighted cross-entropy, and plain ones of `text` and `vision`.

    `loss` is normalised by the sum of weights (ours: the paper does not say whether by weights or by tokens). Labels
    from `vision_offset` on are vision tokens; control tokens count as text. Only `loss` carries gradients.

    Raises: SchemaError if every weight is zero.
    Paper: Emu3 report, section 2.4. The weights are decided in schemas.document, not here.
    """
    if not bool((weights_BL > 0).any()):
        raise SchemaError(f"found no label with a weight in a batch of {tuple(labels_BL.shape)}: nothing to learn from")
    nll_BL = F.cross_entropy(logits_BLV.float().flatten(0, 1), labels_BL.flatten(), reduction="none").view_as(
        weights_BL
    )
    counted_BL = weights_BL > 0
    vision_BL = counted_BL & (labels_BL >= vision_offset)
    text_BL = counted_BL & (labels_BL < vision_offset)
    plain_BL = nll_BL.detach()
    return {
        "loss": Term((nll_BL * weights_BL).sum(), weights_BL.sum()),
        "text": Term(plain_BL[text_BL].sum(), text_BL.sum()),
        "vision": Term(plain_BL[vision_BL].sum(), vision_BL.sum()),
    }


def vision_tokenizer_loss(
    output: TokenizerOutput, pixels_BTCHW: Tensor, codebook_weight: float, commitment_weight: float
) -> dict[str, Term]:
    """A training forward and its pixels in [-1, 1] -> `loss` and its parts, each a mean over clips.

    Squared error, plus what pulls the codebook to the latents and the latents to the codebook.
    Paper: Emu3 report, section 2.2 names L2 and commitment among the objectives; the weights are MoVQGAN's.
    """
    num_clips = torch.tensor(float(len(pixels_BTCHW)), device=pixels_BTCHW.device)
    pixels = F.mse_loss(output.reconstruction_BTCHW.float(), pixels_BTCHW)
    quantizing = codebook_weight * output.codebook_loss + commitment_weight * output.commitment_loss
    return {
        "loss": Term((pixels + quantizing) * num_clips, num_clips),
        "pixels": Term(pixels.detach() * num_clips, num_clips),
        "commitment": Term(output.commitment_loss.detach() * num_clips, num_clips),
    }
