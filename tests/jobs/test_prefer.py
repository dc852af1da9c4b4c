"""Pairs of generations: who is compared with whom, what votes and scorers make of them, and what a training reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import train as train_module
from jobs.generate import Ask, GenerateRecipe, generate
from jobs.lineage import print_trace, trace
from jobs.prefer import PreferRecipe, PreferReport, prefer
from jobs.preference_sets import materialise_pairs
from jobs.scorers import load_scorer
from jobs.shapes import all_facts, make_scene, render_image, render_video, score_drawing, write_caption
from jobs.train import TrainRecipe, train
from model.weights import digest
from pipeline.read_votes import read_votes
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.document import VisionDocument, parse_document
from schemas.errors import ConfigError, RowError, SchemaError
from schemas.generations import GENERATIONS, PREFERENCE_PAIRS, PREFERENCE_SETS
from schemas.runs import ATTEMPTS, RUNS
from tests.jobs.small_models import FPS, VOCABULARY, make_lake
from tests.train.small_data import dpo_config
from train.batches import SequenceFile
from train.language import Start
from train.progress import TrainingResult

RECIPE = GenerateRecipe(h=3, w=3, video_t=4, fps=FPS, lookahead=2)
PROMPTS = ("a cat", "a dog")
NUM_EACH = 4


@dataclass(frozen=True)
class Drawn:
    """A lake with drawings; their ids by prompt, and how bright each is."""

    where: Path
    ids: dict[str, list[str]]
    light: dict[str, float]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Four images of each of two prompts, one of a third, and two ways that a clip goes on."""
    folder = tmp_path_factory.mktemp("drawn")
    lake = make_lake(folder)
    asks = [Ask(prompt, "image", seed) for prompt in PROMPTS for seed in range(NUM_EACH)]
    asks += [Ask("alone", "image", 1), *(Ask("on", "video", seed, "moving", 2) for seed in (1, 2))]
    ids: dict[str, list[str]] = {}
    light = {}
    for made in generate(lake, asks, "talker", RECIPE):
        ids.setdefault(made.ask.prompt, []).append(made.generation_id)
        light[made.generation_id] = float(made.frames.mean())
    return Drawn(folder / "lake", ids, light)


@pytest.fixture
def lake(drawn: Drawn, tmp_path: Path) -> Lake:
    """The drawings in a lake of the test's own: it is filled again, which is quick, as a lake cannot be copied."""
    made = make_lake(tmp_path)
    made.append(GENERATIONS, Lake.open(drawn.where).read(GENERATIONS), "copy")
    return made


@pytest.fixture
def ids(drawn: Drawn) -> dict[str, list[str]]:
    return drawn.ids


def write_votes(path: Path, lines: list[str], header: str = "generation_id,voter,score") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def pairs_by_id(lake: Lake) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in lake.read(PREFERENCE_PAIRS).to_pylist()}


def reasons(lake: Lake) -> list[tuple[str, str]]:
    return sorted((row["error_class"], row["item_id"].split("/")[-1]) for row in lake.read(ATTEMPTS).to_pylist())


def test_the_highest_mean_is_chosen_and_the_lowest_rejected(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    cats, dogs = ids["a cat"], ids["a dog"]
    scores = {cats[0]: (1, 5, 3), cats[1]: (4, 4, 5), cats[2]: (1, 1, 2), cats[3]: (5, 3, 3)}
    scores |= {dogs[0]: (1, 1, 1), dogs[3]: (2, 1, 1)}
    lines = [f"{one},{voter},{n}" for one, given in scores.items() for voter, n in zip("abc", given, strict=True)]
    report = prefer(lake, "mine", PreferRecipe(min_voters=3), votes=[write_votes(tmp_path / "votes.csv", lines)])
    assert (report.num_pairs, report.num_generations, report.num_refused) == (2, 6, 0)
    found = {(row["chosen_id"], row["rejected_id"]): row for row in pairs_by_id(lake).values()}
    assert found.keys() == {(cats[1], cats[2]), (dogs[3], dogs[0])}
    row = found[cats[1], cats[2]]
    assert row["chosen_score"] == pytest.approx(13 / 3)
    assert row["rejected_score"] == pytest.approx(4 / 3)
    assert row["judge"] == report.judge


def test_the_same_votes_add_nothing_whatever_their_order_and_file(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    lines = [f"{one},ann,{n}" for n, one in enumerate(ids["a cat"])]
    first = prefer(lake, "mine", PreferRecipe(), votes=[write_votes(tmp_path / "a.csv", lines)])
    state = {table.name: lake.snapshot_id(table) for table in (PREFERENCE_PAIRS, PREFERENCE_SETS, ATTEMPTS, RUNS)}
    halves = [write_votes(tmp_path / f"{name}.csv", part) for name, part in (("b", lines[2:]), ("c", lines[:2][::-1]))]
    again = prefer(lake, "mine", PreferRecipe(), votes=halves)
    assert again == PreferReport(**{**vars(first), "already_there": True})
    assert state == {t.name: lake.snapshot_id(t) for t in (PREFERENCE_PAIRS, PREFERENCE_SETS, ATTEMPTS, RUNS)}
    other = prefer(lake, "yours", PreferRecipe(), votes=halves)
    assert (other.pairset_id, len(lake.read(PREFERENCE_PAIRS))) == (first.pairset_id, 1)
    more = write_votes(tmp_path / "d.csv", [f"{ids['a cat'][0]},bob,9"])
    with pytest.raises(ConfigError, match="'mine' exists with other content"):
        prefer(lake, "mine", PreferRecipe(), votes=[*halves, more])


def test_what_makes_no_pair_is_a_row_with_its_reason(lake: Lake, ids: dict[str, list[str]], tmp_path: Path) -> None:
    cats, dogs = ids["a cat"], ids["a dog"]
    lines = [f"{cats[0]},ann,1", f"{cats[1]},ann,2", f"{cats[0]},bob,2", f"{cats[1]},bob,2", f"{cats[2]},ann,5"]
    lines += [f"{one},{voter},3" for one in dogs[:2] for voter in ("ann", "bob")]
    lines += [
        "nobody,ann,3",
        f"{cats[0]},ann,good",
        f"{cats[0]},ann",
        f"{cats[0]},,2",
        f"{cats[1]},ann,5",
        f"{cats[0]},ann,nan",
    ]
    report = prefer(lake, "mine", PreferRecipe(min_voters=2), votes=[write_votes(tmp_path / "v.csv", lines)])
    (row,) = pairs_by_id(lake).values()
    assert (row["chosen_id"], row["rejected_id"]) == (cats[1], cats[0])
    bad = [
        ("UnknownGeneration", 9),
        ("BrokenVote", 10),
        ("BrokenRow", 11),
        ("BrokenVote", 12),
        ("SecondVote", 13),
        ("BrokenVote", 14),
    ]
    expected = [(reason, f"v.csv#row={line}") for reason, line in bad]
    expected += [("TooFewVoters", cats[2]), ("Tie", min(dogs[:2]))]
    assert reasons(lake) == sorted(expected)
    assert report.num_refused == len(expected)
    again = prefer(lake, "mine", PreferRecipe(min_voters=2), votes=[tmp_path / "v.csv"])
    assert (again.num_refused, again.already_there) == (len(expected), True)


def test_a_smaller_difference_than_asked_for_is_a_tie(lake: Lake, ids: dict[str, list[str]], tmp_path: Path) -> None:
    votes = [write_votes(tmp_path / "v.csv", [f"{one},ann,{n}" for n, one in enumerate(ids["a cat"][:2])])]
    with pytest.raises(ConfigError, match="no pair"):
        prefer(lake, "mine", PreferRecipe(min_margin=1.0), votes=votes)
    assert reasons(lake) == [("Tie", min(ids["a cat"][:2]))]
    assert prefer(lake, "mine", PreferRecipe(min_margin=0.9), votes=votes).num_pairs == 1


@pytest.mark.parametrize(
    ("scores", "asked", "ranks"),
    [
        ((4, 1, 3, 2), 1, [(0, 1)]),
        ((4, 1, 3, 2), 2, [(0, 1), (2, 3)]),
        ((4, 1, 3, 2), 9, [(0, 1), (2, 3)]),  # the third best is worse than the third worst
        ((4, 2, 2, 1), 9, [(0, 3)]),
        ((4, 4, 1, 1), 9, [(0, 2), (1, 3)]),
    ],
)
def test_more_pairs_of_a_prompt_go_from_both_ends_inwards_and_share_no_drawing(
    lake: Lake,
    ids: dict[str, list[str]],
    tmp_path: Path,
    scores: tuple[int, ...],
    asked: int,
    ranks: list[tuple[int, int]],
) -> None:
    cats = sorted(ids["a cat"])
    file = write_votes(tmp_path / "votes.csv", [f"{one},ann,{n}" for one, n in zip(cats, scores, strict=True)])
    prefer(lake, "mine", PreferRecipe(pairs_per_prompt=asked), votes=[file])
    found = {(row["chosen_id"], row["rejected_id"]) for row in pairs_by_id(lake).values()}
    assert found == {(cats[best], cats[worst]) for best, worst in ranks}


def test_criteria_count_alike(lake: Lake, ids: dict[str, list[str]], tmp_path: Path) -> None:
    first, second = ids["a cat"][:2]
    lines = [f"{first},ann,appeal,5", f"{first},ann,alignment,1", f"{second},ann,appeal,4", f"{second},ann,alignment,4"]
    votes = [write_votes(tmp_path / "v.csv", lines, "generation_id,voter,criterion,score")]
    prefer(lake, "mine", PreferRecipe(), votes=votes)
    (row,) = pairs_by_id(lake).values()
    assert (row["chosen_id"], row["chosen_score"], row["rejected_score"]) == (second, 4.0, 3.0)


def test_votes_may_come_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({"generation_id": "g", "voter": "ann", "score": 3}) + "\n{broken\n")
    good, bad = read_votes(path)
    assert getattr(good.vote, "score", None) == 3.0
    assert isinstance(bad.vote, RowError)
    with pytest.raises(ConfigError, match=r"cannot be read: .*expected also score"):
        list(read_votes(write_votes(tmp_path / "v.csv", [], "generation_id,voter")))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_votes(tmp_path / "nowhere.csv"))
    with pytest.raises(ConfigError, match=r"expected \.csv"):
        list(read_votes(tmp_path / "votes.xlsx"))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "another"}, {"h": 1, "w": 9}, {"fps": 5.0}, {"tokenizer_id": "other"}, {"checkpoint_id": "stranger"}],
    ids=lambda change: next(iter(change)),
)
def test_only_drawings_that_differ_by_chance_are_compared(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path, change: dict[str, Any]
) -> None:
    """The best and the worst of all are unlike the two others in one thing, and meet nobody."""
    (row,) = lake.read_where(GENERATIONS, "generation_id", [ids["a cat"][0]]).to_pylist()
    add_stranger(lake)
    lake.append(GENERATIONS, [{**row, **change, "generation_id": "unlike"}], "r")
    first, second = ids["a cat"][:2]
    lines = ["unlike,ann,9", f"{first},ann,2", f"{second},ann,1"]
    report = prefer(lake, "mine", PreferRecipe(), votes=[write_votes(tmp_path / "v.csv", lines)])
    (pair,) = pairs_by_id(lake).values()
    assert (pair["chosen_id"], pair["rejected_id"]) == (first, second)
    assert (report.num_generations, report.num_alone) == (2, 1)


def add_stranger(lake: Lake) -> None:
    """A checkpoint `stranger` that reads other text ids, and `twin`, which reads the same as `talker`."""
    from schemas.sequences import SEQUENCE_SETS

    (talker,) = lake.read_where(CHECKPOINTS, "checkpoint_id", ["talker"]).to_pylist()
    (read,) = lake.read_where(SEQUENCE_SETS, "seqset_id", ["seqset"]).to_pylist()
    lake.append(SEQUENCE_SETS, [{**read, "name": "strange", "seqset_id": "strange", "text_tokenizer": "{}"}], "r")
    rows = [{**talker, "checkpoint_id": "stranger", "data_id": "strange"}, {**talker, "checkpoint_id": "twin"}]
    lake.append(CHECKPOINTS, [{**row, "training_id": row["checkpoint_id"]} for row in rows], "r")


def test_checkpoints_with_the_same_ids_may_be_compared_or_one_looked_at_alone(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    add_stranger(lake)
    first, second, third = ids["a cat"][:3]
    (row,) = lake.read_where(GENERATIONS, "generation_id", [third]).to_pylist()
    lake.append(GENERATIONS, [{**row, "checkpoint_id": "twin", "generation_id": "of-twin"}], "r")
    lake.append(GENERATIONS, [{**row, "checkpoint_id": "gone", "generation_id": "of-gone"}], "r")
    lines = ["of-twin,ann,9", f"{first},ann,2", f"{second},ann,1", "of-gone,ann,5"]
    votes = [write_votes(tmp_path / "v.csv", lines)]
    prefer(lake, "both", PreferRecipe(), votes=votes)
    (pair,) = pairs_by_id(lake).values()
    assert (pair["chosen_id"], pair["rejected_id"]) == ("of-twin", second)
    assert reasons(lake) == [("UnknownCheckpoint", "v.csv#row=3")]
    prefer(lake, "one", PreferRecipe(), votes=votes, checkpoints=["talker"])
    assert {(row["chosen_id"], row["rejected_id"]) for row in pairs_by_id(lake).values()} == {
        ("of-twin", second), (first, second)
    }  # fmt: skip


def test_drawings_in_the_ids_of_two_tokenizers_make_no_set(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    add_stranger(lake)
    rows = lake.read_where(GENERATIONS, "generation_id", ids["a cat"][:2]).to_pylist()
    lake.append(
        GENERATIONS,
        [{**row, "checkpoint_id": "stranger", "generation_id": f"s{n}"} for n, row in enumerate(rows)],
        "r",
    )
    lines = [f"{one},ann,{n}" for n, one in enumerate([*ids["a cat"][:2], "s0", "s1"])]
    with pytest.raises(ConfigError, match="in the ids of 2 tokenizers"):
        prefer(lake, "mine", PreferRecipe(), votes=[write_votes(tmp_path / "v.csv", lines)])


def brightness(prompt: str, frames: np.ndarray) -> float:
    """A scorer of the user's own: cats cannot be judged, all else by how bright it is."""
    if "cat" in prompt:
        raise ValueError("no cats")
    return float(frames.mean())


def test_a_scorer_sees_what_was_drawn_and_its_complaints_are_kept(lake: Lake, drawn: Drawn) -> None:
    scorer = f"{__name__}:brightness"
    report = prefer(lake, "bright", PreferRecipe(), scorer=scorer, checkpoints=["talker"])
    expected = {}
    for prompt in ("a dog", "on"):
        best, worst = (choose(drawn.ids[prompt], key=lambda one: drawn.light[one]) for choose in (max, min))
        expected[best, worst] = drawn.light[best], drawn.light[worst]
    found = list(pairs_by_id(lake).values())
    assert {(row["chosen_id"], row["rejected_id"]) for row in found} == expected.keys()
    for row in found:
        scores = row["chosen_score"], row["rejected_score"]
        assert scores == pytest.approx(expected[row["chosen_id"], row["rejected_id"]])
        assert row["judge"] == scorer
    assert reasons(lake) == sorted(("NoScore", one) for one in drawn.ids["a cat"])
    assert (report.num_pairs, report.num_refused, report.num_alone) == (2, NUM_EACH, 1)
    assert prefer(lake, "bright", PreferRecipe(), scorer=scorer).already_there


def test_some_generations_alone_are_looked_at(lake: Lake, ids: dict[str, list[str]]) -> None:
    some, scorer = [*ids["a dog"][:2], ids["on"][0]], f"{__name__}:brightness"
    report = prefer(lake, "some", PreferRecipe(), scorer=scorer, generations=some)
    assert (report.num_generations, report.num_alone) == (2, 1)
    (pair,) = pairs_by_id(lake).values()
    assert {pair["chosen_id"], pair["rejected_id"]} == set(some[:2])
    with pytest.raises(ConfigError, match="found no generation 'nowhere'"):
        prefer(lake, "none", PreferRecipe(), scorer=scorer, generations=[*some, "nowhere"])


def test_scorers_by_name() -> None:
    assert load_scorer("shapes") is score_drawing
    assert load_scorer(f"{__name__}:brightness")("a dog", np.full((1, 2, 2, 3), 7, np.uint8)) == 7.0
    for name, said in (("beauty", "there is no scorer 'beauty'"), ("nowhere:nothing", "cannot be imported")):
        with pytest.raises(ConfigError, match=said):
            load_scorer(name)


def test_shapes_are_scored_by_how_much_of_the_prompt_they_show() -> None:
    for facts in all_facts(moving=False)[:4] + all_facts(moving=True)[::7]:
        scene = make_scene(facts, 3)
        frames = render_video(scene, 16, 8.0, 64) if facts.direction else render_image(scene, 64)[None]
        prompt = write_caption(facts)
        assert score_drawing(prompt, frames) == 1.0
        assert score_drawing(prompt, np.zeros_like(frames)) == 0.0
        other = next(one for one in ("red", "blue") if one != facts.colour)
        wrong = score_drawing(prompt.replace(facts.colour, other), frames)
        assert wrong == pytest.approx(2 / 3 if facts.direction else 1 / 2)
    with pytest.raises(ValueError, match="not of the grammar"):
        score_drawing("a dog", np.zeros((1, 8, 8, 3), np.uint8))


def test_either_votes_or_a_scorer(lake: Lake, tmp_path: Path) -> None:
    votes = [write_votes(tmp_path / "v.csv", [])]
    for options in ({}, {"votes": votes, "scorer": "shapes"}):
        with pytest.raises(ConfigError, match="give --votes or --scorer"):
            prefer(lake, "mine", PreferRecipe(), **options)
    with pytest.raises(ConfigError, match="preference set name 'a b'"):
        prefer(lake, "a b", PreferRecipe(), scorer="shapes")


def prefer_some(lake: Lake, ids: dict[str, list[str]], folder: Path) -> None:
    """A set `some` of two pairs, of which one is of continued clips."""
    lines = [f"{one},ann,{n}" for prompt in ("a dog", "on") for n, one in enumerate(ids[prompt])]
    assert prefer(lake, "some", PreferRecipe(), votes=[write_votes(folder / "some.csv", lines)]).num_pairs == 2


def test_a_training_reads_the_very_tokens_that_were_drawn(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    prefer_some(lake, ids, tmp_path)
    data = materialise_pairs(lake, "some")
    stored = {row["generation_id"]: row for row in lake.read(GENERATIONS).to_pylist()}
    pairs = sorted(pairs_by_id(lake).values(), key=lambda row: row["pair_id"])
    file = SequenceFile(data.path)
    assert len(file) == len(pairs) == 2
    assert data.context_len == max(len(file.tokens(row)) for row in range(2))
    for row, pair in enumerate(pairs):
        both = [stored[pair[side]] for side in ("chosen_id", "rejected_id")]
        assert file.tokens(row).tobytes() == b"".join(one["tokens"] for one in both)
        for one, segment, span in zip(both, file.segments(row), file.answers(row), strict=True):
            assert segment["item_id"] == one["generation_id"]
            end = segment["offset"] + segment["length"]  # type: ignore[operator]
            document = file.tokens(row)[segment["offset"] : end]
            parsed = parse_document(document, VOCABULARY, data.text)
            assert isinstance(parsed, VisionDocument)
            completed = file.tokens(row)[span["offset"] : span["offset"] + span["length"]]
            codes = parsed.block.codes[one["context_t"] :].ravel()  # those that were not given
            assert (
                completed[completed >= VOCABULARY.vision_offset] - VOCABULARY.vision_offset
            ).tolist() == codes.tolist()
            assert completed[-1] == VOCABULARY.eos
            assert span["offset"] + span["length"] == end


def test_a_set_that_reads_back_otherwise_is_an_error(lake: Lake, ids: dict[str, list[str]], tmp_path: Path) -> None:
    prefer_some(lake, ids, tmp_path)
    (row,) = lake.read_where(PREFERENCE_SETS, "name", ["some"]).to_pylist()
    lake.append(PREFERENCE_SETS, [{**row, "name": "forged", "content_sha256": "x"}], "r")
    with pytest.raises(SchemaError, match="does not read back"):
        materialise_pairs(lake, "forged")
    lake.append(PREFERENCE_SETS, [{**row, "name": "lost", "pair_ids": ["nothing"], "num_pairs": 1}], "r")
    with pytest.raises(SchemaError, match="and 0 of them are here"):
        materialise_pairs(lake, "lost")
    with pytest.raises(ConfigError, match=r"there is no preference set 'none'; there are \['forged', 'lost', 'some'\]"):
        materialise_pairs(lake, "none")


def test_pairs_that_are_too_long_equal_or_begin_differently_are_recorded_and_never_cut(
    lake: Lake, ids: dict[str, list[str]], tmp_path: Path
) -> None:
    first, second = ids["a cat"][:2]
    rows = {row["generation_id"]: row for row in lake.read(GENERATIONS).to_pylist()}
    num_tokens = len(rows[first]["tokens"]) // 4
    lines = [f"{first},ann,1", f"{second},ann,2"]
    votes = [write_votes(tmp_path / "v.csv", lines)]
    with pytest.raises(ConfigError, match="no pair"):
        prefer(lake, "mine", PreferRecipe(context_len=num_tokens - 1), votes=votes)
    assert reasons(lake) == [("DocumentTooLong", second)]
    assert prefer(lake, "mine", PreferRecipe(context_len=num_tokens), votes=votes).num_pairs == 1
    lake.append(GENERATIONS, [{**rows[first], "generation_id": "equal"}], "r")
    lake.append(
        GENERATIONS, [{**rows[first], "tokens": rows[ids["a dog"][0]]["tokens"], "generation_id": "foreign"}], "r"
    )
    for name, reason in (("equal", "SameDrawing"), ("foreign", "OtherPrompt")):
        path = write_votes(tmp_path / f"{name}.csv", [f"{first},ann,1", f"{name},ann,2"])
        with pytest.raises(ConfigError, match="no pair"):
            prefer(lake, name, PreferRecipe(), votes=[path])
        assert (reason, name) in reasons(lake)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Start]:
    """What preference trainings began with, which are over as soon as they begin."""
    found: list[Start] = []

    def stub(config: Any, data: Any, storage: Path, *, start: Start, held_out: Any, on_progress: Any) -> TrainingResult:
        found.append(start)
        return TrainingResult(tmp_path / "lm", f"{len(found):016x}", 8, [], 0)

    monkeypatch.setattr(train_module, "train_preferences", stub)
    monkeypatch.setattr(train_module, "ensure_ray", lambda: None)
    return found


def test_a_preferring_checkpoint_says_what_it_read_and_leads_to_all_of_it(
    lake: Lake, ids: dict[str, list[str]], begun: list[Start], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefer_some(lake, ids, tmp_path)
    (row,) = lake.read_where(PREFERENCE_SETS, "name", ["some"]).to_pylist()
    name = digest(tmp_path / "lm")
    (talker,) = lake.read_where(CHECKPOINTS, "checkpoint_id", ["talker"]).to_pylist()
    lake.append(CHECKPOINTS, [{**talker, "checkpoint_id": name[:16], "training_id": "t"}], "r")
    recipe = TrainRecipe(objective="dpo", dpo=dpo_config())
    with pytest.raises(ConfigError, match="Give --from CHECKPOINT"):
        train(lake, recipe, "some")
    assert begun == []
    report = train(lake, recipe, "some", name[:8])
    assert begun == [Start(tmp_path / "lm", name)]
    again = train(lake, recipe, "some", str(tmp_path / "lm"))
    assert (again.checkpoint_id, again.already_there) == (report.checkpoint_id, True)
    (made,) = lake.read_where(CHECKPOINTS, "checkpoint_id", [report.checkpoint_id]).to_pylist()
    facts = {"data_id": row["pairset_id"], "data_sha256": row["content_sha256"], "start_id": name[:16]}
    assert {key: made[key] for key in facts} == facts
    assert made["objective"] == "dpo"

    (drawing,) = generate(lake, [Ask("a bird", "image", 1)], report.checkpoint_id, RECIPE)
    found = trace(lake, drawing.generation_id)
    assert found.training is not None
    preferences = found.training.preferences
    assert preferences is not None
    assert [one["name"] for one in preferences.sets] == ["some"]
    assert {one["pair_id"] for one in preferences.pairs} == set(row["pair_ids"])
    named = {one[side] for one in preferences.pairs for side in ("chosen_id", "rejected_id")}
    assert {one["generation_id"] for one in preferences.generations} == named
    assert [one.checkpoint["checkpoint_id"] for one in preferences.drawn_by] == ["talker"]
    assert found.training.start is not None
    assert found.training.start.checkpoint["checkpoint_id"] == name[:16]
    assert "clip_id moving in clips" in found.missing  # the clip that two of the drawings continue
    print_trace(found, as_json=False)
    said = capsys.readouterr().out
    for words in (
        "preference set some",
        f"began with checkpoint {name[:16]}",
        "drawn by checkpoint talker",
        "'a dog'",
    ):
        assert words in said


def test_pairs_of_another_vision_tokenizer_are_refused(
    lake: Lake, ids: dict[str, list[str]], begun: list[Start], tmp_path: Path
) -> None:
    prefer_some(lake, ids, tmp_path)
    (row,) = lake.read_where(PREFERENCE_SETS, "name", ["some"]).to_pylist()
    lake.append(PREFERENCE_SETS, [{**row, "name": "tik", "pairset_id": "tik", "tokenizer_id": "tik"}], "r")
    (talker,) = lake.read_where(CHECKPOINTS, "checkpoint_id", ["talker"]).to_pylist()
    name = digest(tmp_path / "lm")[:16]
    lake.append(CHECKPOINTS, [{**talker, "checkpoint_id": name, "training_id": "t"}], "r")
    with pytest.raises(
        ConfigError, match="learnt codes of the vision tokenizer tok, and these sequences hold those of tik"
    ):
        train(lake, TrainRecipe(objective="dpo", dpo=dpo_config()), "tik", name)
    assert begun == []
