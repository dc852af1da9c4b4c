"""Export: a language model, finished or still being trained, as folders that other programs load."""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jobs.checkpoints import LANGUAGE_OBJECTIVES, checkpoint_row
from jobs.models import Models, models_of
from jobs.train import ID_DIGITS
from jobs.trainings import Training, export_step, find_training
from model.export import export_composite, export_language_model, export_vision_tokenizer
from model.weights import digest, write_folder
from schemas.catalog import Lake
from schemas.errors import ConfigError
from train.adapter import ADAPTER_FOLDER

Form = Literal["llama", "transformers", "official", "adapter", "outback"]
LANGUAGE_FOLDER, VISION_FOLDER = "language_model", "vision_tokenizer"  # of the form `official`


def form_named(name: str) -> Form:
    """A name -> the form. Raises: ConfigError if there is no such form."""
    for form in get_args(Form):
        if form == name:
            return form  # type: ignore[no-any-return]
    raise ConfigError(f"there is no form {name!r}; there are {', '.join(get_args(Form))}")


@dataclass(frozen=True)
class ExportReport:
    """What was exported, after how many steps of its training, and the folders that were written. The id is of the weights, so
    that each step of a training has its own. An adapter has no vision tokenizer.
    """

    checkpoint_id: str
    tokenizer_id: str | None
    form: Form
    folders: tuple[str, ...]
    step: int


def export(lake: Lake, name: str, folder: Path, form: Form, step: int | None = None) -> ExportReport:
    """A language model checkpoint, or a training that is not finished, with its vision tokenizer where the form has room for
    it -> folders, whole or not there.

    `llama`: the language model alone, as vLLM serves it. `transformers`: both networks in one folder. `official`: one
    folder for each, as published. `adapter`: what was trained beside frozen weights, as PEFT loads it onto the `llama` of
    what its training began with. `outback`: our own, which trainings begin with. Of a training its checkpoint of this step is
    taken, or what it has come to; it goes on meanwhile.

    Raises: ConfigError for an unknown checkpoint, training or step, a folder that holds something, or networks that the form
        cannot express.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty: give a folder that is not, or remove it")
    training = find_training(lake, name)
    if training is None and step is not None:
        raise ConfigError(f"found step {step} of {name!r}, expected a training: `outback show runs` has their ids")
    if training is None or (training.checkpoint is not None and step in (None, training.steps)):
        row = checkpoint_row(lake, training.checkpoint or "" if training else name, *LANGUAGE_OBJECTIVES)
        return _write(lake, row, folder, form)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as draft:
        return _write(lake, _row_of_step(lake, training, step, Path(draft) / "weights"), folder, form)


def _row_of_step(lake: Lake, training: Training, step: int | None, weights: Path) -> dict[str, Any]:
    """What stands for a step of a training as the row of a checkpoint stands for its end, with the weights in this folder."""

    def say(pruned: int) -> None:
        print(
            f"export: the checkpoint of step {pruned} was removed by its training, taking a newer one", file=sys.stderr
        )

    found = export_step(lake, training, step, weights, say)
    checkpoint_id = digest(weights)[:ID_DIGITS]
    return {"checkpoint_id": checkpoint_id, "data_id": training.data_id, "step": found, "uri": str(weights)}


def _write(lake: Lake, row: Mapping[str, Any], folder: Path, form: Form) -> ExportReport:
    if form == "adapter":
        return _write_adapter(row, folder)
    models, folders = models_of(lake, row), [folder]
    if form == "outback":
        write_folder(folder, lambda draft: _copy(Path(str(row["uri"])), draft))
    elif form == "llama":
        export_language_model(folder, models.lm, "llama")
    elif form == "transformers":
        export_composite(folder, models.lm, models.vision)
    else:
        write_folder(folder, lambda draft: _write_official(models, draft))
        folders = [folder / LANGUAGE_FOLDER, folder / VISION_FOLDER]
    names = tuple(str(path.absolute()) for path in folders)
    return ExportReport(str(row["checkpoint_id"]), models.tokenizer_id, form, names, int(row["step"]))


def _write_adapter(row: Mapping[str, Any], folder: Path) -> ExportReport:
    source, checkpoint_id = Path(str(row["uri"])) / ADAPTER_FOLDER, str(row["checkpoint_id"])
    if not source.is_dir():
        raise ConfigError(
            f"checkpoint {checkpoint_id} was trained whole, found no {source}: export it in another form, or one whose "
            "recipe has a section adapter"
        )
    write_folder(folder, lambda draft: _copy(source, draft))
    return ExportReport(checkpoint_id, None, "adapter", (str(folder.absolute()),), int(row["step"]))


def _write_official(models: Models, folder: Path) -> None:
    export_language_model(folder / LANGUAGE_FOLDER, models.lm, "official")
    export_vision_tokenizer(folder / VISION_FOLDER, models.vision, "official")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
