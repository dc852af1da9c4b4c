import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from model.transformer import Transformer, TransformerConfig
from schemas.errors import ConfigError
from tests.train.small_data import ALONE, pretrain_config, sequence_data
from tests.train.small_runs import run
from train.checkpoint import CheckpointWriter
from train.loggers import open_loggers
from train.meter import Meter, Work, transformer_flops
from train.pretrain import PretrainObjective, pretrain
from train.progress import read_losses

WRITTEN: list[tuple[int, dict[str, float]]] = []


class _Hook:
    def write(self, step: int, figures: Mapping[str, float]) -> None:
        WRITTEN.append((step, dict(figures)))

    def close(self) -> None:
        WRITTEN.append((-1, {}))


def hook(folder: Path, resumed_from_step: int) -> _Hook:
    WRITTEN.append((resumed_from_step, {}))
    return _Hook()


def test_operations_are_those_that_torch_counts() -> None:
    config = TransformerConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8
    )
    model = Transformer(config)
    lengths = np.array([16, 48, 7])
    projections = attention = 0.0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            model(torch.randint(0, 96, (1, int(length)))).sum().backward()
        counts: Mapping[Any, int] = counter.get_flop_counts()["Global"]
        assert {str(operator) for operator in counts} == {"aten.mm", "aten.bmm"}
        projections += counts[torch.ops.aten.mm]
        attention += counts[torch.ops.aten.bmm]
    # Torch counts the whole square of attention; half of it is what a causal one needs.
    assert transformer_flops(config, lengths) == pytest.approx(projections + attention / 2)


def test_curves_reach_tensorboard_and_hooks(tmp_path: Path) -> None:
    WRITTEN.clear()
    config = pretrain_config(
        execution={"loggers": ("tensorboard", "tests.train.test_journal:hook"), "peak_tflops": 1.0, "log_every": 2}
    )
    run(PretrainObjective(config, sequence_data(tmp_path)), tmp_path / "run")
    lines = read_losses(tmp_path / "run" / "progress.jsonl")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines
    ]
    expected = {"loss", "text", "vision", "grad_norm", "learning_rate", "tokens_per_s", "memory_mib", "checkpoint_wait"}
    assert expected | {"tflops_per_worker", "mfu", *(f"quarter_{n}" for n in range(1, 5))} == set(
        events.Tags()["scalars"]
    )
    assert [step for step, _ in WRITTEN] == [0, 2, 4, 6, 8, -1]
    assert all(figures["mfu"] == figures["tflops_per_worker"] > 0 for step, figures in WRITTEN if step > 0)
    assert not any("tokens_per_s" in line for line in lines)  # equal trainings have equal lists


def test_the_share_of_time_that_checkpoints_take_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITTEN.clear()
    execution = {"loggers": ("tests.train.test_journal:hook",), "log_every": 2, "checkpoint_every": 3}
    save = CheckpointWriter.save

    def slow(*given: Any) -> None:
        time.sleep(0.5)
        save(*given)

    monkeypatch.setattr(CheckpointWriter, "save", slow)
    run(PretrainObjective(pretrain_config(execution=execution), sequence_data(tmp_path)), tmp_path / "run")
    shares = {step: figures.get("checkpoint_wait") for step, figures in WRITTEN if step > 0}
    assert {step for step, share in shares.items() if share} == {4, 8}  # after 3 and 6 steps
    assert all(0.5 < share < 1.0 for share in shares.values() if share)


@pytest.mark.parametrize("name", ["wandb", "no_such_module:open", "tests.train.test_journal:nothing"])
def test_a_logger_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 'tensorboard' or 'module:function'"):
        open_loggers([name], tmp_path, 0)


def test_a_pause_is_no_part_of_the_speed() -> None:
    meter = Meter(1, torch.device("cpu"), None)
    meter.add(Work(100, "tokens"))
    with meter.paused():
        time.sleep(0.5)
    assert meter.read()["tokens_per_s"] > 1000
    meter.reset()
    meter.add(Work(100, "tokens"))
    time.sleep(0.5)
    assert meter.read()["tokens_per_s"] < 1000


def test_what_is_held_out_is_evaluated_as_if_it_were_trained_on(tmp_path: Path) -> None:
    data, held_out = sequence_data(tmp_path), sequence_data(tmp_path, num_rows=5, seed=3, items="held ")
    config = pretrain_config(
        model={"dropout": 0.3}, execution={"evaluate_every": 3, "log_every": 4, "rows_at_once": 2, "held_out_rows": 4}
    )
    objective = PretrainObjective(config, data, held_out=held_out)
    run(objective, tmp_path / "run")
    lines = {int(line["step"]): line for line in read_losses(tmp_path / "run" / "progress.jsonl")}
    assert sorted(lines) == [3, 4, 6, 8]
    assert [step for step, line in lines.items() if "held_out_loss" in line] == [3, 6, 8]
    # The same rows through the finished network, dropout off, as a training on them would see them.
    finished = PretrainObjective(config, held_out, tmp_path / "run" / "weights")
    terms = finished.loss(finished.build_model(ALONE).eval(), np.arange(4), 0, ALONE, {})
    for name, term in terms.items():
        assert lines[8][f"held_out_{name}"] == pytest.approx(float(term.mean.detach()), rel=1e-5), name
    # It is evaluated, not learnt.
    run(PretrainObjective(config, data), tmp_path / "without")
    assert (tmp_path / "run" / "weights" / "model.safetensors").read_bytes() == (
        tmp_path / "without" / "weights" / "model.safetensors"
    ).read_bytes()


def test_learning_from_what_is_held_out_is_refused(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    with pytest.raises(ConfigError, match="documents in both set-0 and the held-out set-1"):
        pretrain(pretrain_config(), data, tmp_path / "run", held_out=sequence_data(tmp_path, seed=1))
