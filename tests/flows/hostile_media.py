"""Files that nobody should offer, made from a seed: each with the reasons by which it may end. And good ones among them."""

import io
import os
import random
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.flows.small_media import write_image
from tests.pipeline.made_media import shot, write_video

BROKEN = frozenset({"Unreadable", "Truncated", "Corrupt", "DecodeFailed", "NoVideoStream", "Empty", "WrongExtension"})
BEYOND = frozenset({"TooManyPixels", "TooManyFrames", "TooLong"})
CUTS, FLIPS = 3, 3
NUM_GIF_FRAMES = 100_000
NUM_TIFF_PAGES = 20_000
STILLS = ("png", "jpg", "webp", "gif", "tif", "bmp", "jp2", "avif", "ico", "ppm", "tga")
MOVING = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video", "flv": "flv"}
MOVING |= {"hevc.mp4": "libx265", "av1.mkv": "libsvtav1"}


@dataclass
class Hostile:
    """Reasons by which each file may end, by its path below the folder; None in it where it may also be read."""

    folder: Path
    reasons: dict[str, frozenset[str | None]] = field(default_factory=dict)
    only_in_scan: set[str] = field(default_factory=set)
    """Files that look right when they are opened; `grows.mp4` and `vanishes.mp4` are to change in between."""

    def expect(self, name: str, *reasons: str | None) -> Path:
        """Notes how a file may end, and gives its path."""
        self.reasons[name] = frozenset(reasons)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, data: bytes, *reasons: str | None) -> None:
        """A file of such bytes."""
        self.expect(name, *reasons).write_bytes(data)


def write_good(folder: Path) -> list[str]:
    """Media of every odd kind that must be read; returns their names."""
    folder.mkdir(parents=True)
    for seed in range(2):
        write_video(folder / f"video{seed}.mp4", shot(seed, 20) + shot(seed + 10, 20))
    write_video(folder / "wide.mkv", shot(2, 20, width=16_384, height=16))
    write_image(folder / "plain.png", 1)
    noise = np.random.default_rng(3).integers(0, 255, (48, 64, 3), np.uint8)
    picture = Image.fromarray(noise).resize((96, 64))
    others = [picture.rotate(90 * turn) for turn in (1, 2)]
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(folder / "16bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "two.mpo", save_all=True, append_images=others)
    for suffix, seed in (("gif", 4), ("png", 5), ("webp", 6)):
        frames = [Image.fromarray(frame) for frame in shot(seed, 5, width=64, height=48)]
        frames[0].save(folder / f"moving.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    for index, name in enumerate(("-rf.png", "new\nline.png", "quo'te\".png", "sé p.png", "x" * 250 + ".png")):
        write_image(folder / name, 20 + index)
    return sorted(path.name for path in folder.iterdir())


def write_hostile(folder: Path, seed: int, port: int) -> Hostile:
    """Everything else, below a new folder. URLs point to `port` of this machine, where nobody may be asked for anything."""
    folder.mkdir(parents=True)
    made = Hostile(folder)
    rng = random.Random(seed)
    _bombs(made)
    for name, data in _whole(folder):
        _damaged(made, name, data, rng)
    _named_wrongly(made)
    _no_files(made)
    _elsewhere(made, port)
    return made


def _whole(folder: Path) -> Iterator[tuple[str, bytes]]:
    """A whole file of every format."""
    picture = Image.fromarray(shot(7, 1, width=96, height=64)[0])
    for suffix in STILLS:
        path = folder / f"whole.{suffix}"
        picture.save(path)
        yield path.name, path.read_bytes()
        path.unlink()
    for suffix, codec in MOVING.items():
        path = write_video(folder / f"whole.{suffix}", shot(8, 30, width=96, height=64), codec=codec)
        yield path.name, path.read_bytes()
        path.unlink()


def _damaged(made: Hostile, name: str, data: bytes, rng: random.Random) -> None:
    stem, _, suffix = name.partition(".")
    for index in range(CUTS):
        made.write(f"cut/{stem}{index}.{suffix}", data[: rng.randrange(1, len(data))], *BROKEN, *BEYOND, None)
    for index in range(FLIPS):
        bad = bytearray(data)
        for _ in range(1 + len(bad) // 200):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        made.write(f"flipped/{stem}{index}.{suffix}", bytes(bad), *BROKEN, *BEYOND, None)
    made.write(f"noise/{stem}.{suffix}", data[:12] + rng.randbytes(2000), *BROKEN, *BEYOND, None)


def _bombs(made: Hostile) -> None:
    made.write("bomb.png", png_bomb(40_000, 40_000), "TooManyPixels")
    made.write("bomb.ico", icon(png_bomb(12_000, 12_000)), "TooManyPixels")
    made.write("bomb.bmp", _saved("bmp", _bmp_bomb), "TooManyPixels")
    made.write("bomb.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + _gif_frames(1), "TooManyPixels")
    made.write("bomb.jpg", _saved("jpeg", _jpeg_bomb), "TooManyPixels")
    made.write("bomb.tif", _tiff(1, side_px=60_000), "TooManyPixels")
    made.write("bomb.webp", _saved("webp", _webp_bomb), "TooManyPixels", "Unreadable")
    made.write("bomb.avif", _saved("avif", lambda data: _ispe(data, 60_000)), "TooManyPixels", "Unreadable")
    made.write("bomb.y4m", b"YUV4MPEG2 W30000 H30000 F25:1 Ip C420\nFRAME\n" + bytes(64), "TooManyPixels", "Unreadable")
    made.write("many.gif", b"GIF89a" + struct.pack("<HH", 8, 8) + _gif_frames(NUM_GIF_FRAMES), "TooManyFrames")
    made.write("many.tif", _tiff(NUM_TIFF_PAGES), "TooManyFrames")
    made.write("round.tif", _tiff(1, next_page=8), None)
    made.write("claims.apng", _apng(10**9), "TooManyFrames", "Unreadable")
    write_video(made.expect("long.mkv", "TooLong"), shot(9, 12), times_ms=[index * 3_600_000 for index in range(12)])
    minute = shot(9, 60, width=64, height=48)
    write_video(made.expect("endless.h264", "TooManyFrames"), (frame for _ in range(20) for frame in minute))
    for index, name in enumerate(("grows.mp4", "vanishes.mp4")):
        write_video(made.expect(name, "Moved"), shot(13 + index, 10))
    made.only_in_scan |= {"endless.h264", "grows.mp4", "vanishes.mp4"}


def _named_wrongly(made: Hostile) -> None:
    write_video(made.expect("video.jpg", "WrongExtension").with_suffix(".mp4"), shot(11, 5))
    (made.folder / "video.mp4").rename(made.folder / "video.jpg")
    made.write("picture.mp4", _saved("jpeg"), "WrongExtension")
    made.write("words.mkv", b"title\n" * 300, "WrongExtension")
    made.write("program.mp4", b"\x7fELF\x02\x01\x01" + bytes(4000), "WrongExtension", "Unreadable")
    made.write("page.pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n", "NotMedia")
    made.write("script.eps", _saved("eps"), "NotMedia")
    for suffix in ("mp4", "png", "gif", "webm", "tif"):
        made.write(f"empty.{suffix}", b"", "Empty")
    made.write("empty", b"", "NotMedia")
    made.write("zeros.mp4", bytes(100_000), *BROKEN)
    with made.expect("sparse.mp4", "TooManyBytes").open("wb") as file:
        file.truncate(1 << 40)
    with made.expect("sparse.csv", "BrokenRows").open("wb") as file:
        file.truncate(1 << 33)
    with made.expect("hollow.txt", "TextTooLong").open("wb") as file:
        file.truncate(1 << 40)


def _no_files(made: Hostile) -> None:
    os.mkfifo(made.expect("pipe.mp4", "NotAFile"))
    here = os.open(made.folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(f"/proc/self/fd/{here}/{made.expect('socket.mp4', 'NotAFile').name}")  # whole paths may be too long
    os.close(here)
    made.expect("folder.mp4", "NotAFile").mkdir()
    made.expect("self.png", "LinkLoop").symlink_to(made.folder / "self.png")
    made.expect("up", "LinkLoop").symlink_to(made.folder)
    made.expect("dead.mp4", "Missing").symlink_to(made.folder / "nowhere.mp4")
    made.expect("zero.mp4", "NotAFile").symlink_to("/dev/zero")
    write_image(made.folder / "x.png", 30)
    os.rename(made.folder / "x.png", os.fsencode(made.folder) + b"/caf\xe9.png")
    made.expect("caf\\xe9.png", "NameNotUtf8")
    if os.geteuid():
        made.write("secret.png", _saved("png"), "NotPermitted")
        (made.folder / "secret.png").chmod(0)


def _elsewhere(made: Hostile, port: int) -> None:
    """Files that name other files or places: none of them is looked at."""
    url = f"http://127.0.0.1:{port}/video.mp4"
    picture = _saved("png")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../outside.png", picture)
    made.write("archive.zip", packed.getvalue(), "NotMedia")
    made.write("archive.mp4", packed.getvalue(), *BROKEN)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("/tmp/../outside.png")
        member.size = len(picture)
        tar.addfile(member, io.BytesIO(picture))
    made.write("archive.tar", packed.getvalue(), "NotMedia")
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{url}\n#EXTINF:2,\npipe.mp4\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile pipe.mp4\nfile '{url}'\nfile /etc/passwd\n".encode()
    dash = f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{url}</BaseURL></MPD>'.encode()
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{url}"/><image href="file:///etc/passwd"/></svg>'.encode()
    sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n".encode()
    for name, data in (("hls", hls), ("concat", concat), ("dash", dash), ("svg", svg), ("sdp", sdp)):
        made.write(f"{name}.list", data, "NotMedia")
        made.write(f"{name}.mp4", data, *BROKEN, "Playlist")
    made.write("drawing.svg", svg, "NotMedia")
    made.write("list.m3u8", hls, "NotMedia")
    urls = [
        url,
        "http://169.254.169.254/latest/meta-data",
        "ftp://10.0.0.1/a.mp4",
        "file://elsewhere/a.mp4",
        "gopher://localhost/1",
        f"HTTP://user@127.0.0.1:{port}/a.mp4",
        "https://ｌｏｃａｌｈｏｓｔ/a.mp4",
        "file://[::1/a.mp4",
        "data:image/png;base64,AAAA",
    ]
    odd = ["javascript:alert(1)", f"//127.0.0.1:{port}/a.mp4", "../../../nowhere/a.mp4", "pipe.mp4", "a\\u0000b.png"]
    rows = [f'{{"path": "{path}"}}\n' for path in urls + odd]
    made.write("rows/manifest.jsonl", "".join(rows).encode(), None)
    reasons = ["UrlNotAllowed"] * len(urls) + ["Missing"] * 2 + ["Missing", "Missing", "BrokenRow"]
    made.reasons |= {f"rows/manifest.jsonl#row={row}": frozenset({reason}) for row, reason in enumerate(reasons)}


# --- files made by hand ---


def _saved(form: str, change: Callable[[bytes], bytes] = lambda data: data) -> bytes:
    """A small picture in a format, with its bytes changed."""
    stream = io.BytesIO()
    Image.fromarray(shot(12, 1, width=64, height=48)[0]).save(stream, form)
    return change(stream.getvalue())


def png_bomb(width: int, height: int) -> bytes:
    """A valid PNG of one colour: a thousandth of the bytes that it unpacks to."""
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _apng(num_frames: int) -> bytes:
    """A PNG that claims to be an animation."""
    whole = png_bomb(8, 8)
    return whole[:33] + _chunk(b"acTL", struct.pack(">II", num_frames % 2**32, 0)) + whole[33:]


def icon(png: bytes) -> bytes:
    """An icon whose directory says 16x16 and which holds any PNG."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


def _gif_frames(num_frames: int) -> bytes:
    """What follows the size of a GIF: two colours, and frames of 8x8 that alternate."""
    control = b"\x21\xf9\x04\x00\x04\x00\x00\x00"
    one = control + b"\x2c" + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\x02\x04\x84\x8f\xa9\x0b\x00"
    return b"\x80\x00\x00" + bytes(3) + b"\xff" * 3 + one * num_frames + b"\x3b"


def _tiff(num_pages: int, side_px: int = 8, next_page: int = 0) -> bytes:
    """A chain of grey pages that share one strip."""
    strip = zlib.compress(bytes(64))
    values = [
        (256, 4, side_px),
        (257, 4, side_px),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (277, 3, 1),
        (278, 4, side_px),
    ]
    length = 2 + 12 * (len(values) + 2) + 4
    at = 8 + num_pages * length
    tags = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in values)
    tags += struct.pack("<HHII", 273, 4, 1, at) + struct.pack("<HHII", 279, 4, 1, len(strip))
    pages = b""
    for page in range(1, num_pages + 1):
        pages += struct.pack("<H", len(values) + 2) + tags
        pages += struct.pack("<I", 8 + page * length if page < num_pages else next_page)
    return b"II*\x00" + struct.pack("<I", 8) + pages + strip


def _bmp_bomb(data: bytes) -> bytes:
    return data[:18] + struct.pack("<ii", 60_000, 60_000) + data[26:]


def _jpeg_bomb(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65_000, 65_000) + data[at + 4 :]


def _webp_bomb(data: bytes) -> bytes:
    at = data.index(b"\x9d\x01\x2a") + 3
    return data[:at] + struct.pack("<HH", 16_383, 16_383) + data[at + 4 :]


def _ispe(data: bytes, side_px: int) -> bytes:
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", side_px, side_px) + data[at + 8 :]
