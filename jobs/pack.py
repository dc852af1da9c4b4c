"""Pack: curated sets with captions and vision tokens, and texts, into sequences for training."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from jobs.captioners import find_captioner
from jobs.curate import check_name, read_set
from jobs.run import recorded
from model.text_tokenizer import Emu3TextTokenizer, TinyBpe
from pipeline.pack_sequences import PackedDocument, pack, sequence_rows
from pipeline.stage import attempt_row
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.curated import CURATED_SETS
from schemas.document import TextDocument, VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError, RowError, SchemaError
from schemas.recipe import Config, canonical_json, later_option, short_hash
from schemas.runs import ATTEMPTS
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.table import content_sha256
from schemas.texts import TEXTS
from schemas.vision_tokens import VISION_TOKENS
from schemas.vocabulary import Vocabulary
from train.batches import write_sequence_file

TextTokenizer = TinyBpe | Emu3TextTokenizer


class TextTokenizerRecipe(Config):
    """Which text tokenizer: Emu3's own vocabulary file, or a small BPE trained on what is packed."""

    kind: Literal["tiny_bpe", "emu3"] = "emu3"
    path: Path | None = None
    num_text: int = Field(default=512, ge=256)


class PackRecipe(Config):
    """How documents are written and how long a row is."""

    context_len: int = Field(ge=16)
    num_codes: int = Field(gt=0)
    null_prompt_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    captioner: str | None = later_option(None)
    """Whose captions: `provided`, an id or the beginning of one. None: of each clip those of whoever captioned most."""
    include_texts: bool = True
    seed: int = 0
    text_tokenizer: TextTokenizerRecipe = TextTokenizerRecipe()


@dataclass(frozen=True)
class PackReport:
    """The packed set: rows, tokens, how full the rows are, what was left out; and whether it was there already."""

    name: str
    seqset_id: str
    num_sequences: int
    num_tokens: int
    fill_ratio: float
    num_without_caption: int
    num_too_long: int
    already_there: bool


@dataclass(frozen=True)
class _Source:
    """One document before it is written: what it was made from and its parts."""

    kind: Literal["image", "video", "text"]
    item_id: str
    text: str
    codes: bytes = b""
    grid: tuple[int, int, int] = (0, 0, 0)
    fps: float | None = None
    captioner_id: str | None = None


def pack_sets(
    lake: Lake, set_names: Sequence[str], recipe: PackRecipe, name: str, tokenizer_id: str | None
) -> PackReport:
    """Pack the sets under a new name; the same inputs, recipe and name do nothing.

    Raises: ConfigError if the name is taken by other content, or tokens are missing or made by several tokenizers.
    """
    check_name("sequence set", name)
    set_names = sorted(set(set_names))
    if recipe.captioner is not None:
        recipe = recipe.model_copy(update={"captioner": find_captioner(lake, recipe.captioner)})
    clip_ids = sorted({clip for set_name in set_names for clip in read_set(lake, set_name)["clip_id"].to_pylist()})
    tokenizer_id = _tokenizer(lake, clip_ids, tokenizer_id)
    sources, num_without = _sources(lake, clip_ids, tokenizer_id, recipe)
    _check_codes(sources, recipe.num_codes)
    curated_ids = sorted(_curated_id(lake, set_name) for set_name in set_names)
    content = [[s.kind, s.item_id, s.text, zlib.crc32(s.codes), list(s.grid), s.fps] for s in sources]
    seqset_id = short_hash([curated_ids, tokenizer_id, recipe.canonical_json(), content])
    taken = [row for row in lake.read_where(SEQUENCE_SETS, "name", [name]).to_pylist()]
    if taken and taken[0]["seqset_id"] != seqset_id:
        raise ConfigError(
            f"sequence set {name!r} exists with other content ({taken[0]['seqset_id']}); choose another name"
        )
    if taken:
        row = taken[0]
        fill = row["num_tokens"] / (row["num_sequences"] * row["context_len"])
        return PackReport(name, seqset_id, row["num_sequences"], row["num_tokens"], fill, num_without, 0, True)
    text = _text_tokenizer(recipe, [source.text for source in sources])
    vocabulary = Vocabulary(text.num_text, recipe.num_codes)
    inputs = {"sets": list(set_names), "curated_ids": curated_ids, "tokenizer_id": tokenizer_id}
    with recorded(lake, "pack", recipe, inputs) as run:
        documents, too_long = _documents(sources, vocabulary, text, recipe)
        if not documents:
            raise ConfigError(
                f"nothing to pack: {len(clip_ids)} clips, {num_without} of them without caption or tokens"
            )
        lake.append(ATTEMPTS, [_attempt(source, length, seqset_id, recipe) for source, length in too_long], run.run_id)
        rows = pack(documents, recipe.context_len, recipe.seed)
        lake.append(SEQUENCES, sequence_rows(rows, seqset_id), run.run_id)
        num_tokens = sum(row.num_tokens for row in rows)
        set_row = {
            "name": name,
            "seqset_id": seqset_id,
            "curated_ids": curated_ids,
            "tokenizer_id": tokenizer_id,
            "recipe": recipe.canonical_json(),
            "vocabulary": vocabulary.to_json(),
            "text_tokenizer": canonical_json(text_tokenizer_json(recipe, text)),
            "context_len": recipe.context_len,
            "num_sequences": len(rows),
            "num_tokens": num_tokens,
            "content_sha256": _sequences_sha256(_set_rows(lake, seqset_id)),
        }
        lake.append(SEQUENCE_SETS, [set_row], run.run_id)
        if lake.read_where(SEQUENCE_SETS, "name", [name])["seqset_id"][0].as_py() != seqset_id:
            raise ConfigError(
                f"sequence set {name!r} was just made by another run with other content; choose another name"
            )
        run.outcome |= {"seqset_id": seqset_id, "sequences": len(rows), "tokens": num_tokens, "too_long": len(too_long)}
    fill = num_tokens / (len(rows) * recipe.context_len)
    return PackReport(name, seqset_id, len(rows), num_tokens, fill, num_without, len(too_long), False)


def sequence_set(lake: Lake, name: str) -> dict[str, object]:
    """The `sequence_sets` row of a name. Raises: ConfigError if there is none."""
    rows = lake.read_where(SEQUENCE_SETS, "name", [name]).to_pylist()
    if not rows:
        known = sorted(lake.read(SEQUENCE_SETS, ["name"])["name"].to_pylist())
        raise ConfigError(f"there is no sequence set {name!r}; there are {known}. `outback pack` makes one")
    return dict(rows[0])


def materialise(lake: Lake, name: str) -> Path:
    """A sequence set -> a memory-mappable file of its rows in order, in the lake's cache; made once per content.

    Raises: SchemaError if the rows are not dense or their content is not what was packed.
    """
    row = sequence_set(lake, name)
    path = lake.folder / "cache" / f"sequences-{row['seqset_id']}.arrow"
    if path.exists():
        return path
    rows = _set_rows(lake, str(row["seqset_id"]))
    if rows["seq_index"].to_pylist() != list(range(len(rows))) or len(rows) != row["num_sequences"]:
        raise SchemaError(
            f"sequence set {name!r} should have rows 0..{row['num_sequences']}-1 and has {len(rows)} others"
        )
    if _sequences_sha256(rows) != row["content_sha256"]:
        raise SchemaError(
            f"sequence set {name!r} does not read back as it was packed; run `outback pack` under a new name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [np.frombuffer(value, "<u4") for value in rows["tokens"].to_pylist()]
    write_sequence_file(path, tokens, rows["segments"].to_pylist())
    return path


def text_tokenizer_json(recipe: PackRecipe, text: TextTokenizer) -> dict[str, object]:
    """A text tokenizer as JSON: the tiny one whole, Emu3's by path."""
    if isinstance(text, TinyBpe):
        return {"kind": "tiny_bpe", "serialised": json.loads(text.to_json())}
    return {"kind": "emu3", "path": str(recipe.text_tokenizer.path)}


def text_tokenizer_from_json(stored: str) -> TextTokenizer:
    """The inverse of `text_tokenizer_json`."""
    value = json.loads(stored)
    if value["kind"] == "tiny_bpe":
        return TinyBpe(json.dumps(value["serialised"]))
    return Emu3TextTokenizer(Path(value["path"]))


def _set_rows(lake: Lake, seqset_id: str) -> pa.Table:
    return lake.read_where(SEQUENCES, "seqset_id", [seqset_id]).sort_by("seq_index")


def _sequences_sha256(rows: pa.Table) -> str:
    return content_sha256(rows, SEQUENCES.content_columns, SEQUENCES.key)


def _curated_id(lake: Lake, set_name: str) -> str:
    return str(lake.read_where(CURATED_SETS, "name", [set_name], ["curated_id"])["curated_id"][0].as_py())


def _tokenizer(lake: Lake, clip_ids: Sequence[str], asked: str | None) -> str:
    """The tokenizer whose tokens are packed: the one asked for, or the only one that these clips have tokens of."""
    wanted = set(clip_ids)
    rows = lake.read(VISION_TOKENS, ["clip_id", "tokenizer_id"]).to_pylist()
    found = sorted({row["tokenizer_id"] for row in rows if row["clip_id"] in wanted})
    if asked is not None:
        if asked not in found:
            raise ConfigError(f"no clip of the sets has vision tokens by {asked!r}; there are those of {found}")
        return asked
    if len(found) != 1:
        raise ConfigError(
            f"the sets' clips have vision tokens by {len(found)} tokenizers {found}: name one with --tokenizer"
        )
    return str(found[0])


def _sources(lake: Lake, clip_ids: Sequence[str], tokenizer_id: str, recipe: PackRecipe) -> tuple[list[_Source], int]:
    """Everything to pack in the order of ids, and how many clips lack a caption or tokens."""
    captions = {row["clip_id"]: row for row in _best_captions(lake, clip_ids, recipe.captioner)}
    wanted = set(clip_ids)
    sources: list[_Source] = []
    columns = ["clip_id", "tokenizer_id", "kind", "t", "h", "w", "fps", "codes", "crc32"]
    for batch in lake.iter_batches(VISION_TOKENS, columns):
        for row in batch.to_pylist():
            if row["tokenizer_id"] != tokenizer_id or row["clip_id"] not in wanted or row["clip_id"] not in captions:
                continue
            if zlib.crc32(row["codes"]) != row["crc32"]:
                raise SchemaError(f"vision tokens of {row['clip_id']} do not match their checksum; the file is damaged")
            said, grid = captions[row["clip_id"]], (row["t"], row["h"], row["w"])
            sources.append(
                _Source(row["kind"], row["clip_id"], said["text"], row["codes"], grid, row["fps"], said["captioner_id"])
            )
    num_without = len(wanted) - len(sources)
    if recipe.include_texts:
        sources += [
            _Source("text", row["text_id"], row["text"]) for row in lake.read(TEXTS, ["text_id", "text"]).to_pylist()
        ]
    return sorted(sources, key=lambda source: (source.kind, source.item_id)), num_without


def _best_captions(lake: Lake, clip_ids: Sequence[str], captioner: str | None) -> Iterator[dict[str, str]]:
    """The first window's caption per clip, if it passed its checks. Several captioners: the one asked for, else the one that
    captioned most clips, then by id.
    """
    wanted = set(clip_ids)
    columns = ["clip_id", "window", "captioner_id", "text", "problem"]
    rows = [
        row
        for row in lake.read(CAPTIONS, columns).to_pylist()
        if row["clip_id"] in wanted
        and row["window"] == 0
        and row["problem"] is None
        and captioner in (None, row["captioner_id"])
    ]
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["captioner_id"]] = counts.get(row["captioner_id"], 0) + 1
    rows.sort(key=lambda row: (row["clip_id"], -counts[row["captioner_id"]], row["captioner_id"]))
    last = None
    for row in rows:
        if row["clip_id"] != last:
            yield row
        last = row["clip_id"]


def _text_tokenizer(recipe: PackRecipe, texts: Sequence[str]) -> TextTokenizer:
    if recipe.text_tokenizer.kind == "tiny_bpe":
        return TinyBpe.train(sorted(texts), recipe.text_tokenizer.num_text)
    if recipe.text_tokenizer.path is None:
        raise ConfigError("text_tokenizer.kind = 'emu3' needs text_tokenizer.path, the file emu3.tiktoken")
    return Emu3TextTokenizer(recipe.text_tokenizer.path)


def _check_codes(sources: Sequence[_Source], num_codes: int) -> None:
    largest = max((int(np.frombuffer(source.codes, "<u2").max()) for source in sources if source.codes), default=-1)
    if largest >= num_codes:
        raise ConfigError(
            f"found the vision code {largest}, and num_codes is {num_codes}: give the size of the tokenizer's codebook"
        )


def _documents(
    sources: Sequence[_Source], vocabulary: Vocabulary, text: TextTokenizer, recipe: PackRecipe
) -> tuple[list[PackedDocument], list[tuple[_Source, int]]]:
    documents, too_long = [], []
    for source in sources:
        document = _document(source, recipe)
        tokens = write_document(document, vocabulary, text)
        if len(tokens) > recipe.context_len:
            too_long.append((source, len(tokens)))
        else:
            has_caption = isinstance(document, VisionDocument) and bool(document.caption)
            captioner_id = source.captioner_id if has_caption else None
            documents.append(PackedDocument(source.kind, source.item_id, tokens, captioner_id))
    return documents, too_long


def _document(source: _Source, recipe: PackRecipe) -> TextDocument | VisionDocument:
    if source.kind == "text":
        return TextDocument(source.text)
    # Part of the captions become empty so that the model learns the unconditional branch of guidance. Which ones depends on
    # the clip and the seed alone, so adding clips changes nothing for the others.
    draw = int(short_hash([recipe.seed, "null_prompt", source.item_id]), 16) / 16**16
    caption = "" if draw < recipe.null_prompt_ratio else source.text
    codes = np.frombuffer(source.codes, "<u2").reshape(source.grid).astype(np.int64)
    return VisionDocument(VisionBlock(source.kind, codes, source.fps), caption)


def _attempt(source: _Source, length: int, seqset_id: str, recipe: PackRecipe) -> dict[str, object]:
    error = RowError("DocumentTooLong", f"{length} tokens, and a row holds {recipe.context_len}; whole documents only")
    return attempt_row("pack", seqset_id, source.item_id, error)
