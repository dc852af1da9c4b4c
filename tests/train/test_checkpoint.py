import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from schemas.errors import ConfigError
from train.checkpoint import TrainingIdentity, latest, restore_latest, save_checkpoint
from train.optim import OptimConfig, build_optimizers

IDENTITY = TrainingIdentity("pretrain", "options", "data", "sha")


def _network(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return model, build_optimizers(model, OptimConfig(learning_rate=0.1))


def _step(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], seed: int) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(inputs).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()


def _save(folder: Path, step: int, keep_last: int = 2) -> Path:
    model, optimizer = _network(step)
    return save_checkpoint(folder, step, model, optimizer, {}, IDENTITY, keep_last=keep_last)


def test_a_restored_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = _network(0)
    extra = {"uses": torch.tensor([3, 1, 4])}
    for seed in range(3):
        _step(model, optimizer, seed)
    save_checkpoint(tmp_path, 3, model, optimizer, extra, IDENTITY, keep_last=2)
    other, other_optimizer = _network(99)
    other_extra: dict[str, Tensor] = {"uses": torch.zeros(3, dtype=torch.int64)}
    assert restore_latest(tmp_path, other, other_optimizer, other_extra, IDENTITY) == 3
    assert other_extra["uses"].tolist() == [3, 1, 4]
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        _step(other, other_optimizer, seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_nothing_to_restore_is_step_zero(tmp_path: Path) -> None:
    model, optimizer = _network(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert latest(tmp_path / "none") is None
    assert restore_latest(tmp_path / "none", model, optimizer, {}, IDENTITY) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 9_999_999):
        _save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_09999999"]
    assert latest(tmp_path) == (9_999_999, tmp_path / "step_09999999")


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    # What a kill in the middle of a save leaves, and what a careless copy may leave.
    shutil.copytree(tmp_path / "step_00000005", tmp_path / ".step_00000010.draft")
    (tmp_path / "step_00000015").mkdir()
    assert latest(tmp_path) == (5, tmp_path / "step_00000005")
    _save(tmp_path, 10)
    assert latest(tmp_path) == (10, tmp_path / "step_00000010")


@pytest.mark.parametrize("field", ["objective", "config_hash", "data_id", "data_sha256"])
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, field: str) -> None:
    _save(tmp_path, 5)
    model, optimizer = _network(0)
    other = dataclasses.replace(IDENTITY, **{field: "other"})
    with pytest.raises(ConfigError, match=f"{field} .*expected 'other'"):
        restore_latest(tmp_path, model, optimizer, {}, other)
