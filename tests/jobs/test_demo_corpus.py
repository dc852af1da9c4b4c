"""The demo corpus: same seed, same bytes, whatever interrupts it; and a truth that independent tools confirm."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import shapes
from jobs.demo_corpus import CONVERSATIONS, CorpusConfig, CorpusTruth, _wanted_shapes, load_truth, make_corpus
from pipeline.read_conversations import read_conversations
from schemas.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALL = CorpusConfig(
    num_shape_images=6,
    num_shape_videos=3,
    num_named_clips=3,
    num_unnamed_clips=2,
    num_unseen_clips=2,
    num_pans=1,
    num_zooms=1,
    num_cut_videos=1,
    num_fade_videos=1,
    pan_frames=48,
)
CUTS_ONLY = CorpusConfig(
    num_shape_images=0,
    num_shape_videos=2,
    num_named_clips=0,
    num_unnamed_clips=0,
    num_unseen_clips=0,
    num_pans=2,
    num_zooms=1,
    num_cut_videos=3,
    num_fade_videos=2,
)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decoded(path: Path) -> shapes.Pixels:
    with av.open(str(path)) as container:
        return np.stack([np.asarray(f.to_ndarray(format="rgb24"), np.uint8) for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, seed=0, config=SMALL)
    return folder


@pytest.fixture(scope="module")
def truth(corpus: Path) -> CorpusTruth:
    return load_truth(corpus / "truth.json")


def test_same_seed_gives_same_bytes(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path, seed=0, config=SMALL)
    assert digests(tmp_path) == digests(corpus)


def test_killed_and_run_again_gives_the_same_folder(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    code = (
        "import sys; from pathlib import Path; from jobs.demo_corpus import CorpusConfig, make_corpus; "
        "make_corpus(Path(sys.argv[1]), 0, CorpusConfig.model_validate_json(sys.argv[2]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), SMALL.model_dump_json()], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "photos" / "cat.png").exists() and child.poll() is None:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "truth.json").exists(), "the child was done before it was killed"
    made_before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert made_before
    make_corpus(folder, seed=0, config=SMALL)
    assert digests(folder) == digests(corpus)
    assert all(path.stat().st_mtime_ns == at for path, at in made_before.items()), "whole files were made again"


def test_finished_corpus_is_left_alone(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    make_corpus(corpus, seed=0, config=SMALL)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_folder_of_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seed=0 \(asked for 3\)"):
        make_corpus(corpus, seed=3, config=SMALL)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        make_corpus(tmp_path)


def test_truth_names_every_file(corpus: Path, truth: CorpusTruth) -> None:
    named = Counter(file.path for file in truth.files)
    assert max(named.values()) == 1
    sidecars = {path for path in digests(corpus) if path.startswith("photos/") and path.endswith((".json", ".txt"))}
    assert digests(corpus).keys() - named.keys() - sidecars == {
        "plan.json",
        "truth.json",
        "shapes/manifest.jsonl",
        CONVERSATIONS,
    }
    for source in truth.sources:
        assert (corpus / source).exists()


def test_captions_are_where_the_truth_says(corpus: Path, truth: CorpusTruth) -> None:
    said = {}
    for line in (corpus / "shapes/manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row.keys() - {"caption"} == {"path", "licence", "source"}
        if "caption" in row:
            said[f"shapes/{row['path']}"] = (row["caption"], row["licence"])
    for path in (corpus / "photos").glob("*.txt"):
        said[str(path.relative_to(corpus).with_suffix(""))] = (path.read_text().strip(), None)
    for path in (corpus / "photos").glob("*.json"):
        row = json.loads(path.read_text())
        said[str(path.relative_to(corpus).with_suffix(""))] = (row["caption"], row["licence"])
    captioned = [file for file in truth.files if file.caption is not None]
    for file in captioned:
        key = file.path if file.path in said else str(Path(file.path).with_suffix(""))
        assert said.pop(key) == (file.caption, file.licence)
    assert not said


def test_shapes_show_what_their_captions_say(corpus: Path, truth: CorpusTruth) -> None:
    assert sum(file.shows is not None for file in truth.files) == 7
    for file in truth.files:
        if file.what in ("shape", "unseen shape"):
            assert (file.caption is None) != (file.shows is None)
            facts = shapes.parse_caption(file.caption or file.shows or "")
            assert facts is not None
            if file.kind == "image":
                pixels = np.asarray(cv2.imread(str(corpus / file.path)), np.uint8)[..., ::-1]
                assert shapes.judge_shape(pixels) == (facts.colour, facts.shape)
            else:
                frames = decoded(corpus / file.path)
                assert shapes.judge_shape(frames[len(frames) // 2]) == (facts.colour, facts.shape)
                assert shapes.judge_direction(frames) == facts.direction


def test_videos_are_as_long_as_the_truth_says(corpus: Path, truth: CorpusTruth) -> None:
    for file in truth.files:
        if file.num_frames is not None:
            with av.open(str(corpus / file.path)) as container:
                stream = container.streams.video[0]
                assert stream.average_rate == file.fps
                assert sum(1 for _ in container.decode(stream)) == file.num_frames


def test_copies_are_exact(corpus: Path, truth: CorpusTruth) -> None:
    copies = [file for file in truth.files if file.duplicate_of]
    assert {file.kind for file in copies} == {"image", "video"}
    for file in copies:
        assert (corpus / file.path).read_bytes() == (corpus / str(file.duplicate_of)).read_bytes()


def test_broken_files_are_broken(corpus: Path, truth: CorpusTruth) -> None:
    by_reason = Counter(file.reason for file in truth.files if file.outcome == "failed")
    assert by_reason == {"WrongExtension": 3, "Empty": 1, "Unreadable": 2, "Truncated": 3, "Corrupt": 1}
    for file in truth.files:
        path = corpus / file.path
        if file.reason == "Unreadable":
            with pytest.raises(av.FFmpegError):
                decoded(path)
        elif file.reason == "Corrupt":
            with av.open(str(path)) as container:
                assert container.streams.video[0].frames == 96
            with pytest.raises(av.FFmpegError):
                decoded(path)
        elif file.reason == "Truncated" and file.kind == "video":
            with av.open(str(path)) as container:
                assert container.duration == 4 * av.time_base
            assert 24 < len(decoded(path)) < 72
        elif file.reason == "Truncated":
            with pytest.raises(OSError, match="truncated"), Image.open(path) as image:
                image.load()


def test_texts_are_all_different(corpus: Path, truth: CorpusTruth) -> None:
    rows = [json.loads(line)["text"] for line in (corpus / "texts/shapes.jsonl").read_text().splitlines()]
    rows += pq.read_table(corpus / "texts/shapes.parquet")["text"].to_pylist()
    rows.append((corpus / "texts/about_shapes.txt").read_text())
    assert len(set(rows)) == len(rows) == SMALL.num_texts
    assert sum(file.num_texts or 0 for file in truth.files) == SMALL.num_texts


def check_cuts(folder: Path, truth: CorpusTruth) -> None:
    """PySceneDetect itself, over its own reader, finds the planted cuts and no others."""
    from scenedetect import ContentDetector, SceneManager, ThresholdDetector, open_video

    checked = 0
    for file in truth.files:
        if file.kind != "video" or file.outcome == "failed" or file.duplicate_of:
            continue
        manager = SceneManager()
        manager.add_detector(ContentDetector())
        manager.add_detector(ThresholdDetector())
        manager.detect_scenes(open_video(str(folder / file.path)))
        found = [start.frame_num for start, _ in manager.get_scene_list()[1:]]
        if file.fades:
            assert len(found) == len(file.fades), file.path
            for frame, fade in zip(found, file.fades, strict=True):
                assert abs(frame - fade.frame) <= fade.tolerance_frames, file.path
        else:
            assert found == list(file.cut_frames), file.path
        checked += len(file.cut_frames) + len(file.fades)
    assert checked >= 2


def test_scene_detectors_find_the_planted_cuts(corpus: Path, truth: CorpusTruth) -> None:
    check_cuts(corpus, truth)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_scene_detectors_find_the_planted_cuts_of_other_seeds(seed: int, corpus: Path, tmp_path: Path) -> None:
    check_cuts(tmp_path, load_truth(make_corpus(tmp_path, seed, CUTS_ONLY)))
    assert digests(tmp_path)["photos/pan_00.mp4"] != digests(corpus)["photos/pan_00.mp4"]


def test_moving_shapes_take_their_places_by_turns_and_unseen_ones_keep_theirs() -> None:
    config = CorpusConfig()
    shown: Counter[tuple[shapes.ShapeFacts, shapes.Place]] = Counter()
    unseen: Counter[tuple[shapes.ShapeFacts, shapes.Place]] = Counter()
    for group, _, facts, place in _wanted_shapes(3, config):
        if group != "image":
            assert place is not None
            assert place in shapes.all_places(facts)
            (unseen if group == "unseen" else shown)[facts, place] += 1
    assert len(unseen) == sum(unseen.values()) == config.num_unseen_clips
    assert not unseen.keys() & shown.keys()
    # 504 clips of 48 kinds and 8 places each: every place once before any is taken twice.
    assert sum(shown.values()) == 504
    assert set(shown.values()) == {1, 2}
    assert len(shown) == 384


def test_conversations_say_what_the_manifest_says(corpus: Path, truth: CorpusTruth) -> None:
    captions = {file.path: file.caption for file in truth.files}
    first: Counter[str] = Counter()
    said = list(read_conversations(corpus / CONVERSATIONS))
    for one in said:
        assert one.error is None
        (path,) = one.media
        facts = shapes.parse_caption(captions[str(path.relative_to(corpus))] or "")
        assert facts is not None
        known = {question: getattr(facts, fact) for fact, question in shapes.QUESTIONS.items()}
        for exchange in one.exchanges:
            assert exchange.answer == known[exchange.question]
        first[one.exchanges[0].question] += 1
    assert [len(one.exchanges) for one in said] == [1] * 3 + [3] * 3
    assert set(first) == set(shapes.QUESTIONS.values())
