"""Evaluate: the loss of a checkpoint on a sequence set, which may be one that it never learnt from."""

from dataclasses import dataclass

from pydantic import Field

from jobs.models import load_models
from jobs.pack import sequence_data
from jobs.run import recorded
from schemas.catalog import Lake
from schemas.recipe import Config
from train.evaluate import evaluate_language_model


class EvaluateRecipe(Config):
    """How much is looked at."""

    rows: int | None = Field(default=None, ge=1)
    """The first rows alone; None: all."""
    rows_at_once: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class EvaluateReport:
    """A checkpoint, a sequence set, and figures in nats a token (`train.evaluate`)."""

    checkpoint_id: str
    data_id: str
    figures: dict[str, float]


def evaluate(lake: Lake, checkpoint: str, data_name: str, recipe: EvaluateRecipe) -> EvaluateReport:
    """A checkpoint and the name of a sequence set -> its losses, which the run's row holds too.

    Raises: ConfigError if there is no such checkpoint or set, or the one cannot read the other.
    """
    models, data = load_models(lake, checkpoint), sequence_data(lake, data_name)
    checkpoint_id = str(models.checkpoint["checkpoint_id"])
    inputs = {"checkpoint": checkpoint_id, "data_id": data.data_id}
    with recorded(lake, "evaluate", recipe, inputs) as run:
        figures = evaluate_language_model(models.lm, data, rows=recipe.rows, rows_at_once=recipe.rows_at_once)
        run.outcome |= figures
    return EvaluateReport(checkpoint_id, data.data_id, figures)
