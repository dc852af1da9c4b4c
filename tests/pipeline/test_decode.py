"""Every decoder gives the same frames at the same times, whatever the file does to them."""

import csv
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.decode import BUILT_IN, Image, open_video, turned
from schemas.errors import ConfigError, RowError
from tests.pipeline.made_media import SHARED_MEDIA, shared_media, shot, write_video


def three_greys(path: Path) -> Iterator[tuple[float, Image]]:
    """A user's decoder: three flat frames, whatever the file."""
    for index in range(3):
        yield 5 + index * 0.5, np.full((8, 10, 3), 80 * index, np.uint8)


def read(path: Path, decoder: str = "pyav") -> tuple[list[float], list[Image], str]:
    with open_video(path, decoder) as reader:
        frames = [(frame.seconds, frame.bgr()) for frame in reader]
        return [seconds for seconds, _ in frames], [image for _, image in frames], reader.decoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("decode") / "clip.mp4", shot(1, 50))


@pytest.mark.parametrize("decoder", BUILT_IN)
def test_each_decoder_gives_what_was_written(clip: Path, decoder: str) -> None:
    seconds, images, served = read(clip, decoder)
    assert served == decoder
    assert seconds == pytest.approx([index / 25 for index in range(50)], abs=1e-5)
    difference = np.abs(np.stack(images).astype(int) - np.stack(shot(1, 50)))
    assert difference.mean() < 4


@pytest.mark.parametrize("decoder", BUILT_IN)
def test_the_time_at_which_the_video_ends(clip: Path, decoder: str) -> None:
    with open_video(clip, decoder) as reader:
        for _ in reader:
            pass
        assert reader.end_s == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("decoder", BUILT_IN)
@pytest.mark.parametrize("target", [0.0, 0.6, 1.5, 1.96])
def test_a_seek_leads_to_the_frame_shown_then(clip: Path, decoder: str, target: float) -> None:
    _, images, _ = read(clip)
    with open_video(clip, decoder) as reader:
        reader.seek(target)
        frames = iter(reader)
        frame = next(frames)
        assert frame.seconds <= target + 1e-6
        while frame.seconds < target - 1e-6:
            frame = next(frames)
        assert np.array_equal(frame.bgr(), images[round(target * 25)])


@pytest.mark.parametrize("decoder", BUILT_IN)
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (32, 2), (98, 50)])
def test_pictures_of_any_size_are_pictures(tmp_path: Path, decoder: str, size: tuple[int, int]) -> None:
    width, height = size
    frames = [np.full((height, width, 3), level, np.uint8) for level in (40, 120, 200)]
    _, images, _ = read(write_video(tmp_path / "a.mp4", frames, pix_fmt="yuv444p"), decoder)
    assert [image.shape for image in images] == [(height, width, 3)] * 3
    assert np.abs(np.stack(images).astype(int) - np.stack(frames)).max() < 8


@pytest.mark.parametrize("decoder", BUILT_IN)
def test_variable_rate_and_late_start_keep_their_times(tmp_path: Path, decoder: str) -> None:
    steps_ms = [0, 40, 80, 200, 240, 500, 540, 1000]
    path = write_video(tmp_path / "vfr.mkv", shot(2, 8), times_ms=[1500 + step for step in steps_ms])
    seconds, _, _ = read(path, decoder)
    assert seconds == pytest.approx([step / 1000 for step in steps_ms], abs=2e-3)


def test_what_one_decoder_cannot_read_the_next_one_reads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "av1.mkv", shot(3, 10), codec="libsvtav1", options={"preset": "12"})
    seconds, _, served = read(path, "opencv")
    assert served == "pyav"
    assert len(seconds) == 10


def test_a_decoder_of_the_users_own(tmp_path: Path) -> None:
    seconds, images, served = read(tmp_path / "any.xyz", f"{__name__}:three_greys")
    assert seconds == [0, 0.5, 1.0]
    assert [int(image.mean()) for image in images] == [0, 80, 160]
    assert served.endswith(":three_greys")


@pytest.mark.parametrize("decoder", ["ffmpg", "no.such.module:decode", "pipeline.decode:no_such_function"])
def test_a_decoder_that_does_not_exist_is_a_wrong_recipe(clip: Path, decoder: str) -> None:
    with pytest.raises(ConfigError, match=decoder.split(":")[0]):
        open_video(clip, decoder)


def test_frames_above_the_limit_are_refused_before_decoding(clip: Path) -> None:
    with pytest.raises(RowError, match="320x180") as caught:
        open_video(clip, max_pixels=320 * 180 - 1)
    assert caught.value.reason == "TooManyPixels"


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_a_video_cut_short_is_an_error_and_not_a_shorter_video(tmp_path: Path, suffix: str) -> None:
    codec = "libvpx" if suffix == ".webm" else "libx264"
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    whole = tmp_path / f"whole{suffix}"
    frames = [frame for seed in range(4) for frame in shot(seed, 50)]
    with av.open(str(whole), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode())
    assert len(read(whole)[0]) == 200
    part = tmp_path / f"part{suffix}"
    part.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    with pytest.raises(RowError) as caught:
        read(part)
    assert caught.value.reason == "Truncated"


def test_the_last_frames_come_out_whatever_stream_they_are_in(tmp_path: Path) -> None:
    path = tmp_path / "sound_first.mkv"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=48_000)
        video = container.add_stream("libx264", rate=25, options={"bf": "3", "preset": "veryfast"})
        video.width, video.height = 320, 180
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 48_000, 0
        container.mux([*audio.encode(silence), *audio.encode()])
        for frame in shot(3, 30):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(video.encode())
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert len(read(path)[0]) == 30


def write_matroska(path: Path, video_s: float, num_frames: int, audio_s: float) -> Path:
    """Frames from `video_s` on, 25 a second, and silence from 0 s on."""
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=48_000)
        video.height, video.width = shot(0, 1)[0].shape[:2]
        packets = []
        for index, pixels in enumerate(shot(0, num_frames)):
            frame = av.VideoFrame.from_ndarray(pixels, format="bgr24")
            frame.pts = round(25 * video_s) + index
            packets += video.encode(frame)
        for start in range(0, int(audio_s * 48_000), 1024):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 48_000, start
            packets += audio.encode(sound)
        for packet in sorted(
            [*packets, *video.encode(), *audio.encode()], key=lambda p: float((p.dts or 0) * p.time_base)
        ):
            container.mux(packet)
    return path


@pytest.mark.parametrize(("video_s", "num_frames", "audio_s"), [(0.0, 1, 30.0), (5.0, 100, 9.0), (0.0, 100, 30.0)])
def test_sound_without_pictures_makes_no_video_too_short(
    tmp_path: Path, video_s: float, num_frames: int, audio_s: float
) -> None:
    assert len(read(write_matroska(tmp_path / "sound.mkv", video_s, num_frames, audio_s))[0]) == num_frames


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_garbage_at_the_beginning_does_not_make_a_video_shorter(tmp_path: Path, codec: str) -> None:
    whole = write_video(tmp_path / "whole.mp4", shot(0, 200), codec=codec, options={"g": "25"})
    data = bytearray(whole.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    upto = start + (end - start) * 4 // 10
    data[start:upto] = np.random.default_rng(0).bytes(upto - start)
    whole.write_bytes(data)
    with pytest.raises(RowError) as caught:
        read(whole)
    assert caught.value.reason == "Corrupt"


def test_one_damaged_packet_can_bear_any_time(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "whole.mkv", [frame for part in range(4) for frame in shot(part, 50)], options={"g": "25"}
    )
    with av.open(str(path)) as container:
        payload = [bytes(packet) for packet in container.demux(video=0) if packet.size][100]
    data = bytearray(path.read_bytes())
    at = data.index(payload)
    stamp = int.from_bytes(data[at - 3 : at - 1], "big", signed=True)  # of the block's header: track, time code, flags
    data[at - 3 : at - 1] = (stamp + 20_000).to_bytes(2, "big", signed=True)
    data[at : at + len(payload)] = b"\xff" * len(payload)
    path.write_bytes(data)
    assert 190 <= len(read(path)[0]) < 200


@pytest.mark.parametrize("seed", range(12))
def test_a_video_that_turns_into_garbage_is_corrupt_and_not_cut_short(tmp_path: Path, seed: int) -> None:
    """Garbage decodes to a picture now and then, so neither the last picture nor the packets lost tell by themselves."""
    whole = write_video(tmp_path / "whole.mp4", [frame for part in range(4) for frame in shot(part, 50)])
    data = bytearray(whole.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    rng = np.random.default_rng(seed)
    start += round(rng.uniform(0.3, 0.7) * (end - start))
    data[start:end] = bytes(end - start) if seed == 0 else rng.bytes(end - start)
    turned_bad = tmp_path / "turned.mp4"
    turned_bad.write_bytes(data)
    with pytest.raises(RowError) as caught:
        read(turned_bad)
    assert caught.value.reason == "Corrupt"


def test_damage_inside_costs_some_frames_only(tmp_path: Path, clip: Path) -> None:
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = bytes(40)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    seconds, _, _ = read(damaged)
    assert 30 <= len(seconds) <= 50
    assert seconds[-1] == pytest.approx(49 / 25)


@pytest.mark.parametrize(("degrees", "where"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (270, (0, 1)), (-90, (0, 1))])
def test_rotation_is_counter_clockwise(degrees: int, where: tuple[int, int]) -> None:
    stored = np.zeros((2, 2, 3), np.uint8)
    stored[0, 0] = 255  # a quarter turn counter-clockwise takes the top left corner to the bottom left
    assert turned(stored, degrees)[where].tolist() == [255, 255, 255]


def shared_rows() -> list[dict[str, str]]:
    manifest = SHARED_MEDIA / "MANIFEST.csv"
    if not manifest.is_file():
        return []
    rows = csv.DictReader(manifest.read_text().splitlines())
    return [row for row in rows if row["kind"] == "video" and row["probe"] == "ok"]


@pytest.mark.slow
@pytest.mark.parametrize("row", shared_rows(), ids=lambda row: str(row["file"]))
def test_real_videos_decode_whole(row: dict[str, str]) -> None:
    seconds, images, served = read(shared_media() / row["file"])
    assert served == "pyav"
    assert len(seconds) == int(row["frames"])
    assert np.all(np.diff(seconds) > 0)
    expected = json.loads((shared_media() / "expected.json").read_text())
    if row["file"] in expected["display_size"]:
        assert [images[0].shape[1], images[0].shape[0]] == expected["display_size"][row["file"]]
    truth = expected["derived"].get(row["file"], {})
    if "pts_s" in truth:
        assert seconds == pytest.approx(truth["pts_s"], abs=1e-3)


def test_the_nominal_rate_is_exact(tmp_path: Path) -> None:
    path = write_video(tmp_path / "ntsc.mp4", shot(4, 30), fps=Fraction(30000, 1001))
    with open_video(path) as reader:
        assert reader.fps == Fraction(30000, 1001)
