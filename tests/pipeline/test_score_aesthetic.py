"""Aesthetics: the published predictor's arithmetic, the lowest frame, and no score without weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from jobs.score_continuity import ContinuityConfig, score_continuity
from jobs.score_semantic import SemanticConfig, score_semantic
from pipeline.clip_scorer import FrameCount, ScoreWorker, scorer_id
from pipeline.samples import Sample
from pipeline.score_aesthetic import AestheticConfig, AestheticScorer, load_layers, predict
from schemas.catalog import Lake
from schemas.clips import CLIPS
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError
from schemas.media import MEDIA
from schemas.scores import AESTHETIC, CONTINUITY, SEMANTIC
from tests.pipeline.test_score_captions import SMALL_CLIP

DIM = 16


class PublishedMLP(nn.Module):
    """The predictor as its authors define it, but smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIM, 12),
            nn.Dropout(0.2),
            nn.Linear(12, 8),
            nn.Dropout(0.2),
            nn.Linear(8, 6),
            nn.Dropout(0.1),
            nn.Linear(6, 4),
            nn.Linear(4, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def predictor() -> PublishedMLP:
    torch.manual_seed(1)
    return PublishedMLP().eval()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, predictor: PublishedMLP) -> AestheticConfig:
    """A CLIP of one layer and a predictor, with random weights in the published formats."""
    import open_clip

    folder = tmp_path_factory.mktemp("aesthetic")
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**SMALL_CLIP).state_dict(), folder / "clip" / "open_clip_model.safetensors")
    torch.save(predictor.state_dict(), folder / "head.pth")
    return AestheticConfig(clip=str(folder / "clip"), weights=str(folder / "head.pth"))


def pictures(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8), float(index)) for index in range(count)]


def reference(config: AestheticConfig, predictor: PublishedMLP, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """As the authors do it: open_clip's transform of RGB, embeddings over their L2 norm, the module."""
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{config.clip}")
    with torch.inference_mode():
        inputs = torch.stack([transform(Image.fromarray(sample.image[..., ::-1].copy())) for sample in samples])
        features = model.eval().encode_image(inputs).numpy()
        units = features / np.linalg.norm(features, axis=-1, keepdims=True)
        return units, predictor(torch.from_numpy(units)).squeeze(1).numpy()


def test_the_lowest_frame_counts_by_the_published_arithmetic(config: AestheticConfig, predictor: PublishedMLP) -> None:
    samples = pictures(3)
    units, expected = reference(config, predictor, samples)
    assert len(set(expected.tolist())) == 3
    scorer = AestheticScorer(config)
    assert scorer.score(samples)["aesthetic"] == pytest.approx(expected.min(), abs=1e-5)
    columns, kept = scorer.score_and_keep("c", samples)
    assert columns["aesthetic"] == pytest.approx(expected.min(), abs=1e-5)
    rows: Sequence[Mapping[str, Any]] = kept[EMBEDDINGS.name]
    assert [row["frame_ms"] for row in rows] == [0, 1000, 2000]
    assert {(row["clip_id"], row["dim"]) for row in rows} == {("c", DIM)}
    stored = np.stack([np.frombuffer(row["embedding"], "<f2") for row in rows])
    np.testing.assert_allclose(stored, units, atol=5e-4)


def test_an_image_is_judged_by_its_one_frame(config: AestheticConfig, predictor: PublishedMLP, tmp_path: Path) -> None:
    (sample,) = pictures(1)
    Image.fromarray(sample.image[..., ::-1].copy()).save(tmp_path / "a.png")
    _, expected = reference(config, predictor, [sample])
    worker = ScoreWorker("pipeline.score_aesthetic:AestheticScorer", config.model_dump_json(), "s", str(tmp_path))
    item = {"clip_id": "c", "uri": str(tmp_path / "a.png"), "kind": "image", "start_ms": 0, "end_ms": 0}
    rows = worker.process(item)
    (row,) = rows[AESTHETIC.name]
    assert row["aesthetic"] == pytest.approx(expected[0], abs=1e-5)
    assert (row["num_samples"], row["scorer_id"]) == (1, "s")
    lake = Lake(tmp_path / "lake")
    assert [lake.append(table, rows[table.name], "r") for table in (EMBEDDINGS, AESTHETIC)] == [1, 1]


def test_both_formats_hold_the_same_layers_in_order(predictor: PublishedMLP, tmp_path: Path) -> None:
    torch.manual_seed(2)
    long = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)), nn.Linear(4, 1))  # `10` sorts after `9`
    inputs = torch.randn(5, 4)
    expected = long(inputs).detach().squeeze(1).numpy()
    torch.save(long.state_dict(), tmp_path / "a.pth")
    save_file(long.state_dict(), tmp_path / "a.safetensors")
    linear = nn.Linear(4, 1)  # LAION's first predictor
    torch.save(linear.state_dict(), tmp_path / "b.pth")
    for name in ("a.pth", "a.safetensors"):
        np.testing.assert_allclose(predict(load_layers(tmp_path / name), inputs.numpy()), expected, atol=1e-5)
    found = predict(load_layers(tmp_path / "b.pth"), inputs.numpy())
    np.testing.assert_allclose(found, linear(inputs).detach().squeeze(1).numpy(), atol=1e-6)


def test_what_is_missing_is_named_with_where_to_get_it(config: AestheticConfig, tmp_path: Path) -> None:
    lacking = [
        ({"clip": None}, "--set clip=PATH.*vit_large_patch14_clip_224.openai"),
        ({"weights": None}, "--set weights=PATH.*improved-aesthetic-predictor"),
        ({"clip": str(tmp_path)}, "holds no CLIP model"),
        ({"weights": str(tmp_path / "none.pth")}, "there is no file"),
    ]
    for change, message in lacking:
        with pytest.raises(ConfigError, match=message):
            scorer_id(AestheticScorer, config.model_copy(update=change), by_code=False)


def test_files_that_are_no_predictor_are_refused(config: AestheticConfig, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"layers.0.weight": torch.zeros(2, 3), "layers.0.bias": torch.zeros(2)}, tmp_path / "two.pth")
    torch.save({"weight": torch.zeros(1, 3)}, tmp_path / "bias.pth")
    torch.save({"weight": torch.zeros(1, 3), "bias": torch.zeros(1), "mean": torch.zeros(3)}, tmp_path / "more.pth")
    torch.save(nn.Linear(3, 1), tmp_path / "pickle.pth")  # a whole module: code, which is not loaded
    for name in ("text.pth", "two.pth", "bias.pth", "more.pth", "pickle.pth"):
        with pytest.raises(ConfigError, match=name):
            load_layers(tmp_path / name)
    torch.save(nn.Linear(3, 1).state_dict(), tmp_path / "three.pth")
    other = AestheticScorer(config.model_copy(update={"weights": str(tmp_path / "three.pth")}))
    with pytest.raises(ConfigError, match="vectors of 16 numbers, the aesthetic predictor takes 3"):
        other.score(pictures(1))


def test_the_id_is_of_bytes_not_of_paths(config: AestheticConfig, tmp_path: Path) -> None:
    def name_of(changed: AestheticConfig) -> str:
        return scorer_id(AestheticScorer, changed, by_code=False)

    copied = tmp_path / "elsewhere.pth"
    copied.write_bytes(Path(str(config.weights)).read_bytes())
    assert name_of(config.model_copy(update={"weights": str(copied)})) == name_of(config)
    torch.manual_seed(9)
    torch.save(PublishedMLP().state_dict(), copied)
    assert name_of(config.model_copy(update={"weights": str(copied)})) != name_of(config)
    fewer = FrameCount(num_frames=1, short_edge_px=None)
    assert name_of(config.model_copy(update={"samples": fewer})) != name_of(config)


def test_kept_embeddings_say_how_alike_clips_are(
    config: AestheticConfig, predictor: PublishedMLP, tmp_path: Path
) -> None:
    """From pictures through CLIP and the lake to both scores that read embeddings, against open_clip alone."""
    lake, scorer = Lake(tmp_path / "lake"), AestheticScorer(config)
    shown = [pictures(6)[:3], pictures(6)[3:]]
    rows = [{"start_frame": 0, "end_frame": 9}, {"start_frame": 9, "end_frame": 18}]
    for index, (samples, row) in enumerate(zip(shown, rows, strict=True)):
        clip = {"clip_id": f"{MEDIUM}-{index}", "media_id": MEDIUM, "kind": "video", "segmentation_id": "s"}
        lake.append(CLIPS, [clip | row | {"start_ms": 0, "end_ms": 9}], "r")
        lake.append(EMBEDDINGS, scorer.score_and_keep(clip["clip_id"], samples)[1][EMBEDDINGS.name], "r")
    medium = {"media_id": MEDIUM, "digest": MEDIUM, "kind": "video", "num_bytes": 1, "container": "x", "codec": "x"}
    lake.append(MEDIA, [medium | {"width_px": 9, "height_px": 9, "rotation_deg": 0, "has_audio": False}], "r")
    score_semantic(lake, None, SemanticConfig())
    score_continuity(lake, ContinuityConfig())
    before, after = (reference(config, predictor, samples)[0] for samples in shown)
    means = [units.mean(axis=0) / np.linalg.norm(units.mean(axis=0)) for units in (before, after)]
    alike = lake.read(SEMANTIC).sort_by("clip_id")["semantic"].to_pylist()
    assert alike == [-1, pytest.approx(means[0] @ means[1], abs=2e-3)]
    goes_on = lake.read(CONTINUITY).sort_by("clip_id")["continuity"].to_pylist()
    assert goes_on == [-1, pytest.approx((before[1:] @ after[:2].T).max(), abs=2e-3)]


MEDIUM = "0" * 16
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(config: AestheticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with both models, as a download leaves it, and no network."""
    from huggingface_hub import constants

    for name, files in (("clip", Path(str(config.clip)).iterdir()), ("head", [Path(str(config.weights))])):
        repository = tmp_path / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).mkdir(parents=True)
        for file in files:
            (repository / "snapshots" / COMMIT / file.name).symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_weights_by_hub_name_are_those_by_path(config: AestheticConfig, hub_cache: Path) -> None:
    by_name = config.model_copy(update={"clip": "hf-hub:org/clip", "weights": "hf-hub:org/head/head.pth"})
    assert hub_cache in by_name.files()[0].parents
    assert scorer_id(AestheticScorer, by_name, by_code=False) == scorer_id(AestheticScorer, config, by_code=False)
    samples = pictures(2)
    assert AestheticScorer(by_name).score(samples) == AestheticScorer(config).score(samples)


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_it_says_how_to_bring_the_files(config: AestheticConfig) -> None:
    lacking = [
        ({"clip": "hf-hub:org/other"}, r"hf-hub:org/other is not in.*`hf download org/other --local-dir FOLDER`"),
        ({"weights": "hf-hub:org/head/b.pth"}, r"`hf download org/head b.pth --local-dir FOLDER`"),
        ({"weights": "hf-hub:org/head"}, "expected hf-hub:ORG/NAME/FILE"),
        ({"clip": "hf-hub:org/clip/a"}, "expected hf-hub:ORG/NAME, a whole model"),
        ({"clip": "hf-hub:clip"}, "expected hf-hub:ORG/NAME"),
    ]
    for change, message in lacking:
        with pytest.raises(ConfigError, match=message):
            config.model_copy(update=change).files()
