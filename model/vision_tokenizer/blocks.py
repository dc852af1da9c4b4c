"""Layers shared by encoder and decoder. Attribute names are the published state-dict keys.

Shapes: B clips or frames, T frames, C channels, H W height and width, Q channels of the guide (codebook vectors).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


def frames_of(x_BCTHW: Tensor) -> Tensor:
    """Features of clips -> features of their frames (B * T, C, H, W), channels last in memory.

    All 2-D layers keep that memory order, in which convolutions take about half the time.
    """
    return x_BCTHW.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


class SpatialNorm(nn.Module):
    """Normalise, then scale and shift by maps made from the codebook vectors at the same place (MoVQ)."""

    def __init__(self, channels: int, norm_groups: int, guide_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.conv_y = nn.Conv2d(guide_channels, channels, 1)
        self.conv_b = nn.Conv2d(guide_channels, channels, 1)

    def forward(self, x_BCHW: Tensor, guide_BQHW: Tensor) -> Tensor:
        """Features and guide, at any two sizes -> features."""
        # A 1x1 convolution commutes with nearest resizing, and is 64 times cheaper before it than after.
        scale_BCHW = F.interpolate(self.conv_y(guide_BQHW), size=x_BCHW.shape[-2:], mode="nearest")
        shift_BCHW = F.interpolate(self.conv_b(guide_BQHW), size=x_BCHW.shape[-2:], mode="nearest")
        return torch.addcmul(shift_BCHW, self.norm_layer(x_BCHW), scale_BCHW)


def make_norm(channels: int, norm_groups: int, guide_channels: int | None) -> nn.GroupNorm | SpatialNorm:
    """GroupNorm for the encoder (no guide), SpatialNorm for the decoder."""
    if guide_channels is None:
        return nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
    return SpatialNorm(channels, norm_groups, guide_channels)


def apply_norm(norm: nn.GroupNorm | SpatialNorm, x_BCHW: Tensor, guide_BQHW: Tensor | None) -> Tensor:
    """Normalise, with the guide where the norm takes one."""
    return cast(Tensor, norm(x_BCHW) if guide_BQHW is None else norm(x_BCHW, guide_BQHW))


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual path."""

    def __init__(
        self, in_channels: int, out_channels: int, norm_groups: int, dropout: float, guide_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, norm_groups, guide_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(out_channels, norm_groups, guide_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, guide_BQHW: Tensor | None = None) -> Tensor:
        """Features -> features of `out_channels`."""
        h_BCHW = self.conv1(F.silu(apply_norm(self.norm1, x_BCHW, guide_BQHW)))
        h_BCHW = self.conv2(self.dropout(F.silu(apply_norm(self.norm2, h_BCHW, guide_BQHW))))
        skip_BCHW = x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW)
        return cast(Tensor, skip_BCHW + h_BCHW)


class Attention(nn.Module):
    """Single-head attention over the places of one frame, residual."""

    def __init__(self, channels: int, norm_groups: int, guide_channels: int | None = None) -> None:
        super().__init__()
        self.norm = make_norm(channels, norm_groups, guide_channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, guide_BQHW: Tensor | None = None) -> Tensor:
        """Features -> features. Nothing of size (H*W)^2 is kept where a fused kernel runs."""
        h_BCHW = apply_norm(self.norm, x_BCHW, guide_BQHW)
        # One head, as a 4-D tensor: (B, 1, H*W, C).
        q, k, v = (layer(h_BCHW).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed_BCHW = mixed.squeeze(1).transpose(1, 2).reshape(x_BCHW.shape)
        return x_BCHW + cast(Tensor, self.proj_out(mixed_BCHW))


class Downsample(nn.Module):
    """Halve height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features -> features of half the height and width; the padding is right and bottom only."""
        return cast(Tensor, self.conv(F.pad(x_BCHW, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features -> features of twice the height and width."""
        return cast(Tensor, self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")))


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        rows, columns = kernel[1] - stride[1], kernel[2] - stride[2]
        # Two frames of padding on the left whatever the kernel: the published layers with kernel 4 have it so.
        self.padding = (columns - columns // 2, columns // 2, rows - rows // 2, rows // 2, 2, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    @torch.no_grad()
    def near_identity(self, noise: float) -> None:
        """Keep `noise` of the random weights and add a path of weight 1 from each channel to itself.

        The path goes through the newest frames of the kernel, as many as one step of the stride passes.
        """
        weight = self.conv.weight
        weight.mul_(noise)
        newest, row, column = self.conv.stride[0], weight.shape[3] // 2, weight.shape[4] // 2
        for channel in range(weight.shape[0]):
            weight[channel, channel, -newest:, row, column] += 1.0 / newest
        if self.conv.bias is not None:
            self.conv.bias.zero_()

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features -> features."""
        return cast(Tensor, self.conv(F.pad(x_BCTHW, self.padding)))


class TemporalDownsample(nn.Module):
    """Halve the number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(4, 3, 3), stride=(2, 1, 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features of T frames -> of T // 2 frames."""
        return cast(Tensor, self.conv(x_BCTHW))


class TemporalUpsample(nn.Module):
    """Double the number of frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features of T frames -> of 2 T frames."""
        return cast(Tensor, self.conv(x_BCTHW.repeat_interleave(2, dim=2)))


class TemporalResBlock(nn.Module):
    """Two normalised causal 3x3x3 convolutions with a residual path. The norms are BatchNorm, as published."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, kernel=(3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(channels, channels, kernel=(3, 3, 3))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """Features -> features."""
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)))
        h_BCTHW = self.conv2(self.dropout(F.silu(self.norm2(h_BCTHW))))
        return x_BCTHW + cast(Tensor, h_BCTHW)
