"""Pixels to latents. Everything spatial works on single frames; four small temporal layers follow.

Shapes: B clips, T frames, t latent frames (T / 4), C channels, H W pixels, h w code grid (H / 8, W / 8).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.vision_tokenizer.blocks import (
    NORM_EPS,
    Attention,
    Downsample,
    ResBlock,
    TemporalDownsample,
    TemporalResBlock,
    frames_of,
)
from model.vision_tokenizer.config import VisionTokenizerConfig


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block at the smallest size."""

    def __init__(self, config: VisionTokenizerConfig, guide_channels: int | None = None) -> None:
        super().__init__()
        channels, groups = config.ch * config.ch_mult[-1], config.norm_groups
        self.block_1 = ResBlock(channels, channels, groups, config.dropout, guide_channels)
        self.attn_1 = Attention(channels, groups, guide_channels)
        self.block_2 = ResBlock(channels, channels, groups, config.dropout, guide_channels)

    def forward(self, x_BCHW: Tensor, guide_BQHW: Tensor | None = None) -> Tensor:
        """Features -> features."""
        x_BCHW = self.block_1(x_BCHW, guide_BQHW)
        x_BCHW = self.attn_1(x_BCHW, guide_BQHW)
        out_BCHW: Tensor = self.block_2(x_BCHW, guide_BQHW)
        return out_BCHW


class DownLevel(nn.Module):
    """The residual blocks of one resolution, with attention where the config asks, then a halving."""

    def __init__(self, config: VisionTokenizerConfig, level: int) -> None:
        super().__init__()
        channels = config.ch * (1, *config.ch_mult)[level]
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.num_res_blocks):
            out_channels = config.ch * config.ch_mult[level]
            self.block.append(ResBlock(channels, out_channels, config.norm_groups, config.dropout))
            channels = out_channels
            if level in config.attn_resolutions:
                self.attn.append(Attention(channels, config.norm_groups))
        self.downsample = Downsample(channels) if level < len(config.ch_mult) - 1 else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features -> features, of half the size except at the last level."""
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW)
        return x_BCHW if self.downsample is None else self.downsample(x_BCHW)


class Encoder(nn.Module):
    """Frames to the latents that `quant_conv` and the codebook then turn into codes."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        channels = config.ch * config.ch_mult[-1]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(DownLevel(config, level) for level in range(len(config.ch_mult)))
        self.mid = MiddleBlock(config)
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)
        self.time_conv = nn.ModuleList(TemporalDownsample(config.z_channels) for _ in range(config.num_temporal_stages))
        self.time_res_stack = nn.ModuleList(
            TemporalResBlock(config.z_channels, config.dropout) for _ in range(config.num_res_blocks)
        )

    def forward(self, pixels_BTCHW: Tensor, repeats: int = 1) -> Tensor:
        """Pixels in [-1, 1], each frame taken `repeats` times -> latents (B, z_channels, t, h, w).

        An image is four equal frames: the spatial layers, nearly all of the work, need to see it once.
        """
        num_clips = pixels_BTCHW.shape[0]
        x_BCHW = self.conv_in(frames_of(pixels_BTCHW.transpose(1, 2)))
        for level in self.down:
            x_BCHW = level(x_BCHW)
        x_BCHW = self.mid(x_BCHW)
        x_BCHW = self.conv_out(F.silu(self.norm_out(x_BCHW)))
        x_BCTHW = torch.unflatten(x_BCHW, 0, (num_clips, -1)).transpose(1, 2).repeat_interleave(repeats, dim=2)
        for conv in self.time_conv:
            x_BCTHW = F.silu(conv(x_BCTHW))
        for block in self.time_res_stack:
            x_BCTHW = block(x_BCTHW)
        return x_BCTHW
