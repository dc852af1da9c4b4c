"""Answers of a lake's model: each once, as a row of the tokens that were read and chosen."""

import numpy as np
import pytest

from jobs import ask as module
from jobs.ask import AskRecipe, Question, ask
from jobs.models import load_models
from schemas.answers import ANSWERS
from schemas.catalog import Lake
from schemas.chat import chat_prompt
from schemas.document import VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError
from schemas.table import Table
from schemas.vision_tokens import VISION_TOKENS
from tests.jobs.small_models import make_lake

RECIPE = AskRecipe.model_validate({"batch_size": 2, "answer": {"max_new_tokens": 12}})


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("models"))


def block(lake: Lake, clip: str) -> VisionBlock:
    (row,) = lake.read_where(VISION_TOKENS, "clip_id", [clip]).to_pylist()
    codes = np.frombuffer(row["codes"], "<u2").reshape(row["t"], row["h"], row["w"])
    return VisionBlock(row["kind"], codes, row["fps"])


def test_an_answer_is_a_row_of_what_was_read_and_chosen(lake: Lake) -> None:
    questions = [
        Question("What <|image start|> is it?", ("moving",)),
        Question("Which is it?", ("still", "moving", "still")),
        Question("Who are you?"),
        Question(None, ("still",)),
    ]
    replies = ask(lake, questions, "latest", RECIPE)
    lm = load_models(lake, "latest").lm
    shown = {clip: block(lake, clip) for clip in ("moving", "still")}
    rows = {row["answer_id"]: row for row in lake.read(ANSWERS).to_pylist()}
    for reply, question in zip(replies, questions, strict=True):
        row = rows[reply.answer_id]
        assert (row["question"], tuple(row["clip_ids"]), row["text"]) == (question.text, question.clip_ids, reply.text)
        blocks = [shown[clip] for clip in question.clip_ids]
        prompt = (
            write_document(VisionDocument(blocks[0]), lm.vocabulary, lm.text)[:-1]
            if question.text is None
            else chat_prompt(question.text, blocks, lm.vocabulary, lm.text)
        )
        tokens = np.frombuffer(row["tokens"], "<u4")
        assert tokens[: len(prompt)].tolist() == prompt.tolist()
        chosen = tokens[len(prompt) :]
        assert 1 <= len(chosen) <= 12
        assert row["is_complete"] == (chosen[-1] == lm.vocabulary.eos)
        assert lm.text.decode([int(token) for token in chosen if token != lm.vocabulary.eos]) == row["text"]


def test_what_was_answered_is_not_asked_again(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = ask(lake, [Question("Once?", ("still",))], "latest", RECIPE)
    monkeypatch.setattr(module, "generate_text", None)
    again = ask(lake, [Question("Once?", ("still",))] * 2, "talker", RECIPE.model_copy(update={"batch_size": 5}))
    assert again == [first, first]


def test_seeds_decide_draws_in_any_batch(lake: Lake) -> None:
    hot = AskRecipe.model_validate({"answer": {"max_new_tokens": 12, "temperature": 1.5}, "batch_size": 4})
    alone = AskRecipe.model_validate({"answer": {"max_new_tokens": 12, "temperature": 1.5}, "batch_size": 1})
    questions = [Question(f"Hm {index % 2}?", ("moving",), seed=index) for index in range(4)]
    drawn = [reply.text for reply in ask(lake, questions, "latest", hot)]
    assert len(set(drawn)) == 4
    fresh = [Question("Hm 1?", ("moving",), seed=index) for index in (3, 9)]
    assert ask(lake, fresh, "latest", alone)[0].text == drawn[3]


def test_what_cannot_be_asked_is_said(lake: Lake) -> None:
    for question, words in (
        (Question("What?", ("nowhere",)), "the first is nowhere: run `outback tokenize`"),
        (Question(None), "found 0 clips and no question"),
        (Question(None, ("still", "moving")), "found 2 clips and no question"),
        (Question("\ud800"), "not valid Unicode"),
        (Question("x" * 600), "expected fewer than 512, the model's context"),
    ):
        with pytest.raises(ConfigError, match=words):
            ask(lake, [question], "latest", RECIPE)


@pytest.mark.parametrize(("seconds", "num_commits"), [(0.0, 3), (1000.0, 1)])
def test_answers_are_kept_from_time_to_time(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, seconds: float, num_commits: int
) -> None:
    monkeypatch.setattr(module, "COMMIT_SECONDS", seconds)
    before = lake.read(ANSWERS)["answer_id"].to_pylist()
    kept: list[int] = []
    append = Lake.append

    def note(self: Lake, table: Table, rows: list[dict[str, object]], run_id: str) -> int:
        if table is ANSWERS:
            kept.append(len(rows))
        return append(self, table, rows, run_id)

    monkeypatch.setattr(Lake, "append", note)
    replies = ask(lake, [Question(f"Now {seconds} {number}?") for number in range(6)], "latest", RECIPE)
    assert (len(kept), sum(kept)) == (num_commits, 6)
    stored = set(lake.read(ANSWERS)["answer_id"].to_pylist())
    assert stored == {*before, *(reply.answer_id for reply in replies)}
