"""Whatever dies while captions are written, every window has one caption or one reason, and none is asked for twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from jobs.caption import caption
from jobs.curate import curate
from jobs.ingest import IngestConfig, ingest
from jobs.scan import scan
from jobs.sql import run_sql
from pipeline.caption_clips import CaptionRecipe
from pipeline.rules import CurateRecipe
from pipeline.scan_medium import ScanConfig
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.runs import ATTEMPTS, RUNS
from schemas.table import Table
from tests.flows.test_scan_failures import ROOT, finish
from tests.pipeline.stub_endpoint import MODEL, Endpoint, Reply, caption_reply, frames_of, serving

NUM_IMAGES = 40


def colour_of(request: dict[str, Any]) -> int:
    """Which of the media a request shows: each is of one level of red."""
    return round(float(frames_of(request)[0][..., 0].mean()) / 5)


def say_colour(request: dict[str, Any], _: int) -> Reply:
    return caption_reply(f"a picture of level {colour_of(request)} among forty", after_s=0.15)


class Gate:
    """Answers so many requests at once, and the others when it is opened: what happens in between finds work done and work
    undone, however fast the machine is.
    """

    def __init__(self, num_answered: int, answer: Callable[[dict[str, Any], int], Reply] = say_colour) -> None:
        self._num_answered, self._answer = num_answered, answer
        self._opened = threading.Event()

    def __call__(self, request: dict[str, Any], index: int) -> Reply:
        if index >= self._num_answered:
            self._opened.wait(timeout=600)
        return self._answer(request, index)

    def open(self) -> None:
        self._opened.set()


# Forty windows are four blocks of a worker. Three that wait leave one block whole at least, which is committed.
MOST = NUM_IMAGES - 3


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for level in range(NUM_IMAGES):
        pixels = np.full((64, 64, 3), (5 * level, 60, 90), np.uint8)
        Image.fromarray(pixels).save(folder / f"level{level:02}.png")
    return folder


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory, media: Path, ray_apart: None) -> Lake:
    """A lake of forty images in the set `all`."""
    lake = Lake.open(tmp_path_factory.mktemp("scanned") / "lake")
    ingest(lake, [str(media)], options=IngestConfig())
    scan(lake, ScanConfig())
    curate(lake, CurateRecipe(), "all")
    return lake


@dataclass(frozen=True)
class Asked:
    """The lake, and a prompt of the test's own: a captioner that nobody was before."""

    lake: Lake
    prompt: Path

    def rows(self, table: Table) -> list[dict[str, Any]]:
        """The rows of this captioner in `captions`, or its failures in `attempts`."""
        mine = [r for r in self.lake.read(CAPTIONERS).to_pylist() if r["prompt_id"].startswith(self.prompt.stem)]
        column = "stage_id" if table is ATTEMPTS else "captioner_id"
        return self.lake.read_where(table, column, [row["captioner_id"] for row in mine]).to_pylist() if mine else []

    def levels(self) -> list[int]:
        """The levels of red that were captioned, with one entry for each caption."""
        return sorted(int(row["text"].split()[4]) for row in self.rows(CAPTIONS))

    def runs(self, status: str) -> list[dict[str, Any]]:
        """Captionings of this captioner that ended so."""
        runs = [row for row in self.lake.read(RUNS).to_pylist() if row["job"] == "caption"]
        return [row for row in runs if row["status"] == status and str(self.prompt) in row["recipe"]]


@pytest.fixture
def asked(tmp_path: Path, scanned: Lake) -> Asked:
    prompt = tmp_path / f"{uuid.uuid4().hex}.toml"
    prompt.write_text(f'image = "What level is it, {prompt.stem}?"\nvideo = "What levels are they?"\n')
    return Asked(scanned, prompt)


def recipe(asked: Asked, endpoint: Endpoint, **options: object) -> CaptionRecipe:
    return CaptionRecipe(
        engine="endpoint",
        model=MODEL,
        prompt=str(asked.prompt),
        readers=1,
        endpoint={
            "url": endpoint.url,
            "concurrency": 4,
            "timeout_s": 120.0,
            "max_tries": 2,
            "patience_s": 120.0,
            **options,
        },
    )


def driver(asked: Asked, endpoint: Endpoint, *options: str) -> "subprocess.Popen[str]":
    values = [
        f"model={MODEL}",
        f"prompt={asked.prompt}",
        "readers=1",
        f"endpoint.url={endpoint.url}",
        "endpoint.concurrency=4",
        *options,
    ]
    command = [sys.executable, "-m", "tests.flows.caption_driver", str(asked.lake.folder), "all"]
    command += ["caption_endpoint", *values]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(happened: Callable[[], bool], limit_s: float = 300.0) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


def test_a_set_is_captioned_once(asked: Asked) -> None:
    with serving(say_colour) as endpoint:
        first = caption(asked.lake, "all", recipe(asked, endpoint))
        assert (first.num_windows, first.num_new, first.num_captioned, first.num_failed) == (40, 40, 40, 0)
        again = caption(
            asked.lake, "all", recipe(asked, endpoint, concurrency=2)
        )  # how fast is asked changes no caption
        assert (again.captioner_id, again.num_new, again.num_captioned) == (first.captioner_id, 0, 40)
        assert len(endpoint.requests) == 40
        other = caption(asked.lake, "all", recipe(asked, endpoint).model_copy(update={"prompt": "dense.v1"}))
    assert other.captioner_id != first.captioner_id
    prompts = {row["captioner_id"]: row["prompt_id"] for row in asked.lake.read(CAPTIONERS).to_pylist()}
    assert prompts[first.captioner_id].startswith(asked.prompt.stem)
    assert prompts[other.captioner_id].startswith("dense.v1-")
    assert asked.levels() == list(range(NUM_IMAGES))
    row = asked.rows(CAPTIONS)[0]
    assert (row["prompt_tokens"], row["output_tokens"], row["finish_reason"], row["tries"]) == (7, 5, "stop", 1)
    assert (row["window"], row["num_frames"], row["problem"], row["engine"]) == (0, 1, None, "endpoint")


@pytest.mark.slow
def test_every_kind_of_poison_costs_one_row_and_nothing_else(asked: Asked, media: Path) -> None:
    ill = {
        1: Reply(400, b'{"error": {"message": "longer than the context"}}'),
        2: Reply(429, b"slow down"),
        3: Reply(500, b"oops"),
        4: Reply(200, b"<html>a proxy</html>"),
        5: Reply(200, b'{"choices": ['),
        6: caption_reply("never", after_s=3600.0),
        7: Reply(413, b"too large"),
    }
    gone = media / "level08.png"
    hidden = gone.rename(gone.with_suffix(".away"))
    try:
        with serving(lambda request, index: ill.get(colour_of(request)) or say_colour(request, index)) as endpoint:
            report = caption(asked.lake, "all", recipe(asked, endpoint, timeout_s=10.0))
    finally:
        hidden.rename(gone)
    assert (report.num_captioned, report.num_failed) == (32, 8)
    assert asked.levels() == [level for level in range(NUM_IMAGES) if level not in {*ill, 8}]
    failed = asked.rows(ATTEMPTS)
    found = {int(Path(row["uri"]).stem.removeprefix("level")): row["error_class"] for row in failed}
    assert len(failed) == 8
    assert {level: found.pop(level) for level in (1, 2, 3, 4, 5, 6, 7)} == {
        1: "Http400",
        2: "Http429",
        3: "Http500",
        4: "MalformedAnswer",
        5: "MalformedAnswer",
        6: "EndpointTimeout",
        7: "Http413",
    }
    assert found == {8: "FileNotFoundError"}
    with serving(say_colour) as endpoint:  # what may pass does; what was refused for good is left alone
        report = caption(asked.lake, "all", recipe(asked, endpoint))
    assert {colour_of(request) for request in endpoint.requests} == {2, 3, 4, 5, 6, 8}
    assert report.num_failed == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_driver_killed_between_commits(asked: Asked) -> None:
    gate = Gate(MOST)
    with serving(gate) as endpoint:
        process = driver(asked, endpoint)
        wait_for(lambda: len(asked.rows(CAPTIONS)) > 0)
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        gate.open()
        done = asked.levels()
        assert 0 < len(done) < NUM_IMAGES
        # What was under way when the driver died is answered; no worker outlives it for long.
        wait_for(lambda: not any(psutil.pid_exists(worker) for worker in workers))
        before = len(endpoint.requests)
        finish(driver(asked, endpoint))
        asked_again = [colour_of(request) for request in endpoint.requests[before:]]
    assert sorted(asked_again) == sorted(set(range(NUM_IMAGES)) - set(done))
    assert asked.levels() == list(range(NUM_IMAGES))
    assert len(asked.rows(ATTEMPTS)) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_worker_killed(asked: Asked) -> None:
    gate = Gate(MOST)
    with serving(gate) as endpoint:
        process = driver(asked, endpoint)
        wait_for(lambda: len(asked.rows(CAPTIONS)) > 0)
        done = set(asked.levels())
        before = len(endpoint.requests)
        (worker,) = workers_of(process.pid)
        os.kill(worker, signal.SIGKILL)
        gate.open()
        finish(process)
        assert not done & {colour_of(request) for request in endpoint.requests[before:]}
    assert done
    assert asked.levels() == list(range(NUM_IMAGES))
    assert len(asked.rows(ATTEMPTS)) == 0


def workers_of(driver_pid: int) -> list[int]:
    """The Ray actors of a driver that hold a captioning worker."""
    children = psutil.Process(driver_pid).children(recursive=True)
    return [child.pid for child in children if "ray::" in child.name() and "Map" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_endpoint_killed_and_started_again(asked: Asked) -> None:
    """Nobody listens for a while: the job waits. Nobody comes back: the job stops, and a rerun asks for what is left."""
    gate = Gate(8)
    with serving(gate) as endpoint:
        process = driver(asked, endpoint, "endpoint.patience_s=300")
        wait_for(lambda: len(endpoint.requests) > 8)
    gate.open()
    port = int(endpoint.url.split(":")[2].split("/")[0])
    time.sleep(1.0)
    with serving(say_colour, port=port) as back:
        finish(process)
        assert len(back.requests) < NUM_IMAGES
    assert asked.levels() == list(range(NUM_IMAGES))
    assert len(asked.rows(ATTEMPTS)) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_endpoint_that_stays_away_fails_the_job_and_no_window(asked: Asked) -> None:
    gate = Gate(15)
    with serving(gate) as endpoint:
        process = driver(asked, endpoint, "endpoint.patience_s=1")
        wait_for(lambda: len(endpoint.requests) > 15)
    gate.open()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "TransientError" in err
    assert "run the same command again" in err
    assert len(asked.rows(ATTEMPTS)) == 0
    (failed,) = asked.runs("failed")
    assert "has not been reachable" in failed["outcome"]
    done = asked.levels()
    with serving(say_colour, port=int(endpoint.url.split(":")[2].split("/")[0])) as back:
        finish(driver(asked, back))
        assert {colour_of(request) for request in back.requests} == set(range(NUM_IMAGES)) - set(done)
    assert asked.levels() == list(range(NUM_IMAGES))


def test_captions_that_fail_their_checks_are_kept_and_tried_once_more(asked: Asked) -> None:
    def answer(request: dict[str, Any], index: int) -> Reply:
        level, is_second = colour_of(request), request["temperature"] > 0
        if level < 10 or (level < 20 and not is_second):
            return caption_reply("and so on and so on " * 9, "length")
        return say_colour(request, index)

    with serving(answer) as endpoint:
        report = caption(asked.lake, "all", recipe(asked, endpoint))
        assert len(endpoint.requests) == NUM_IMAGES + 20
        assert caption(asked.lake, "all", recipe(asked, endpoint)).num_new == 0  # a marked caption is a caption
    assert (report.num_captioned, report.num_failed) == (40, 0)
    query = f"""
        select problem, tries, first_problem, count(*) as n from captions where captioner_id = '{report.captioner_id}'
        group by all order by n desc, problem nulls last
    """
    assert [tuple(row.values()) for row in run_sql(asked.lake, query, None).to_pylist()] == [
        (None, 1, None, 20),
        ("repetition", 2, "repetition", 10),
        (None, 2, "repetition", 10),
    ]
    (run,) = asked.runs("done")
    counts = json.loads(run["outcome"])
    assert (counts["done"], counts["problems"], counts["output_tokens"]) == (40, 10, 5 * 60)


def test_two_slow_answers_do_not_stop_the_others(asked: Asked) -> None:
    slow, others = {0, 30}, threading.Semaphore(0)

    def answer(request: dict[str, Any], index: int) -> Reply:
        """The slow ones answer when all the others have been asked."""
        if colour_of(request) not in slow:
            others.release()
        elif not all(others.acquire(timeout=120) for _ in range((NUM_IMAGES - len(slow)) // len(slow))):
            return Reply(400, b'{"error": {"message": "the others were not asked"}}')
        return say_colour(request, index)

    with serving(answer) as endpoint:
        caption(asked.lake, "all", recipe(asked, endpoint, timeout_s=300.0))
    assert asked.levels() == list(range(NUM_IMAGES))


def test_what_others_have_captioned_can_be_left_out(asked: Asked, tmp_path: Path) -> None:
    prompt = tmp_path / "another.toml"
    prompt.write_text('image = "Which level?"\nvideo = "Which levels?"\n')
    with serving(say_colour) as endpoint:
        first = recipe(asked, endpoint)
        caption(asked.lake, "all", first)
        other = first.model_copy(update={"prompt": str(prompt), "skip_captioned": True})
        report = caption(asked.lake, "all", other)
        assert len(endpoint.requests) == NUM_IMAGES
    assert (report.num_clips, report.num_windows, report.num_new) == (0, 0, 0)
