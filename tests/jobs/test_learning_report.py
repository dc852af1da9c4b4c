"""What each training brought: figures before and after, and which of them reach their goal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import learning_report
from jobs.ask import Question, Reply
from jobs.demo_truth import ShownClip
from jobs.generate import Ask, Generation
from jobs.learning import Line
from jobs.learning_report import milestones, share_high
from jobs.shapes import QUESTIONS, Place, ShapeFacts, all_facts, make_scene, render_image, write_caption
from jobs.train import TrainReport
from schemas.catalog import Lake

LOW, MIDDLE, HIGH = 0.625, 0.5, 0.375


def draw(facts: ShapeFacts, y: float = MIDDLE) -> Generation:
    pixels = render_image(make_scene(facts, 1, Place((0.5, y), 0.3)), 64)
    return Generation("id", Ask(write_caption(facts), "image", 1), Path("x.png"), pixels[None], None)


def trained(**last: float) -> TrainReport:
    first = {"step": 5.0, "held_out_text": 2.0, "held_out_vision": 5.0}
    return TrainReport("pretrain", "id", 9, Path("x"), [first, {"step": 9.0, **last}], True)


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    """A line on which every goal is reached."""
    monkeypatch.setattr(learning_report, "num_parsed", lambda lake, folder, drawn: len(drawn))
    facts = all_facts(moving=False)
    wrong = [
        draw(facts[0]),
        *(Generation("id", Ask(write_caption(facts[1]), "image", 2), Path("x"), draw(facts[0]).frames, None),),
    ]
    right = [draw(facts[0]), draw(facts[1])]
    moving = ShapeFacts("red", "circle", "left")
    tokenizer = trained(held_out_psnr=28.5)
    return Line(
        lake=Lake.open(tmp_path / "lake"),
        tokenizer_id="tok",
        codes_used=0.8,
        trainings={
            "vision tokenizer": tokenizer,
            **{name: trained(held_out_text=1.0, held_out_vision=4.0) for name in ("stage 1", "stage 2", "preferences")},
        },
        held_out={
            "stage 1": {"text": 1.0, "image": 4.0, "video": 9.0},
            "stage 2": {"text": 0.9, "image": 3.9, "video": 3.0},
            "quality tuning": {"text": 1.0, "image": 2.0, "video": 3.0},
            "preferences": {"text": 1.04, "image": 2.09, "video": 3.0},
        },
        drawn={"stage 2": wrong, "quality tuning": right, "preferences": right},
        preferred={
            "quality tuning": [draw(facts[0], y) for y in (LOW, MIDDLE, MIDDLE, HIGH)],
            "preferences": [draw(facts[0], y) for y in (LOW, HIGH, MIDDLE, HIGH)],
        },
        unseen=[ShownClip("clip", {}, moving)],
        replies=[Reply("a", Question(q, ("clip",)), str(getattr(moving, fact)), True) for fact, q in QUESTIONS.items()],
    )


def failing(line: Line) -> list[str]:
    return [f"{one.training}: {one.what}" for one in milestones(line) if not one.is_reached]


def test_every_training_has_its_figures(line: Line) -> None:
    found = milestones(line)
    assert not failing(line)
    names = [one.training for one in found]
    assert sorted(set(names)) == ["answers", "preferences", "quality tuning", "stage 1", "stage 2", "vision tokenizer"]
    quality = next(one for one in found if one.training == "quality tuning")
    assert (quality.before, quality.after) == ("50%", "100%")
    high = next(one for one in found if "stands high" in one.what)
    assert (high.before, high.after) == ("25%", "50%")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainings": {"vision tokenizer": trained(held_out_psnr=27.9)}}, "PSNR"),
        ({"codes_used": 0.79}, "codes in use"),
        ({"trainings": {"stage 1": trained(held_out_text=2.0, held_out_vision=4.0)}}, "stage 1: loss of text"),
        ({"held_out": {"stage 2": {"text": 0.9, "image": 4.0, "video": 3.0}}}, "stage 2: loss of image"),
        ({"held_out": {"preferences": {"text": 1.0, "image": 2.11, "video": 3.0}}}, "preferences: loss of image"),
        ({"replies": [Reply("a", Question("q", ("clip",)), "blue", True)] * len(QUESTIONS)}, "answers"),
    ],
)
def test_a_figure_below_its_goal_is_told(line: Line, change: dict[str, Any], said: str) -> None:
    for name, value in change.items():
        known = getattr(line, name)
        object.__setattr__(line, name, {**known, **value} if isinstance(value, dict) else value)
    assert failing(line)
    assert all(said in one for one in failing(line))


def test_preferences_must_move_a_fifth_of_the_drawings(line: Line) -> None:
    facts = all_facts(moving=False)[0]
    line.preferred["preferences"][:] = [draw(facts, y) for y in (LOW, MIDDLE, MIDDLE, HIGH)]  # type: ignore[index]
    assert ["stands high" in one for one in failing(line)] == [True]


def test_a_drawing_without_a_shape_stands_nowhere() -> None:
    empty = Generation("id", Ask("a red circle", "image", 1), Path("x"), np.full((1, 64, 64, 3), 52, np.uint8), None)
    assert share_high([empty, draw(all_facts(moving=False)[0], HIGH)]) == 0.5
