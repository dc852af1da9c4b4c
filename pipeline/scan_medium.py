"""The one pass over a medium: every frame is decoded once, and cuts and all CPU scores come out of it.

The cutter gets a few numbers of every frame. Each scorer sees the few small frames it declared. Values are kept per
sample, a few numbers each, and are given to clips when the medium is over; frames are not kept, and those that neither a
cut nor a scorer asks for are not even converted.
"""

import os
import time
from array import array
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline import score_motion, score_resolution, score_technical, score_text
from pipeline.clip_scorers import ClipScorers
from pipeline.decode import FALLBACK_FPS, MICROSECOND, Frame, check_decoder
from pipeline.detect_scenes import FrameNumbers, NumberRow, SegmentationConfig, Span
from pipeline.failures import FailureBound
from pipeline.media_limits import MediaLimits
from pipeline.scan_video import scan_video
from pipeline.score_technical import repeated_ratio
from pipeline.video_part import Part
from schemas.identity import clip_id
from schemas.recipe import Config, short_hash
from schemas.scores import MOTION, RESOLUTION, TECHNICAL, TEXT

Row = dict[str, Any]
DEFAULT_WORKERS_MAX = 4  # other media are scanned at the same time
WORKER_MEMORY_MB = 512  # pictures of 1080p, their decoder and the models of the scorers fit in


class ScanLimits(MediaLimits):
    """What one medium may cost. Limits are no part of a scan's identity: they decide whether, not what."""

    timeout_s: float = Field(3600.0, gt=0)
    memory_mb: int = Field(4096, ge=256)
    threads: int = Field(1, ge=1)  # of the decoder
    segment_workers: int | None = Field(None, ge=1)  # processes that share a long video; by default one for each CPU

    @property
    def num_segment_workers(self) -> int:
        """Processes that share a long video: few enough to leave each half a gigabyte of the limit."""
        wanted = self.segment_workers or min(DEFAULT_WORKERS_MAX, len(os.sched_getaffinity(0)))
        return max(1, min(wanted, self.memory_mb // WORKER_MEMORY_MB))


class ScanConfig(Config):
    """Everything that one pass does."""

    decoder: str = "pyav"
    # Measured besides resolution. What is left out costs nothing now and another pass when it is wanted.
    families: tuple[Literal["motion", "text", "technical"], ...] = ("motion", "text", "technical")
    # Where only cuts are wanted: frames that no other needs are decoded where something may happen, and passed over elsewhere.
    # A quarter of the time is saved where half of them are such, and a flash of a few frames may be missed.
    skim: bool = False
    segmentation: SegmentationConfig = SegmentationConfig()
    motion: score_motion.MotionConfig = score_motion.MotionConfig()
    text: score_text.TextConfig = score_text.TextConfig()
    technical: score_technical.TechnicalConfig = score_technical.TechnicalConfig()
    limits: ScanLimits = ScanLimits()
    failures: FailureBound = FailureBound()

    @model_validator(mode="after")
    def _can_skim(self) -> Self:
        """With several threads a decoder is told too late what to leave out."""
        wanted = {
            "families = []": not self.families,
            "no segmentation.adaptive": self.segmentation.adaptive is None,
            'decoder = "pyav"': self.decoder == "pyav",
            "limits.threads = 1": self.limits.threads == 1,
        }
        if self.skim and (missing := [setting for setting, holds in wanted.items() if not holds]):
            raise ValueError(
                f"skim = true needs {', '.join(missing)}: it finds cuts alone, and looks at some of the frames"
            )
        return self

    @property
    def segmentation_id(self) -> str:
        """Hash of the detectors and their settings."""
        return self.segmentation.segmentation_id

    @property
    def scorer_ids(self) -> dict[str, str]:
        """Score table -> the id of the scorer that fills it."""
        ids = {
            RESOLUTION.name: score_resolution.SCORER_ID,
            MOTION.name: self.motion.scorer_id,
            TEXT.name: self.text.scorer_id,
            TECHNICAL.name: self.technical.scorer_id,
        }
        measured = {RESOLUTION.name, *(f"score_{family}" for family in self.families)}
        return {table: scorer_id for table, scorer_id in ids.items() if table in measured}

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


def scan_medium(
    path: Path, media_id: str, kind: Literal["video", "image"], config: ScanConfig, left_out: Collection[int] = ()
) -> ScanResult:
    """A medium -> its clips and their scores, by decoding every frame once. `left_out`: first frames of clips that are joined
    to the ones before them.

    A packet that does not decode is left out; a stream whose frames end well before the length in its header is an
    error, because a file cut short would otherwise pass for a shorter film. What the header overstates by a second or
    a tenth is taken for sloppiness of the container.

    Raises: RowError with DecodeFailed, Truncated, Corrupt, TooManyPixels, TooManyFrames, TooLong, NoVideoStream or
        Unreadable; ConfigError for a decoder or model that does not exist.
    """
    started = time.perf_counter()
    if kind == "image":
        spans, scores, served, num_frames = _scan_image(path, config)
    else:
        spans, scores, served, num_frames = _scan_video(path, config, left_out)
    clips = [_clip_row(media_id, kind, span, config) for span in spans]
    tables: dict[str, list[Row]] = {table: [] for table in config.scorer_ids}
    for clip, values in zip(clips, scores, strict=True):
        for table, row in values.items():
            if table in tables:
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

    image = read_image(path, config.limits.max_pixels, config.limits.max_pictures).bgr
    frame = Frame(0, 0, MICROSECOND, lambda: image)
    scorers = ClipScorers(config.motion, config.text, config.technical, frame.size, 0.0, config.scorer_ids)
    scorers.see(0, frame, FrameNumbers(0.0, None))
    span = Span(0, 1, 0, 0)
    part = Part(frame.size, FALLBACK_FPS, MICROSECOND, "pillow", array("q", [0]), NumberRow([FrameNumbers(0.0, None)]))
    part.measurements = scorers.finish()
    return [span], [_scores(span, part, config, None, path)], "pillow", 1


def _scan_video(
    path: Path, config: ScanConfig, left_out: Collection[int]
) -> tuple[list[Span], list[dict[str, Row]], str, int]:
    check_decoder(config.decoder)
    video = scan_video(path, config)
    spans = video.spans(config.segmentation, left_out)
    scores = [_scores(span, video, config, (span.end_ms - span.start_ms) / 1000, path) for span in spans]
    return spans, scores, video.decoder, len(video.pts)


def _scores(span: Span, part: Part, config: ScanConfig, duration_s: float | None, path: Path) -> dict[str, Row]:
    resolution = score_resolution.score_resolution(*part.size, duration_s)
    measured = part.measurements.scores(span.start_frame, span.end_frame, config.text)
    num_pixels = part.size[0] * part.size[1] * len(part.pts)
    technical = {
        **measured[TECHNICAL.name],
        "repeated_ratio": repeated_ratio(part.numbers[span.start_frame : span.end_frame].repeats),
        # Of the whole file, sound and all. A user's decoder may need no file.
        "bits_per_pixel": path.stat().st_size * 8 / num_pixels if path.is_file() else None,
    }
    return {RESOLUTION.name: asdict(resolution), **measured, TECHNICAL.name: technical}
