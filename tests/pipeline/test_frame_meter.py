"""Numbers near a threshold are PySceneDetect's own, and those far from it are on its side, whatever the picture shows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from scenedetect import ContentDetector, FrameTimecode

from pipeline.decode import MICROSECOND, Frame, open_video
from pipeline.decode_planes import bgr_matrix
from pipeline.detect_scenes import FrameNumbers, SegmentationConfig
from pipeline.frame_meter import FrameMeter, analysed, sketch_size
from tests.pipeline.made_media import Image, faded, shot, texture, write_video

CONFIG = SegmentationConfig()
WIDTH, HEIGHT = 960, 540


def exact(images: list[Image]) -> list[tuple[float, float]]:
    """Score and mean of every frame by PySceneDetect's own arithmetic, from pictures converted whole."""
    detector = ContentDetector()
    found = []
    for index, image in enumerate(images):
        small = analysed(image)
        detector.process_frame(FrameTimecode(index, 25.0), small)
        found.append((detector._frame_score or 0.0, float(np.mean(small))))
    return found


def read(path: Path) -> tuple[list[FrameNumbers], list[Image]]:
    with open_video(path) as reader:
        meter, numbers, images = FrameMeter(CONFIG), [], []
        for frame in reader:
            numbers.append(meter.measure(frame))
            images.append(frame.bgr())
        return numbers, images


def noise(rng: np.random.Generator, middle: int, spread: int) -> Image:
    levels = rng.integers(middle - spread, middle + spread + 1, (HEIGHT, WIDTH, 3))
    return np.clip(levels, 0, 255).astype(np.uint8)


def grains(seed: int) -> Iterator[Image]:
    """Noise of every strength on dark, medium and light grey, that changes from frame to frame."""
    rng = np.random.default_rng(seed)
    for middle in (10, 20, 30, 128):
        for spread in (1, 8, 64):
            yield from (noise(rng, middle, spread) for _ in range(2))


def lines(period: int, *, across: bool) -> Iterator[Image]:
    """One-pixel lines that move by one pixel a frame, and then turn into their opposite."""
    for index in range(2 * period + 2):
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        if across:
            image[index % period :: period] = 255
        else:
            image[:, index % period :: period] = 255
        yield image
        if index % 3 == 2:
            yield 255 - image


def saturated(seed: int) -> Iterator[Image]:
    """Full colours, and colours next to each other on either side of the red at which hue wraps around."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        tiles = rng.choice(np.array([0, 255], np.uint8), (6, 10, 3))
        yield cv2.resize(tiles, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)  # type: ignore[misc]  # uint8 in, uint8 out
    for green, blue in ((3, 0), (0, 3), (20, 0), (0, 20)):
        yield np.full((HEIGHT, WIDTH, 3), (blue, green, 200), np.uint8)


def near_grey(level: int) -> Iterator[Image]:
    """A grey that takes on one hue after another, a level at a time."""
    for change in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 2, 2), (4, 0, 4), (0, 5, 0)):
        yield np.full((HEIGHT, WIDTH, 3), np.array([level, level, level]) + change, np.uint8)


def flashes() -> Iterator[Image]:
    """White, half white and coloured flashes in a quiet shot."""
    for index, image in enumerate(shot(3, 24, width=WIDTH, height=HEIGHT)):
        if index in (6, 7, 15):
            image[:, : WIDTH // (1 if index == 6 else 2)] = 255
        if index == 20:
            image[..., 2] = 255
        yield image


def slow_fade() -> Iterator[Image]:
    """Through the threshold of fades in steps of less than a level, out and in."""
    light = texture(4, WIDTH, HEIGHT)
    yield from (((light.astype(np.uint32) * level) // 255).astype(np.uint8) for level in range(60, 4, -3))
    yield from (((light.astype(np.uint32) * level) // 255).astype(np.uint8) for level in range(4, 60, 3))


CONTENTS: dict[str, Callable[[], Iterator[Image]]] = {
    "grain": lambda: grains(1),
    "rows": lambda: lines(2, across=True),
    "rows of the grid": lambda: lines(4, across=True),
    "columns": lambda: lines(3, across=False),
    "columns of the grid": lambda: lines(4, across=False),
    "saturated": lambda: saturated(2),
    "dark grey": lambda: near_grey(20),
    "grey": lambda: near_grey(120),
    "flashes": flashes,
    "slow fade": slow_fade,
}


def assert_same_decisions(path: Path) -> list[FrameNumbers]:
    numbers, images = read(path)
    for index, (found, (score, mean)) in enumerate(zip(numbers, exact(images), strict=True)):
        assert found.candidate == (score >= CONFIG.content_threshold), (index, found, score)
        assert found.dark == (mean < CONFIG.fade_threshold), (index, found, mean)
    return numbers


@pytest.mark.parametrize("name", CONTENTS)
def test_every_decision_is_the_exact_one(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / "a.mp4", CONTENTS[name](), options={"qp": "4"})
    assert_same_decisions(path)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [
        ("libx264", "yuv422p"),
        ("libx264", "yuv444p"),
        ("libx264", "yuv420p10le"),
        ("mjpeg", "yuvj420p"),
        ("ffv1", "bgr0"),
    ],
)
def test_formats(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    frames = [*shot(1, 6, width=WIDTH, height=HEIGHT), *faded(shot(2, 12, width=WIDTH, height=HEIGHT), fade_out=10)]
    path = write_video(tmp_path / "a.mkv", frames, codec=codec, pix_fmt=pix_fmt)
    numbers = assert_same_decisions(path)
    assert numbers[6].candidate
    assert numbers[-1].dark


@pytest.mark.parametrize("size", [(854, 480), (641, 361), (406, 720), (1280, 200), (16, 16), (2, 2)])
def test_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = [*shot(1, 4, width=size[0], height=size[1]), *shot(2, 4, width=size[0], height=size[1])]
    assert_same_decisions(write_video(tmp_path / "a.mp4", frames, pix_fmt="yuv444p"))


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "gray", "bgr0"])
def test_a_sketch_shows_the_frame(tmp_path: Path, pix_fmt: str) -> None:
    codec = "ffv1" if pix_fmt in ("gray", "bgr0") else "libx264"
    path = write_video(tmp_path / "a.mkv", shot(5, 2, width=WIDTH, height=HEIGHT), codec=codec, pix_fmt=pix_fmt)
    with open_video(path) as reader:
        frame = next(iter(reader))
        sketch, whole = frame.sketch(sketch_size(WIDTH, HEIGHT)), analysed(frame.bgr())
    if pix_fmt in ("gray", "bgr0"):
        assert sketch is None
    else:
        assert sketch is not None
        assert np.abs(sketch.astype(int) - whole[::2, ::2]).max() <= 6


@pytest.mark.slow
def test_a_sketch_of_hdr_is_toned_down_as_the_frame_is(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = 16, 9, 9, 1
        for image in shot(5, 2, width=WIDTH, height=HEIGHT):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode())
    with open_video(path) as reader:
        frame = next(iter(reader))
        sketch, whole = frame.sketch(sketch_size(WIDTH, HEIGHT)), analysed(frame.bgr())
    assert sketch is not None
    assert np.abs(sketch.astype(int) - whole[::2, ::2]).mean() <= 3


def test_frames_that_decide_nothing_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [*shot(1, 10, width=WIDTH, height=HEIGHT), *shot(2, 10, width=WIDTH, height=HEIGHT)]
    path = write_video(tmp_path / "a.mp4", frames)
    converted: list[int | None] = []
    picture_of = Frame.bgr

    def noted(self: Frame) -> Image:
        converted.append(self.index)
        return picture_of(self)

    monkeypatch.setattr(Frame, "bgr", noted)
    with open_video(path) as reader:
        meter = FrameMeter(CONFIG)
        candidates = [frame.index for frame in reader if meter.measure(frame).candidate]
    assert candidates == [10]
    assert set(converted) == {9, 10}


def test_frames_of_another_size_are_not_analysed() -> None:
    meter = FrameMeter(CONFIG)
    images = [texture(1, 64, 48), texture(2, 48, 64), texture(1, 64, 48)]
    frames = [Frame(index, index, MICROSECOND, lambda image=image: image) for index, image in enumerate(images)]  # type: ignore[misc]  # default binds the loop variable
    assert [meter.measure(frame).score for frame in frames] == [0.0, None, 0.0]


@pytest.mark.parametrize("colorspace", [1, 5, 9])
@pytest.mark.parametrize("color_range", [1, 2])
def test_the_matrix_is_that_of_the_converter(colorspace: int, color_range: int) -> None:
    rng = np.random.default_rng(0)
    for levels in rng.integers(64, 190, (8, 3)):
        picture = av.VideoFrame(16, 16, "yuv444p")
        for plane, level in zip(picture.planes, levels, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        picture.colorspace, picture.color_range = colorspace, color_range
        converted = picture.reformat(format="bgr24").to_ndarray()[8, 8].astype(int)
        ours = bgr_matrix(colorspace, color_range == 2, 8) @ np.array([*levels, 1])
        assert np.abs(np.clip(ours, 0, 255) - converted).max() <= 3
