"""Rotary positions, half-split as in Llama: channel i turns together with channel i + C/2.

Shapes: B batch, L tokens, H heads, C channels of a head.
"""

import torch
from torch import Tensor


def rotary_tables(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions -> cosine and sine tables (B, L, 1, C), float32: bfloat16 cannot count to a thousand."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BL.device, dtype=torch.float32) / head_dim
    angles = positions_BL.float().unsqueeze(-1) / theta**exponents
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x_BLHC: Tensor, cos_BL1C: Tensor, sin_BL1C: Tensor) -> Tensor:
    """Queries or keys -> the same, turned by their positions, in their own dtype."""
    first, second = x_BLHC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BLHC * cos_BL1C + turned * sin_BL1C).to(x_BLHC.dtype)
