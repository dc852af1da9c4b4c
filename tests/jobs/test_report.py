"""The report: one file, whatever is in it, that says what it was given and lets no text act as markup."""

import base64
import io
import math
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from jobs import report
from jobs.report import (
    Accuracy,
    Answer,
    AnsweredClip,
    AttemptGroup,
    BalanceLine,
    CaptionedClip,
    ClipCard,
    Curve,
    Fact,
    FunnelStep,
    GeneratedImage,
    GeneratedVideo,
    Histogram,
    LineageNode,
    LossChart,
    Milestone,
    NamedShare,
    PromptImages,
    Reconstruction,
    ReportData,
    Room,
    StageTime,
)

HOSTILE = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>{{ 7 * 7 }}\u202e.mp4"
RNG = np.random.default_rng(0)


def pixels(*shape: int) -> report.Pixels:
    return RNG.integers(0, 256, (*shape, 3), np.uint8)


def jpeg() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels(16, 20)).save(sink, "JPEG")
    return sink.getvalue()


def full(text: str = "plain") -> ReportData:
    leaf = LineageNode("medium", text, (Fact(text, text),), jpeg())
    video = GeneratedVideo(text, pixels(6, 8, 8), 4.0, seen=text, is_right=True)
    return ReportData(
        title=text,
        summary=text,
        facts=(Fact(text, text),),
        milestones=(Milestone(text, text, "", text, text, True), Milestone(text, text, "1.5", "2.5", text, False)),
        stages=(StageTime(text, 61.0), StageTime("scan", 0.0)),
        balance=(BalanceLine(text, 1234, text),),
        road=(Room(text, 5678), Room("clips", 9)),
        funnel=(FunnelStep(text, text, 100, 25, (text,)),),
        histograms=(Histogram(text, (0.1, 0.2, 0.9), low=0.15, high=0.5, num_null=3),),
        kept=(ClipCard(jpeg(), text, text, text),),
        rejected=(ClipCard(jpeg(), text, text),),
        attempts=(AttemptGroup(text, text, 3, ((text, text),)),),
        captioning=text,
        named=(NamedShare(text, 0.87, 0.5),),
        captions=(CaptionedClip(text, pixels(6, 8, 8), text, True, text),),
        reconstructions=(Reconstruction(text, pixels(8, 8), pixels(8, 8), text),),
        losses=(LossChart(text, (Curve(text, (0, 1, 2), (3.0, 2.0, 1.0)),)),),
        accuracies=(Accuracy(text, 0.93, 1.0, 0.25),),
        images=(PromptImages(text, (GeneratedImage(pixels(8, 8), 0, text, False),)),),
        videos=(video,),
        unseen=(NamedShare(text, 0.9, 0.25),),
        answers=(AnsweredClip(text, pixels(6, 8, 8), (Answer(text, text, True), Answer(text, text, False))),),
        continuations=(GeneratedVideo(text, pixels(6, 8, 8), 4.0, num_context=2),),
        lineage=LineageNode("generation", text, made_from=(leaf, leaf)),
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    VOID = frozenset({"img", "meta", "br", "line", "rect", "polyline", "wbr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self.text += " "
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page(data: ReportData) -> Page:
    return Page(report.render_report(data))


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    shown, plain = page(full(HOSTILE)), page(full())
    assert sorted(set(shown.tags) - {"wbr"}) == sorted(set(plain.tags) - {"wbr"})
    assert shown.tags.count("img") == plain.tags.count("img")
    assert "script" not in shown.tags
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    assert shown.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in shown.text


def test_page_loads_nothing_from_elsewhere() -> None:
    html = report.render_report(full())
    shown = Page(html)
    for tag, name, value in shown.attributes:
        if name in ("src", "href", "data", "action", "srcset", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:60])
            if value.startswith("#"):
                assert value[1:] in shown.ids
    assert not re.search(r"url\(|@import|https?:", html)


def test_page_of_nothing_is_a_page() -> None:
    shown = page(ReportData(title="Nothing yet", summary="No run."))
    assert "section" not in shown.tags
    assert "Nothing yet" in shown.text


@pytest.mark.parametrize("name", [field.name for field in fields(ReportData)][2:])
def test_every_part_stands_alone(name: str) -> None:
    alone = ReportData(title="t", summary="s", **{name: getattr(full("lonely"), name)})
    assert "lonely" in page(alone).text


def test_numbers_come_through() -> None:
    text = " ".join(page(full()).text.split())
    for said in ("5,678", "1,234", "1 min 01 s", "93 %", "100 %", "25 %", "3 without", "≥ 0.15", "≤ 0.5"):
        assert said in text
    assert "plain plain 25 75 plain" in text, "rule, bound, rejected, left, example"


def test_written_file_is_whole_and_utf8(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    report.write_report(target, full("eukalyptus \udcff ü"))
    assert "ü" in target.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_animation_holds_every_frame_exactly() -> None:
    video = GeneratedVideo("p", pixels(5, 8, 8), fps=4.0)
    head, data = report._animation_uri(video).split(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        frames = []
        for frame in ImageSequence.Iterator(image):
            frames.append(np.asarray(frame.convert("RGB")))
            assert frame.info["duration"] == 250
    assert np.array_equal(np.stack(frames), video.frames)


def test_strip_shows_first_and_last_and_marks_what_was_given() -> None:
    strip = report._strip(GeneratedVideo("p", pixels(24, 4, 4), fps=12.0, num_context=8))
    assert len(strip) == 8
    assert (strip[0].index, strip[-1].index) == (0, 23)
    assert [frame.is_context for frame in strip] == [frame.index < 8 for frame in strip]
    assert len(report._strip(GeneratedVideo("p", pixels(1, 4, 4), fps=1.0))) == 1


def test_histogram_bars_count_kept_and_rejected() -> None:
    values = (*RNG.normal(0.5, 0.1, 200), 0.1, 0.05, 0.95, math.nan)
    plot = report._histogram_plot(Histogram("s", values, low=0.3, high=0.9))
    per_clip = (plot.bottom - plot.y_ticks[-1].at) / float(plot.y_ticks[-1].label)
    finite = np.asarray(values[:-1])
    num_kept = int(((finite >= 0.3) & (finite <= 0.9)).sum())
    for is_kept, expected in ((True, num_kept), (False, len(finite) - num_kept)):
        height = sum(bar.height for bar in plot.bars if bar.is_kept is is_kept)
        assert height / per_clip == pytest.approx(expected, rel=0.02)
    low, high = (bound.at for bound in plot.bounds)
    width = plot.bars[0].width + 0.6
    assert all(low - width <= bar.x <= high for bar in plot.bars if bar.is_kept)
    assert [bound.label for bound in plot.bounds] == ["≥ 0.3", "≤ 0.9"]


@pytest.mark.parametrize("values", [(), (0.0,), (5.0, 5.0), (0.0, 1e9), (-3.0, -3.0)])
@pytest.mark.parametrize("log", [False, True])
def test_histogram_of_odd_values_stays_inside_the_plot(values: tuple[float, ...], log: bool) -> None:
    plot = report._histogram_plot(Histogram("s", values, low=0.001, log=log))
    for bar in plot.bars:
        assert plot.left - 0.01 <= bar.x <= bar.x + bar.width <= plot.right + 0.01
        assert plot.top - 0.01 <= bar.y <= bar.y + bar.height <= plot.bottom + 0.01
    assert all(plot.left <= tick.at <= plot.right for tick in plot.x_ticks)


def test_log_axis_is_labelled_with_the_values_themselves() -> None:
    plot = report._histogram_plot(Histogram("s", (1.0, 10.0, 100.0, 1000.0), log=True))
    assert [tick.label for tick in plot.x_ticks] == ["1", "10", "100", "1,000"]


def test_curves_end_where_the_run_ended_and_skip_what_is_no_number() -> None:
    steps = tuple(range(5000))
    values = (math.nan, *(1 / (1 + step) for step in steps[1:-1]), 0.25)
    plot = report._loss_plot(LossChart("t", (Curve("total", steps, values), Curve("empty", (), ()))))
    points = [tuple(map(float, point.split(","))) for point in plot.lines[0].points.split()]
    assert len(points) <= report.MAX_POINTS + 20
    assert points[0][1] == plot.top
    assert points[-1][0] == plot.right
    assert points[-1][1] == pytest.approx((plot.top + plot.bottom) / 2, abs=0.5)
    assert (plot.lines[0].last, plot.lines[1].last) == ("0.25", "none")
