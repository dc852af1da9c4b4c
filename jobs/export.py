"""Export: a trained model as folders that other programs load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jobs.models import load_models
from model.export import export_composite, export_language_model, export_vision_tokenizer
from schemas.catalog import Lake
from schemas.errors import ConfigError

Form = Literal["llama", "transformers", "official"]


def form_named(name: str) -> Form:
    """A name -> the form. Raises: ConfigError if there is no such form."""
    for form in get_args(Form):
        if form == name:
            return form  # type: ignore[no-any-return]
    raise ConfigError(f"there is no form {name!r}; there are {', '.join(get_args(Form))}")


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and the folders that were written."""

    checkpoint_id: str
    tokenizer_id: str
    form: Form
    folders: tuple[str, ...]


def export(lake: Lake, checkpoint: str, folder: Path, form: Form) -> ExportReport:
    """A language model checkpoint, with its vision tokenizer where the form has room for it -> folders.

    `llama`: the language model alone, as vLLM serves it. `transformers`: both networks in one folder. `official`: one
    folder for each, as published.

    Raises: ConfigError for an unknown checkpoint, a folder that holds something, or networks that the form cannot express.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty: give a folder that is not, or remove it")
    models = load_models(lake, checkpoint)
    folders = [folder]
    if form == "llama":
        export_language_model(folder, models.lm, "llama")
    elif form == "transformers":
        export_composite(folder, models.lm, models.vision)
    else:
        folders = [folder / "language_model", folder / "vision_tokenizer"]
        export_language_model(folders[0], models.lm, "official")
        export_vision_tokenizer(folders[1], models.vision, "official")
    names = tuple(str(path.absolute()) for path in folders)
    return ExportReport(str(models.checkpoint["checkpoint_id"]), models.tokenizer_id, form, names)
