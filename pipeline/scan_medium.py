"""The one pass over a medium: every frame is decoded once, and cuts and all CPU scores come out of it.

The cutter sees every frame. Each scorer sees the few small frames it declared, taken on a time grid that starts anew at
every cut as soon as it is known. A cut can become known late (a fade is cut in its middle, when it is over), so values
are kept per sample, a few numbers each, and are given to clips when the medium is over; frames are not kept.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline import score_motion, score_resolution, score_technical, score_text
from pipeline.clip_scorers import ClipScorers
from pipeline.decode import Image, check_decoder, open_video
from pipeline.detect_scenes import SceneCutter, SegmentationConfig, Span, Step
from schemas.errors import RowError
from schemas.identity import clip_id
from schemas.recipe import Config, short_hash
from schemas.scores import MOTION, RESOLUTION, TECHNICAL, TEXT

Row = dict[str, Any]


class ScanLimits(Config):
    """What one medium may cost. Limits are no part of a scan's identity: they decide whether, not what."""

    timeout_s: float = Field(3600.0, gt=0)
    memory_mb: int = Field(4096, ge=256)
    max_pixels: int = Field(120_000_000, gt=0)
    threads: int = Field(1, ge=1)  # of the decoder


class ScanConfig(Config):
    """Everything that one pass does."""

    decoder: str = "pyav"
    segmentation: SegmentationConfig = SegmentationConfig()
    motion: score_motion.MotionConfig = score_motion.MotionConfig()
    text: score_text.TextConfig = score_text.TextConfig()
    technical: score_technical.TechnicalConfig = score_technical.TechnicalConfig()
    limits: ScanLimits = ScanLimits()

    @property
    def segmentation_id(self) -> str:
        """Hash of the detectors and their settings."""
        return self.segmentation.segmentation_id

    @property
    def scorer_ids(self) -> dict[str, str]:
        """Score table -> the id of the scorer that fills it."""
        return {
            RESOLUTION.name: score_resolution.SCORER_ID,
            MOTION.name: self.motion.scorer_id,
            TEXT.name: self.text.scorer_id,
            TECHNICAL.name: self.technical.scorer_id,
        }

    @property
    def scan_id(self) -> str:
        """Hash of the segmentation and of every scorer: what makes two scans the same work."""
        return short_hash({"segmentation_id": self.segmentation_id, **self.scorer_ids})


@dataclass(frozen=True)
class ScanResult:
    """Rows of one medium, complete but for run_id and written_at: `clips`, `scores` by table name, and `scan`."""

    clips: list[Row]
    scores: dict[str, list[Row]]
    scan: Row


def scan_medium(path: Path, media_id: str, kind: Literal["video", "image"], config: ScanConfig) -> ScanResult:
    """A medium -> its clips and their scores, by decoding every frame once.

    A packet that does not decode is left out; a stream whose frames end well before the length in its header is an
    error, because a file cut short would otherwise pass for a shorter film. What the header overstates by a second or
    a tenth is taken for sloppiness of the container.

    Raises: RowError with DecodeFailed, Truncated, TooManyPixels, NoVideoStream or Unreadable; ConfigError for a decoder
        or model that does not exist.
    """
    started = time.perf_counter()
    if kind == "image":
        spans, scores, served, num_frames = _scan_image(path, config)
    else:
        spans, scores, served, num_frames = _scan_video(path, config)
    clips = [_clip_row(media_id, kind, span, config) for span in spans]
    tables: dict[str, list[Row]] = {table: [] for table in config.scorer_ids}
    for clip, values in zip(clips, scores, strict=True):
        for table, row in values.items():
            tables[table].append({"clip_id": clip["clip_id"], "scorer_id": config.scorer_ids[table], **row})
    scan = {
        "media_id": media_id,
        "scan_id": config.scan_id,
        "segmentation_id": config.segmentation_id,
        "decoder": served,
        "num_frames": num_frames,
        "num_clips": len(clips),
        "cuts": [span.start_frame for span in spans[1:]],
        "seconds": time.perf_counter() - started,
    }
    return ScanResult(clips, tables, scan)


def _clip_row(media_id: str, kind: str, span: Span, config: ScanConfig) -> Row:
    duration_ms = span.end_ms - span.start_ms
    num_frames = span.end_frame - span.start_frame
    return {
        "clip_id": clip_id(media_id, span.start_ms, span.end_ms),
        "segmentation_id": config.segmentation_id,
        "media_id": media_id,
        "kind": kind,
        "start_ms": span.start_ms,
        "end_ms": span.end_ms,
        "start_frame": span.start_frame,
        "end_frame": span.end_frame,
        "fps": num_frames * 1000 / duration_ms if kind == "video" and duration_ms > 0 else None,
    }


def _scan_image(path: Path, config: ScanConfig) -> tuple[list[Span], list[dict[str, Row]], str, int]:
    from pipeline.read_image import read_image

    image = read_image(path, config.limits.max_pixels).bgr
    span = Span(0, 1, 0, 0)
    scorers = _scorers(config, image)
    scorers.see(0, 0.0, image, Step())
    bits = _bits_per_pixel(path, image, 1)
    return [span], [_scores(span, scorers, image, None, bits)], "pillow", 1


def _scan_video(path: Path, config: ScanConfig) -> tuple[list[Span], list[dict[str, Row]], str, int]:
    check_decoder(config.decoder)
    limits = config.limits
    scorers: ClipScorers | None = None
    with open_video(path, config.decoder, max_pixels=limits.max_pixels, threads=limits.threads) as reader:
        cutter = SceneCutter(config.segmentation, reader.fps)
        for index, frame in enumerate(reader):
            image = frame.bgr()
            if scorers is None:
                first = image
                scorers = _scorers(config, first)
            scorers.see(index, frame.seconds, image, cutter.see(image, frame.pts, frame.time_base))
        if scorers is None:
            raise RowError("DecodeFailed", f"{path.name}: no frame decodes")
        spans = cutter.spans(reader.end_s)
        bits = _bits_per_pixel(path, first, cutter.num_frames)
        scores = [_scores(span, scorers, first, (span.end_ms - span.start_ms) / 1000, bits) for span in spans]
        return spans, scores, reader.decoder, cutter.num_frames


def _scorers(config: ScanConfig, first: Image) -> ClipScorers:
    return ClipScorers(config.motion, config.text, config.technical, (first.shape[1], first.shape[0]))


def _bits_per_pixel(path: Path, first: Image, num_frames: int) -> float | None:
    """Bits of the whole file, sound and all, over the pixels of its frames. None where a user's decoder needs no file."""
    num_pixels = first.shape[0] * first.shape[1] * num_frames
    return path.stat().st_size * 8 / num_pixels if path.is_file() else None


def _scores(
    span: Span, scorers: ClipScorers, first: Image, duration_s: float | None, bits_per_pixel: float | None
) -> dict[str, Row]:
    height, width = first.shape[:2]
    resolution = score_resolution.score_resolution(width, height, duration_s)
    measured = scorers.scores(span.start_frame, span.end_frame)
    technical = {**measured[TECHNICAL.name], "bits_per_pixel": bits_per_pixel}
    return {RESOLUTION.name: asdict(resolution), **measured, TECHNICAL.name: technical}
