"""The questions of docs/captioning.md, asked as printed of a lake whose answers are known."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.curate import curate
from jobs.sql import run_sql
from pipeline.rules import Bounds, CurateRecipe
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.runs import ATTEMPTS, RUNS
from tests.conftest import CHECKOUT
from tests.jobs.test_curate import fill

PAGE = (CHECKOUT / "docs" / "captioning.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^```sql\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NUM = 6


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Six clips. `good` captioned four, one of them badly, and failed at one in two attempts; `late` captioned one that it
    had failed at before."""
    made = Lake(tmp_path_factory.mktemp("captioned") / "lake")
    fill(made, range(NUM))
    curate(made, CurateRecipe(resolution=Bounds(low=1)), "all")
    clips = sorted(made.read(CLIPS, ["clip_id"])["clip_id"].to_pylist())
    for who in ("good", "late"):
        says = {"captioner_id": who, "model": f"/models/{who}", "model_digest": who, "prompt_id": "ask-1"}
        made.append(CAPTIONERS, [{**says, "prompt": "{}", "sampling": "[]", "windowing": "{}", "checks": "{}"}], "r")
    span = {"window": 0, "window_start_ms": 0, "window_end_ms": 1, "engine": "vllm", "text": "words"}
    for clip, who, problem in [
        *((c, "good", None) for c in clips[:3]),
        (clips[3], "good", "empty"),
        (clips[4], "late", None),
    ]:
        made.append(CAPTIONS, [{**span, "clip_id": clip, "captioner_id": who, "problem": problem}], "r")
    for attempt, (clip, who, reason) in enumerate(
        [(clips[5], "good", "Timeout"), (clips[5], "good", "EngineRefused"), (clips[4], "late", "Timeout")]
    ):
        row: dict[str, object] = {
            "stage": "caption",
            "stage_id": who,
            "item_id": f"{clip}#0",
            "attempt": attempt,
            "error_class": reason,
        }
        made.append(ATTEMPTS, [{**row, "message": "", "terminal": True, "host": "here"}], "r")
    run = {"run_id": "run-1", "job": "caption", "recipe": "{}", "code_version": "1", "environment": "{}"}
    outcome = {"prompt_tokens": 300, "output_tokens": 60, "stage_seconds": 2.0}
    inputs = json.dumps({"captioner_id": "good"})
    made.append(RUNS, [{**run, "status": "done", "inputs": inputs, "outcome": json.dumps(outcome)}], "run-1")
    return made


def answers(lake: Lake, question: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_sql(lake, question, None).to_pylist()
    return found


def test_captions_of_each_captioner(lake: Lake) -> None:
    found = [(row["captioner_id"], row["captions"], row["with_a_problem"]) for row in answers(lake, QUESTIONS[0])]
    assert found == [("good", 4, 1), ("late", 1, 0)]


def test_shares_by_reason(lake: Lake) -> None:
    found = [(row["captioner_id"], row["outcome"], row["windows"], row["share"]) for row in answers(lake, QUESTIONS[1])]
    assert found == [
        ("good", "EngineRefused", 1, 0.2), ("good", "empty", 1, 0.2), ("good", "fine", 3, 0.6), ("late", "fine", 1, 1.0)
    ]  # fmt: skip


def test_tokens_per_second(lake: Lake) -> None:
    (row,) = answers(lake, QUESTIONS[2])
    assert (row["captioner_id"], row["prompt_tokens_per_s"], row["output_tokens_per_s"]) == ("good", 150.0, 30.0)


def test_clips_without_a_caption(lake: Lake) -> None:
    (row,) = answers(lake, QUESTIONS[3])
    assert (row["name"], row["clips"], row["without_caption"]) == ("all", NUM, 2)


def test_every_question_has_a_test() -> None:
    assert len(QUESTIONS) == 4


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (CHECKOUT / "docs" / Path(link)).exists()
