import dataclasses
import json
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from schemas.document import TextDocument, VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError, OutbackError
from tests.train.small_data import (
    DISCRIMINATOR,
    VOCABULARY,
    dpo_config,
    frame_data,
    pair_data,
    pretrain_config,
    sequence_data,
    start_weights,
    text_tokenizer,
    tokenizer_config,
)
from tests.train.small_runs import run, workers
from train.batches import batch_indices, write_sequence_file
from train.checkpoint import latest
from train.launch import training_identity
from train.loop import Objective, TrainingFolder, return_freed_memory, run_loop
from train.losses import Term
from train.mesh import Mesh
from train.preference import DpoObjective
from train.pretrain import PretrainObjective
from train.progress import read_losses
from train.vision_tokenizer import TokenizerObjective

# The discriminator begins between two checkpoints; its weights, its optimizer and the average have to be in the second.
JUDGING = {"learning_rate": 0.001, "betas": [0.5, 0.9], "weight_decay": 0.0, "eps": 1e-4}
ADVERSARIAL: dict[str, Any] = {
    "adversarial": {**DISCRIMINATOR, "weight": 1.0, "start_step": 4, "optim": JUDGING},
    "ema_decay": 0.5,
}


@dataclass(frozen=True)
class Interrupted:
    """An objective that fails once it has done some steps."""

    inner: Objective
    after: int

    def __getattr__(self, name: str) -> object:
        return getattr(object.__getattribute__(self, "inner"), name)

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        self.inner.finish_step(model, step, device, state)
        if step + 1 == self.after:
            raise KeyboardInterrupt


def _objectives(folder: Path) -> dict[str, Objective]:
    return {
        "pretrain": PretrainObjective(pretrain_config(model={"dropout": 0.2}), sequence_data(folder)),
        "muon": PretrainObjective(
            pretrain_config(optim={"learning_rate": 0.01, "matrices": "muon"}), sequence_data(folder)
        ),
        "vision_tokenizer": TokenizerObjective(tokenizer_config(free_steps=2), frame_data(folder)),
        "adversarial": TokenizerObjective(tokenizer_config(**ADVERSARIAL), frame_data(folder)),
    }


@pytest.mark.parametrize("name", ["pretrain", "muon", "vision_tokenizer", "adversarial"])
@pytest.mark.parametrize("after", [2, 7])  # before and after the first checkpoints, which are at 3 and 6
def test_an_interrupted_training_ends_with_the_same_bits(tmp_path: Path, name: str, after: int) -> None:
    objective = _objectives(tmp_path)[name]
    whole = run(objective, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(objective, after), tmp_path / "parts")
    newest = latest(tmp_path / "parts" / "checkpoints")
    assert (newest[0] if newest else 0) == (6 if after == 7 else 0)
    parts = run(objective, tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    first, second = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "parts"))
    assert first == second
    assert [line["step"] for line in first["losses"]] == [2, 4, 6, 8]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    first = run(PretrainObjective(pretrain_config(), data), tmp_path / "first")
    second = run(PretrainObjective(pretrain_config(seed=1), data), tmp_path / "second")
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


@pytest.mark.parametrize("name", ["pretrain", "vision_tokenizer"])
def test_it_learns(tmp_path: Path, name: str) -> None:
    objective = {
        "pretrain": PretrainObjective(pretrain_config(steps=60), sequence_data(tmp_path)),
        "vision_tokenizer": TokenizerObjective(tokenizer_config(steps=60), frame_data(tmp_path)),
    }[name]
    run(objective, tmp_path / "run")
    losses = [line["loss"] for line in read_losses(tmp_path / "run" / "progress.jsonl")]
    assert losses[-1] < 0.75 * losses[0]


def test_a_diverging_training_says_so(tmp_path: Path) -> None:
    config = pretrain_config(optim={"learning_rate": 1e30})
    with pytest.raises(ConfigError, match="learning_rate"):
        run(PretrainObjective(config, sequence_data(tmp_path)), tmp_path / "run")


def test_threads_that_another_library_holds_are_no_exact_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(OutbackError, match="found 2 threads in this process after setting 1"):
        run(PretrainObjective(pretrain_config(), sequence_data(tmp_path)), tmp_path / "run")


def test_other_data_is_refused(tmp_path: Path) -> None:
    objective = PretrainObjective(pretrain_config(), sequence_data(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(objective, 7), tmp_path / "run")
    other = training_identity("test", objective.config, "data", "other sha")
    with pytest.raises(ConfigError, match="data_sha256 'sha', expected 'other sha'"):
        run_loop(objective, other, tmp_path / "run")


def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loop.LOCK_WAIT_S", 0.3)
    objective = PretrainObjective(pretrain_config(), sequence_data(tmp_path))

    @dataclass(frozen=True)
    class Nested(Interrupted):
        def start(self, model: nn.Module, mesh: Mesh) -> None:
            run(objective, tmp_path / "run")

    with pytest.raises(ConfigError, match="another process trains"):
        run(Nested(objective, 1), tmp_path / "run")
    run(objective, tmp_path / "run")  # the first writer let go of the folder when it failed


def test_a_step_whose_rows_hold_nothing_that_weighs_changes_nothing(tmp_path: Path) -> None:
    texts, pictures = (
        write_document(document, VOCABULARY, text_tokenizer())
        for document in (
            TextDocument("red"),
            VisionDocument(VisionBlock("image", np.zeros((1, 2, 3), np.int64)), "red"),
        )
    )
    rows = [texts] * 6 + [pictures] * 2
    segments = [[{"kind": "text", "item_id": "a", "offset": 0, "length": len(row)}] for row in rows]
    write_sequence_file(tmp_path / "rows.arrow", rows, segments)
    data = dataclasses.replace(sequence_data(tmp_path), path=tmp_path / "rows.arrow")
    only_vision = {"text_weight": 0.0, "structure_weight": 0.0, "execution": {"log_every": 1}}
    objective = PretrainObjective(pretrain_config(batch_size=1, steps=8, **only_vision), data)
    trained = run(objective, tmp_path / "run")
    losses = read_losses(tmp_path / "run" / "progress.jsonl")
    seen = [int(batch_indices(0, step, 1, 8)[0]) for step in range(8)]
    assert [line["step"] for line in losses] == [step + 1 for step in range(8) if seen[step] >= 6]  # the two pictures
    assert all(bool(torch.isfinite(value).all()) for value in trained.values())
    write_sequence_file(tmp_path / "texts.arrow", rows[:6], segments[:6])
    texts_only = dataclasses.replace(data, path=tmp_path / "texts.arrow")
    start = TrainingFolder(tmp_path / "run").weights
    unchanged = run(PretrainObjective(objective.config, texts_only, start), tmp_path / "unchanged")
    assert all(torch.equal(unchanged[key], value) for key, value in trained.items())


def test_rows_in_groups_take_the_steps_of_all_together(tmp_path: Path) -> None:
    data = sequence_data(tmp_path)
    optim = {"learning_rate": 0.01, "warmup_steps": 2, "eps": 1e-5}  # gradients that are only rounding stay small
    one, groups = (
        run(
            PretrainObjective(pretrain_config(batch_size=5, optim=optim, execution=execution), data),
            tmp_path / f"run-{name}",
        )
        for name, execution in {"one": {}, "groups": {"rows_at_once": 2}}.items()
    )
    for key, value in one.items():
        assert float((groups[key] - value).abs().max()) <= 1e-5, key
    losses = [read_losses(tmp_path / f"run-{name}" / "progress.jsonl") for name in ("one", "groups")]
    for mine, theirs in zip(*losses, strict=True):
        for figure in ("loss", "text", "vision", "grad_norm"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-5), figure


def _train_all(rank: int, folder: Path) -> None:
    for name, objective in _two_worker_objectives(folder, num_workers=2).items():
        run(objective, folder / f"two-{name}")


def _two_worker_objectives(folder: Path, num_workers: int) -> dict[str, Objective]:
    execution = {"num_workers": num_workers}
    data = folder / f"data-{num_workers}-{os.getpid()}"
    data.mkdir()
    return {
        # 5 rows over 2 workers: unequal shares, and unequal weights in them.
        "pretrain": PretrainObjective(pretrain_config(batch_size=5, execution=execution), sequence_data(data)),
        "vision_tokenizer": TokenizerObjective(tokenizer_config(batch_size=3, execution=execution), frame_data(data)),
        # The reference is worked out by both together, 10 pairs in threes.
        "dpo": DpoObjective(
            dpo_config(batch_size=5, execution=execution),
            pair_data(data),
            start_weights(data),
            folder / f"reference-{num_workers}",
        ),
        "adversarial": TokenizerObjective(
            tokenizer_config(batch_size=3, execution=execution, **ADVERSARIAL), frame_data(data)
        ),
    }


def test_two_workers_take_the_steps_of_one() -> None:
    # Not tmp_path: its name may be too long for the children's command line.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with workers(2, folder, _train_all):
            one = {name: run(made, folder / f"one-{name}") for name, made in _two_worker_objectives(folder, 1).items()}
        for name, weights in one.items():
            two = load_file(folder / f"two-{name}" / "weights" / "model.safetensors")
            for key, value in weights.items():
                worst = float((two[key] - value).abs().max())
                assert worst <= 1e-5, f"{name}: {key} differs by {worst}"
            losses = [read_losses(folder / f"{run}-{name}" / "progress.jsonl") for run in ("one", "two")]
            for mine, theirs in zip(*losses, strict=True):
                assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_terms_of_nothing_are_left_out() -> None:
    from train.mesh import LayoutConfig
    from train.parallelize import reduce_step

    model = nn.Linear(1, 1)
    model.weight.grad = torch.tensor([[6.0]])
    terms = {
        "loss": Term(torch.tensor(4.0), torch.tensor(2.0)),
        "vision": Term(torch.tensor(0.0), torch.tensor(0.0)),
    }
    assert reduce_step(model, terms, LayoutConfig()) == {"loss": 2.0}
    assert model.weight.grad.item() == 3.0


def _megabytes_left(queue: "multiprocessing.Queue[float]") -> None:
    """What is left of 240 MB after they were freed, with something small between them that was not."""
    return_freed_memory()
    del (before := [torch.ones(4_000_000)])[:]  # from then on glibc would keep blocks of 16 MB
    process = psutil.Process()
    began = process.memory_info().rss
    small, large = [], []
    for _ in range(20):
        large.append(torch.ones(3_000_000))
        small.append(torch.ones(1_000))
    assert process.memory_info().rss - began > 200e6
    large.clear()
    queue.put((process.memory_info().rss - began) / 1e6)
    assert not before
    assert len(small) == 20


def test_what_a_layer_frees_goes_back_to_the_system() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_megabytes_left, args=(queue,))
    child.start()
    assert queue.get(timeout=120) < 20
    child.join()
