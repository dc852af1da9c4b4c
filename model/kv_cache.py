"""Keys and values of the tokens already seen, so that each new token costs one position instead of all.

Rows grow on their own: each has its own length, its tokens lie at their positions from 0 on, and tokens that turn out to be
wrong are forgotten by shortening it. What lies behind a row's length is never seen, and is written over.

Shapes: B batch, K key-value heads, S places in all, L new tokens, C channels of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KvCache:
    """Room for `max_length` tokens of each row, taken once. `lengths` says how many of each row are filled.

    is_static: layers read all of the room, whatever is filled, so that every step has the same shapes and is compiled once.
    """

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
        is_static: bool = False,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.max_length, self.is_static = max_length, is_static
        self.lengths = [0] * batch_size

    def places(self, num_new: int) -> Tensor:
        """Where the next tokens of each row go, which is also their position (B, L).

        Raises: RuntimeError if they do not fit.
        """
        end = max(self.lengths) + num_new
        if end > self.max_length:
            raise RuntimeError(f"found {end} tokens for a cache of {self.max_length}: make the cache longer")
        device = self.keys[0].device
        return torch.tensor(self.lengths, device=device).unsqueeze(1) + torch.arange(num_new, device=device)

    def update(self, layer: int, keys_BKLC: Tensor, values_BKLC: Tensor, places_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values -> all of that layer's up to the longest row, (B, K, S, C)."""
        if self.is_static:
            index = places_BL[:, None, :, None].expand_as(keys_BKLC)
            self.keys[layer].scatter_(2, index, keys_BKLC)
            self.values[layer].scatter_(2, index, values_BKLC)
            return self.keys[layer], self.values[layer]
        start, num_new = max(self.lengths), keys_BKLC.shape[2]
        for store, new_BKLC in ((self.keys[layer], keys_BKLC), (self.values[layer], values_BKLC)):
            if min(self.lengths) == start:
                store[:, :, start : start + num_new] = new_BKLC
            else:
                store.scatter_(2, places_BL[:, None, :, None].expand_as(new_BKLC), new_BKLC)
        return self.keys[layer][:, :, : start + num_new], self.values[layer][:, :, : start + num_new]

    def advance(self, num_tokens: int) -> None:
        """Count new tokens as seen, once every layer has stored them."""
        self.lengths = [length + num_tokens for length in self.lengths]

    def forget(self, num_last: Sequence[int]) -> None:
        """Drop so many of the last tokens of each row."""
        self.lengths = [length - wrong for length, wrong in zip(self.lengths, num_last, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order: sequences that are finished leave."""
        kept = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [keys[kept] for keys in self.keys]
        self.values = [values[kept] for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]
