"""The shape of a vision tokenizer, under the published field names, and its named sizes."""

import math
from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from schemas.recipe import Config


class VisionTokenizerConfig(Config):
    """Numbers that fix the architecture. The defaults are the published tokenizer's.

    Paper: Emu3 report, table 1: codebook 32768, latent size 4, compression 4 x 8 x 8.
    """

    codebook_size: int = Field(default=32768, ge=2)
    embed_dim: int = Field(default=4, ge=1)
    z_channels: int = Field(default=4, ge=1)
    double_z: Literal[False] = False
    in_channels: int = Field(default=3, ge=1)
    out_channels: int = Field(default=3, ge=1)
    temporal_downsample_factor: int = Field(default=4, ge=1)
    ch: int = Field(default=256, ge=1)
    ch_mult: tuple[int, ...] = Field(default=(1, 2, 2, 4), min_length=1)
    num_res_blocks: int = Field(default=2, ge=1)
    attn_resolutions: tuple[int, ...] = (3,)  # level indices, despite the published name
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    norm_groups: int = Field(default=32, ge=1)  # of every GroupNorm; not a published field, always 32 there

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ch % self.norm_groups or min(self.ch_mult) < 1:
            raise ValueError(
                f"found ch {self.ch} and ch_mult {self.ch_mult}, expected ch a multiple of norm_groups, {self.norm_groups}"
            )
        if self.embed_dim != self.z_channels:
            raise ValueError(
                f"found embed_dim {self.embed_dim} and z_channels {self.z_channels}, expected equal numbers: "
                "the decoder runs latents and codebook vectors through the same temporal layers"
            )
        if self.temporal_downsample_factor & (self.temporal_downsample_factor - 1):
            raise ValueError(
                f"found temporal_downsample_factor {self.temporal_downsample_factor}, expected a power of 2"
            )
        if any(level not in range(len(self.ch_mult)) for level in self.attn_resolutions):
            raise ValueError(
                f"found attn_resolutions {self.attn_resolutions}, expected levels 0..{len(self.ch_mult) - 1}"
            )
        return self

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along height and width."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def num_temporal_stages(self) -> int:
        """Temporal convolutions that each halve (encoder) or double (decoder) the frame count."""
        return int(math.log2(self.temporal_downsample_factor))


VISION_TOKENIZER_SIZES = MappingProxyType(
    {
        "emu3": VisionTokenizerConfig(),
        "tiny": VisionTokenizerConfig(codebook_size=512, ch=8, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=4),
    }
)
