"""Codebook vectors to pixels. Every spatial norm is guided by the codebook vectors at its place.

Shapes: B clips, T frames, t latent frames, C channels, Q guide channels, H W pixels, h w code grid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vision_tokenizer.blocks import (
    Attention,
    ResBlock,
    SpatialNorm,
    TemporalResBlock,
    TemporalUpsample,
    Upsample,
    frames_of,
)
from model.vision_tokenizer.config import VisionTokenizerConfig
from model.vision_tokenizer.encoder import MiddleBlock


class UpLevel(nn.Module):
    """The residual blocks of one resolution, with attention where the config asks, then a doubling."""

    def __init__(self, config: VisionTokenizerConfig, level: int) -> None:
        super().__init__()
        multipliers = (*config.ch_mult, config.ch_mult[-1])
        channels = config.ch * multipliers[level + 1]
        out_channels = config.ch * config.ch_mult[level]
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.num_res_blocks + 1):
            block = ResBlock(channels, out_channels, config.norm_groups, config.dropout, config.embed_dim)
            self.block.append(block)
            channels = out_channels
            if level in config.attn_resolutions:
                self.attn.append(Attention(channels, config.norm_groups, config.embed_dim))
        self.upsample = Upsample(channels) if level > 0 else None

    def forward(self, x_BCHW: Tensor, guide_BQHW: Tensor) -> Tensor:
        """Features -> features, of twice the size except at level 0."""
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW, guide_BQHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW, guide_BQHW)
        return x_BCHW if self.upsample is None else self.upsample(x_BCHW)


class Decoder(nn.Module):
    """Latents and their codebook vectors to frames."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.time_res_stack = nn.ModuleList(
            TemporalResBlock(config.z_channels, config.dropout) for _ in range(config.num_res_blocks)
        )
        self.time_conv = nn.ModuleList(TemporalUpsample(config.z_channels) for _ in range(config.num_temporal_stages))
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = MiddleBlock(config, config.embed_dim)
        self.up = nn.ModuleList(UpLevel(config, level) for level in range(len(config.ch_mult)))
        self.norm_out = SpatialNorm(config.ch * config.ch_mult[0], config.norm_groups, config.embed_dim)
        self.conv_out = nn.Conv2d(config.ch * config.ch_mult[0], config.out_channels, 3, padding=1)

    def forward(self, latents_BCtHW: Tensor, quantized_BQtHW: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents after `post_quant_conv`, and the codebook vectors -> pixels (B, T, 3, H, W), not clipped.

        With `num_frames` only the first of them: frames meet in the temporal layers alone, which are little of the work.
        """
        num_clips = latents_BCtHW.shape[0]
        # Both go through the same temporal layers, so the guide of each frame is a moving one.
        both = torch.cat((latents_BCtHW, quantized_BQtHW), dim=0)
        for block in self.time_res_stack:
            both = block(both)
        for conv in self.time_conv:
            both = F.silu(conv(both))
        x_BCHW, guide_BQHW = frames_of(both[:, :, :num_frames]).chunk(2, dim=0)
        x_BCHW = self.mid(self.conv_in(x_BCHW), guide_BQHW)
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW, guide_BQHW)
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(x_BCHW, guide_BQHW)))
        return torch.unflatten(pixels, 0, (num_clips, -1))
