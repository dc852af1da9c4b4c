"""Clips that show alike things, by their embeddings: for every clip the better clip most like it. No threshold is applied.

Not all pairs are compared. Vectors are told into cells by spherical k-means; each is compared with the better ones of the
cells whose centres it is nearest to, so that the cost grows with the clips times the size of a cell. A pair is missed if
those are other cells than the better clip's own, which the more alike the rarer it is.

Vectors lie on a grid of 1/2048. Any part of the dot product of two such unit vectors is then exact in float32, in whatever
order it is added: results are the same on every machine, for any library and number of threads.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VERSION = 1
GRID = 2048  # a cosine is off by about 2e-4; float16 holds every point, and float32 all sums of products
CELL_CLIPS = 1024
NUM_PROBES = 6  # cells that a clip looks into
MOST_COMPARED = 1 << 14  # of one cell, the best of it: thousands of one title card need not all be compared
TRAINED_ON = 256  # clips a cell
ROUNDS = 5
BLOCK_CLIPS = 2048
LEAST_NORM = 1e-6

Vectors = NDArray[np.float16]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Similar:
    """By clip, in the order given: cosine with the better clip most like it, and its place; -1 where none was compared."""

    cosine: NDArray[np.float32]
    place: Places


def unit_vectors(sums: NDArray[np.floating]) -> Vectors:
    """Sums of vectors [clips, dim] -> their directions, on the grid. A sum of nothing stays zero."""
    wide = sums.astype(np.float64)
    norms = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
    return on_grid(wide / np.maximum(norms, LEAST_NORM)).astype(np.float16)


def on_grid(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Numbers of at most 1 -> the nearest points of the grid."""
    return np.asarray(np.rint(vectors * GRID) / GRID, np.float32)


def find_similar(vectors: Vectors, group: Places, on_progress: Callable[[int, int], None] | None = None) -> Similar:
    """Unit vectors [clips, dim] on the grid, the best clip first, of which only those of one group are compared.

    Reads a few cells' worth of vectors at a time, so that they may lie in a file. `on_progress` is told how many clips were
    compared with the cells, of how many.
    """
    count = len(vectors)
    found = Similar(np.full(count, -1, np.float32), np.full(count, -1, np.int64))
    num_done = 0
    for one in np.unique(group):
        places = np.flatnonzero(group == one)
        for num_own in _search(vectors, places, _cells(vectors, places), found):
            num_done += num_own
            if on_progress is not None:
                on_progress(num_done, count)
    return found


def _cells(vectors: Vectors, places: Places) -> NDArray[np.int32]:
    """The cells that each clip looks into, nearest first [clips, probes]. The first is its own."""
    num_cells = max(1, len(places) // CELL_CLIPS)
    centres = _centres(vectors, places, num_cells)
    probes = np.empty((len(places), min(NUM_PROBES, num_cells)), np.int32)
    for start in range(0, len(places), BLOCK_CLIPS):
        rows = slice(start, start + BLOCK_CLIPS)
        cosines = vectors[places[rows]].astype(np.float32) @ centres.T
        for nth in range(probes.shape[1]):
            probes[rows, nth] = cosines.argmax(axis=1)
            np.put_along_axis(cosines, probes[rows, nth, np.newaxis].astype(np.int64), -2, axis=1)
    return probes


def _centres(vectors: Vectors, places: Places, num_cells: int) -> NDArray[np.float32]:
    """Spherical k-means over clips spread evenly over the order of quality, which has nothing to do with what they show."""
    wanted = min(len(places), num_cells * TRAINED_ON)
    learnt = places[np.linspace(0, len(places) - 1, wanted).astype(np.int64)]
    centres = vectors[learnt[np.linspace(0, wanted - 1, num_cells).astype(np.int64)]].astype(np.float32)
    for _ in range(ROUNDS if num_cells > 1 else 0):
        sums = np.zeros(centres.shape)
        for start in range(0, wanted, BLOCK_CLIPS):
            block = vectors[learnt[start : start + BLOCK_CLIPS]].astype(np.float32)
            own = (block @ centres.T).argmax(axis=1)
            order = np.argsort(own, kind="stable")
            cells, starts = np.unique(own[order], return_index=True)
            sums[cells] += np.add.reduceat(block[order], starts, axis=0)
        filled = sums.any(axis=1)
        centres[filled] = unit_vectors(sums[filled])
    return centres


def _search(vectors: Vectors, places: Places, probes: NDArray[np.int32], found: Similar) -> Iterator[int]:
    """Compares each clip with the better ones of the cells it looks into, cell by cell. Gives the clips of each when done."""
    by_cell = np.argsort(probes[:, 0], kind="stable")
    asking = np.argsort(probes.ravel(), kind="stable")
    cells = np.arange(int(probes.max(initial=0)) + 2)
    member_edges = np.searchsorted(probes[by_cell, 0], cells)
    asking_edges = np.searchsorted(probes.ravel()[asking], cells)
    for cell in cells[:-1]:
        members = places[by_cell[member_edges[cell] : member_edges[cell + 1]]]
        num_own, members = len(members), members[:MOST_COMPARED]
        queries = places[asking[asking_edges[cell] : asking_edges[cell + 1]] // probes.shape[1]]
        if not len(members):
            continue
        theirs = vectors[members].astype(np.float32)
        scale = np.float32(1) / _norms(theirs)
        for start in range(0, len(queries), BLOCK_CLIPS):
            block = queries[start : start + BLOCK_CLIPS]
            num_better = np.searchsorted(members, block)
            if not num_better[-1]:  # queries come in order, so nobody here has a better one
                continue
            mine = vectors[block].astype(np.float32)
            _note(mine, theirs[: num_better[-1]], scale, members, block, num_better, found)
        yield num_own


def _note(
    mine: NDArray[np.float32],
    theirs: NDArray[np.float32],
    scale: NDArray[np.float32],
    members: Places,
    block: Places,
    num_better: Places,
    found: Similar,
) -> None:
    """Keeps for each clip of a block the likest better one; of equals the best."""
    best, place = np.full(len(block), -2, np.float32), np.zeros(len(block), np.int64)
    for start in range(0, len(theirs), BLOCK_CLIPS):
        part = slice(start, min(start + BLOCK_CLIPS, len(theirs)))
        cosines = (mine @ theirs[part].T) * scale[part]
        cosines[np.arange(part.start, part.stop) >= num_better[:, np.newaxis]] = -2
        likest = cosines.argmax(axis=1)
        values = cosines[np.arange(len(block)), likest]
        better = values > best
        best[better], place[better] = values[better], members[part.start + likest[better]]
    best = np.where(best > -2, np.clip(best / _norms(mine), -1, 1), -2).astype(np.float32)
    likelier = (best > found.cosine[block]) | ((best == found.cosine[block]) & (place < found.place[block]))
    likelier &= best > -2
    found.cosine[block[likelier]], found.place[block[likelier]] = best[likelier], place[likelier]


def _norms(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    norms: NDArray[np.float32] = np.sqrt(np.square(vectors).sum(axis=1))
    return np.maximum(norms, np.float32(LEAST_NORM))
