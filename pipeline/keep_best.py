"""Groups of clips that are alike, and which one of each stays: the best of those that every other rule keeps.

A scorer of duplicates says of each clip which better clip it is most like, and how like it is. Those links are a forest;
what is left of it at a threshold are trees, and a tree is a group. Its root is the best of the group, and stays unless
another rule rejects it: then the next best that is left stays in its place. Which clips are compared, and in what order of
quality, is the scorer's to say; where the threshold lies is the recipe's.
"""

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


def groups(likeness: NDArray[np.float32], rank: Places, rank_of_better: Places, high: float) -> Places:
    """All clips that were compared with each other -> the group of each, by the rank of its best.

    `rank` is a clip's place by quality, the best 0, and `rank_of_better` that of the clip it is most like, -1 if there is
    none. Clips are of one group where a likeness above `high` links them.
    """
    above = np.flatnonzero((likeness > np.float32(high)) & (rank_of_better >= 0))
    root = np.arange(max(int(rank.max(initial=-1)), int(rank_of_better.max(initial=-1))) + 1)
    root[rank[above]] = rank_of_better[above]
    linked = rank[above]
    while True:
        further = root[root[linked]]
        if np.array_equal(further, root[linked]):
            return np.asarray(root[rank], np.int64)
        root[linked] = further


def best_of(group: Places, rank: Places, left: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Groups and ranks of clips, and which clips are `left` -> the best of those in each group."""
    is_root: NDArray[np.bool_] = left & (group == rank)
    others = np.flatnonzero(left & ~is_root)
    best = np.full(int(group.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    best[group[is_root]] = group[is_root]
    np.minimum.at(best, group[others], rank[others])
    is_root[others] = rank[others] == best[group[others]]
    return is_root
