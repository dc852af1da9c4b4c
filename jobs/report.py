"""The report of a run: one HTML file that holds its pictures and charts, needs no network and runs no script.

Captions, prompts and file names come from whoever made the media, so every text is escaped by the template engine, and
charts are drawn by the template from plain numbers. What a section has nothing to show for is left out.
"""

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import markupsafe

Pixels = npt.NDArray[np.uint8]

PLOT_WIDTH, PLOT_HEIGHT = 420, 190
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 46, 22, 12, 26
MAX_POINTS = 300  # of a drawn curve: more than the plot has pixels for
NUM_BINS = 36


@dataclass(frozen=True)
class Fact:
    """A name and what it is."""

    name: str
    value: str


@dataclass(frozen=True)
class StageTime:
    """Wall seconds that one stage took."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class BalanceLine:
    """One line of the balance sheet: where so many of the offered items went."""

    label: str
    count: int
    note: str = ""


@dataclass(frozen=True)
class Room:
    """A table of the road and its rows."""

    table: str
    num_rows: int


@dataclass(frozen=True)
class FunnelStep:
    """What one rule did; `bound` as people write it (`>= 512`), `examples` as `name: value` texts."""

    rule: str
    bound: str
    num_in: int
    num_rejected: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClipCard:
    """A clip on a contact sheet. `verdict` says why it was refused, with value and bound, or what it is if kept."""

    thumbnail_jpeg: bytes
    name: str
    verdict: str
    caption: str = ""


@dataclass(frozen=True)
class AttemptGroup:
    """Items that failed in one stage for one reason; `examples` are pairs of file and message."""

    stage: str
    reason: str
    count: int
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Histogram:
    """One score over all clips and the closed interval that its rule keeps. `log` spaces the axis by powers of ten."""

    score: str
    values: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    num_null: int = 0
    log: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """uint8 RGB pixels (H, W, 3) before and after the vision tokenizer."""

    name: str
    original: Pixels
    reconstructed: Pixels
    note: str = ""


@dataclass(frozen=True)
class CaptionedClip:
    """Frames of a clip, uint8 RGB (T, H, W, 3), what a captioner says of it, and whether that is so."""

    name: str
    frames: Pixels
    caption: str
    is_right: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """A question about a clip, what a model answers, and whether that is so."""

    question: str
    answer: str
    is_right: bool


@dataclass(frozen=True)
class AnsweredClip:
    """Frames of a clip, uint8 RGB (T, H, W, 3), and what was asked about it."""

    name: str
    frames: Pixels
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class NamedShare:
    """Shares in 0..1 of clips of which a fact is named, drawn or answered rightly: its own, and any other clip's on average."""

    fact: str
    named: float
    shuffled: float


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name, and values over steps."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LossChart:
    """Losses of one training run."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Milestone:
    """What a training was to bring: a figure before and after it, as people write it, and whether the goal is reached."""

    training: str
    what: str
    before: str
    after: str
    goal: str
    is_reached: bool


@dataclass(frozen=True)
class Accuracy:
    """Shares in 0..1 of one fact that the judge found: as asked, in true renderings, and against shuffled prompts."""

    fact: str
    asked: float
    true_renderings: float
    shuffled: float


@dataclass(frozen=True)
class GeneratedImage:
    """A drawn image, uint8 RGB (H, W, 3), what the judge saw in it, and whether that was asked."""

    pixels: Pixels
    seed: int
    seen: str
    is_right: bool


@dataclass(frozen=True)
class PromptImages:
    """All images of one prompt."""

    prompt: str
    images: tuple[GeneratedImage, ...]


@dataclass(frozen=True)
class GeneratedVideo:
    """A drawn video, uint8 RGB (T, H, W, 3), with the judge's verdict. The first `num_context` frames were given."""

    prompt: str
    frames: Pixels
    fps: float
    seen: str = ""
    is_right: bool | None = None
    num_context: int = 0


@dataclass(frozen=True)
class LineageNode:
    """One thing and what it was made from."""

    kind: str
    name: str
    facts: tuple[Fact, ...] = ()
    thumbnail_jpeg: bytes | None = None
    made_from: "tuple[LineageNode, ...]" = ()


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows, in its order."""

    title: str
    summary: str
    facts: tuple[Fact, ...] = ()
    milestones: tuple[Milestone, ...] = ()
    stages: tuple[StageTime, ...] = ()
    balance: tuple[BalanceLine, ...] = ()
    road: tuple[Room, ...] = ()
    funnel: tuple[FunnelStep, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    kept: tuple[ClipCard, ...] = ()
    rejected: tuple[ClipCard, ...] = ()
    attempts: tuple[AttemptGroup, ...] = ()
    captioning: str = ""
    named: tuple[NamedShare, ...] = ()
    captions: tuple[CaptionedClip, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    losses: tuple[LossChart, ...] = ()
    accuracies: tuple[Accuracy, ...] = ()
    images: tuple[PromptImages, ...] = ()
    videos: tuple[GeneratedVideo, ...] = ()
    unseen: tuple[NamedShare, ...] = ()
    continuations: tuple[GeneratedVideo, ...] = ()
    answers: tuple[AnsweredClip, ...] = ()
    lineage: LineageNode | None = None


def write_report(path: Path, data: ReportData) -> None:
    """Report data -> one self-contained HTML file at `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(render_report(data).encode("utf-8", "backslashreplace"))
    os.replace(partial, path)


def render_report(data: ReportData) -> str:
    """Report data -> HTML text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=lambda number: f"{number:,}",
        percent=lambda share: f"{100 * share:.0f} %",
        duration=_duration,
        breakable=_breakable,
        jpeg_uri=lambda data: _data_uri("image/jpeg", data),
        png_uri=_png_uri,
        animation_uri=_animation_uri,
        strip=_strip,
        chart=_loss_plot,
        histogram=_histogram_plot,
    )
    return environment.get_template("report.html.j2").render(report=data)


def _breakable(text: str) -> "markupsafe.Markup":
    """Text -> escaped text that long names may be broken in after a separator."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"([/_.,:-])(?=\w)", r"\1<wbr>", str(markupsafe.escape(text))))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


# -------------------------------------------------------------------------------------------------------- pictures


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _png_uri(pixels: Pixels) -> str:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "PNG", optimize=True)
    return _data_uri("image/png", sink.getvalue())


def _animation_uri(video: GeneratedVideo) -> str:
    from PIL import Image

    first, *rest = (Image.fromarray(np.ascontiguousarray(frame)) for frame in video.frames)
    sink = io.BytesIO()
    step_ms = round(1000 / video.fps)
    first.save(sink, "WEBP", save_all=True, append_images=rest, duration=step_ms, loop=0, lossless=True)
    return _data_uri("image/webp", sink.getvalue())


@dataclass(frozen=True)
class StripFrame:
    """A frame of a filmstrip and its place in the clip."""

    pixels: Pixels
    index: int
    is_context: bool


def _strip(video: GeneratedVideo | CaptionedClip | AnsweredClip, most: int = 8) -> list[StripFrame]:
    """At most `most` frames, evenly spread, the first and the last among them."""
    count = min(most, len(video.frames))
    given = video.num_context if isinstance(video, GeneratedVideo) else 0
    places = np.unique(np.linspace(0, len(video.frames) - 1, count).round().astype(int))
    return [StripFrame(video.frames[place], int(place), int(place) < given) for place in places]


# ---------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the plot and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve in plot coordinates; `points` as SVG wants them."""

    name: str
    points: str
    last: str


@dataclass(frozen=True)
class Bar:
    """A histogram bar in plot coordinates."""

    x: float
    y: float
    width: float
    height: float
    is_kept: bool


@dataclass(frozen=True)
class Plot:
    """A chart with every coordinate worked out, for the template to draw."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()
    bounds: tuple[Tick, ...] = ()
    width: int = PLOT_WIDTH
    height: int = PLOT_HEIGHT
    left: int = PLOT_LEFT
    right: int = PLOT_WIDTH - PLOT_RIGHT
    top: int = PLOT_TOP
    bottom: int = PLOT_HEIGHT - PLOT_BOTTOM


@dataclass(frozen=True)
class _Axis:
    """A range of values laid over a range of places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def _axes(x_low: float, x_high: float, y_low: float, y_high: float) -> tuple[_Axis, _Axis]:
    x = _Axis(x_low, x_high if x_high > x_low else x_low + 1, PLOT_LEFT, PLOT_WIDTH - PLOT_RIGHT)
    y = _Axis(y_low, y_high if y_high > y_low else y_low + 1, PLOT_HEIGHT - PLOT_BOTTOM, PLOT_TOP)
    return x, y


def _round_ticks(axis: _Axis, about: int) -> list[float]:
    """Round values inside the axis, about so many."""
    rough = (axis.high - axis.low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _ticks(axis: _Axis, about: int, log: bool = False) -> tuple[Tick, ...]:
    values = _round_ticks(axis, about)
    if log:
        values = sorted({float(round(value)) for value in values if axis.low <= round(value) <= axis.high})
    return tuple(Tick(axis.at(value), f"{10**value if log else value:,.4g}") for value in values)


def _loss_plot(chart: LossChart) -> Plot:
    finite = [
        [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
        for curve in chart.curves
    ]
    steps = [step for points in finite for step, _ in points] or [0]
    values = [value for points in finite for _, value in points] or [0.0]
    x, y = _axes(min(steps), max(steps), min(0.0, *values), max(values))
    lines = []
    for curve, points in zip(chart.curves, finite, strict=True):
        thinned = points[:: max(1, len(points) // MAX_POINTS)]
        if points and thinned[-1] != points[-1]:
            thinned.append(points[-1])
        path = " ".join(f"{x.at(step)},{y.at(value)}" for step, value in thinned)
        lines.append(Line(curve.name, path, f"{points[-1][1]:.3g}" if points else "none"))
    return Plot(_ticks(x, 5), _ticks(y, 4), lines=tuple(lines))


def _histogram_plot(histogram: Histogram) -> Plot:
    def scaled(values: Sequence[float]) -> npt.NDArray[np.float64]:
        array = np.asarray(values, np.float64)
        return np.log10(np.maximum(array, 1e-6)) if histogram.log else array

    low = -math.inf if histogram.low is None else float(scaled([histogram.low])[0])
    high = math.inf if histogram.high is None else float(scaled([histogram.high])[0])
    values = scaled(histogram.values)
    seen = [value for value in (*values, low, high) if math.isfinite(value)] or [0.0]
    edges = np.linspace(min(seen), max(seen) if max(seen) > min(seen) else min(seen) + 1, NUM_BINS + 1)
    kept = (values >= low) & (values <= high)
    tallies = [np.histogram(values[chosen], edges)[0] for chosen in (kept, ~kept)]
    x, y = _axes(edges[0], edges[-1], 0, max(1, int((tallies[0] + tallies[1]).max())))
    bars = []
    for index, (num_kept, num_rejected) in enumerate(zip(*tallies, strict=True)):
        left, right = x.at(edges[index]), x.at(edges[index + 1])
        for start, size, is_kept in ((0, num_kept, True), (num_kept, num_rejected, False)):
            if size:
                top = y.at(start + size)
                bars.append(Bar(left, top, round(right - left - 0.6, 2), round(y.at(start) - top, 2), is_kept))
    bounds = tuple(
        Tick(x.at(value), f"{sign} {bound:g}")
        for sign, bound, value in (("≥", histogram.low, low), ("≤", histogram.high, high))
        if bound is not None
    )
    return Plot(_ticks(x, 5, histogram.log), _ticks(y, 3), bars=tuple(bars), bounds=bounds)
