"""A skimmed video has the clips of one that was decoded whole."""

from itertools import pairwise
from pathlib import Path

import av
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

CUTS_ALONE = ScanConfig(families=(), skim=True, limits=ScanLimits(segment_workers=1))
SHORT_SCENES = ScanConfig(families=(), skim=True, segmentation=SegmentationConfig(min_scene_len_frames=3))
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


def test_only_those_who_ask_skim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("skimmed")

    monkeypatch.setattr("pipeline.scan_video.skim_video", refuse)
    path = write_video(tmp_path / "a.mp4", shot(1, 30), options={"bf": "3", "preset": "veryfast"})
    assert scan_medium(path, "0123456789abcdef", "video", ScanConfig(families=())).scan["num_frames"] == 30
    with pytest.raises(AssertionError, match="skimmed"):
        scan_medium(path, "0123456789abcdef", "video", CUTS_ALONE)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"families": ["technical"]}, r"families = \[\]"),
        ({"segmentation": {"adaptive": {}}}, "adaptive"),
        ({"decoder": "opencv"}, "pyav"),
        ({"limits": {"threads": 2}}, "threads"),
    ],
)
def test_what_needs_every_frame_cannot_be_skimmed(other: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ScanConfig.model_validate({"families": [], "skim": True, **other})


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


@pytest.mark.parametrize("kind", ["black", "white"])
def test_a_flash_that_costs_few_bytes_is_seen(tmp_path: Path, kind: str) -> None:
    path = flashes_in_noise(tmp_path / "a.mkv", "libx264", kind)
    for config in (CUTS_ALONE, SHORT_SCENES):
        part = skimmed(path, config)
        assert part is not None
        assert part.spans(config.segmentation) == scan_part(path, config).spans(config.segmentation)


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_videos_of_older_coders_are_left_to_one_pass(tmp_path: Path, codec: str) -> None:
    assert skimmed(flashes_in_noise(tmp_path / "a.mkv", codec, "black")) is None


def flashes_in_noise(path: Path, codec: str, kind: str) -> Path:
    """Flashes in frames that no other needs, of a fixed pattern, in noise that makes all others dear."""
    rng = np.random.default_rng(5)
    frames = [
        np.clip(frame + rng.normal(0, 8, frame.shape), 0, 255).astype(np.uint8) for frame in shot(7, 240, step_px=1)
    ]
    for at in range(61, 220, 40):
        frames[at] = flash(frames[at], kind)
    options = {"bf": "3", "b-adapt": "0", "b_strategy": "0", "sc_threshold": "0", "g": "60", "b-pyramid": "none"}
    return write_video(path, frames, codec=codec, options=options)


def test_frames_that_were_lost_are_not_taken_for_passed_over(tmp_path: Path) -> None:
    options = {"bf": "3", "b-pyramid": "none", "preset": "veryfast"}
    path = write_video(tmp_path / "a.mkv", [*shot(1, 100), *shot(2, 100)], options=options)
    broken = tmp_path / "b.mkv"
    with av.open(str(path)) as source, av.open(str(broken), "w") as container:
        stream = source.streams.video[0]
        made = container.add_stream_from_template(stream)
        for index, packet in enumerate(source.demux(stream)):
            if not packet.size:
                continue
            kept: av.Packet[av.stream.Stream] = av.Packet(bytes(range(64)) if index in (31, 32, 33) else bytes(packet))
            kept.pts, kept.dts, kept.duration = packet.pts, packet.dts, packet.duration
            kept.time_base, kept.is_keyframe, kept.stream = packet.time_base, packet.is_keyframe, made
            container.mux(kept)
    whole = scan_part(broken, CUTS_ALONE)
    assert len(whole.pts) < 200
    assert skimmed(broken) is None


def test_a_video_without_key_frames_cannot_be_entered(tmp_path: Path) -> None:
    """As one that was cut out of the middle of a stream. One pass reads it all the same."""
    options = {"bf": "0", "g": "1000", "sc_threshold": "1000000000"}
    path, middle = write_video(tmp_path / "a.mkv", shot(1, 60), codec="mpeg4", options=options), tmp_path / "b.avi"
    with av.open(str(path)) as source, av.open(str(middle), "w") as container:
        stream = source.streams.video[0]
        made = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size and not packet.is_keyframe:
                packet.stream = made
                container.mux(packet)
    assert packet_times(middle, 0.0) is None
    assert scan_medium(middle, "0123456789abcdef", "video", CUTS_ALONE).scan["num_frames"] == 59
