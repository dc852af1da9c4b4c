"""A captioner is trained on what a set's captions say, all of it, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.caption import caption
from jobs.curate import curate
from jobs.ingest import IngestConfig, ingest
from jobs.scan import scan
from jobs.shipped import load_named
from jobs.train import TrainRecipe, load_training_recipe, train
from pipeline.caption_provided import CAPTIONER_ID as PROVIDED_ID
from pipeline.rules import CurateRecipe
from pipeline.scan_medium import ScanConfig
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError
from schemas.runs import ATTEMPTS
from train.captioner import ExampleFile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_IMAGES = 6
SMALL = [
    "captioner.steps=2",
    "captioner.batch_size=2",
    "captioner.size.side_px=32",
    "captioner.execution.num_workers=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ray_apart: None) -> tuple[Lake, Path]:
    """A lake of a few pictures with captions, one of them endless, and where they lie."""
    folder = tmp_path_factory.mktemp("media") / "here"
    folder.mkdir()
    for level in range(NUM_IMAGES):
        Image.fromarray(np.full((48, 48, 3), (40 * level, 60, 90), np.uint8)).save(folder / f"{level}.png")
        text = f"a picture of level {level}" if level else "endless " * 10_000
        (folder / f"{level}.txt").write_text(text)
    lake = Lake.open(tmp_path_factory.mktemp("lake") / "lake")
    ingest(lake, [str(folder)], options=IngestConfig())
    scan(lake, load_named(ScanConfig, "scan"))
    curate(lake, CurateRecipe(), "all")
    caption(lake, "all")
    return lake, folder


def recipe(*options: str) -> TrainRecipe:
    return load_training_recipe("demo_captioner", [*SMALL, *options])


def test_absent_media_stop_a_training_and_leave_nothing_behind(place: tuple[Lake, Path]) -> None:
    lake, folder = place
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(ConfigError, match="5 of 5 clips or windows of the set cannot be read"):
        train(lake, recipe(), "all")
    assert {row["error_class"] for row in lake.read(ATTEMPTS).to_pylist()} == {"FileNotFoundError"}
    assert len(lake.read(ATTEMPTS)) == NUM_IMAGES - 1
    away.rename(folder)
    one = (folder / "3.png").rename(folder / "3.away")
    with pytest.raises(ConfigError, match="1 of 5 clips"):
        train(lake, recipe(), "all")
    assert not list((lake.folder / "cache").glob("examples*"))
    one.rename(folder / "3.png")
    done = train(lake, recipe(), "all")
    (cached,) = (lake.folder / "cache").glob("examples*")
    assert sorted(ExampleFile(cached).captions()) == [f"a picture of level {level}" for level in range(1, NUM_IMAGES)]
    (row,) = lake.read(CHECKPOINTS).to_pylist()
    assert json.loads(row["recipe"])["examples"]["captioner"] == PROVIDED_ID
    assert (done.step, train(lake, recipe(), "all").already_there) == (2, True)


def test_a_captioner_that_nobody_knows_is_named(place: tuple[Lake, Path]) -> None:
    with pytest.raises(ConfigError, match="0 captioners fit 'abc', expected one"):
        train(place[0], recipe("examples.captioner=abc"), "all")
