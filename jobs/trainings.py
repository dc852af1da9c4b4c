"""Language model trainings of the lake by id, finished or not, and the networks of those that are not."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from jobs.checkpoints import LANGUAGE_OBJECTIVES, language_data
from jobs.pack import text_tokenizer_from_json
from jobs.train import TrainRecipe, training_folder
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError
from schemas.runs import RUNS
from schemas.vocabulary import Vocabulary
from train.batches import SequenceData
from train.language import Start
from train.loop import Objective, TrainingFolder
from train.mesh import LayoutConfig, Mesh
from train.preference import DpoObjective
from train.pretrain import PretrainObjective
from train.snapshot import read_weights


@dataclass(frozen=True)
class Training:
    """A language model's training. `start` is the folder of the weights that it began with; `checkpoint` is the id of what came
    out, None until it is finished.
    """

    training_id: str
    recipe: TrainRecipe
    data_id: str
    start: Path | None
    folder: TrainingFolder
    checkpoint: str | None

    @property
    def steps(self) -> int:
        """How many it takes."""
        config = self.recipe.pretrain or self.recipe.dpo
        assert config is not None
        return config.steps


def find_training(lake: Lake, name: str) -> Training | None:
    """A training's id, the beginning of one, or the id of its checkpoint -> the training; None if nothing is named so.

    Raises: ConfigError if several are.
    """
    finished = {
        row["training_id"]: str(row["checkpoint_id"])
        for row in lake.read(CHECKPOINTS, ["checkpoint_id", "objective", "training_id"]).to_pylist()
        if row["objective"] in LANGUAGE_OBJECTIVES
    }
    found: dict[str, Training] = {}
    for row in lake.read_where(RUNS, "job", ["train"]).sort_by("written_at").to_pylist():
        inputs, recipe = json.loads(row["inputs"]), json.loads(row["recipe"])
        training_id = str(inputs.get("training_id", ""))
        checkpoint = finished.get(training_id)
        is_named = training_id.startswith(name) or (checkpoint or "").startswith(name)
        if is_named and recipe["objective"] in LANGUAGE_OBJECTIVES:
            found[training_id] = Training(
                training_id,
                TrainRecipe.model_validate(recipe),
                inputs["data_id"],
                Path(inputs["start"]) if inputs.get("start") else None,
                TrainingFolder(training_folder(lake, training_id)),
                checkpoint,
            )
    if len(found) > 1:
        raise ConfigError(f"{name!r} names {len(found)} trainings: {', '.join(sorted(found))}")
    return next(iter(found.values()), None)


def export_step(
    lake: Lake, training: Training, step: int | None, folder: Path, on_pruned: Callable[[int], None]
) -> int:
    """Write the weights after `step` steps, or the newest there are, as a folder of ours; the step.

    Raises: ConfigError if there is no such checkpoint, or its network cannot be made here.
    """
    objective = _objective(lake, training)
    model = _empty_network(objective)
    found = read_weights(training.folder.checkpoints, model, step, on_pruned)
    objective.export(model.eval(), folder)
    return found


def _empty_network(objective: Objective) -> nn.Module:
    import torch

    return objective.build_model(Mesh(LayoutConfig(), torch.device("cpu")))


def _objective(lake: Lake, training: Training) -> Objective:
    """The training's objective as far as networks are concerned: it has no rows."""
    read: dict[str, Any] | None = language_data(lake, training.data_id)
    if read is None:
        raise ConfigError(f"training {training.training_id} reads {training.data_id}, which is not here")
    data = SequenceData(
        path=Path(),
        data_id=training.data_id,
        sha256="",
        vocabulary=Vocabulary.from_json(read["vocabulary"]),
        text=text_tokenizer_from_json(read["text_tokenizer"]),
        context_len=1,
    )
    if training.recipe.pretrain is not None:
        return PretrainObjective(training.recipe.pretrain, data, training.start)
    assert training.recipe.dpo is not None
    if training.start is None:
        raise ConfigError(
            f"nothing is written down of what training {training.training_id} began with: give its command once more, "
            "which goes on and writes it down"
        )
    return DpoObjective(training.recipe.dpo, data, Start(training.start, ""), training.folder.path)
