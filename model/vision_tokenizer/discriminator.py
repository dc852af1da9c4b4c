"""A judge of patches: which parts of a frame look drawn, for adversarial training of the vision tokenizer.

Emu3's own discriminator is unknown. This is the PatchGAN of pix2pix (Isola et al. 2017) in the size of MoVQGAN's config, two
layers and 64 channels, on single frames. The norms are ours: GroupNorm, where MoVQGAN has BatchNorm, so that what is
thought of a frame depends on that frame alone and a batch may be split over workers.

Shapes: N frames, C channels, H W pixels, h w patches.
"""

from typing import Self, cast

from pydantic import Field, model_validator
from torch import Tensor, nn

from schemas.recipe import Config

MOST_CHANNELS = 8  # times those of the first layer
KERNEL = 4
SLOPE = 0.2
INITIAL_STD = 0.02


class DiscriminatorConfig(Config):
    """Numbers that fix the architecture. Each of `num_layers` halves height and width; two more look at what is left."""

    in_channels: int = Field(default=3, ge=1)
    channels: int = Field(default=64, ge=1)
    num_layers: int = Field(default=2, ge=1)
    norm_groups: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.channels % self.norm_groups:
            raise ValueError(f"found channels {self.channels}, expected a multiple of norm_groups, {self.norm_groups}")
        return self


class PatchDiscriminator(nn.Module):
    """Frames -> a logit for each overlapping patch, high where it looks real. With two layers a patch has 34 x 34 pixels."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, channels, KERNEL, 2, 1), nn.LeakyReLU(SLOPE)]
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, MOST_CHANNELS)
            stride = 2 if index < config.num_layers else 1
            layers += [
                nn.Conv2d(channels, wider, KERNEL, stride, 1, bias=False),
                nn.GroupNorm(config.norm_groups, wider),
                nn.LeakyReLU(SLOPE),
            ]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, KERNEL, 1, 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh parameters as pix2pix has them: normal with deviation 0.02, norms around 1."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, INITIAL_STD)
                nn.init.zeros_(module.bias)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> logits (N, 1, h, w)."""
        return cast(Tensor, self.layers(pixels_NCHW))
