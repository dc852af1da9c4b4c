"""The demo's captioner at its full size: trained, served by vLLM, and right about clips that nobody has named."""

from pathlib import Path

import pytest

from jobs.caption import caption
from jobs.curate import curate, load_curate_recipe
from jobs.demo_corpus import CorpusConfig, load_truth, make_corpus
from jobs.ingest import IngestConfig, ingest
from jobs.scan import scan
from jobs.shapes import parse_caption, score_captions
from jobs.shipped import load_named
from jobs.train import load_training_recipe, train
from pipeline.caption_clips import CaptionRecipe
from pipeline.scan_medium import ScanConfig
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.media import LOCATIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
pytest.importorskip("vllm")
SEED = 4  # not the demo's own
SHAPES_ONLY = CorpusConfig(
    num_shape_images=0, num_pans=0, num_zooms=0, num_cut_videos=0, num_fade_videos=0, num_texts=3
)


def test_colour_shape_and_direction_of_unseen_clips_are_named(tmp_path: Path) -> None:
    import ray

    truth = load_truth(make_corpus(tmp_path / "corpus", SEED, SHAPES_ONLY))
    lake = Lake.open(tmp_path / "lake")
    ingest(lake, [str(tmp_path / "corpus/shapes/manifest.jsonl")], options=IngestConfig())
    scan(lake, load_named(ScanConfig, "scan"))
    curate(lake, load_curate_recipe("demo_moving"), "moving")
    caption(lake, "moving")
    trained = train(lake, load_training_recipe("demo_captioner"), "moving")
    recipe = load_named(CaptionRecipe, "demo_caption").model_copy(update={"model": trained.checkpoint_id})
    report = caption(lake, "moving", recipe)
    ray.shutdown()
    assert (report.num_windows, report.num_failed) == (100, 0)
    shows = {str(tmp_path / "corpus" / file.path): file.shows for file in truth.files if file.shows}
    places = {row["media_id"]: row["uri"] for row in lake.read(LOCATIONS).to_pylist()}
    uris = {row["clip_id"]: places[row["media_id"]] for row in lake.read(CLIPS).to_pylist()}
    said = lake.read_where(CAPTIONS, "captioner_id", [report.captioner_id]).to_pylist()
    pairs = [(row["text"], parse_caption(shows[uris[row["clip_id"]]] or "")) for row in said]
    score = score_captions([(text, facts) for text, facts in pairs if facts is not None])
    assert score.num_judged == 100
    assert min(score.colour, score.shape, score.direction or 0.0) >= 0.85
