"""Decoding with PyAV (FFmpeg): the default, and the only one that reads AV1, HDR and every odd file we know of."""

import hashlib
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from pipeline.decode import FALLBACK_FPS, Frame, Image, Size, VideoReader, check_pixels, turned
from pipeline.decode_planes import planes, sketched, small_frame
from schemas.errors import RowError

PLAYLISTS = frozenset({"concat", "hls", "applehttp", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest"})
LOST_RATIO_MAX = 0.1  # share of packets that may not decode: a scratch, not a ruin
# Containers whose header speaks of the whole file: FFmpeg says the same of each stream.
STATES_FILE_LENGTH = frozenset({"matroska", "nut", "mpegts", "mpeg", "flv"})
HDR_TRANSFERS = {int(ColorTrc.SMPTE2084), int(ColorTrc.ARIB_STD_B67)}  # PQ and HLG need tone mapping
SEEK_MARGINS_S = (0.0, 5.0, 30.0)  # indexes point past their target, and streams without one are entered anywhere
LEAP_LEAST_FRAMES = 8  # what entering at a key frame costs: docs/experiments/decoders.md
SLOPPY_END_S = 1.0  # headers overstate the length by this much, or by the share below, in files that are whole
SLOPPY_END_RATIO = 0.05

_of_thread = threading.local()


class PyavFrame(Frame):
    """A frame as FFmpeg decoded it, which is in memory of FFmpeg's own until a picture is asked for."""

    __slots__ = ("_raw",)

    def __init__(self, index: int | None, pts: int, time_base: Fraction, raw: VideoFrame) -> None:
        super().__init__(index, pts, time_base, partial(shown, raw))
        self._raw = raw

    @property
    def size(self) -> Size:
        """Of the picture as shown."""
        width, height = self._raw.width, self._raw.height
        return (height, width) if int(self._raw.rotation) % 180 else (width, height)

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """The planes as FFmpeg has them, which costs no conversion, and the turn; of unusual formats the picture."""
        raw = self._raw
        found = planes(raw)
        if found is None:
            super().update_digest(digest)
            return
        digest.update(f"{raw.format.name} {raw.width} {raw.height} {int(raw.rotation) % 360}".encode())
        for plane in found:
            digest.update(np.ascontiguousarray(plane).data)

    def sketch(self, size: Size) -> Image | None:
        """From the planes, not turned."""
        width, height = size
        stored = (height, width) if int(self._raw.rotation) % 180 else size
        if int(self._raw.color_trc) not in HDR_TRANSFERS:
            return sketched(self._raw, stored)
        small = small_frame(self._raw, stored, _reformatter("small"))
        return None if small is None else converted(small, _reformatter("sketch"))


class PyavReader(VideoReader):
    """One pass over the first video stream. Audio is not touched, so an audio stream that is broken does not matter."""

    decoder = "pyav"

    def __init__(
        self,
        path: Path,
        max_pixels: int | None,
        threads: int,
        may_pass: "Callable[[Packet[VideoStream]], bool] | None" = None,
    ) -> None:
        """`may_pass` is asked for each packet whether its frame may be left out if no other needs it."""
        self._path = path
        self._max_pixels = max_pixels
        self._threads = threads
        self._may_pass = may_pass
        self._num_packets = 0
        self._num_lost = 0
        self._file_reached_s = 0.0
        self._stamps_s = array("d")  # of every packet of the stream, decoded or not
        self._failure = ""
        self._step = 0
        self._stated = 0  # duration of the newest frame
        self._leapt_back = False
        self._raw: Iterator[VideoFrame]
        self._open()
        self.fps = self._nominal_fps()
        first = next(self._raw, None)
        if first is None:
            self.close()
            raise RowError("DecodeFailed", f"{path.name}: no frame decodes {self._failure}".rstrip())
        self.rotation_deg = int(first.rotation) % 360
        self.width_px, self.height_px = first.width, first.height
        if self.rotation_deg % 180:
            self.width_px, self.height_px = first.height, first.width
        self._origin = first.pts if first.pts is not None else (first.dts or 0)
        self._raw = chain([first], self._raw)

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return self._stream.codec_context.codec.canonical_name

    def _open(self) -> None:
        try:
            self._container = open_container(self._path)
        except av.error.FFmpegError as error:
            raise RowError("DecodeFailed", f"{self._path.name} cannot be opened: {error.strerror}") from error
        self._stream = first_video_stream(self._container, self._path)
        check_pixels(self._stream.width, self._stream.height, self._max_pixels)
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = self._threads
        self._raw = self._decoded()
        self._index: int | None = 0
        self._last_pts: int | None = None
        self._base: Fraction | None = None

    def _nominal_fps(self) -> Fraction:
        """The average rate of the header, or the clock of a stream that states none: what OpenCV says too."""
        rate = self._stream.average_rate
        if rate:
            return Fraction(rate.numerator, rate.denominator)
        base = self._stream.time_base
        return Fraction(base.denominator, base.numerator) if base else FALLBACK_FPS

    def _decoded(self) -> Iterator[VideoFrame]:
        """Frames of every packet that decodes. Packets of all streams pass by: the last tells where the file ends."""
        clocks = {stream.index: _clock(stream.time_base) for stream in self._container.streams}
        for packet in self._packets():
            stamp, clock = packet.dts if packet.pts is None else packet.pts, clocks.get(packet.stream.index)
            if stamp is not None and clock:
                end = (stamp + (packet.duration or 0)) * clock[0] / clock[1]
                self._file_reached_s = max(self._file_reached_s, end)
            if packet.stream.index != self._stream.index:
                continue
            if stamp is not None and clock and not packet.is_discard:
                self._stamps_s.append(stamp * clock[0] / clock[1])
            self._num_packets += 1
            if self._may_pass is not None:
                self._stream.codec_context.skip_frame = "NONREF" if self._may_pass(packet) else "DEFAULT"
            try:
                frames = packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError as error:
                self._num_lost += 1
                self._failure = f"({error.strerror})"
                continue
            for frame in frames:
                if isinstance(frame, VideoFrame):
                    yield frame

    def _packets(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream, *self._container.streams.audio)
        except av.error.FFmpegError as error:
            self._failure = f"({error.strerror})"  # nothing can be read behind it; if that matters, the end tells
        except IndexError:  # PyAV knows the streams that were there when the file was opened
            self._failure = "(a stream begins in the middle of the file)"

    def __iter__(self) -> Iterator[Frame]:
        for raw in self._raw:
            check_pixels(raw.width, raw.height, self._max_pixels)
            time_base = self._time_base(raw)
            pts = self._pts(raw, time_base)
            self._last_pts = pts
            self.end_s = (pts + self._duration(raw, time_base)) * time_base.numerator / time_base.denominator
            yield PyavFrame(self._index, pts, time_base, raw)
            if self._index is not None:
                self._index += 1
        self._check_whole()

    def _time_base(self, raw: VideoFrame) -> Fraction:
        """That of all frames of the stream."""
        if self._base is None:
            base = raw.time_base or self._stream.time_base
            self._base = Fraction(base.numerator, base.denominator) if base else 1 / self.fps
        return self._base

    def _pts(self, raw: VideoFrame, time_base: Fraction) -> int:
        """Time since the first frame; where a frame states none, or one that runs backwards, the nominal step."""
        stated = raw.pts if raw.pts is not None else raw.dts
        pts = None if stated is None else stated - self._origin
        if self._last_pts is None:
            return pts or 0
        if pts is None or pts <= self._last_pts:
            return self._last_pts + max(1, round(1 / (self.fps * time_base)))
        self._step = pts - self._last_pts
        return pts

    def _duration(self, raw: VideoFrame, time_base: Fraction) -> int:
        """How long a frame is shown. Some containers state the clock's tick: less than half a step is no duration. Nor is one
        stated where that of the frame before was more than twice as long as it lasted.
        """
        before, stated = self._stated, raw.duration or 0
        self._stated = stated
        if stated > 0 and 2 * stated >= self._step and not 0 < 2 * self._step < before:
            return stated
        return self._step or max(1, round(1 / (self.fps * time_base)))

    def _check_whole(self) -> None:
        """Raises: RowError(Truncated) if the packets stop well before the length in the header, RowError(Corrupt) if they
        are there and many of them, or all from some time on, do not decode.
        """
        name, many = self._path.name, LOST_RATIO_MAX * self._num_packets
        stated_s, reached_s = self._lengths()
        if _ends_early(reached_s, stated_s):
            said = f"{name} ends at {reached_s:.2f} s, its header says {stated_s:.2f} s {self._failure}"
            raise RowError("Truncated", said.rstrip())
        first_s = float(self._origin * (self._stream.time_base or 0))
        behind_s = [stamp - first_s for stamp in self._stamps_s if stamp - first_s >= self.end_s]
        # Many, because one damaged packet can bear any time.
        if len(behind_s) > many and _ends_early(self.end_s, max(behind_s)):
            said = (
                f"{name}: {len(behind_s)} packets behind {self.end_s:.2f} s, and nothing decodes there {self._failure}"
            )
            raise RowError("Corrupt", said.rstrip())
        if self._num_lost > many:
            said = f"{name}: {self._num_lost} of {self._num_packets} packets do not decode {self._failure}"
            raise RowError("Corrupt", said)

    def _lengths(self) -> tuple[float, float]:
        """How long the header says that the stream is, or the file where it speaks of that, and how far its packets reach."""
        stream, container = self._stream, self._container
        of_file_s = (container.duration or 0) / av.time_base
        of_stream_s = float((stream.duration or 0) * (stream.time_base or 0))
        is_same = abs(of_stream_s - of_file_s) < 1e-3 and container.format.name.split(",")[0] in STATES_FILE_LENGTH
        if is_same or not of_stream_s:  # other streams may go on when the pictures end
            return of_file_s, max(self._file_reached_s, self.end_s)
        begins_s = (container.start_time or 0) / av.time_base
        return of_stream_s, max(max(self._stamps_s, default=0.0) - begins_s, self.end_s)

    def leaps(self, seconds: float) -> bool:
        """Where the index of the file tells of a key frame between here and there, until that has led back to the start."""
        base = self._stream.time_base
        if self._last_pts is None or not base or self._leapt_back:
            return False
        index = self._stream.index_entries
        entry = index.search_timestamp(self._origin + int(seconds / base))
        if entry < 0 or (index[entry].timestamp - self._origin - self._last_pts) * base * self.fps < LEAP_LEAST_FRAMES:
            return False
        self.seek(seconds)
        self._leapt_back = self._index is not None
        return True

    def seek(self, seconds: float) -> None:
        """To a key frame before `seconds`; a file that cannot seek is opened again, from its first frame."""
        base = self._stream.time_base or Fraction(1, av.time_base)
        for margin_s in SEEK_MARGINS_S:
            if seconds <= margin_s:
                break
            try:
                self._container.seek(
                    self._origin + round((seconds - margin_s) / base), stream=self._stream, backward=True
                )
            except av.error.FFmpegError:
                break
            self._raw = self._decoded()
            self._index = None
            self._last_pts = None
            first = next(self._raw, None)
            if first is None or first.pts is None:
                continue
            if float((first.pts - self._origin) * self._time_base(first)) <= seconds:  # as a frame says its own time
                self._raw = chain([first], self._raw)
                return
        self._rewind()

    def _rewind(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()


def shown(raw: VideoFrame) -> Image:
    """A decoded frame -> the picture as shown. Bicubic chroma, as OpenCV converts, so that scene cuts equal those of
    PySceneDetect on OpenCV; HDR is toned down to the standard range, without which it looks like fog.
    """
    return turned(converted(raw, _reformatter("whole")), raw.rotation)


def converted(raw: VideoFrame, reformatter: VideoReformatter) -> Image:
    """A decoded frame -> BGR, not turned."""
    hdr = int(raw.color_trc) in HDR_TRANSFERS
    bgr = reformatter.reformat(
        raw,
        format="bgr24",
        interpolation=Interpolation.BICUBIC,
        dst_color_trc=ColorTrc.BT709 if hdr else None,
        dst_color_primaries=ColorPrimaries.BT709 if hdr else None,
        threads=1,
    )
    return np.asarray(bgr.to_ndarray(), np.uint8)


def _clock(time_base: Fraction | None) -> tuple[int, int] | None:
    """Arithmetic with whole numbers costs a tenth of that with fractions, and there is much of it to each packet."""
    return (time_base.numerator, time_base.denominator) if time_base else None


def _ends_early(reached_s: float, stated_s: float) -> bool:
    return stated_s - reached_s > max(SLOPPY_END_S, SLOPPY_END_RATIO * stated_s)


def _reformatter(use: str) -> VideoReformatter:
    """One for all readers of a thread and each use: the tables of one kind of video are kept until another kind comes.
    Those of HDR take seconds to make.
    """
    if not hasattr(_of_thread, use):
        setattr(_of_thread, use, VideoReformatter())
    kept: VideoReformatter = getattr(_of_thread, use)
    return kept


def open_container(path: Path) -> InputContainer:
    """A path -> the open container. Metadata that is not UTF-8 is read without its bad bytes.

    Raises: RowError(Playlist) if the file only names other files: its bytes would not be the medium's.
    """
    container = av.open(str(path), metadata_errors="ignore", options={"protocol_whitelist": "file"})
    if not PLAYLISTS.isdisjoint(container.format.name.split(",")):
        name = container.format.name
        container.close()
        raise RowError("Playlist", f"{path.name} is a playlist ({name}): ingest the files that it names")
    return container


@dataclass(frozen=True)
class PacketTimes:
    """Presentation times of all frames, from the first one, in order, and those of key frames among them. `origin` is the
    time stamp of the first.
    """

    pts: "array[int]"
    key_pts: "array[int]"
    time_base: Fraction
    origin: int

    def newest_key(self, pts: int) -> int:
        """The time of the key frame that a frame at `pts` is decoded from: the newest one by then."""
        return self.key_pts[max(0, bisect_right(self.key_pts, pts) - 1)]


def packet_times(path: Path, least_s: float, most: int | None = None) -> PacketTimes | None:
    """A video of at least `least_s` seconds -> when its frames are shown, without decoding one; of more than `most` frames
    as many as that and one. None if it is shorter, or its packets do not tell.

    Raises: RowError if it is no video.
    """
    stamps, keys = array("q"), bytearray()
    try:
        with open_container(path) as container:
            stream = first_video_stream(container, path)
            if (container.duration or 0) / av.time_base < least_s or not stream.time_base:
                return None
            base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                if packet.pts is None:
                    return None
                stamps.append(packet.pts)
                keys.append(packet.is_keyframe)
                if most is not None and len(stamps) > most:
                    break
    except (av.error.FFmpegError, IndexError):  # the latter at a stream that begins midway
        return None  # decoding tells what is wrong
    found = np.frombuffer(stamps, np.int64)
    order = np.argsort(found)
    pts = found[order] - found.min(initial=np.iinfo(np.int64).max)
    if not len(pts) or (np.diff(pts) <= 0).any() or int(pts[-1]) * base < least_s:
        return None
    key_pts = pts[np.frombuffer(keys, np.bool_)[order]]
    if not len(key_pts):
        return None
    return PacketTimes(array("q", pts.tobytes()), array("q", key_pts.tobytes()), base, int(found.min()))


def first_video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream a player would show. Raises: RowError(NoVideoStream) if there is none, cover art aside."""
    for stream in container.streams.video:
        if int(stream.disposition) & int(av.stream.Disposition.attached_pic):
            continue
        if stream.codec_context is None:
            raise RowError("Unreadable", f"{path.name}: there is no decoder for the codec of its video stream")
        return stream
    raise RowError("NoVideoStream", f"{path.name} has no video stream")
