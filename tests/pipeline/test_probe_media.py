"""Files are known by their content, and what cannot be used says why."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.decode import open_video
from pipeline.media_limits import MediaLimits
from pipeline.probe_media import probe, sniff
from pipeline.sandbox import Sandbox
from schemas.errors import RowError
from tests.pipeline.made_media import shared_media, shot, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    write_video(folder / "clip.mp4", shot(1, 20), fps=10)
    Image.fromarray(shot(2, 1)[0]).save(folder / "still.jpg")
    return folder


def named(folder: Path, source: str, name: str) -> Path:
    path = folder / name
    path.write_bytes((folder / source).read_bytes())
    return path


def reason(path: Path, limits: MediaLimits | None = None) -> str:
    with pytest.raises(RowError) as caught:
        probe(path, limits or MediaLimits())
    assert path.name in caught.value.message or "pixels" in caught.value.message
    return caught.value.reason


def test_facts_of_a_video(folder: Path) -> None:
    facts = probe(folder / "clip.mp4")
    assert (facts.kind, facts.codec, facts.width_px, facts.height_px, facts.rotation_deg) == (
        "video",
        "h264",
        320,
        180,
        0,
    )
    assert (facts.fps, facts.duration_ms, facts.has_audio) == (10.0, 2000, False)
    assert facts.num_bytes == (folder / "clip.mp4").stat().st_size


def test_facts_of_an_image(folder: Path) -> None:
    facts = probe(folder / "still.jpg")
    assert (facts.kind, facts.container, facts.width_px, facts.height_px) == ("image", "jpeg", 320, 180)
    assert (facts.fps, facts.duration_ms, facts.has_audio) == (None, None, False)


@pytest.mark.parametrize("name", ["clip_no_suffix", "clip.dat"])
def test_a_name_that_says_nothing_is_no_fault(folder: Path, name: str) -> None:
    assert probe(named(folder, "clip.mp4", name)).kind == "video"


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mkv", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("ts", "mpeg2video"), ("flv", "flv")],
)
def test_containers_are_told_by_content(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", shot(1, 12), codec=codec)
    path = path.rename(tmp_path / "nameless")
    assert sniff(path) == "video"
    assert probe(path).kind == "video"


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tif", "ppm", "jp2", "avif", "tga"])
def test_pictures_are_told_by_content(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(shot(2, 1)[0]).save(tmp_path / f"still.{suffix}")
    path = (tmp_path / f"still.{suffix}").rename(tmp_path / "nameless")
    assert sniff(path) == "image"


def test_a_gif_that_moves_is_a_video(tmp_path: Path) -> None:
    frames = [Image.new("L", (32, 32), shade) for shade in (0, 90, 200)]
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=100)
    assert probe(tmp_path / "still.gif").kind == "image"
    assert probe(tmp_path / "moving.gif").kind == "video"


def test_the_wrong_kind_under_a_name(folder: Path) -> None:
    assert reason(named(folder, "clip.mp4", "clip_as.jpg")) == "WrongExtension"
    assert reason(named(folder, "still.jpg", "still_as.mp4")) == "WrongExtension"
    text = folder / "text_as.mkv"
    text.write_text("title\n" * 300)
    with pytest.raises(RowError, match="named as a video but holds neither a video nor an image"):
        probe(text)


def test_another_format_of_the_same_kind_is_no_fault(folder: Path) -> None:
    assert probe(named(folder, "still.jpg", "still_as.png")).container == "jpeg"
    assert probe(named(folder, "clip.mp4", "clip_as.avi")).kind == "video"


def test_faults(folder: Path) -> None:
    empty = folder / "empty.mp4"
    empty.touch()
    assert reason(empty) == "Empty"
    headless = folder / "headless.mp4"
    headless.write_bytes((folder / "clip.mp4").read_bytes()[:1000])
    assert reason(headless) == "Unreadable"
    half = folder / "half.jpg"
    half.write_bytes((folder / "still.jpg").read_bytes()[:1500])
    assert reason(half) == "Truncated"
    other = folder / "notes.txt"
    other.write_text("no medium")
    assert reason(other) == "Unreadable"


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(path) == "NoVideoStream"


@pytest.mark.parametrize("name", ["clip.mp4", "still.jpg"])
def test_too_many_pixels(folder: Path, name: str) -> None:
    assert reason(folder / name, MediaLimits(max_pixels=1000)) == "TooManyPixels"


def test_real_files_that_must_fail() -> None:
    media = shared_media()
    assert reason(media / "video" / "broken.mp4") == "Unreadable"
    assert reason(media / "video" / "vp9_invalid_bitstream.webm") == "Unreadable"
    assert reason(media / "image" / "giant_20000x14000.jpg") == "TooManyPixels"


@pytest.mark.parametrize(
    ("name", "rotation"), [("ios9.mov", 270), ("paper_letter.mp4", 90), ("fire2.mp4", 180), ("desks_badmeta.3gp", 0)]
)
def test_real_rotation(name: str, rotation: int) -> None:
    facts = probe(shared_media() / "video" / name)
    assert facts.rotation_deg == rotation
    assert facts.has_audio


@pytest.mark.parametrize("name", ["list.mp4", "list.ffconcat", "list.m3u8", "list"])
def test_a_playlist_is_not_the_media_it_names(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "clip.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    playlist = tmp_path / name
    if name.endswith("m3u8"):
        playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n")
    else:
        playlist.write_text("ffconcat version 1.0\nfile clip.mp4\n")
    with pytest.raises(RowError, match="holds neither a video nor an image"):
        probe(playlist)
    with pytest.raises(RowError, match="is a playlist"):
        open_video(playlist)


def test_a_document_with_a_photograph_is_no_video(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "page.pdf", "PDF")
    with pytest.raises(RowError, match="holds neither a video nor an image"):
        probe(tmp_path / "page.pdf")


@pytest.mark.parametrize("name", ["art.xb", "art.mp4", "art"])
def test_drawings_of_characters_are_no_video(tmp_path: Path, name: str) -> None:
    """FFmpeg would play them."""
    header = b"XBIN\x1a" + (80).to_bytes(2, "little") + (25).to_bytes(2, "little") + bytes([16, 0])
    (tmp_path / name).write_bytes(header + b"A\x07" * 2000)
    assert sniff(tmp_path / name) == "other"
    with pytest.raises(RowError):
        probe(tmp_path / name)


@pytest.mark.parametrize("name", ["noise.mkv", "noise.bin"])
def test_a_few_bytes_of_noise_are_no_video(tmp_path: Path, name: str) -> None:
    """FFmpeg knows graphics of karaoke discs by two bytes in 24, which one file of noise in some hundreds has."""
    (tmp_path / name).write_bytes((b"\x09\x01" + bytes(22)) * 3)
    assert sniff(tmp_path / name) == "other"


def test_a_gif_that_claims_more_pixels_than_pillow_opens_is_refused_as_any_other(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.gif")
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:6] + b"\xff\xff\xff\xff" + data[10:])
    assert reason(tmp_path / "a.gif") == "TooManyPixels"


def test_a_playlist_that_names_a_pipe_is_not_followed(tmp_path: Path) -> None:
    """FFmpeg would wait for somebody to write into it."""
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("list.mp4", "list"):
        (tmp_path / name).write_text("ffconcat version 1.0\nfile pipe.mp4\n")
        with Sandbox(timeout_s=60, memory_mb=2000) as sandbox, pytest.raises(RowError, match="holds neither"):
            sandbox.run(probe, tmp_path / name)
