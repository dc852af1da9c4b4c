"""Lineage: from a generation to every file that had a part in it, and to none that had not."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.curate import curate, set_row
from jobs.lineage import print_trace, trace
from jobs.run import recorded
from pipeline.rules import Bounds, CurateRecipe
from schemas.captions import CAPTIONERS, CAPTIONS
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError
from schemas.generations import GENERATIONS
from schemas.identity import clip_id
from schemas.media import LOCATIONS, MEDIA
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.texts import TEXTS
from schemas.vision_tokens import TOKENIZERS
from tests.jobs.test_curate import RECIPE, expected, fill

NUM = 12
ALL = CurateRecipe(resolution=Bounds(low=1))


def checkpoint(
    lake: Lake,
    name: str,
    objective: str,
    data_id: str,
    *,
    killed_first: bool = False,
    recipe: str = "{}",
    start_id: str | None = None,
) -> str:
    """A training of its own, in a run of its own; with `killed_first` one that broke off and was resumed."""
    training = {"training_id": f"training-{name}"}
    if killed_first:
        with pytest.raises(KeyboardInterrupt), recorded(lake, "train", {}, training):
            raise KeyboardInterrupt
    with recorded(lake, "train", {}, training) as run:
        row: dict[str, Any] = {"checkpoint_id": name, "objective": objective, "recipe": recipe, "start_id": start_id}
        row |= {"data_id": data_id, "data_sha256": "x"}
        lake.append(
            CHECKPOINTS, [{**row, **training, "step": 10, "losses": "[]", "uri": f"/models/{name}"}], run.run_id
        )
    return run.run_id


def caption(lake: Lake, clip: str, captioner_id: str, **more: object) -> None:
    row = {
        "clip_id": clip,
        "window": 0,
        "captioner_id": captioner_id,
        "text": f"{clip} by {captioner_id}",
        "engine": "x",
    }
    lake.append(CAPTIONS, [{**row, "window_start_ms": 0, "window_end_ms": 2000, **more}], "caption")


def captioner(lake: Lake, captioner_id: str, model: str, prompt: str) -> None:
    row = {"captioner_id": captioner_id, "model": model, "model_digest": model, "prompt": prompt, "sampling": "[]"}
    lake.append(CAPTIONERS, [{**row, "prompt_id": "ask-1", "windowing": "{}", "checks": "{}"}], "caption")


def pack(lake: Lake, name: str, set_name: str, clips: list[str], texts: list[str], captioned: dict[str, str]) -> str:
    """Clips without an entry in `captioned` became documents without a caption."""
    seqset_id = f"seqset-{name}"
    items = [("video", clip) for clip in clips] + [("text", text) for text in texts]
    rows = []
    for index in range(0, len(items), 3):
        part = items[index : index + 3]
        segments = [{"kind": k, "item_id": i, "offset": n, "length": 1} for n, (k, i) in enumerate(part)]
        row = {"seqset_id": seqset_id, "seq_index": index // 3, "tokens": b"", "num_tokens": len(part), "crc32": 0}
        rows.append({**row, "segments": segments, "captioner_ids": [captioned.get(i) for _, i in part]})
    lake.append(SEQUENCES, rows, "pack")
    facts = {"tokenizer_id": "tok", "recipe": "{}", "vocabulary": "{}", "text_tokenizer": "{}", "context_len": 8}
    counts = {"num_sequences": len(rows), "num_tokens": len(items), "content_sha256": "x"}
    curated_ids = [set_row(lake, set_name)["curated_id"]]
    lake.append(
        SEQUENCE_SETS, [{"name": name, "seqset_id": seqset_id, "curated_ids": curated_ids, **facts, **counts}], "r"
    )
    return seqset_id


def generation(lake: Lake, name: str, checkpoint_id: str, continued: str | None = None) -> None:
    row: dict[str, Any] = {"generation_id": name, "kind": "image", "prompt": "a cat", "seed": 1, "sampling": "{}"}
    row |= {"checkpoint_id": checkpoint_id, "tokenizer_id": "tok", "t": 1, "h": 2, "w": 2, "tokens": b"1234"}
    lake.append(
        GENERATIONS, [{**row, "continued_clip_id": continued, "context_t": 0, "uri": f"/drawn/{name}.png"}], "g"
    )


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Twelve clips of twelve media, the first with two locations. The language model saw the kept ones and a text, the
    vision tokenizer all of them; two more media and a text were seen by nobody."""
    made = Lake(tmp_path_factory.mktemp("lineage") / "lake")
    fill(made, range(NUM))
    facts = {"num_bytes": 1, "container": "mp4", "codec": "h264", "width_px": 1, "height_px": 1, "rotation_deg": 0}
    media = [{"media_id": f"{n:016x}", "digest": f"{n:064x}", "kind": "video", **facts} for n in range(NUM + 2)]
    made.append(MEDIA, [{**row, "has_audio": False} for row in media], "ingest")
    places = [(n, f"/media/{n}.mp4") for n in range(NUM + 2)] + [(0, "/media/copy.mp4")]
    said = {"licence": "CC0", "source": "here", "manifest": "/media/list.csv"}
    made.append(LOCATIONS, [{"location_id": u, "media_id": f"{n:016x}", "uri": u, **said} for n, u in places], "ingest")
    made.append(
        TEXTS, [{"text_id": t, "text": t, "uri": "/texts/a.txt", "row": 0} for t in ("seen", "unseen")], "ingest"
    )
    curate(made, RECIPE, "kept")
    curate(made, ALL, "all")
    tokenizer_run = checkpoint(made, "vision", "vision_tokenizer", set_row(made, "all")["curated_id"])
    made.append(TOKENIZERS, [{"tokenizer_id": "tok", "checkpoint_id": "vision", "preparation": "{}", "uri": "/v"}], "t")
    kept = expected(range(NUM))
    for clip in kept[:-1]:
        caption(made, clip, "provided")
    caption(made, kept[0], "named", num_frames=3)  # a first window and a second, of which documents have the first
    caption(made, kept[0], "named", num_frames=3, window=1)
    caption(made, kept[1], "named", problem="empty")
    captioner(made, "provided", "provided", "{}")
    captioner(made, "named", "/models/namer", json.dumps({"video": "What is it?", "image": "", "system": ""}))
    examples = json.dumps({"examples": {"captioner": "provided"}})
    checkpoint(made, "namer", "captioner", set_row(made, "all")["curated_id"], recipe=examples)
    whose = dict.fromkeys(kept[1:-1], "provided") | {kept[0]: "named"}
    seqset_id = pack(made, "packed", "kept", kept, ["seen"], whose)
    checkpoint(made, "model", "pretrain", seqset_id, killed_first=True, start_id="elsewhere")
    tuned = pack(made, "tuned", "kept", kept[:2], [], {kept[1]: "provided"})
    checkpoint(made, "tuned", "pretrain", tuned, start_id="model")
    generation(made, "tuned-1", "tuned")
    generation(made, "gen-abc1", "model")
    generation(made, "gen-abc2", "model", continued=clip_id(f"{3:016x}", 0, 2000))
    generation(made, "gen-lost", "gone")
    assert tokenizer_run
    return made


def test_a_generation_leads_to_every_file_that_its_model_saw(lake: Lake) -> None:
    found = trace(lake, "gen-abc1")
    assert found.generation["prompt"] == "a cat"
    assert "tokens" not in found.generation
    assert found.missing == ()
    training = found.training
    assert training is not None
    assert [clip["clip_id"] for clip in training.data.clips] == expected(range(NUM))
    media = sorted({clip[:16] for clip in expected(range(NUM))})
    assert [row["media_id"] for row in training.data.media] == media
    places = {row["media_id"]: [place["uri"] for place in row["locations"]] for row in training.data.media}
    assert places[f"{0:016x}"] == ["/media/0.mp4", "/media/copy.mp4"]
    assert places[f"{1:016x}"] == ["/media/1.mp4"]
    assert training.data.media[0]["locations"][0]["licence"] == "CC0"
    assert [text["text_id"] for text in training.data.texts] == ["seen"]
    assert [row["name"] for row in training.sequence_sets] == ["packed"]
    assert [row["name"] for row in training.curated_sets] == ["kept"]
    assert [row["seq_index"] for row in training.sequences] == [0, 1, 2, 3]
    items = [item["item_id"] for row in training.sequences for item in row["segments"]]
    assert items == [*expected(range(NUM)), "seen"]


def test_a_tuned_model_leads_to_what_the_one_before_it_saw(lake: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    found = trace(lake, "tuned-1")
    assert found.missing == ()
    assert found.training is not None
    assert len(found.training.data.clips) == 2
    before = found.training.start
    assert before is not None
    assert before.checkpoint["checkpoint_id"] == "model"
    assert [clip["clip_id"] for clip in before.data.clips] == expected(range(NUM))
    assert before.start is None
    print_trace(found, as_json=False)
    said = capsys.readouterr().out
    assert "began with checkpoint model  pretrain, step 10" in said
    assert "began with weights elsewhere, which were not trained in this lake" in said


def test_runs_are_those_of_the_training_with_their_ends(lake: Lake) -> None:
    training = trace(lake, "gen-abc1").training
    assert training is not None
    assert [run["status"] for run in training.runs] == ["failed", "done"]
    assert training.checkpoint["run_id"] == training.runs[1]["run_id"]


def test_the_vision_tokenizer_has_a_lineage_of_its_own(lake: Lake) -> None:
    training = trace(lake, "gen-abc1").tokenizer_training
    assert training is not None
    assert training.checkpoint["checkpoint_id"] == "vision"
    assert [row["name"] for row in training.curated_sets] == ["all"]
    assert len(training.data.clips) == NUM
    assert training.sequences == training.sequence_sets == ()


def test_captions_lead_to_their_captioners_with_prompt_and_frames(lake: Lake) -> None:
    training = trace(lake, "gen-abc1").training
    assert training is not None
    kept = expected(range(NUM))
    assert [(c["clip_id"], c["captioner_id"]) for c in training.data.captions] == [
        (kept[0], "named"), *((clip, "provided") for clip in kept[1:-1])
    ]  # fmt: skip
    assert training.data.captions[0]["frame_ms"] == [0, 1000, 2000]
    named, provided = training.captioners
    assert named.captioner["prompt"]["video"] == "What is it?"
    assert provided.training is None
    taught = named.training
    assert taught is not None
    assert taught.checkpoint["checkpoint_id"] == "namer"
    assert taught.runs[0]["status"] == "done"
    assert {c["clip_id"] for c in taught.data.captions} == set(kept[:-1])
    assert [one.captioner["captioner_id"] for one in taught.captioners] == ["provided"]
    assert len(taught.data.media) == NUM


def test_a_continued_clip_is_part_of_the_lineage(lake: Lake) -> None:
    found = trace(lake, "gen-abc2")
    assert found.context is not None
    assert [row["locations"][0]["uri"] for row in found.context.media] == ["/media/3.mp4"]
    assert trace(lake, "gen-abc1").context is None


def test_a_unique_beginning_is_enough(lake: Lake) -> None:
    assert trace(lake, "gen-l").generation["generation_id"] == "gen-lost"
    with pytest.raises(ConfigError, match=r"begins 2 of 4 generation ids, expected one; they are gen-abc1, gen-abc2"):
        trace(lake, "gen-abc")
    with pytest.raises(ConfigError, match="begins 0 of 4"):
        trace(lake, "nothing")


def test_what_the_lake_does_not_hold_is_named(lake: Lake, tmp_path: Path) -> None:
    assert trace(lake, "gen-lost").missing == ("checkpoint_id gone in checkpoints",)
    alone = Lake(tmp_path / "alone")
    checkpoint(alone, "model", "pretrain", "seqset-x")
    generation(alone, "g", "model", continued="clip-x")
    assert set(trace(alone, "g").missing) == {
        "tokenizer_id tok in tokenizers",
        "data seqset-x of checkpoint model",
        "clip_id clip-x in clips",
    }


def test_printing(lake: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    found = trace(lake, "gen-abc2")
    print_trace(found, True)
    told = json.loads(capsys.readouterr().out)
    assert told["training"]["data"]["media"][0]["locations"][1]["uri"] == "/media/copy.mp4"
    assert told["tokenizer_training"]["checkpoint"]["checkpoint_id"] == "vision"
    print_trace(found, False)
    out = capsys.readouterr().out
    for piece in (
        "gen-abc2",
        "'a cat'",
        "checkpoint model",
        "vision tokenizer tok",
        "/media/copy.mp4  (CC0)",
        "continues",
        "captioner named  1 captions  /models/namer",
        "prompt ask-1",
        "video: What is it?",
        "checkpoint namer  captioner, step 10",
        "by named, shown its frames at 0, 1000, 2000 ms",
    ):
        assert piece in out
    assert f"{len(expected(range(NUM)))} clips of" in out
    assert "1 texts from 1 files" in out
