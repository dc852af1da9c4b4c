"""Ask: what a language model says about clips, or to a plain question; each answer a row."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from jobs.models import Models, clip_blocks, first_of_each, load_models
from jobs.progress import progress
from jobs.run import recorded
from model.generate_text import AnswerConfig, generate_text
from pipeline.stage import COMMIT_SECONDS
from schemas.answers import ANSWERS
from schemas.catalog import Lake
from schemas.chat import chat_prompt
from schemas.document import DocumentError, Tokens, VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError
from schemas.recipe import Config, canonical_json, short_hash


class AskRecipe(Config):
    """How answers are chosen, and how many at once."""

    batch_size: int = Field(default=8, gt=0)
    answer: AnswerConfig = AnswerConfig()


@dataclass(frozen=True)
class Question:
    """A question about clips, in order, or about none. Without a text the model is to describe the one clip."""

    text: str | None
    clip_ids: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The answer to a question, and the id of its row."""

    answer_id: str
    question: Question
    text: str
    is_complete: bool


def ask(lake: Lake, questions: Sequence[Question], checkpoint: str, recipe: AskRecipe) -> list[Reply]:
    """Answer what was asked, in order. What the same checkpoint has answered under the same options is not asked again.

    Raises: ConfigError for an unknown checkpoint, a clip without tokens of its tokenizer, or a question too long for the
        model's context.
    """
    models = load_models(lake, checkpoint)
    blocks = clip_blocks(lake, models.tokenizer_id, {clip for question in questions for clip in question.clip_ids})
    prompts = [_prompt(question, [blocks[clip] for clip in question.clip_ids], models) for question in questions]
    sampling = canonical_json(recipe.answer.model_dump(mode="json"))
    ids = [
        short_hash([q.text, list(q.clip_ids), q.seed, sampling, models.checkpoint["checkpoint_id"]]) for q in questions
    ]
    found = _stored(lake, ids)
    todo = first_of_each(ids, found)
    if todo:
        inputs = {"checkpoint": models.checkpoint["checkpoint_id"], "questions": len(questions), "todo": len(todo)}
        with recorded(lake, "ask", recipe, inputs) as run, progress("ask") as advance:
            pending: list[dict[str, Any]] = []
            committed_s = time.monotonic()
            for start in range(0, len(todo), recipe.batch_size):
                part = todo[start : start + recipe.batch_size]
                seeds = [questions[index].seed for index in part]
                answers = generate_text(models.lm, [prompts[index] for index in part], recipe.answer, seeds=seeds)
                pending += [
                    {
                        "answer_id": ids[index],
                        "question": questions[index].text,
                        "clip_ids": list(questions[index].clip_ids),
                        "seed": questions[index].seed,
                        "sampling": sampling,
                        "checkpoint_id": models.checkpoint["checkpoint_id"],
                        "tokenizer_id": models.tokenizer_id,
                        "text": answer.text,
                        "is_complete": answer.is_complete,
                        "tokens": np.append(prompts[index], answer.tokens).astype("<u4").tobytes(),
                    }
                    for index, answer in zip(part, answers, strict=True)
                ]
                # A commit writes files of its own: one for each few answers would leave thousands.
                if time.monotonic() - committed_s >= COMMIT_SECONDS or start + len(part) == len(todo):
                    lake.append(ANSWERS, pending, run.run_id)
                    found |= {row["answer_id"]: row for row in pending}
                    pending, committed_s = [], time.monotonic()
                advance(start + len(part), len(todo), "")
            run.outcome["answers"] = len(todo)
    return [
        Reply(i, question, found[i]["text"], found[i]["is_complete"])
        for i, question in zip(ids, questions, strict=True)
    ]


def _prompt(question: Question, blocks: list[VisionBlock], models: Models) -> Tokens:
    vocabulary, text = models.lm.vocabulary, models.lm.text
    if question.text is None and len(blocks) != 1:
        raise ConfigError(f"found {len(blocks)} clips and no question, expected a question, or one clip to describe")
    try:
        if question.text is None:
            return write_document(VisionDocument(blocks[0]), vocabulary, text)[:-1]
        return chat_prompt(question.text, blocks, vocabulary, text)
    except DocumentError as error:
        raise ConfigError(str(error)) from error


def _stored(lake: Lake, ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    columns = ["answer_id", "text", "is_complete"]
    rows = lake.read_where(ANSWERS, "answer_id", sorted(set(ids)), columns).to_pylist()
    return {row["answer_id"]: row for row in rows}
