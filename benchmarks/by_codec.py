"""One source in six codecs and at a variable frame rate: its cuts, its verdicts, and the scores that differ most.

Usage: python benchmarks/by_codec.py

The source is made: nine shots of a second, each on its own side of some rule of the shipped `offline` recipe, which is
asked with its bound of the resolution lowered to the source's. Every encoding goes through the scan as it is shipped.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import cv2
import numpy as np
import pyarrow as pa
from av.video.stream import VideoStream

from jobs.curate import load_curate_recipe
from jobs.doctor import usual_priority
from pipeline.decode import Image
from pipeline.rules import Rule, passes, rules_of
from pipeline.scan_medium import ScanConfig, ScanLimits, scan_medium

FPS, SHOT_MS = 25, 1000
WIDTH, HEIGHT = 320, 240
PAN_PX_PER_S = 30
MILLISECOND = Fraction(1, 1000)
PLAIN = "H.264"
VARIABLE = "H.264, variable rate"
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    PLAIN: ("libx264", {"crf": "23", "bf": "3"}),
    "HEVC": ("libx265", {"crf": "26", "x265-params": "log-level=error"}),
    "VP9": ("libvpx-vp9", {"crf": "30", "b": "0", "cpu-used": "6"}),
    "AV1": ("libsvtav1", {"crf": "32", "preset": "10"}),
    "MPEG-4": ("mpeg4", {"b": "1500000", "bf": "2"}),
    VARIABLE: ("libx264", {"crf": "23", "bf": "3"}),
}
SHOTS = (
    "pan",
    "still",
    "grain on a still",
    "object on a still",
    "blurred pan",
    "dark pan",
    "bright pan",
    "grey pan",
    "page of text",
)
LEVELS = {"dark pan": (4, 30), "bright pan": (230, 295)}  # darker ones would be fades
BLUR_PX = {"blurred pan": 80, "dark pan": 20}  # far from the bound of sharpness, that none goes over it
VARIABLE_STEPS_MS = (20, 40, 20, 60, 40, 80, 40, 20, 80)


@dataclass(frozen=True)
class Scanned:
    """What the scan said of one encoding: clips in order, [(start_ms, end_ms)], and their scores by `family.column`."""

    spans: list[tuple[int, int]]
    scores: list[dict[str, float | None]]


def times_ms(name: str) -> list[int]:
    """When the frames of an encoding are shown. Every shot begins with a frame at both rates."""
    if name != VARIABLE:
        return list(range(0, SHOT_MS * len(SHOTS), 1000 // FPS))
    steps = VARIABLE_STEPS_MS * math.ceil(SHOT_MS / sum(VARIABLE_STEPS_MS))
    offsets = [0, *(int(offset) for offset in np.cumsum(steps) if offset < SHOT_MS)]
    return [SHOT_MS * shot + offset for shot in range(len(SHOTS)) for offset in offsets]


def picture(at_ms: int) -> Image:
    """The source at a time: BGR, uint8 [HEIGHT, WIDTH, 3]."""
    shot, inside_ms = divmod(at_ms, SHOT_MS)
    name, shift = SHOTS[shot], PAN_PX_PER_S * inside_ms / 1000
    if name == "page of text":
        return _page(shift)
    low, high = LEVELS.get(name, (30, 225))
    wide = _surface(shot, low, high, BLUR_PX.get(name, 1))
    still = name in ("still", "grain on a still", "object on a still")
    across = np.array([[1, 0, 0 if still else shift], [0, 1, 0]], np.float64)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    frame = cv2.warpAffine(wide, across, (WIDTH, HEIGHT), flags=flags)
    if name == "grain on a still":
        grain = np.random.default_rng(at_ms).normal(0, 4, frame.shape[:2])[..., None]
        frame = np.clip(frame + grain, 0, 255).astype(np.uint8)
    if name == "object on a still":
        left = 20 + round(5 * shift)
        frame[80:160, left : left + 90] = _surface(99, low, high, 1)[:80, :90]
    if name == "grey pan":
        frame = cv2.cvtColor(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return np.asarray(frame, np.uint8)


def _surface(seed: int, low: int, high: int, blur_px: int) -> Image:
    """Patches of many sizes, wider than the picture by the way of a pan."""
    rng, width = np.random.default_rng(seed), WIDTH + PAN_PX_PER_S * SHOT_MS // 1000 + 2
    total = np.zeros((HEIGHT, width, 3))
    for cells in (8, 24, 80):
        rough = rng.uniform(low, high, (cells * 3 // 4, cells, 3)).astype(np.float32)
        total += cv2.resize(rough, (width, HEIGHT), interpolation=cv2.INTER_CUBIC) / 3
    smooth = cv2.blur(total, (blur_px, blur_px))
    return np.clip(smooth, 0, 255).astype(np.uint8)


def _page(shift: float) -> Image:
    """Lines of print that scroll up."""
    page = np.full((HEIGHT * 2, WIDTH, 3), (240, 205, 160), np.uint8)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    for line in range(HEIGHT * 2 // 26):
        text = " ".join(words[(line * 5 + place) % len(words)] for place in range(5))
        cv2.putText(page, text, (8, 20 + 26 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (30, 20, 20), 2, cv2.LINE_AA)
    top = round(shift)
    return np.ascontiguousarray(page[top : top + HEIGHT])


def write(name: str, path: Path) -> Path:
    """One encoding of the source, as Matroska. Frames bear their times in milliseconds."""
    codec, options = ENCODERS[name]
    with usual_priority(), av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=FPS, options=options))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        if name == VARIABLE:
            stream.time_base = stream.codec_context.time_base = MILLISECOND
        for at_ms in times_ms(name):
            frame = av.VideoFrame.from_ndarray(picture(at_ms), format="bgr24")
            frame.pts, frame.time_base = at_ms, MILLISECOND
            if name != VARIABLE:
                frame.pts, frame.time_base = at_ms * FPS // 1000, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def scanned(path: Path) -> Scanned:
    """A video -> its clips and their scores, by the scan as it is shipped."""
    result = scan_medium(path, "0123456789abcdef", "video", ScanConfig(limits=ScanLimits(segment_workers=1)))
    spans = [(clip["start_ms"], clip["end_ms"]) for clip in result.clips]
    scores: list[dict[str, float | None]] = [{} for _ in spans]
    for table, rows in result.scores.items():
        for row, found in zip(rows, scores, strict=True):
            numbers = {column: value for column, value in row.items() if value is None or isinstance(value, float)}
            found |= {f"{table.removeprefix('score_')}.{column}": value for column, value in numbers.items()}
    return Scanned(spans, scores)


def rules() -> list[Rule]:
    """Those of the shipped recipe, with the source large enough for it."""
    return rules_of(load_curate_recipe("offline", [f"resolution.low={HEIGHT}"]))


def verdicts(found: Scanned) -> list[dict[str, bool]]:
    """Of every rule about every clip."""
    answers: list[dict[str, bool]] = [{} for _ in found.spans]
    for rule in rules():
        family = rule.family.name.removeprefix("score_")
        column = pa.chunked_array([pa.array([row[f"{family}.{rule.column}"] for row in found.scores], pa.float32())])
        kinds = pa.chunked_array([pa.array(["video"] * len(found.spans))])
        mask = passes(rule, pa.table({"kind": kinds, rule.column: column}))
        for answer, passed in zip(answers, mask, strict=True):
            answer[rule.name] = bool(passed)
    return answers


def spreads(found: dict[str, Scanned]) -> Iterator[tuple[str, float, str, str]]:
    """Encodings with equal clips -> of every score, in falling order: how far its values for one clip lie apart at most,
    as a share of how far they lie apart over all clips; the shot where; and the values there.
    """
    rows = []
    names = [name for name, value in found[PLAIN].scores[0].items() if value is not None]
    for name in names:
        values = np.array([[row[name] for row in one.scores] for one in found.values()], np.float64)
        reach = float(np.ptp(values))
        apart = np.ptp(values, axis=0)
        worst = int(np.argmax(apart))
        if reach > 0:
            listed = ", ".join(f"{value:.3g}" for value in values[:, worst])
            rows.append((name, float(apart[worst]) / reach, SHOTS[worst], listed))
    yield from sorted(rows, key=lambda row: -row[1])


def main() -> None:
    """Encode, scan, compare and print."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: write(name, Path(folder) / f"{index}.mkv") for index, name in enumerate(ENCODERS)}
        found = {name: scanned(path) for name, path in paths.items()}
    print("| | shots kept | clips |\n|---|---|---|")
    for name, one in found.items():
        kept = [all(answer.values()) for answer in verdicts(one)]
        starts = ", ".join(str(start) for start, _ in one.spans)
        print(f"| {name} | {sum(kept)} of {len(kept)} | at {starts} ms |")
    print("\n| shot | rejected by |\n|---|---|")
    for shot, answer in zip(SHOTS, verdicts(found[PLAIN]), strict=True):
        print(f"| {shot} | {', '.join(rule for rule, passed in answer.items() if not passed) or 'none'} |")
    for name, one in found.items():
        for shot, answer, plain in zip(SHOTS, verdicts(one), verdicts(found[PLAIN]), strict=True):
            if differing := [rule for rule in answer if answer[rule] != plain[rule]]:
                print(f"\n{name}, {shot}: another verdict of {', '.join(differing)} than as {PLAIN}")
    print(f"\n| score | apart | most at | {', '.join(found)} |\n|---|---|---|---|")
    for score, share, shot, listed in spreads(found):
        print(f"| {score} | {share:.3f} | {shot} | {listed} |")


if __name__ == "__main__":
    main()
