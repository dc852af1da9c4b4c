"""The cache gives back what was put in, for the rows that are kept."""

import pytest
import torch

from model.kv_cache import KvCache


def test_layers_grow_together_and_rows_can_leave() -> None:
    cache = KvCache(num_layers=2, batch_size=3, num_kv_heads=2, max_length=4, head_dim=8)
    parts = torch.randn(2, 2, 3, 2, 2, 8)  # steps, layers, B, K, L, C
    for step in range(2):
        places = cache.places(2)
        for layer in range(2):
            keys, values = cache.update(layer, parts[step, layer], -parts[step, layer], places)
            assert keys.shape == (3, 2, 2 * step + 2, 8)
            assert torch.equal(keys, -values)
        cache.advance(2)
    assert cache.lengths == [4, 4, 4]
    assert torch.equal(keys, torch.cat([parts[0, 1], parts[1, 1]], dim=2))
    cache.select([2, 0])
    assert cache.lengths == [4, 4]
    assert torch.equal(cache.keys[1], torch.cat([parts[0, 1], parts[1, 1]], dim=2)[[2, 0]])
    with pytest.raises(RuntimeError, match="cache of 4"):
        cache.places(1)


def test_what_is_forgotten_is_written_over() -> None:
    cache = KvCache(num_layers=1, batch_size=2, num_kv_heads=1, max_length=6, head_dim=2)
    first, second = torch.randn(2, 2, 1, 3, 2)
    cache.update(0, first, first, cache.places(3))
    cache.advance(3)
    cache.forget([2, 0])
    assert cache.places(3).tolist() == [[1, 2, 3], [3, 4, 5]]
    keys, _ = cache.update(0, second, second, cache.places(3))
    assert torch.equal(keys[0, 0, :4], torch.cat([first[0, 0, :1], second[0, 0]]))
    assert torch.equal(keys[1, 0], torch.cat([first[1, 0], second[1, 0]]))
