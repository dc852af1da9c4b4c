"""A skimmed video has the clips of one that was decoded whole."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode import Frame
from pipeline.decode_pyav import packet_times
from pipeline.detect_scenes import FrameNumbers, SegmentationConfig
from pipeline.frame_meter import FrameMeter
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium
from pipeline.skim_video import skim_video
from pipeline.video_part import Part, scan_part
from schemas.errors import RowError
from tests.pipeline.made_media import Image, shared_media, shot, write_video

CUTS_ALONE = ScanConfig(families=(), limits=ScanLimits(segment_workers=1))
SHORT_SCENES = ScanConfig(families=(), segmentation=SegmentationConfig(min_scene_len_frames=3))
NUM_FRAMES = 120


def skimmed(path: Path, config: ScanConfig = CUTS_ALONE) -> Part | None:
    times = packet_times(path, 0.0)
    assert times is not None
    return skim_video(path, config, times)


def flash(frame: Image, kind: str) -> Image:
    """A frame that is nothing like its neighbours."""
    if kind == "inverted":
        return 255 - frame
    if kind == "other":
        return shot(99, 1, width=frame.shape[1], height=frame.shape[0])[0]
    return np.full_like(frame, 255 if kind == "white" else 0)


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(5, NUM_FRAMES - 5), max_size=4, unique=True),
    flashes=st.lists(
        st.tuples(
            st.integers(8, NUM_FRAMES - 8), st.integers(1, 3), st.sampled_from(["white", "black", "inverted", "other"])
        ),
        max_size=3,
    ),
    step_px=st.sampled_from([0, 1, 3]),
    bframes=st.integers(1, 8),
    scenecut=st.sampled_from([0, 40]),
    keyint=st.sampled_from([12, 40, 250]),
    crf=st.sampled_from([18, 28, 38]),
    seed=st.integers(0, 1000),
)
def test_cuts_and_flashes_wherever_they_fall(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: list[int],
    flashes: list[tuple[int, int, str]],
    step_px: int,
    bframes: int,
    scenecut: int,
    keyint: int,
    crf: int,
    seed: int,
) -> None:
    edges = [0, *sorted(cuts), NUM_FRAMES]
    frames = [
        frame
        for index, (start, end) in enumerate(pairwise(edges))
        for frame in shot(seed + index, end - start, step_px=step_px)
    ]
    for at, length, kind in flashes:
        for index in range(at, at + length):
            frames[index] = flash(frames[index], kind)
    options = {
        "bf": str(bframes),
        "sc_threshold": str(scenecut),
        "g": str(keyint),
        "crf": str(crf),
        "preset": "veryfast",
    }
    path = write_video(tmp_path_factory.mktemp("made") / "a.mp4", frames, options=options)
    for config in (CUTS_ALONE, SHORT_SCENES):
        part = skimmed(path, config)
        if part is not None:
            assert part.spans(config.segmentation) == scan_part(path, config).spans(config.segmentation)


def test_frames_that_no_other_needs_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"bf": "3", "b-pyramid": "none", "sc_threshold": "40", "preset": "veryfast"}
    path = write_video(tmp_path / "a.mp4", [*shot(1, 100), *shot(2, 100), *shot(3, 100)], options=options)
    seen: list[float] = []
    measure = FrameMeter.measure

    def counted(self: FrameMeter, frame: Frame) -> FrameNumbers:
        seen.append(frame.seconds)
        return measure(self, frame)

    monkeypatch.setattr(FrameMeter, "measure", counted)
    part = skimmed(path)
    assert part is not None
    assert [span.start_frame for span in part.spans(CUTS_ALONE.segmentation)] == [0, 100, 200]
    assert len(seen) < 0.6 * len(part.pts)


def test_a_video_that_must_be_decoded_again_mostly_is_left_to_one_pass(tmp_path: Path) -> None:
    options = {"bf": "3", "b-pyramid": "none", "sc_threshold": "0", "g": "1000", "preset": "veryfast"}
    path = write_video(tmp_path / "a.mp4", [*shot(1, 150), *shot(2, 50)], options=options)
    times = packet_times(path, 0.0)
    assert times is not None
    assert times.key_pts.tolist() == [0]
    whole = scan_part(path, CUTS_ALONE).spans(CUTS_ALONE.segmentation)
    assert [span.start_frame for span in whole] == [0, 150]
    scan = scan_medium(path, "0123456789abcdef", "video", CUTS_ALONE)
    assert scan.scan["cuts"] == [150]


def test_what_is_measured_is_measured_on_every_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("skimmed")

    monkeypatch.setattr("pipeline.scan_video.skim_video", refuse)
    path = write_video(tmp_path / "a.mp4", shot(1, 30), options={"bf": "3", "preset": "veryfast"})
    for config in (
        ScanConfig(families=("technical",)),
        ScanConfig(families=(), skim=False),
        ScanConfig(families=(), decoder="opencv"),
        ScanConfig(families=(), limits=ScanLimits(threads=2)),
    ):
        assert scan_medium(path, "0123456789abcdef", "video", config).scan["num_frames"] == 30
    with pytest.raises(AssertionError, match="skimmed"):
        scan_medium(path, "0123456789abcdef", "video", CUTS_ALONE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_videos_have_the_clips_of_a_whole_pass() -> None:
    num_skimmed = 0
    for path in sorted((shared_media() / "video").iterdir()):
        if path.stat().st_size > 3_000_000:
            continue
        try:
            part = skimmed(path) if packet_times(path, 0.0) else None
        except RowError:
            continue
        if part is not None:
            num_skimmed += 1
            assert part.spans(CUTS_ALONE.segmentation) == scan_part(path, CUTS_ALONE).spans(CUTS_ALONE.segmentation), (
                path.name
            )
    assert num_skimmed > 30
