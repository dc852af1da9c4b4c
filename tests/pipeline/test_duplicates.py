"""Duplicates among clips made on the spot: what was re-encoded, resized or cropped is found, what is another clip is not."""

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.find_duplicates import Duplicates, find_duplicates, likeness
from pipeline.fingerprint_clips import NUM_FRAMES, FingerprintConfig, fingerprint, fingerprint_clip, phash
from tests.pipeline.made_media import Image, write_video

FPS, NUM = 10, 24


def film(seed: int) -> list[Image]:
    """Blobs that drift over a texture, each film its own: the picture changes all the time."""
    rng = np.random.default_rng(seed)
    ground = cv2.resize(rng.integers(0, 256, (7, 11, 3), dtype=np.uint8), (320, 180), interpolation=cv2.INTER_CUBIC)
    where, speed = rng.uniform((0, 0), (320, 180), (8, 2)), rng.uniform(-6, 6, (8, 2))
    colours = rng.integers(0, 256, (8, 3)).tolist()
    frames = []
    for index in range(NUM):
        frame = ground.copy()
        for spot, step, colour in zip(where, speed, colours, strict=True):
            x, y = (spot + index * step) % (320, 180)
            cv2.circle(frame, (int(x), int(y)), 28, colour, -1)
        frames.append(np.asarray(frame, np.uint8))
    return frames


def resized(frames: list[Image], width: int, height: int) -> list[Image]:
    return [np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8) for frame in frames]


def printed(frames: NDArray[np.uint8]) -> dict[str, Any]:
    """The fingerprint of a clip that has no frames but these."""
    return fingerprint(frames, hashlib.sha256(frames.tobytes()).hexdigest())


def compared(prints: list[dict[str, object]], group: list[int] | None = None) -> Duplicates:
    hashes = np.stack([np.frombuffer(one["hashes"], "<u8") for one in prints])  # type: ignore[call-overload]
    return find_duplicates(
        hashes.astype(np.uint64),
        np.array([one["blank"] for one in prints], np.int32),
        np.array([one["pixels_sha256"] for one in prints], object),
        np.array(group or [0] * len(prints)),
    )


@pytest.fixture(scope="module")
def prints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Fingerprints of a film, of what can be made of it, and of others, the best first."""
    folder, source = tmp_path_factory.mktemp("films"), film(0)
    write_video(folder / "first.mp4", source, FPS)
    write_video(folder / "coarse.mp4", source, FPS, options={"crf": "36"})
    write_video(folder / "mpeg4.mp4", source, FPS, "mpeg4")
    write_video(folder / "small.mp4", resized(source, 160, 90), FPS)
    write_video(folder / "cropped.mp4", [np.ascontiguousarray(frame[4:-4, 6:-6]) for frame in source], FPS)
    write_video(folder / "mirrored.mp4", [np.ascontiguousarray(frame[:, ::-1]) for frame in source], FPS)
    write_video(folder / "backwards.mp4", source[::-1], FPS)
    for seed in range(1, 5):
        write_video(folder / f"other{seed}.mp4", film(seed), FPS)
    names = [
        "first",
        "coarse",
        "mpeg4",
        "small",
        "cropped",
        "mirrored",
        "backwards",
        *(f"other{n}" for n in range(1, 5)),
    ]
    span = {"start_ms": 0, "end_ms": NUM * 1000 // FPS}
    return {name: fingerprint_clip({"uri": str(folder / f"{name}.mp4"), **span}, FingerprintConfig()) for name in names}


def test_what_was_made_of_a_film_is_like_it_and_others_are_not(prints: dict[str, dict[str, object]]) -> None:
    found = compared(list(prints.values()))
    near = dict(zip(prints, found.near.tolist(), strict=True))
    for name in ("coarse", "mpeg4", "small", "cropped"):
        assert near[name] > 0.9, (name, near)
    for name in ("first", "mirrored", "other1", "other2", "other3", "other4"):
        assert near[name] < 0.8, (name, near)
    assert near["first"] == 0.0  # nothing is better
    assert found.place[0] == -1
    assert not found.exact.any()
    assert found.place[list(prints).index("small")] < list(prints).index("small")


def test_the_same_pixels_in_another_container_are_exact(tmp_path: Path) -> None:
    frames = film(3)
    first, second = write_video(tmp_path / "a.mp4", frames, FPS), write_video(tmp_path / "b.mkv", frames, FPS)
    assert first.read_bytes() != second.read_bytes()
    items = [{"uri": str(path), "start_ms": 0, "end_ms": 2400} for path in (first, second)]
    found = compared([fingerprint_clip(item, FingerprintConfig()) for item in items])
    assert found.exact.tolist() == [False, True]
    assert found.near.tolist() == [0.0, 1.0]
    assert found.place.tolist() == [-1, 0]


def test_a_hash_is_that_of_the_cosine_transform_written_out() -> None:
    luma = np.asarray(cv2.cvtColor(film(5)[0], cv2.COLOR_BGR2GRAY), np.uint8)
    small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    place, frequency = np.arange(32), np.arange(32)[:, None]
    basis = np.cos(np.pi * (2 * place + 1) * frequency / 64) * np.where(frequency, np.sqrt(2 / 32), np.sqrt(1 / 32))
    lowest = (basis @ small @ basis.T)[:8, :8].ravel()
    expected = sum(1 << bit for bit, value in enumerate(lowest) if value > np.median(lowest))
    assert phash(luma) == expected


def test_blank_frames_are_like_nothing() -> None:
    black = np.zeros((NUM_FRAMES, 90, 160, 3), np.uint8)
    nearly = black.copy()
    nearly[:, 40, 80] = 9
    both = [printed(black), printed(nearly)]
    assert [one["blank"] for one in both] == [NUM_FRAMES, NUM_FRAMES]
    assert compared(both).near.tolist() == [0.0, 0.0]
    assert compared([both[0], both[0]]).near.tolist() == [0.0, 1.0]  # the same pixels are the same all the same


def test_an_image_repeats_its_hash_and_is_like_no_video() -> None:
    one = np.stack([frame[..., ::-1] for frame in film(6)[:1]])
    still = printed(one)
    assert len({*np.frombuffer(still["hashes"], "<u8").tolist()}) == 1
    moving = printed(np.repeat(one, NUM_FRAMES, axis=0))
    assert compared([moving, still], [0, 1]).near.tolist() == [0.0, 0.0]
    assert compared([moving, still], [0, 0]).near.tolist() == [0.0, 1.0]


def test_exact_is_every_frame_and_not_the_sampled_ones_alone(tmp_path: Path) -> None:
    frames = [frame.copy() for frame in film(7)]
    changed = [frame.copy() for frame in frames]
    changed[8][60:100, 100:160] = 255  # of 24 frames 0, 3, 6, 10 and so on are sampled
    lossless = {"crf": "0", "g": "1"}  # so that one frame does not touch the next
    paths = [
        write_video(tmp_path / "a.mp4", frames, FPS, options=lossless),
        write_video(tmp_path / "b.mp4", changed, FPS, options=lossless),
    ]
    prints = [
        fingerprint_clip({"uri": str(path), "start_ms": 0, "end_ms": 2400}, FingerprintConfig()) for path in paths
    ]
    assert prints[0]["hashes"] == prints[1]["hashes"]
    assert prints[0]["sharpness"] == prints[1]["sharpness"]
    found = compared(prints)
    assert (found.exact.tolist(), found.near.tolist()) == ([False, False], [0.0, 1.0])
    elsewhere = {"uri": str(paths[1]), "start_ms": 900, "end_ms": 2400}
    same = {"uri": str(paths[0]), "start_ms": 900, "end_ms": 2400}
    spans = compared([fingerprint_clip(item, FingerprintConfig()) for item in (elsewhere, same)])
    assert spans.exact.tolist() == [False, True]  # the frame that differs lies outside the span


def test_pictures_are_exact_by_all_their_pixels(tmp_path: Path) -> None:
    picture = np.asarray(cv2.resize(film(8)[0], (1280, 720)), np.uint8)
    changed = picture.copy()
    changed[11, 13] ^= 1
    for name, pixels in (("a.png", picture), ("b.bmp", picture), ("c.png", changed)):
        assert cv2.imwrite(str(tmp_path / name), pixels)
    items = [{"uri": str(tmp_path / name), "start_ms": 0, "end_ms": 0} for name in ("a.png", "b.bmp", "c.png")]
    found = compared([fingerprint_clip(item, FingerprintConfig()) for item in items])
    assert found.exact.tolist() == [False, True, False]
    assert found.near.tolist() == [0.0, 1.0, 1.0]


def made(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    return rng.integers(1, 1 << 63, (count, NUM_FRAMES), dtype=np.uint64)


def flipped(rng: np.random.Generator, hashes: NDArray[np.uint64], share: float) -> NDArray[np.uint64]:
    noise = np.packbits(rng.random((*hashes.shape, 64)) < share, axis=-1).view(np.uint64)[..., 0]
    return hashes ^ noise


def test_the_join_finds_what_all_pairs_give() -> None:
    rng = np.random.default_rng(1)
    originals = made(rng, 200)
    hashes = np.concatenate([originals, flipped(rng, originals, 0.04), made(rng, 200)])
    found = find_duplicates(hashes, np.zeros(600, np.int32), np.arange(600).astype(object), np.zeros(600, np.int64))
    for index in range(200, 400):
        each = likeness(np.broadcast_to(hashes[index], (index, NUM_FRAMES)), hashes[:index])
        assert found.near[index] == each.max()
        assert found.place[index] == each.argmax() == index - 200
    assert found.near[:200].max() < 0.7  # agreements by chance stay far below copies
    assert found.near[400:].max() < 0.7


def test_clips_that_share_a_title_alone_are_not_alike() -> None:
    rng = np.random.default_rng(2)
    hashes = made(rng, 3000)
    hashes[:, 0] = 12345  # all open with one title
    found = find_duplicates(hashes, np.zeros(3000, np.int32), np.arange(3000).astype(object), np.zeros(3000, np.int64))
    assert (found.place[1:] >= 0).all()
    assert found.near[1:].max() < 0.75  # one frame of eight is the same
