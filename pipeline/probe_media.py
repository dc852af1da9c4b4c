"""What a file is, by its content: kind, container, codec, shown size, and whether it can be read at all."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pipeline.media_limits import GIF_MARKS, MediaLimits
from schemas.errors import RowError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

Kind = Literal["video", "image", "other"]

VIDEO_SUFFIXES = frozenset(
    {
        ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mjpeg",
        ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".obu", ".ogv", ".qt", ".ts", ".vob", ".webm",
        ".wmv", ".y4m",
    }
)  # fmt: skip
IMAGE_SUFFIXES = frozenset(
    {
        ".apng", ".avif", ".bmp", ".dib", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
        ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
EITHER_SUFFIXES = frozenset({".gif"})  # a picture that may move

PHRASES: Mapping[Kind, str] = MappingProxyType(
    {"video": "a video", "image": "an image", "other": "neither a video nor an image"}
)
RAW_STREAMS = frozenset(
    {"av1", "avs2", "avs3", "cavsvideo", "dirac", "dnxhd", "evc", "h264", "hevc", "ingenient", "ipu"}
    | {"m4v", "mjpeg", "mjpeg_2000", "mpegvideo", "obu", "rawvideo", "vc1", "vvc"}
)  # streams without a container, which have no mark of their own
FAINT_FORMATS = frozenset({"cdg", "h261", "h263", "image2", "tty", "txt", "xbin"})
"""What FFmpeg also takes text and noise for: hardly a byte tells them. No suffix of ours promises one of them."""
SNIFFED_BYTES = 4096
TS_PACKETS = (188, 192, 204)  # packet lengths of MPEG transport streams
PICTURE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc", b"hevx"})
IMAGE_MAGIC = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"BM"),
    (0, b"II*\x00"),
    (0, b"MM\x00*"),
    (0, b"\x00\x00\x00\x0cjP  \r\n"),
    (0, b"\x00\x00\x01\x00"),
    (8, b"WEBP"),
)
VIDEO_MAGIC = (
    (0, b"\x1aE\xdf\xa3"),  # Matroska and WebM
    (8, b"AVI "),
    (0, b"FLV"),
    (0, b"\x00\x00\x01\xba"),  # MPEG program stream
    (0, b"\x00\x00\x01\xb3"),
    (0, b"0&\xb2u\x8ef\xcf\x11"),  # ASF
    (0, b"OggS"),
    (0, b"YUV4MPEG2"),
    (0, b"\x06\x0e+4\x02\x05\x01\x01"),  # MXF
    (4, b"ftyp"),
    (4, b"moov"),
    (4, b"mdat"),
    (4, b"moof"),
)
PLAYLIST_MARKS = (b"ffconcat", b"#EXTM3U", b"[playlist]", b"<smil", b"<asx", b"<ASX")


@dataclass(frozen=True)
class MediumFacts:
    """Facts of one readable medium, as the columns of `media` want them."""

    kind: Literal["video", "image"]
    num_bytes: int
    container: str
    codec: str
    width_px: int
    height_px: int
    rotation_deg: int
    fps: float | None
    duration_ms: int | None
    has_audio: bool


def sniff(path: Path) -> Kind:
    """A file -> video, image or other, by its first bytes, never by its name. A GIF that moves is a video."""
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
    if head[:6] in GIF_MARKS:
        return "video" if _moves(path) else "image"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(PLAYLIST_MARKS):
        return "other"  # FFmpeg would open what it names, a pipe without a writer too
    if head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS:
        return "image"
    if _has_magic(head, IMAGE_MAGIC):
        return "image"
    if _has_magic(head, VIDEO_MAGIC) or _is_transport_stream(head):
        return "video"
    return _ask_readers(path) if head else "other"


def probe(path: Path, limits: MediaLimits = MediaLimits()) -> MediumFacts:  # noqa: B008  # frozen
    """A file -> its facts. A video's first frame is decoded and a picture is decoded whole, so that it can be used.

    Raises: RowError with Empty, WrongExtension, Unreadable, Truncated, NoVideoStream, TooManyPixels, TooManyFrames or
        TooLong.
    """
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise RowError("Empty", f"{path.name} has no bytes")
    kind = sniff(path)
    named = named_kind(path)
    if kind == "other" and named == "other":
        raise RowError("Unreadable", f"{path.name} holds {PHRASES[kind]}")
    if kind != named and named != "other" and not (path.suffix.lower() in EITHER_SUFFIXES and kind != "other"):
        raise RowError("WrongExtension", f"{path.name} is named as {PHRASES[named]} but holds {PHRASES[kind]}")
    return _probe_image(path, num_bytes, limits) if kind == "image" else _probe_video(path, num_bytes, limits)


def named_kind(path: Path) -> Kind:
    """A path -> what its name claims; "other" where the name says nothing we know. A GIF is named as a picture."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES or suffix in EITHER_SUFFIXES else "other"


def _probe_image(path: Path, num_bytes: int, limits: MediaLimits) -> MediumFacts:
    from pipeline.read_image import read_image

    picture = read_image(path, limits.max_pixels, limits.max_pictures)
    height, width = picture.bgr.shape[:2]
    return MediumFacts(
        kind="image",
        num_bytes=num_bytes,
        container=picture.container.lower(),
        codec=picture.container.lower(),
        width_px=width,
        height_px=height,
        rotation_deg=picture.rotation_deg,
        fps=None,
        duration_ms=None,
        has_audio=False,
    )


def _probe_video(path: Path, num_bytes: int, limits: MediaLimits) -> MediumFacts:
    import av.error

    from pipeline.decode import check_pixels
    from pipeline.decode_pyav import first_video_stream, open_container

    try:
        container = open_container(path.absolute())
    except av.error.FFmpegError as error:
        raise RowError("Unreadable", f"{path.name} cannot be opened: {error.strerror}") from error
    with container:
        stream = first_video_stream(container, path)
        check_pixels(stream.width, stream.height, limits.max_pixels)
        if stream.duration and stream.time_base:
            duration_ms: int | None = round(float(stream.duration * stream.time_base) * 1000)
        else:
            duration_ms = round(container.duration / 1000) if container.duration else None
        gif = container.format.name == "gif"
        num_frames = _num_packets(container, stream, limits.max_pictures) if gif else stream.frames
        limits.check_length(path.name, num_frames, None if duration_ms is None else duration_ms / 1000, is_gif=gif)
        width, height, rotation_deg = _shown_size(path, limits)
        return MediumFacts(
            kind="video",
            num_bytes=num_bytes,
            container=container.format.name.split(",")[0],
            codec=stream.codec_context.codec.canonical_name,
            width_px=width,
            height_px=height,
            rotation_deg=rotation_deg,
            fps=float(stream.average_rate) if stream.average_rate else None,
            duration_ms=duration_ms,
            has_audio=bool(container.streams.audio),
        )


def _shown_size(path: Path, limits: MediaLimits) -> tuple[int, int, int]:
    """Width, height and counter-clockwise rotation of the first frame, by the first decoder that gives one."""
    from pipeline.decode import open_video

    try:
        with open_video(path, max_pixels=limits.max_pixels) as reader:
            return reader.width_px, reader.height_px, reader.rotation_deg
    except RowError as error:
        if error.reason != "DecodeFailed":
            raise
        raise RowError("Unreadable", error.message) from error


def _num_packets(container: "InputContainer", stream: "VideoStream", enough: int) -> int:
    """Packets that a stream still holds, counted no further than one more than is enough."""
    return sum(1 for packet in islice(container.demux(stream), enough + 1) if packet.size)


def _has_magic(head: bytes, table: tuple[tuple[int, bytes], ...]) -> bool:
    return any(head[offset : offset + len(magic)] == magic for offset, magic in table)


def _is_transport_stream(head: bytes) -> bool:
    def synced(length: int, start: int) -> bool:
        marks = head[start::length]
        return len(marks) >= 3 and set(marks[:8]) == {0x47}

    return any(synced(length, 4 if length == 192 else 0) for length in TS_PACKETS)


def _moves(path: Path) -> bool:
    from PIL import Image

    from pipeline.read_image import BROKEN_PICTURE

    try:
        with Image.open(path) as picture:
            return bool(getattr(picture, "is_animated", False))
    except (*BROKEN_PICTURE, Image.DecompressionBombError):
        return False  # a broken GIF is a broken picture


def _ask_readers(path: Path) -> Kind:
    """Content without a known mark: a picture if Pillow names its format, a video if FFmpeg finds one in it."""
    import av.error
    from PIL import Image, UnidentifiedImageError

    from pipeline.decode_pyav import first_video_stream, open_container
    from pipeline.read_image import BROKEN_PICTURE, picture_formats

    try:
        with Image.open(path, formats=picture_formats()):
            return "image"
    except UnidentifiedImageError:
        pass  # not a picture: ask the video reader
    except (*BROKEN_PICTURE, Image.DecompressionBombError):
        return "image"
    try:
        with open_container(path.absolute()) as container:
            name = container.format.name
            if name in FAINT_FORMATS or name.endswith("_pipe"):
                return "other"
            # FFmpeg also guesses a raw stream in the middle of something else, such as a PDF with a photograph.
            if name in RAW_STREAMS and named_kind(path) != "video":
                return "other"
            first_video_stream(container, path)
            return "video"
    except (av.error.FFmpegError, RowError):
        return "other"
