"""Checkpoints of the lake by name: an id, the beginning of one, or the latest of an objective; and what one has read."""

from pathlib import Path
from typing import Any

from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError
from schemas.generations import PREFERENCE_SETS
from schemas.sequences import SEQUENCE_SETS
from schemas.vision_tokens import TOKENIZERS

LANGUAGE_OBJECTIVES = ("pretrain", "dpo")


def checkpoint_row(lake: Lake, checkpoint: str, *objectives: str) -> dict[str, object]:
    """The `checkpoints` row of an id or a unique beginning of one; `latest` is the newest of these objectives.

    Raises: ConfigError if none or several fit.
    """
    rows = [row for row in lake.read(CHECKPOINTS).to_pylist() if row["objective"] in objectives]
    if checkpoint == "latest":
        found = sorted(rows, key=lambda row: row["written_at"])[-1:]
    else:
        found = [row for row in rows if str(row["checkpoint_id"]).startswith(checkpoint)]
    if len(found) != 1:
        known = [row["checkpoint_id"] for row in rows]
        raise ConfigError(f"{checkpoint!r} names {len(found)} {' or '.join(objectives)} checkpoints; there are {known}")
    return dict(found[0])


def language_data(lake: Lake, data_id: str) -> dict[str, Any] | None:
    """The `data_id` of a language model's checkpoint -> the tokenizer_id, vocabulary and text_tokenizer of the sequence set or
    the preference set that it read; None if that is not here.
    """
    columns = ["tokenizer_id", "vocabulary", "text_tokenizer"]
    for table, key in ((SEQUENCE_SETS, "seqset_id"), (PREFERENCE_SETS, "pairset_id")):
        rows = lake.read_where(table, key, [data_id], columns).to_pylist()
        if rows:
            return dict(rows[0])
    return None


def tokenizer_folder(lake: Lake, tokenizer_id: str) -> Path | None:
    """A `tokenizer_id` -> the folder of its vision tokenizer, None if that is not here."""
    rows = lake.read_where(TOKENIZERS, "tokenizer_id", [tokenizer_id], ["uri"]).to_pylist()
    return Path(rows[0]["uri"]) if rows else None
