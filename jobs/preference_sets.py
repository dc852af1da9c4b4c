"""Preference sets by name: which pairs of generations a name was given to, and those as a file that a training reads.

A set never changes: its row lists its pairs, and its hash covers the tokens of their generations, which are checked when
the training's file is made of them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.checkpoints import tokenizer_folder
from jobs.pack import text_tokenizer_from_json
from schemas.catalog import Lake
from schemas.document import Grammar, Tokens
from schemas.errors import ConfigError, RowError, SchemaError
from schemas.generations import GENERATIONS, PREFERENCE_PAIRS, PREFERENCE_SETS
from schemas.table import content_sha256
from schemas.vocabulary import Vocabulary
from train.batches import SequenceData, SequenceFile, write_sequence_file

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two generations for one prompt, the better one first: rows of `generations`, with tokens."""

    pair_id: str
    chosen: Row
    rejected: Row

    @property
    def documents(self) -> tuple[Tokens, Tokens]:
        """Both documents, uint32."""
        return tokens_of(self.chosen), tokens_of(self.rejected)


def preference_set(lake: Lake, name: str) -> Row:
    """The `preference_sets` row of a name. Raises: ConfigError if there is none."""
    rows = lake.read_where(PREFERENCE_SETS, "name", [name]).to_pylist()
    if not rows:
        known = sorted(lake.read(PREFERENCE_SETS, ["name"])["name"].to_pylist())
        raise ConfigError(f"there is no preference set {name!r}; there are {known}. `outback prefer` makes one")
    return dict(rows[0])


def read_pairs(lake: Lake, row: Row) -> list[Pair]:
    """A row of `preference_sets` -> its pairs, in order.

    Raises: SchemaError if they are not what the name was given to.
    """
    found = {one["pair_id"]: one for one in rows_of(lake, row["pair_ids"])}
    wanted = {one[side] for one in found.values() for side in ("chosen_id", "rejected_id")}
    drawn = {one["generation_id"]: one for one in generations_of(lake, wanted)}
    if len(found) != row["num_pairs"] or wanted - drawn.keys():
        raise SchemaError(
            f"preference set {row['name']!r} has {row['num_pairs']} pairs, and {len(found)} of them are here, "
            f"{len(wanted - drawn.keys())} of their generations are not"
        )
    ordered = [found[pair_id] for pair_id in row["pair_ids"]]
    pairs = [Pair(one["pair_id"], drawn[one["chosen_id"]], drawn[one["rejected_id"]]) for one in ordered]
    if pairs_sha256(pairs) != row["content_sha256"]:
        raise SchemaError(f"preference set {row['name']!r} does not read back as it was made: `outback prefer` it anew")
    return pairs


def rows_of(lake: Lake, pair_ids: Sequence[str]) -> list[Row]:
    """Ids -> their rows of `preference_pairs`, in no particular order."""
    rows = lake.read(PREFERENCE_PAIRS)
    return list(rows.filter(pc.is_in(rows["pair_id"], value_set=pa.array(pair_ids, pa.string()))).to_pylist())


def generations_of(lake: Lake, generation_ids: Collection[str]) -> Iterator[Row]:
    """Ids -> their rows of `generations`, with tokens, in no particular order."""
    wanted = pa.array(sorted(generation_ids), pa.string())
    for batch in lake.iter_batches(GENERATIONS, GENERATIONS.content_columns):
        yield from batch.filter(pc.is_in(batch["generation_id"], value_set=wanted)).to_pylist()


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Pairs -> a hash of their ids and tokens."""
    tokens = {side: pa.array([getattr(one, side)["tokens"] for one in pairs]) for side in ("chosen", "rejected")}
    rows = pa.table({"pair_id": [one.pair_id for one in pairs], **tokens})
    return content_sha256(rows, rows.column_names, ["pair_id"])


def materialise_pairs(lake: Lake, name: str) -> SequenceData:
    """A preference set -> what a training reads, with its file in the lake's cache; made once per content.

    A row is the chosen document and the rejected one; what the model completed in each is marked as an answer.
    """
    row = preference_set(lake, name)
    vocabulary = Vocabulary.from_json(row["vocabulary"])
    path = lake.folder / "cache" / f"pairs-{row['pairset_id']}.arrow"
    if not path.exists():
        pairs = read_pairs(lake, row)
        layouts = [_layout(pair, vocabulary) for pair in pairs]
        segments, answers = ([layout[part] for layout in layouts] for part in (0, 1))
        write_sequence_file(path, [np.concatenate(pair.documents) for pair in pairs], segments, answers)
    file = SequenceFile(path)
    return SequenceData(
        path=path,
        data_id=row["pairset_id"],
        sha256=row["content_sha256"],
        vocabulary=vocabulary,
        text=text_tokenizer_from_json(row["text_tokenizer"]),
        context_len=max(len(file.tokens(pair)) for pair in range(len(file))),
        vision=tokenizer_folder(lake, row["tokenizer_id"]),
    )


def check_pair(pair: Pair, context_len: int) -> None:
    """Raises: RowError if the two are too long, equal, or not two ways to go on from the same tokens."""
    both = pair.documents
    if (longest := max(map(len, both))) > context_len:
        raise RowError("DocumentTooLong", f"{longest} tokens, and context_len is {context_len}; no pair is cut")
    vocabulary = Vocabulary.from_json(pair.chosen["vocabulary"])
    starts = [completion_start(row, vocabulary) for row in (pair.chosen, pair.rejected)]
    given = [tokens[:start].tobytes() for tokens, start in zip(both, starts, strict=True)]
    ids = f"{pair.chosen['generation_id']} and {pair.rejected['generation_id']}"
    if given[0] != given[1]:
        raise RowError("OtherPrompt", f"{ids} begin with other tokens, expected the same prompt and frames")
    if both[0].tobytes() == both[1].tobytes():
        raise RowError("SameDrawing", f"{ids} are the same tokens")


def _layout(pair: Pair, vocabulary: Vocabulary) -> tuple[list[Row], list[Row]]:
    """Segments and answers of the pair's row."""
    segments, answers, offset = [], [], 0
    for made, tokens in zip((pair.chosen, pair.rejected), pair.documents, strict=True):
        first, length = completion_start(made, vocabulary), len(tokens)
        segments.append({"kind": made["kind"], "item_id": made["generation_id"], "offset": offset, "length": length})
        answers.append({"offset": offset + first, "length": length - first})
        offset += length
    return segments, answers


def tokens_of(made: Row) -> Tokens:
    """A row of `generations` -> its document, uint32."""
    return np.frombuffer(made["tokens"], "<u4").astype(np.uint32)


def completion_start(made: Row, vocabulary: Vocabulary) -> int:
    """A row of `generations` -> the place in its document of the first token that was not given: after IMG, and after the
    frames of a clip that it continues.

    Raises: RowError if it is no document with codes.
    """
    places = np.flatnonzero(tokens_of(made) == vocabulary.img)
    if len(places) != 1:
        raise RowError("NoDrawing", f"found {len(places)} IMG in generation {made['generation_id']}, expected one")
    grammar = Grammar(vocabulary, made["kind"], (made["t"], made["h"], made["w"]))
    return int(places[0]) + 1 + int(made["context_t"]) * grammar.frame_length
