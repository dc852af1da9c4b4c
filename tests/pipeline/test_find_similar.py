"""Clips that show alike things, against all pairs: planted groups are found, whatever the machine and however cells lie."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline import find_similar as module
from pipeline.find_similar import Similar, Vectors, find_similar, on_grid, unit_vectors

DIM = 48


def directions(rng: np.random.Generator, count: int, dim: int = DIM) -> NDArray[np.float32]:
    found = rng.normal(size=(count, dim))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def planted(seed: int, topics: int, of_each: int, spread: float) -> tuple[Vectors, NDArray[np.int64]]:
    """Clips in groups, in random order, and the group of each."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.repeat(np.arange(topics), of_each))
    return unit_vectors(directions(rng, topics)[topic] + spread * directions(rng, len(topic))), topic


def all_pairs(vectors: Vectors, group: NDArray[np.int64]) -> Similar:
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    cosines = np.where((group[:, None] == group) & np.tri(len(wide), k=-1, dtype=bool), wide @ wide.T, -1)
    place = cosines.argmax(axis=1)
    best = cosines[np.arange(len(wide)), place]
    return Similar(best.astype(np.float32), np.where(best > -1, place, -1))


def one_group(vectors: Vectors) -> NDArray[np.int64]:
    return np.zeros(len(vectors), np.int64)


def test_in_one_cell_all_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_CLIPS", 17)  # many blocks
    vectors, _ = planted(0, 40, 4, 0.5)
    group = np.arange(len(vectors)) % 2
    found, expected = find_similar(vectors, group), all_pairs(vectors, group)
    assert found.place.tolist() == expected.place.tolist()
    np.testing.assert_allclose(found.cosine, expected.cosine, atol=1e-6)
    assert found.place[:2].tolist() == [-1, -1]  # the best of each group has no better one
    assert found.cosine[:2].tolist() == [-1, -1]


def test_planted_groups_are_found_among_many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELL_CLIPS", 40)
    vectors, topic = planted(1, 400, 5, 0.3)
    found = find_similar(vectors, one_group(vectors))
    first = {int(group): int(np.flatnonzero(topic == group)[0]) for group in range(400)}
    is_first = np.array([first[int(group)] == place for place, group in enumerate(topic)])
    linked = found.cosine > 0.8
    assert not linked[is_first].any()  # nobody better shows the same
    assert linked[~is_first].mean() > 0.99
    assert (topic[found.place[linked]] == topic[linked]).all()
    assert (found.place[linked] < np.flatnonzero(linked)).all()


def test_equal_clips_are_alike_to_the_best_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELL_CLIPS", 10)
    monkeypatch.setattr(module, "MOST_COMPARED", 8)
    vectors = np.repeat(unit_vectors(directions(np.random.default_rng(2), 3)), 40, axis=0)
    found = find_similar(vectors, one_group(vectors))
    assert found.place.reshape(3, 40)[:, 1:].tolist() == [[start] * 39 for start in (0, 40, 80)]
    np.testing.assert_allclose(found.cosine.reshape(3, 40)[:, 1:], 1.0, atol=1e-6)
    assert found.cosine.max() <= 1.0


def test_sums_are_exact_so_that_their_order_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries and numbers of threads differ in the order of a sum: as numbers in another order and other blocks do."""
    monkeypatch.setattr(module, "CELL_CLIPS", 60)
    rng = np.random.default_rng(3)
    vectors = unit_vectors(directions(rng, 300, 768) + 0.5 * directions(rng, 1, 768))
    found = find_similar(vectors, one_group(vectors))
    monkeypatch.setattr(module, "BLOCK_CLIPS", 7)
    other = find_similar(np.ascontiguousarray(vectors[:, rng.permutation(768)]), one_group(vectors))
    assert found.cosine.tobytes() == other.cosine.tobytes()
    assert found.place.tolist() == other.place.tolist()


def test_the_grid_costs_little_of_a_cosine() -> None:
    rng = np.random.default_rng(4)
    exact = directions(rng, 200, 768)
    vectors = unit_vectors(exact)
    assert (vectors.astype(np.float64) * module.GRID % 1 == 0).all()
    assert (on_grid(vectors) == vectors).all()
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    assert np.abs(wide @ wide.T - exact.astype(np.float64) @ exact.T).max() < 2e-3


def test_nothing_and_vectors_of_zero_are_like_nothing() -> None:
    empty = find_similar(np.zeros((0, DIM), np.float16), np.zeros(0, np.int64))
    assert len(empty.cosine) == len(empty.place) == 0
    zero = find_similar(unit_vectors(np.zeros((3, DIM), np.float32)), np.zeros(3, np.int64))
    assert zero.cosine[1:].tolist() == [0.0, 0.0]
