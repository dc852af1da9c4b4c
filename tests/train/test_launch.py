import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.weights import digest, load_language_model
from schemas.errors import ConfigError, OutbackError
from tests.train.small_data import VOCABULARY, frame_data, pretrain_config, sequence_data, tokenizer_config
from tests.train.small_runs import Killed, run
from train.checkpoint import latest
from train.launch import run_training, training_identity
from train.loop import run_loop
from train.pretrain import PretrainObjective, pretrain
from train.progress import Progress, ProgressLog, follow, read_losses
from train.vision_tokenizer import train_vision_tokenizer


@pytest.fixture(scope="module")
def cluster(ray_apart: None) -> None:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_ends_with_the_same_bits(cluster: None, tmp_path: Path) -> None:
    config, data = pretrain_config(model={"dropout": 0.2}), sequence_data(tmp_path)
    whole = run(PretrainObjective(config, data), tmp_path / "whole")
    objective = Killed(config, data, after=5, mark=tmp_path / "killed")
    seen: list[Progress] = []
    identity = training_identity("pretrain", config, "data", "sha")
    result = run_training(objective, identity, tmp_path / "parts", seen.append)
    assert (tmp_path / "killed").exists()
    parts = load_file(result.folder / "model.safetensors")
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key
    assert (result.step, result.resumed_from_step) == (8, 0)
    assert result.checkpoint_digest == digest(tmp_path / "whole" / "weights")
    assert result.losses == json.loads((tmp_path / "whole" / "result.json").read_text())["losses"]
    assert [progress.step for progress in seen][-1] == 8
    assert {progress.steps for progress in seen} == {8}
    loaded = load_language_model(result.folder)
    assert loaded.vocabulary == VOCABULARY


@pytest.mark.slow
def test_the_vision_tokenizer_trains_on_the_cluster(cluster: None, tmp_path: Path) -> None:
    result = train_vision_tokenizer(tokenizer_config(steps=4), frame_data(tmp_path), tmp_path / "run")
    assert result.checkpoint_digest == digest(result.folder)
    assert [line["step"] for line in result.losses] == [2, 4]
    figures = {"loss", "pixels", "commitment", "psnr", "codes_used", "grad_norm", "learning_rate"}
    assert set(result.losses[0]) == {"step", *figures}


@pytest.mark.slow
def test_a_worker_that_keeps_failing_fails_the_training_with_its_own_error(cluster: None, tmp_path: Path) -> None:
    config = pretrain_config(optim={"learning_rate": 1e30}, execution={"max_failures": 0})
    with pytest.raises(ConfigError, match=r"lower optim\.learning_rate"):
        pretrain(config, sequence_data(tmp_path), tmp_path / "run")


def test_more_cpus_than_the_cluster_has_are_refused(cluster: None, tmp_path: Path) -> None:
    config = pretrain_config(execution={"num_workers": 2, "num_threads": 2})
    with pytest.raises(ConfigError, match=r"found 2 CPUs .* expected at least 4"):
        pretrain(config, sequence_data(tmp_path), tmp_path / "run")


def test_a_finished_training_is_returned_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = pretrain_config(), sequence_data(tmp_path)
    identity = training_identity("pretrain", config, data.data_id, data.sha256)
    storage = tmp_path / "run"

    with monkeypatch.context() as patch:
        patch.setattr("train.launch._fit", lambda *_: run_loop(PretrainObjective(config, data), identity, storage))
        patch.setattr("train.launch._ray", _no_ray)
        first = pretrain(config, data, storage)
    monkeypatch.setattr("train.launch._ray", _refuse)
    # How a training is executed is no part of what it is.
    again = pretrain(pretrain_config(execution={"num_workers": 2, "log_every": 1}), data, storage)
    assert (again.folder, again.checkpoint_digest, again.losses) == (
        first.folder,
        first.checkpoint_digest,
        first.losses,
    )
    assert (first.resumed_from_step, again.resumed_from_step) == (0, 8)


def test_a_folder_of_another_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.launch._fit", lambda *_: None)
    monkeypatch.setattr("train.launch._ray", _no_ray)
    data, other = sequence_data(tmp_path), sequence_data(tmp_path, seed=1)
    with pytest.raises(FileNotFoundError):  # nothing was trained
        pretrain(pretrain_config(), data, tmp_path / "run")
    monkeypatch.setattr("train.launch._ray", _refuse)
    with pytest.raises(ConfigError, match=r"data_id 'set-0', expected 'set-1', data_sha256"):
        pretrain(pretrain_config(), other, tmp_path / "run")
    with pytest.raises(ConfigError, match="config_hash"):
        pretrain(pretrain_config(seed=1), data, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_loses_nothing_but_time(tmp_path: Path) -> None:
    script = "import sys; from tests.train.test_launch import train_in; train_in(*sys.argv[1:])"
    commands = {name: [sys.executable, "-c", script, str(tmp_path), name] for name in ("whole", "parts")}
    checkout = Path(__file__).parents[2]
    sequence_data(tmp_path)

    driver = subprocess.Popen(commands["parts"], cwd=checkout, start_new_session=True)
    checkpoints = tmp_path / "parts" / "checkpoints"
    while driver.poll() is None and latest(checkpoints) is None:
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    stopped_at = latest(checkpoints)
    assert stopped_at is not None
    for name, command in commands.items():
        finished = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert finished.returncode == 0, (name, finished.stderr)
    # Workers go on for the moments that Ray takes to notice.
    assert int((tmp_path / "parts.resumed").read_text()) >= stopped_at[0]
    assert int((tmp_path / "whole.resumed").read_text()) == 0
    whole, parts = (load_file(tmp_path / name / "weights" / "model.safetensors") for name in ("whole", "parts"))
    for key, value in whole.items():
        assert torch.equal(value, parts[key]), key


def train_in(folder: str, name: str) -> None:
    """Trains in a process of its own, and notes the step that it went on from."""
    config, data = pretrain_config(steps=400, execution={"checkpoint_every": 20}), sequence_data(Path(folder))
    identity = training_identity("pretrain", config, "data", "sha")
    result = run_training(PretrainObjective(config, data), identity, Path(folder) / name, None)
    (Path(folder) / f"{name}.resumed").write_text(str(result.resumed_from_step))


def _no_ray(*_: object) -> object:
    import contextlib

    return contextlib.nullcontext()


def _refuse(*_: object) -> object:
    raise OutbackError("Ray was started")


def test_a_resumed_log_drops_what_was_lost(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    log = ProgressLog(path, 10, 0)
    for step in (2, 4, 6):
        log.write(step, {"loss": 1.0 / step}, 0.1, {})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    again = ProgressLog(path, 10, 4)
    again.write(6, {"loss": 0.5}, 0.1, {"tokens_per_s": 9.0})
    assert read_losses(path) == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 0.5}]


def test_progress_is_passed_on_while_the_work_runs(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    seen: list[Progress] = []
    ProgressLog(path, 4, 0).write(1, {"loss": 9.0}, 0.1, {})  # of an earlier attempt
    with follow(path, seen.append):
        log = ProgressLog(path, 4, 1)
        log.write(2, {"loss": 2.0}, 0.5, {"tokens_per_s": 7.0})
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            time.sleep(0.05)
        assert seen == [Progress(2, 4, 2.0, 0.5, {"tokens_per_s": 7.0})]
        log.write(4, {"loss": 1.0}, 0.9, {})
    assert seen[1:] == [Progress(4, 4, 1.0, 0.9, {})]


def test_a_training_on_gpus_that_no_node_has_does_not_wait_for_them(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found 0 GPUs"):
        pretrain(pretrain_config(execution={"use_gpu": True}), sequence_data(tmp_path), tmp_path / "training")
