"""What the demo's language model makes of clips that nothing was trained on: how they go on, and what it says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.ask import Question, Reply
from jobs.demo_corpus import load_truth
from jobs.demo_truth import clip_places
from jobs.generate import Ask, Generation
from jobs.shapes import QUESTIONS, ShapeFacts, judge_direction, parse_caption
from schemas.catalog import Lake
from schemas.document import FRAMES_PER_LATENT

UNSEEN = "unseen shape"
GIVEN_T = 2  # latent frames of a clip that are given


@dataclass(frozen=True)
class UnseenClip:
    """A clip that nothing was trained on: where it is, and what it shows by the corpus' truth."""

    clip_id: str
    place: Mapping[str, Any]
    facts: ShapeFacts


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


def unseen_clips(lake: Lake, truth: Path) -> list[UnseenClip]:
    """The clips of the corpus that were kept from every training, in the order of their files."""
    shows = {str(truth.parent / f.path): f.shows for f in load_truth(truth).files if f.what == UNSEEN}
    found = []
    for clip_id, place in clip_places(lake).items():
        facts = parse_caption(shows.get(place["uri"]) or "")
        if facts is not None:
            found.append(UnseenClip(clip_id, place, facts))
    return sorted(found, key=lambda clip: str(clip.place["uri"]))


def continuations(clips: Sequence[UnseenClip], seed: int) -> list[Ask]:
    """A drawing for each clip that begins with its first half, and no word of what it shows."""
    return [Ask("", "video", seed + index, clip.clip_id, GIVEN_T) for index, clip in enumerate(clips)]


def questions(clips: Sequence[UnseenClip]) -> list[Question]:
    """Every question about every clip, clip by clip."""
    return [Question(question, (clip.clip_id,)) for clip in clips for question in QUESTIONS.values()]


def replies_by_clip(clips: Sequence[UnseenClip], replies: Sequence[Reply]) -> list[dict[str, str]]:
    """The answers to `questions(clips)` -> what was answered about each clip, by fact."""
    answers = iter(replies)
    return [{fact: next(answers).text.strip() for fact in QUESTIONS} for _ in clips]


def score_unseen(
    clips: Sequence[UnseenClip], continued: Sequence[Generation], replies: Sequence[Reply]
) -> UnseenFigures:
    """Continuations and answers in the order of `continuations(clips)` and `questions(clips)` -> shares that are right."""
    given = GIVEN_T * FRAMES_PER_LATENT
    directions = [clip.facts.direction for clip in clips]
    answered = replies_by_clip(clips, replies)
    return UnseenFigures(
        num_clips=len(clips),
        continued=_share([judge_direction(g.frames[given - 1 :]) for g in continued], directions),
        continued_alone=_share([judge_direction(g.frames[given:]) for g in continued], directions),
        answers={
            fact: _share([said[fact] for said in answered], [getattr(clip.facts, fact) for clip in clips])
            for fact in QUESTIONS
        },
    )


def _share(found: Sequence[str | None], true: Sequence[str | None]) -> Share:
    right = [one == other for one, other in zip(found, true, strict=True)]
    dealt = [one == other for one in found for other in true]
    return Share(sum(right) / len(right), sum(dealt) / len(dealt))
