"""The vision tokenizer and a discriminator that tells its frames from real ones, trained side by side.

Both learn from the same reconstructions in one backward pass: what the tokenizer learns from the discriminator leaves its
weights alone, and what the discriminator learns stops at the frames. So a step is that of two optimizers taken one after
the other on the same drawings, at the price of one pass through the tokenizer.

Shapes: B chunks, T frames, C channels, H W pixels, N frames of all chunks.
"""

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from model.vision_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from model.vision_tokenizer.tokenizer import VisionTokenizer
from train.losses import hinge_discriminator_loss, hinge_generator_loss
from train.optim import OptimConfig


class AdversarialConfig(DiscriminatorConfig):
    """Options of the adversarial term. Emu3's are unknown: weight, start and optimizer are MoVQGAN's."""

    weight: float = Field(default=0.1, gt=0)
    """Of the term among the tokenizer's losses: fixed, not scaled by gradients as VQGAN does."""
    start_step: int = Field(default=1, ge=0)
    """First step with the term; before it the discriminator learns nothing."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0)


class AdversarialTokenizer(nn.Module):
    """What is trained: the tokenizer, which is exported, and its discriminator, which is not."""

    def __init__(self, tokenizer: VisionTokenizer, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.discriminator = PatchDiscriminator(config)

    def losses(self, drawn_BTCHW: Tensor, pixels_BTCHW: Tensor, started: bool) -> tuple[Tensor, Tensor]:
        """Reconstructions and the true pixels -> what the tokenizer, and what the discriminator, has to lower.

        Not `started`, both are zero: so are the discriminator's gradients, and its optimizer counts the step.
        """
        if not started:
            weights = [parameter.sum() for parameter in self.discriminator.parameters()]
            return drawn_BTCHW.new_zeros(()), 0.0 * torch.stack(weights).sum()
        drawn_NCHW, real_NCHW = drawn_BTCHW.flatten(0, 1), pixels_BTCHW.flatten(0, 1)
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        judged = cast(Tensor, torch.func.functional_call(self.discriminator, frozen, (drawn_NCHW,)))
        real, drawn = self.discriminator(real_NCHW), self.discriminator(drawn_NCHW.detach())
        return hinge_generator_loss(judged), hinge_discriminator_loss(real, drawn)


def tokenizer_of(model: nn.Module) -> VisionTokenizer:
    """What is trained -> the tokenizer in it."""
    tokenizer = model.tokenizer if isinstance(model, AdversarialTokenizer) else model
    assert isinstance(tokenizer, VisionTokenizer)
    return tokenizer
