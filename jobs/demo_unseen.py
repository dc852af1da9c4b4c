"""What the demo's language model makes of clips that nothing was trained on: how they go on, and what it says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.ask import Question, Reply
from jobs.demo_corpus import UNSEEN_SHAPE
from jobs.demo_truth import ShownClip, shown_clips
from jobs.generate import Ask, Generation
from jobs.shapes import QUESTIONS, judge_direction
from schemas.catalog import Lake
from schemas.document import FRAMES_PER_LATENT

GIVEN_T = 2  # latent frames of a clip that are given


@dataclass(frozen=True)
class Share:
    """How many are right, and how many would be had they been dealt out at random, 0..1."""

    right: float
    shuffled: float


@dataclass(frozen=True)
class UnseenFigures:
    """Shares of clips. A clip goes on if its shape moves in its direction, and not if it rests.

    `continued` is judged from the last given frame on, `continued_alone` by the drawn frames alone. `answers` are by fact.
    """

    num_clips: int
    continued: Share
    continued_alone: Share
    answers: Mapping[str, Share]


def unseen_clips(lake: Lake, truth: Path) -> list[ShownClip]:
    """The clips of the corpus that were kept from every training, in the order of their files."""
    return sorted(shown_clips(lake, truth, UNSEEN_SHAPE), key=lambda clip: str(clip.place["uri"]))


def continuations(clips: Sequence[ShownClip], seed: int) -> list[Ask]:
    """A drawing for each clip that begins with its first half, and no word of what it shows."""
    return [Ask("", "video", seed + index, clip.clip_id, GIVEN_T) for index, clip in enumerate(clips)]


def questions(clips: Sequence[ShownClip]) -> list[Question]:
    """Every question about every clip, clip by clip."""
    return [Question(question, (clip.clip_id,)) for clip in clips for question in QUESTIONS.values()]


def replies_by_clip(clips: Sequence[ShownClip], replies: Sequence[Reply]) -> list[dict[str, str]]:
    """The answers to `questions(clips)` -> what was answered about each clip, by fact."""
    answers = iter(replies)
    return [{fact: next(answers).text.strip() for fact in QUESTIONS} for _ in clips]


def direction_drawn(generation: Generation) -> str | None:
    """Where the shape of a continuation goes from the last given frame on; None if it rests."""
    return judge_direction(generation.frames[num_given(generation) - 1 :])


def num_given(generation: Generation) -> int:
    """Frames of a continuation that were given."""
    return generation.ask.context_t * FRAMES_PER_LATENT


def score_unseen(
    clips: Sequence[ShownClip], continued: Sequence[Generation], replies: Sequence[Reply]
) -> UnseenFigures:
    """Continuations and answers in the order of `continuations(clips)` and `questions(clips)` -> shares that are right."""
    directions = [clip.facts.direction for clip in clips]
    return UnseenFigures(
        num_clips=len(clips),
        continued=_share([direction_drawn(g) for g in continued], directions),
        continued_alone=_share([judge_direction(g.frames[num_given(g) :]) for g in continued], directions),
        answers=score_answers(clips, replies),
    )


def score_answers(clips: Sequence[ShownClip], replies: Sequence[Reply]) -> dict[str, Share]:
    """Answers in the order of `questions(clips)` -> the share that is right, by fact."""
    answered = replies_by_clip(clips, replies)
    return {
        fact: _share([said[fact] for said in answered], [getattr(clip.facts, fact) for clip in clips])
        for fact in QUESTIONS
    }


def _share(found: Sequence[str | None], true: Sequence[str | None]) -> Share:
    right = [one == other for one, other in zip(found, true, strict=True)]
    dealt = [one == other for one in found for other in true]
    return Share(sum(right) / len(right), sum(dealt) / len(dealt))
