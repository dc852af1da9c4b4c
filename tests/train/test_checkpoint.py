import dataclasses
import errno
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from schemas.errors import ConfigError
from train.checkpoint import CheckpointWriter, TrainingIdentity, latest, restore_latest
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


def _save(folder: Path, step: int, keep_every: int | None = None) -> None:
    writer = CheckpointWriter(folder, IDENTITY, keep_last=2, keep_every=keep_every)
    model, optimizer = _network(step)
    writer.save(step, model, optimizer, {})
    writer.wait()


def test_a_restored_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, optimizer = _network(0)
    extra = {"uses": torch.tensor([3, 1, 4])}
    for seed in range(3):
        _step(model, optimizer, seed)
    writer = CheckpointWriter(tmp_path, IDENTITY, keep_last=2)
    writer.save(3, model, optimizer, extra)
    _step(model, optimizer, 3)  # while it is being written
    extra["uses"].zero_()
    writer.wait()
    other, other_optimizer = _network(99)
    other_extra: dict[str, Tensor] = {"uses": torch.zeros(3, dtype=torch.int64)}
    assert restore_latest(tmp_path, other, other_optimizer, other_extra, IDENTITY) == 3
    assert other_extra["uses"].tolist() == [3, 1, 4]
    _step(other, other_optimizer, 3)
    for seed in range(4, 6):
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


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        _save(tmp_path, step, keep_every=10)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [10, 20, 25, 30]


def test_a_checkpoint_has_its_name_when_all_of_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Any:
        written.set()
        assert go_on.wait(60)
        return finish(*arguments, **options)

    finish = FileSystemWriter.finish
    monkeypatch.setattr(FileSystemWriter, "finish", slowly)
    writer = CheckpointWriter(tmp_path, IDENTITY, keep_last=2)
    model, optimizer = _network(0)
    writer.save(5, model, optimizer, {})
    assert written.wait(60)
    writer.publish()
    assert latest(tmp_path) is None
    go_on.set()
    writer.wait()
    assert latest(tmp_path) == (5, tmp_path / "step_00000005")


def test_a_full_disk_is_an_error_and_the_older_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    _save(tmp_path, 5)
    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    writer = CheckpointWriter(tmp_path, IDENTITY, keep_last=1)
    model, optimizer = _network(0)
    writer.save(10, model, optimizer, {})
    with pytest.raises(BaseException, match="No space left"):
        writer.wait()
    assert latest(tmp_path) == (5, tmp_path / "step_00000005")
    monkeypatch.undo()
    assert restore_latest(tmp_path, model, optimizer, {}, IDENTITY) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]


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
