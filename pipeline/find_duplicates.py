"""Duplicates: for every clip the better clip that is most like it, and how like it is. No threshold is applied.

Clips are told apart by fingerprints. Candidates come from a join on bands, which are a few bits of a few hashes each: two
clips are compared if they agree in all bits of any band, so the cost grows with the clips and not with their pairs. Of
two clips the worse one is scored; the best of a group is like no better one and passes every rule. Where a band holds
many clips, such as a title that everyone uses, each is compared with the best of them alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.fingerprint_clips import NUM_FRAMES

VERSION = 2
BAND_BITS = 24  # a million clips agree by chance in 30,000 pairs a band
BANDS_PER_FRAME = 4
MOST_BETTER = 16  # clips of one band that each of it is compared with
HASH_BITS = 64
PIECE_PAIRS = 1 << 20

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Duplicates:
    """By clip, in the order given: likeness in [0, 1] to the better clip most like it, and its place, -1 if there is none."""

    exact: NDArray[np.bool_]
    near: NDArray[np.float32]
    place: Places


def find_duplicates(
    hashes: NDArray[np.uint64], blank: NDArray[np.int32], pixels: NDArray[np.object_], group: NDArray[np.int64]
) -> Duplicates:
    """Clips, the best first, of which only those of one group are alike -> how like a better one each is.

    `hashes` is [clips, NUM_FRAMES], `blank` how many of them show nothing, `pixels` a hash of all pixels.

    `near` is the mean share of equal bits over frames that show something in both clips, and 0 where no better clip
    agrees in a band. Clips half blank are compared by `pixels` alone.
    """
    count = len(hashes)
    near, place = np.zeros(count, np.float32), np.full(count, -1, np.int64)
    told = np.flatnonzero(2 * blank < NUM_FRAMES)
    for frame in range(NUM_FRAMES):
        for bits in _bands(frame):
            worse, better = _pairs(told, _keys(hashes[told, frame], bits, group[told]), hashes[told, frame] != 0)
            for start in range(0, len(worse), PIECE_PAIRS):
                _note(hashes, worse[start : start + PIECE_PAIRS], better[start : start + PIECE_PAIRS], near, place)
    first: dict[tuple[int, object], int] = {}
    exact = np.zeros(count, np.bool_)
    for index, key in enumerate(zip(group.tolist(), pixels.tolist(), strict=True)):
        same = first.setdefault(key, index)
        if same != index:
            exact[index], near[index], place[index] = True, 1.0, same
    return Duplicates(exact, near, place)


def likeness(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Hashes [pairs, NUM_FRAMES] of either side -> mean share of equal bits, 0.5 by chance; blank frames do not count."""
    shown = (left != 0) & (right != 0)
    equal = np.where(shown, HASH_BITS - np.bitwise_count(left ^ right).astype(np.int64), 0).sum(axis=1)
    return np.asarray(equal / np.maximum(1, HASH_BITS * shown.sum(axis=1)), np.float32)


def _bands(frame: int) -> list[NDArray[np.uint64]]:
    """Which bits each band of a frame looks at. They differ by frame, so that those of a still picture do not repeat."""
    rng = np.random.default_rng(frame)
    chosen = (rng.permutation(np.arange(1, HASH_BITS))[:BAND_BITS] for _ in range(BANDS_PER_FRAME))
    return [np.sort(bits).astype(np.uint64) for bits in chosen]


def _keys(hashes: NDArray[np.uint64], bits: NDArray[np.uint64], group: NDArray[np.int64]) -> NDArray[np.uint64]:
    keys = group.astype(np.uint64)
    for bit in bits:
        keys = (keys << np.uint64(1)) | ((hashes >> bit) & np.uint64(1))
    return keys


def _pairs(places: Places, keys: NDArray[np.uint64], shown: NDArray[np.bool_]) -> tuple[Places, Places]:
    """Places of clips, the best first, and their keys -> those of equal keys, the worse and the better of each pair."""
    places, keys = places[shown], keys[shown]
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    rank = np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))
    worse, better = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for nth in range(MOST_BETTER):
        behind = np.flatnonzero(rank > nth)
        worse.append(places[behind])
        better.append(places[behind - rank[behind] + nth])
    return np.concatenate(worse), np.concatenate(better)


def _note(hashes: NDArray[np.uint64], worse: Places, better: Places, near: NDArray[np.float32], place: Places) -> None:
    """Keeps for each worse clip the likest better one; of equals the best."""
    found = likeness(hashes[worse], hashes[better])
    order = np.lexsort((better, -found, worse))
    worse, better, found = worse[order], better[order], found[order]
    first = np.r_[True, worse[1:] != worse[:-1]]
    worse, better, found = worse[first], better[first], found[first]
    likelier = (found > near[worse]) | ((found == near[worse]) & (better < place[worse]))
    near[worse[likelier]], place[worse[likelier]] = found[likelier], better[likelier]
