"""Keys and values of the tokens already seen, so that each new token costs one position instead of all.

Shapes: B batch, K key-value heads, S tokens seen, L new tokens, C channels of a head.
"""

import torch
from torch import Tensor


class KvCache:
    """Room for `max_length` tokens of each row, taken once. `length` tokens of it are filled."""

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.max_length = max_length
        self.length = 0

    def update(self, layer: int, keys_BKLC: Tensor, values_BKLC: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values -> all of that layer's so far, (B, K, S, C).

        Raises: RuntimeError if they do not fit.
        """
        end = self.length + keys_BKLC.shape[2]
        if end > self.max_length:
            raise RuntimeError(f"found {end} tokens for a cache of {self.max_length}: make the cache longer")
        self.keys[layer][:, :, self.length : end] = keys_BKLC
        self.values[layer][:, :, self.length : end] = values_BKLC
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count new tokens as seen, once every layer has stored them."""
        self.length += num_tokens

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, in this order: sequences that are finished leave."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
