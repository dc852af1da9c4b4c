"""A language model of the lake with what belongs to it: the vision tokenizer whose codes it learnt, and clips as its blocks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jobs.checkpoints import LANGUAGE_OBJECTIVES, checkpoint_row, language_data, tokenizer_folder
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import LanguageModel, load_language_model, load_vision_tokenizer
from schemas.catalog import Lake
from schemas.document import VisionBlock
from schemas.errors import ConfigError
from schemas.vision_tokens import VISION_TOKENS


@dataclass(frozen=True, eq=False)
class Models:
    """A language model checkpoint of the lake, loaded, and its vision tokenizer, loaded when it is first used."""

    checkpoint: Mapping[str, Any]
    tokenizer_id: str
    lm: LanguageModel
    vision_folder: Path

    @cached_property
    def vision(self) -> VisionTokenizer:
        """The vision tokenizer whose codes the language model learnt."""
        return load_vision_tokenizer(self.vision_folder)


def load_models(lake: Lake, checkpoint: str) -> Models:
    """A checkpoint's id, the beginning of one, or `latest` -> its networks. Raises: ConfigError if there is none."""
    return models_of(lake, checkpoint_row(lake, checkpoint, *LANGUAGE_OBJECTIVES))


def models_of(lake: Lake, checkpoint: Mapping[str, Any]) -> Models:
    """A checkpoint's row -> its networks, from the folder `uri`. Raises: ConfigError if its data or its tokenizer is gone."""
    read = language_data(lake, str(checkpoint["data_id"]))
    if read is None:
        raise ConfigError(
            f"checkpoint {checkpoint['checkpoint_id']} was trained on {checkpoint['data_id']}, which is not here"
        )
    tokenizer_id = str(read["tokenizer_id"])
    vision = tokenizer_folder(lake, tokenizer_id)
    if vision is None:
        raise ConfigError(
            f"the codes of checkpoint {checkpoint['checkpoint_id']} are by {tokenizer_id}, which is not here"
        )
    return Models(checkpoint, tokenizer_id, load_language_model(Path(str(checkpoint["uri"]))), vision)


def clip_blocks(lake: Lake, tokenizer_id: str, clip_ids: Collection[str]) -> dict[str, VisionBlock]:
    """Clips -> their codes by one tokenizer.

    Raises: ConfigError if a clip has none.
    """
    if not clip_ids:
        return {}
    rows = lake.read_where(VISION_TOKENS, "clip_id", sorted(set(clip_ids))).to_pylist()
    blocks = {
        row["clip_id"]: VisionBlock(
            row["kind"],
            np.frombuffer(row["codes"], "<u2").reshape(row["t"], row["h"], row["w"]).astype(np.int64),
            row["fps"],
        )
        for row in rows
        if row["tokenizer_id"] == tokenizer_id
    }
    if missing := sorted(set(clip_ids) - set(blocks)):
        raise ConfigError(
            f"{len(missing)} clips have no tokens by tokenizer {tokenizer_id}, the first is {missing[0]}: run "
            "`outback tokenize` on a set that holds them"
        )
    return blocks


def first_of_each(ids: Sequence[str], done: Collection[str]) -> list[int]:
    """Where each id that is not done stands first."""
    first: dict[str, int] = {}
    for index, name in enumerate(ids):
        first.setdefault(name, index)
    return [index for name, index in first.items() if name not in done]
