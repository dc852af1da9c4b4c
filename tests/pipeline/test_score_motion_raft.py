"""RAFT's scores: known flow gives known scores, published files load, and without weights nobody makes a score up."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import Raft_Large_Weights, Raft_Small_Weights, raft_small

from pipeline.camera_motion import STILL
from pipeline.clip_scorer import checked_columns
from pipeline.samples import Sample, take_sample
from pipeline.score_motion import summarise
from pipeline.score_motion_raft import PUBLISHED, Pairs, Raft, RaftConfig, RaftScorer
from schemas.errors import ConfigError
from schemas.scores import MOTION, OWN_COMMON
from tests.pipeline.test_score_motion import HEIGHT, WIDTH, surface, view


def taken(seed: int, seconds: float, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Sample:
    picture = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return take_sample(picture, size, seconds)


class KnownShift:
    """Says that everything moves by the same (right, down) pixels, and notes what it was shown."""

    def __init__(self, right: float, down: float) -> None:
        self.shift = right, down
        self.shown: list[Pairs] = []

    def __call__(self, pairs: Pairs) -> np.ndarray:
        self.shown.append(pairs)
        return np.full((*pairs.shape[:1], *pairs.shape[2:4], 2), self.shift, np.float32)


@pytest.mark.parametrize("size", [(455, 256), (256, 455), (160, 128), (33, 20)])
def test_a_known_flow(size: tuple[int, int]) -> None:
    network = KnownShift(3, -4)
    scorer = RaftScorer(RaftConfig(pairs_at_once=2), network)
    samples = [taken(index, index * 0.5, size) for index in range(6)]
    scores = summarise(list(scorer.pairs(samples)), len(samples))
    assert scores.motion == scores.motion_max == pytest.approx(5 / min(size))
    assert scores.camera_motion == pytest.approx(5 / min(size))
    assert scores.object_motion == 0.0
    assert [len(shown) for shown in network.shown] == [2, 2, 1]
    for shown in network.shown:
        height, width = shown.shape[2:4]
        assert height % 8 == width % 8 == 0
        assert min(height, width) >= 128
    first = network.shown[0]
    assert np.array_equal(first[0, 0, : size[1], : size[0]], samples[0].image[..., ::-1])
    assert np.array_equal(first[0, 1], first[1, 0])  # what is after in one pair is before in the next


def test_time_between_samples() -> None:
    scorer = RaftScorer(RaftConfig(), KnownShift(8, 0))
    slow, quick = scorer.pairs([taken(0, 0.0), taken(1, 1.0), taken(2, 1.25)])
    assert (slow.motion, quick.motion) == (pytest.approx(4 / HEIGHT), pytest.approx(16 / HEIGHT))


def test_the_same_picture_does_not_move() -> None:
    scorer = RaftScorer(RaftConfig(), KnownShift(8, 0))
    assert list(scorer.pairs([taken(0, 0.0), taken(0, 0.5)])) == [STILL]
    assert list(scorer.pairs([taken(0, 0.0)])) == []


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the published format: a bare state dict."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft_small_C_T_V2-01064c6d.pth"
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


def test_a_published_file(weights: Path) -> None:
    """The flow is that of torchvision's own model on its own preprocessing."""
    config = RaftConfig(size="small", weights=weights, iterations=2)
    picture = surface(2.0)
    before, after = view(picture, 0, 0)[:128, :136], view(picture, 4, 0)[:128, :136]
    found = Raft(config)(np.stack([before, after])[np.newaxis])
    model = raft_small(weights=None).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    first, second = (torch.from_numpy(one.copy()).permute(2, 0, 1)[None] / 255 * 2 - 1 for one in (before, after))
    with torch.inference_mode():
        expected = model(first, second, num_flow_updates=2)[-1][0].permute(1, 2, 0).numpy()
    assert found.shape == (1, 128, 136, 2)
    assert found[0] == pytest.approx(expected, abs=1e-3)
    assert np.abs(expected).max() > 0.01


def test_a_clip_through_the_network(weights: Path) -> None:
    config = RaftConfig(size="small", weights=weights, iterations=1)
    samples = [taken(index, index * 0.5, (60, 40)) for index in range(2)]
    runs = [list(RaftScorer(config, Raft(config)).pairs(samples)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(math.isfinite(value) for pair in runs[0] for value in vars(pair).values())


def test_columns_are_those_of_the_scan(weights: Path) -> None:
    scorer = RaftScorer(RaftConfig(size="small", weights=weights, iterations=1))
    columns = checked_columns(MOTION, scorer.score([taken(index, index * 0.5, (60, 40)) for index in range(2)]))
    assert set(columns) | set(OWN_COMMON) == {*MOTION.names, "seconds"}
    assert None not in columns.values()
    assert set(checked_columns(MOTION, scorer.score([taken(0, 0.0, (60, 40))])).values()) == {None}


def test_the_id_names_the_weights(weights: Path, tmp_path: Path) -> None:
    config = RaftConfig(size="small", weights=weights)
    copied = tmp_path / "elsewhere.pth"
    copied.write_bytes(weights.read_bytes())
    assert config.identity() == RaftConfig(size="small", weights=copied, pairs_at_once=1).identity()
    assert config.identity() != RaftConfig(size="small", weights=weights, iterations=3).identity()
    copied.write_bytes(weights.read_bytes() + b"more")
    assert config.identity() != RaftConfig(size="small", weights=copied).identity()


def test_without_weights(tmp_path: Path) -> None:
    for config in (RaftConfig(), RaftConfig(weights=tmp_path / "none.pth")):
        for use in (Raft, RaftConfig.identity):
            with pytest.raises(
                ConfigError, match=r"raft_large.*raft_large_C_T_SKHT_V2-ff5fadd5\.pth.*--set weights=PATH"
            ):
                use(config)


def test_the_files_that_are_named_are_those_of_torchvision() -> None:
    for name, weights in (("large", Raft_Large_Weights.C_T_SKHT_V2), ("small", Raft_Small_Weights.C_T_V2)):
        assert PUBLISHED[name].startswith(weights.url.rpartition("/")[2])
        assert f"{type(weights).__name__}.{weights.name}.url" in PUBLISHED[name]


def test_files_that_are_not_the_weights(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no state dict of torchvision's raft_large"):
        Raft(RaftConfig(size="large", weights=weights))
    other = tmp_path / "other.pth"
    other.write_bytes(b"not a pickle")
    with pytest.raises(ConfigError, match="no state dict"):
        Raft(RaftConfig(size="small", weights=other))
    torch.save({"code": Path("an object that no state dict has")}, other)
    with pytest.raises(ConfigError, match="no state dict"):
        Raft(RaftConfig(size="small", weights=other))
