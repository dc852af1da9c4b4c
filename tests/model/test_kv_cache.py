"""The cache gives back what was put in, for the rows that are kept."""

import pytest
import torch

from model.kv_cache import KvCache


def test_layers_grow_together_and_rows_can_leave() -> None:
    cache = KvCache(num_layers=2, batch_size=3, num_kv_heads=2, max_length=4, head_dim=8)
    parts = torch.randn(2, 2, 3, 2, 2, 8)  # steps, layers, B, K, L, C
    for step in range(2):
        for layer in range(2):
            keys, values = cache.update(layer, parts[step, layer], -parts[step, layer])
            assert keys.shape == (3, 2, 2 * step + 2, 8)
            assert torch.equal(keys, -values)
        cache.advance(2)
    assert cache.length == 4
    assert torch.equal(keys, torch.cat([parts[0, 1], parts[1, 1]], dim=2))
    cache.select(torch.tensor([2, 0]))
    assert torch.equal(cache.keys[1], torch.cat([parts[0, 1], parts[1, 1]], dim=2)[[2, 0]])
    with pytest.raises(RuntimeError, match="cache of 4"):
        cache.update(0, torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
