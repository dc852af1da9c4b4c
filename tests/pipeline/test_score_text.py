"""Text coverage is near the drawn area, and pictures without text have none."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from benchmarks.made_text import plain_video
from benchmarks.text import samples, text_frames
from pipeline.decode import open_video
from pipeline.read_image import read_image
from pipeline.samples import Image, block_means, shrunk, shrunk_size
from pipeline.score_text import SampleCoverage, TextConfig, TextScorer, model_path, most_edges, summarise
from schemas.errors import ConfigError
from tests.pipeline.made_media import shared_media, texture

WORDS = "The quick brown fox jumps"


@pytest.fixture
def scorer() -> TextScorer:
    return TextScorer(TextConfig(waits=0))


def written(lines: int, height_px: int = 18) -> tuple[Image, float]:
    """A picture with lines of text, and the share of it inside their boxes."""
    canvas = Pillow.fromarray(texture(3, 455, 256, low=30, high=90))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(height_px)
    area = 0.0
    for line in range(lines):
        place = (40, 20 + line * 2 * height_px)
        draw.text(place, WORDS, font=font, fill="white")
        left, top, right, bottom = draw.textbbox(place, WORDS, font=font)
        area += (right - left) * (bottom - top)
    return np.asarray(canvas), area / (455 * 256)


def sample(image: Image) -> Image:
    return shrunk(image, shrunk_size(image.shape[1], image.shape[0], 256))


@pytest.mark.parametrize("lines", [1, 3, 6])
def test_coverage_follows_the_drawn_text(scorer: TextScorer, lines: int) -> None:
    image, share = written(lines)
    assert 0.8 * share <= scorer.coverage(image) <= 2.0 * share


def test_a_title_in_large_letters_counts(scorer: TextScorer) -> None:
    image, share = written(1, 56)
    assert 0.7 * share <= scorer.coverage(image) <= 2.0 * share


def test_pictures_without_text(scorer: TextScorer) -> None:
    for seed in range(3):
        assert scorer.coverage(texture(seed, 455, 256)) == 0.0
    assert scorer.coverage(np.full((256, 256, 3), 255, np.uint8)) == 0.0
    noise = np.random.default_rng(0).integers(0, 255, (256, 400, 3), dtype=np.uint8)
    assert scorer.coverage(noise) < 0.02


def test_tiny_pictures(scorer: TextScorer) -> None:
    assert scorer.coverage(np.zeros((1, 1, 3), np.uint8)) == 0.0
    assert scorer.coverage(np.zeros((30, 500, 3), np.uint8)) == 0.0


def looks(scorer: TextScorer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes (width, height) of the parts that the scorer gives to its detector from now on."""
    sizes: list[tuple[int, int]] = []
    detect = scorer._detect

    def noted(image: Image, short_edge_px: int) -> list[np.ndarray]:
        sizes.append((image.shape[1], image.shape[0]))
        return detect(image, short_edge_px)

    monkeypatch.setattr(scorer, "_detect", noted)
    return sizes


def subtitled(line: str, plain: Image, top: int = 220) -> Image:
    canvas = Pillow.fromarray(plain)
    ImageDraw.Draw(canvas).text((60, top), line, font=ImageFont.load_default(16), fill="white")
    return np.asarray(canvas)


def test_what_did_not_change_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = TextScorer(TextConfig())
    sizes = looks(scorer, monkeypatch)
    written_on = subtitled(WORDS, texture(3, 455, 256, low=30, high=90))
    noisy = np.clip(written_on + np.random.default_rng(0).normal(0, 4, written_on.shape), 0, 255).astype(np.uint8)
    values = [scorer.coverage(image) for image in (written_on, written_on.copy(), noisy)]
    assert values[0] > 0.01
    assert values == [values[0]] * 3
    assert sizes == [(455, 256)]


def test_a_part_that_changed_is_looked_at_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines, one of which changes, goes and comes back; the other stays counted throughout."""
    plain = texture(3, 455, 256, low=30, high=90)
    titled = subtitled(WORDS, plain, top=20)
    pictures = [titled, *(subtitled(line, titled) for line in (WORDS, "over a very lazy dog")), titled]
    scorer = TextScorer(TextConfig())
    sizes = looks(scorer, monkeypatch)
    found = [scorer.coverage(picture) for picture in pictures]
    alone = [TextScorer(TextConfig()).coverage(picture) for picture in pictures]
    assert found == pytest.approx(alone, rel=0.2)
    assert found[0] == pytest.approx(found[3], rel=0.01)
    assert min(found[1:3]) > 1.6 * found[0]
    assert sizes[0] == (455, 256)
    assert all(width * height < 0.6 * 455 * 256 for width, height in sizes[1:])


def test_a_picture_without_text_lets_the_next_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = TextScorer(TextConfig())
    sizes = looks(scorer, monkeypatch)
    pan = [np.roll(texture(3, 455, 256), 12 * index, axis=1) for index in range(7)]
    assert [scorer.coverage(image) for image in pan] == [0.0] * 7
    assert len(sizes) == 4
    assert scorer.coverage(subtitled(WORDS, pan[-1])) == 0.0  # half a second is little time to read
    assert scorer.coverage(subtitled(WORDS, pan[-1])) > 0.01
    assert len(sizes) == 5


def test_another_scene_does_not_wait() -> None:
    scorer = TextScorer(TextConfig())
    assert scorer.coverage(texture(3, 455, 256, low=120, high=220)) == 0.0
    assert scorer.coverage(subtitled(WORDS, texture(4, 455, 256, low=20, high=90))) > 0.01


def test_pictures_of_another_size_start_anew() -> None:
    scorer = TextScorer(TextConfig())
    image, _ = written(3)
    assert scorer.coverage(image) > 0.05
    assert scorer.coverage(np.full((128, 200, 3), 90, np.uint8)) == 0.0
    assert scorer.coverage(image) > 0.05


def test_a_small_line_changes_the_blocks() -> None:
    plain, (subtitled, _) = texture(3, 455, 256, low=30, high=90), written(1, 12)
    assert cv2.absdiff(block_means(plain), block_means(subtitled)).max() > 3 * TextConfig().still_tolerance


def test_clip_scores() -> None:
    scores = summarise([SampleCoverage(0.0, 0.0), SampleCoverage(0.5, 0.2), SampleCoverage(1.0, 0.1)], 0.1)
    assert (scores.text_coverage_max, scores.text_coverage_mean, scores.num_samples) == (0.2, pytest.approx(0.1), 3)
    assert (scores.sample_s, scores.sample_text_coverage) == ([0.0, 0.5, 1.0], [0.0, 0.2, 0.1])
    assert scores.text_ratio == pytest.approx(2 / 3)
    assert summarise([], 0.1).text_coverage_max is None


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="PP-OCRv6_det_small"):
        model_path("no_such_model")


def frame_at(path: Path, index: int) -> Image:
    with open_video(path) as reader:
        for frame in reader:
            if frame.index == index:
                return frame.bgr()
    raise AssertionError(f"{path.name} has no frame {index}")


@pytest.mark.parametrize("file", ["real_subtitle.mp4", "real_text_heavy.mp4"])
def test_real_text_of_known_area(scorer: TextScorer, file: str) -> None:
    truth = json.loads((shared_media() / "expected.json").read_text())["derived"][f"derived/{file}"]
    first, last = truth.get("text_frames", (0, truth["frames"]))
    coverage = scorer.coverage(sample(frame_at(shared_media() / "derived" / file, (first + last) // 2)))
    assert coverage == pytest.approx(truth["text_coverage"], rel=0.6)
    if first > 0:
        assert scorer.coverage(sample(frame_at(shared_media() / "derived" / file, first // 2))) < 0.01


@pytest.mark.parametrize(
    ("file", "index"),
    [
        ("mdn_crystal.mp4", 240),
        ("asl_book.mkv", 60),
        ("cockatoo.mp4", 160),
        ("mdn_stream.mp4", 59),
        ("nasa_13013.mp4", 9),
    ],
)
def test_real_pictures_without_text(scorer: TextScorer, file: str, index: int) -> None:
    assert scorer.coverage(sample(frame_at(shared_media() / "video" / file, index))) < 0.02


@pytest.mark.parametrize(
    "file", ["text_phototest.tif", "text_eurotext.tif", "text_devanagari.png", "terminal_text.png"]
)
def test_real_pages_of_text(scorer: TextScorer, file: str) -> None:
    assert scorer.coverage(sample(read_image(shared_media() / "image" / file).bgr)) > 0.4


@pytest.mark.parametrize("file", ["mdn_larch.jpg", "wall_Ashim_DSilva.jpg", "ski_coins.png", "red_panda_10mp.jpg"])
def test_real_photographs(scorer: TextScorer, file: str) -> None:
    assert scorer.coverage(sample(read_image(shared_media() / "image" / file).bgr)) < 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_videos_with_and_without_text() -> None:
    config = TextConfig()
    by_sample: list[tuple[bool, bool]] = []
    by_video: list[tuple[bool, bool]] = []
    for path, stretches in text_frames(shared_media() / "expected.json").items():
        scorer = TextScorer(config)
        told = [
            (bool(taken.has_text), scorer.coverage(taken.image) >= config.present_min)
            for taken in samples(path, stretches, config.samples.short_edge_px)
        ]
        by_sample += told
        by_video.append((any(true for true, _ in told), any(found for _, found in told)))
    assert sum(true for true, _ in by_sample) > 200
    for pairs in (by_sample, by_video):
        right = sum(true and found for true, found in pairs)
        assert right / sum(true for true, _ in pairs) >= 0.9
        assert right / sum(found for _, found in pairs) >= 0.9


@pytest.mark.parametrize(("surface", "number"), [("posts", 1), ("things", 2)])
def test_a_little_that_nobody_can_read_is_no_text(surface: str, number: int) -> None:
    """The detector alone takes these for text; a word on them is still found."""
    image = plain_video(surface, number)[0].image
    assert TextScorer(TextConfig(unread_max=1e-6)).coverage(image) > TextConfig().present_min
    assert TextScorer(TextConfig(unread_max=0.2)).coverage(image) == 0.0
    assert TextScorer(TextConfig()).coverage(subtitled("a lazy dog", image, top=8)) > TextConfig().present_min


@pytest.mark.parametrize("size_px", [9, 14, 24, 60])
@pytest.mark.parametrize("word", ["ill", "sea", "The"])
@pytest.mark.parametrize(
    ("ground", "ink"), [((0, 0, 0), (255, 255, 255)), ((90, 90, 90), (120, 120, 120)), ((200, 60, 60), (20, 120, 140))]
)
@pytest.mark.parametrize("turned", [False, True])
def test_the_shortest_words_have_edges_enough(
    size_px: int, word: str, ground: tuple[int, int, int], ink: tuple[int, int, int], turned: bool
) -> None:
    canvas = Pillow.new("RGB", (400, 256), ground)
    ImageDraw.Draw(canvas).text((40, 60), word, font=ImageFont.load_default(size_px), fill=ink)
    image = np.asarray(canvas)
    assert most_edges(np.rot90(image) if turned else image) >= TextConfig().edges_min


def test_plain_pictures_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(*_: object) -> None:
        raise AssertionError("the detector ran")

    monkeypatch.setattr("pipeline.score_text._run", look)
    scorer = TextScorer(TextConfig())
    disc = cv2.circle(np.full((256, 256, 3), 50, np.uint8), (120, 130), 60, (60, 70, 250), -1, cv2.LINE_AA)
    noisy = np.clip(disc + np.random.default_rng(0).normal(0, 2, disc.shape), 0, 255).astype(np.uint8)
    for image in (disc, noisy, np.zeros((1, 1, 3), np.uint8), np.zeros((2, 500, 3), np.uint8)):
        assert scorer.coverage(image) == 0.0
    with pytest.raises(AssertionError, match="the detector ran"):
        TextScorer(TextConfig(edges_min=0)).coverage(disc)
