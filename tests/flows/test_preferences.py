"""From drawings to a model that prefers: votes, a set of pairs, a training on Ray, and what the new checkpoint draws."""

from pathlib import Path

import pytest

from jobs.generate import Ask, GenerateRecipe, generate
from jobs.lineage import trace
from jobs.prefer import PreferRecipe, prefer
from jobs.train import TrainRecipe, train
from model.weights import digest
from schemas.checkpoints import CHECKPOINTS
from tests.jobs.small_models import make_lake
from tests.train.small_data import dpo_config

RECIPE = GenerateRecipe(h=3, w=3)


@pytest.mark.slow
def test_votes_become_a_checkpoint_that_prefers_what_was_chosen(tmp_path: Path) -> None:
    lake = make_lake(tmp_path)
    name = digest(tmp_path / "lm")[:16]
    (talker,) = lake.read_where(CHECKPOINTS, "checkpoint_id", ["talker"]).to_pylist()
    lake.append(CHECKPOINTS, [{**talker, "checkpoint_id": name, "training_id": "begun"}], "r")
    drawn = generate(lake, [Ask(p, "image", seed) for p in ("a", "b", "c") for seed in range(2)], name, RECIPE)
    lines = [f"{made.generation_id},ann,{made.ask.seed}" for made in drawn]
    (tmp_path / "votes.csv").write_text("\n".join(["generation_id,voter,score", *lines]) + "\n")
    assert prefer(lake, "mine", PreferRecipe(), votes=[tmp_path / "votes.csv"]).num_pairs == 3
    recipe = TrainRecipe(objective="dpo", dpo=dpo_config(steps=10, batch_size=3))
    report = train(lake, recipe, "mine", name)
    first, last = report.losses[0], report.losses[-1]
    assert last["margin"] > first["margin"]
    assert last["accuracy"] == 1.0
    assert report.checkpoint_id not in (name, "talker")
    assert train(lake, recipe, "mine", name).already_there
    (made,) = generate(lake, [Ask("d", "image", 0)], "latest", RECIPE)
    training = trace(lake, made.generation_id).training
    assert training is not None
    assert training.checkpoint["checkpoint_id"] == report.checkpoint_id
    assert training.preferences is not None
    assert {row["generation_id"] for row in training.preferences.generations} == {one.generation_id for one in drawn}
