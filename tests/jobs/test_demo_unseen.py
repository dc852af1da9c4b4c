"""What counts as going on and as a right answer, on clips whose motion is drawn by hand."""

from pathlib import Path

import numpy as np
import pytest

from jobs.ask import Question, Reply
from jobs.demo_truth import ShownClip
from jobs.demo_unseen import continuations, questions, replies_by_clip, score_unseen
from jobs.generate import Ask, Generation
from jobs.shapes import QUESTIONS, Pixels, ShapeFacts, all_facts, make_scene, render_video

FACTS = all_facts(moving=True)[::7][:6]
CLIPS = [ShownClip(f"clip{number}", {"uri": f"/{number}.mp4"}, facts) for number, facts in enumerate(FACTS)]


def true_frames(facts: ShapeFacts) -> Pixels:
    return render_video(make_scene(facts, 5), 16, 8.0, 64)


def frozen(facts: ShapeFacts) -> Pixels:
    """The first half, and then its last frame again and again."""
    frames = true_frames(facts)
    return np.concatenate([frames[:8], np.repeat(frames[7:8], 8, axis=0)])


def turned_back(facts: ShapeFacts) -> Pixels:
    frames = true_frames(facts)
    return np.concatenate([frames[:8], frames[7::-1]])


def jumped(facts: ShapeFacts) -> Pixels:
    """On to where it ends, and there it rests."""
    frames = true_frames(facts)
    return np.concatenate([frames[:8], np.repeat(frames[-1:], 8, axis=0)])


def drawn(frames: Pixels) -> Generation:
    return Generation("g", Ask("", "video", 0, "clip", 2), Path("g.mp4"), frames, 8.0)


def replies(wrong: int = 0) -> list[Reply]:
    made = []
    for number, clip in enumerate(CLIPS):
        for fact in QUESTIONS:
            answer = "nothing" if number < wrong and fact == "shape" else str(getattr(clip.facts, fact))
            made.append(Reply("a", Question(QUESTIONS[fact], (clip.clip_id,)), f"{answer} ", True))
    return made


@pytest.mark.parametrize(
    ("make", "on", "alone"), [(true_frames, 1.0, 1.0), (frozen, 0.0, 0.0), (turned_back, 0.0, 0.0), (jumped, 1.0, 0.0)]
)
def test_a_clip_goes_on_if_its_shape_moves_in_its_direction(make: object, on: float, alone: float) -> None:
    figures = score_unseen(CLIPS, [drawn(make(clip.facts)) for clip in CLIPS], replies())  # type: ignore[operator]
    assert (figures.num_clips, figures.continued.right, figures.continued_alone.right) == (6, on, alone)


def test_answers_are_counted_by_fact_and_beside_chance() -> None:
    figures = score_unseen(CLIPS, [drawn(true_frames(clip.facts)) for clip in CLIPS], replies(wrong=3))
    assert {fact: share.right for fact, share in figures.answers.items()} == {"colour": 1, "shape": 0.5, "direction": 1}
    for fact in QUESTIONS:
        values = [getattr(clip.facts, fact) for clip in CLIPS]
        chance = np.mean([[one == other for one in values] for other in values])
        assert figures.answers[fact].shuffled == pytest.approx(chance * (0.5 if fact == "shape" else 1), abs=0.1)


def test_every_clip_is_continued_without_words_and_asked_everything() -> None:
    asks = continuations(CLIPS, 100)
    assert [(a.prompt, a.kind, a.seed, a.continued_clip_id, a.context_t) for a in asks[:2]] == [
        ("", "video", 100, "clip0", 2),
        ("", "video", 101, "clip1", 2),
    ]
    asked = questions(CLIPS)
    assert [(q.text, q.clip_ids) for q in asked[:4]] == [
        *((text, ("clip0",)) for text in QUESTIONS.values()),
        (QUESTIONS["colour"], ("clip1",)),
    ]
    assert replies_by_clip(CLIPS, replies())[1] == {
        "colour": CLIPS[1].facts.colour,
        "shape": CLIPS[1].facts.shape,
        "direction": CLIPS[1].facts.direction,
    }
