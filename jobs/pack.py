"""Pack: curated sets with captions and vision tokens, and texts, into sequences for training."""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from jobs.captioners import find_captioner
from jobs.checkpoints import tokenizer_folder
from jobs.curate import check_name, read_set
from jobs.run import recorded
from model.text_tokenizer import Emu3TextTokenizer, TinyBpe
from pipeline.pack_sequences import PackedDocument, pack, sequence_rows
from pipeline.read_conversations import Conversation, read_conversations
from pipeline.stage import attempt_row
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.chat import Exchange, write_chat
from schemas.clips import CLIPS
from schemas.curated import CURATED_SETS
from schemas.document import TextDocument, VisionBlock, VisionDocument, write_document
from schemas.errors import ConfigError, RowError, SchemaError
from schemas.media import LOCATIONS
from schemas.recipe import Config, canonical_json, later_option, short_hash
from schemas.runs import ATTEMPTS
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.table import content_sha256
from schemas.texts import TEXTS
from schemas.vision_tokens import VISION_TOKENS
from schemas.vocabulary import Vocabulary
from train.batches import SequenceData, write_sequence_file

TextTokenizer = TinyBpe | Emu3TextTokenizer
OTHER_SOURCES = ("texts", "conversations")


class TextTokenizerRecipe(Config):
    """Which text tokenizer: Emu3's own vocabulary file, or a small BPE trained on what is packed. Packed like another set, it
    is that set's.
    """

    kind: Literal["tiny_bpe", "emu3"] = "emu3"
    path: Path | None = None
    num_text: int = Field(default=512, ge=256)


class UnderstandingRatios(Config):
    """Shares by kind."""

    image: float = Field(default=0.0, ge=0.0, le=1.0)
    video: float = Field(default=0.0, ge=0.0, le=1.0)


class PackRecipe(Config):
    """How documents are written and how long a row is."""

    context_len: int = Field(ge=16)
    num_codes: int = Field(gt=0)
    null_prompt_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    understanding: UnderstandingRatios = later_option(UnderstandingRatios())
    """Share of images and of clips whose caption stands after them, so that the model learns to describe what it sees."""
    captioner: str | None = later_option(None)
    """Whose captions: `provided`, an id or the beginning of one. None: of each clip those of whoever captioned most."""
    include_texts: bool = True
    mixture: dict[str, Annotated[float, Field(ge=0)]] = later_option({})
    """How often documents of a curated set are packed, or of all `texts` or `conversations`: 2 is twice, 0.25 a quarter of
    them, and nothing said is once. A clip of several sets is packed as often as the set with the largest number says."""
    split_texts: bool = later_option(False)
    """Texts may be cut where a row ends, to fill what images and clips leave free; those stay whole."""
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
    num_conversations_refused: int = 0


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

    @property
    def words(self) -> tuple[str, ...]:
        """What a text tokenizer is trained on."""
        return (self.text,)

    @property
    def content(self) -> list[object]:
        """What decides the document."""
        return [self.kind, self.item_id, self.text, zlib.crc32(self.codes), list(self.grid), self.fps]

    def block(self) -> VisionBlock:
        """The clip as codes."""
        assert self.kind != "text"
        codes = np.frombuffer(self.codes, "<u2").reshape(self.grid).astype(np.int64)
        return VisionBlock(self.kind, codes, self.fps)


@dataclass(frozen=True)
class _ChatSource:
    """One conversation before it is written: the clips it is about, and what was said."""

    clips: tuple[_Source, ...]
    exchanges: tuple[Exchange, ...]
    uri: str

    @property
    def kind(self) -> Literal["chat"]:
        return "chat"

    @property
    def item_id(self) -> str:
        """The hash of clips and words."""
        return short_hash(
            [[clip.item_id for clip in self.clips], [[one.question, one.answer] for one in self.exchanges]]
        )

    @property
    def words(self) -> tuple[str, ...]:
        """What a text tokenizer is trained on."""
        return tuple(text for one in self.exchanges for text in (one.question, one.answer))

    @property
    def content(self) -> list[object]:
        """What decides the document."""
        return [self.kind, self.item_id, *(clip.content for clip in self.clips)]


def pack_sets(
    lake: Lake,
    set_names: Sequence[str],
    recipe: PackRecipe,
    name: str,
    tokenizer_id: str | None,
    conversations: Sequence[Path] = (),
    like: str | None = None,
) -> PackReport:
    """Pack the sets, and conversations about their clips, under a new name; the same inputs, recipe and name do nothing.

    `conversations` are files in LLaVA's layout. A conversation that cannot be packed is a row in `attempts`. `like` names a
    sequence set whose ids are used, text tokenizer and all, so that a model that read it can read this one.

    Raises: ConfigError if the name is taken by other content, tokens are missing or made by several tokenizers or by
        another one than those of `like`, or a file cannot be read.
    """
    check_name("sequence set", name)
    set_names = sorted(set(set_names))
    if recipe.captioner is not None:
        recipe = recipe.model_copy(update={"captioner": find_captioner(lake, recipe.captioner)})
    sets = {set_name: read_set(lake, set_name)["clip_id"].to_pylist() for set_name in set_names}
    _check_mixture(recipe, set_names)
    clip_ids = sorted({clip_id for members in sets.values() for clip_id in members})
    tokenizer_id = _tokenizer(lake, clip_ids, tokenizer_id)
    clips, texts, captioned = _sources(lake, clip_ids, tokenizer_id, recipe)
    _check_codes(clips, recipe.num_codes)
    chats, refused = _chats(lake, clips, conversations)
    sources: list[_Source | _ChatSource] = [*captioned, *texts, *chats]
    num_without = len(clip_ids) - len(captioned)
    curated_ids = sorted(_curated_id(lake, set_name) for set_name in set_names)
    content = [source.content for source in sources]
    like_row = sequence_set(lake, like) if like is not None else None
    text_json = _text_tokenizer_of(like_row, recipe, tokenizer_id) if like_row is not None else None
    identity = [curated_ids, tokenizer_id, recipe.canonical_json(), content]
    seqset_id = short_hash(identity if text_json is None else [*identity, text_json])
    taken = [row for row in lake.read_where(SEQUENCE_SETS, "name", [name]).to_pylist()]
    if taken and taken[0]["seqset_id"] != seqset_id:
        raise ConfigError(
            f"sequence set {name!r} exists with other content ({taken[0]['seqset_id']}); choose another name"
        )
    if taken:
        row = taken[0]
        fill = row["num_tokens"] / (row["num_sequences"] * row["context_len"])
        counts = row["num_sequences"], row["num_tokens"]
        return PackReport(name, seqset_id, *counts, fill, num_without, 0, True, len(refused))
    if text_json is None:
        text = _text_tokenizer(recipe, [word for source in sources for word in source.words])
        text_json = canonical_json(text_tokenizer_json(recipe, text))
    else:
        text = text_tokenizer_from_json(text_json)
    vocabulary = Vocabulary(text.num_text, recipe.num_codes)
    inputs: dict[str, object] = {"sets": list(set_names), "curated_ids": curated_ids, "tokenizer_id": tokenizer_id}
    if like_row is not None:
        inputs["like"] = like_row["seqset_id"]
    if conversations:
        inputs["conversations"] = [str(path.absolute()) for path in conversations]
    with recorded(lake, "pack", recipe, inputs) as run:
        documents, too_long = _documents(sources, vocabulary, text, recipe, _clip_weights(sets, recipe))
        if not documents:
            raise ConfigError(
                f"nothing to pack: {len(clip_ids)} clips, {num_without} of them without caption or tokens"
            )
        failures = [_attempt(source, length, seqset_id, recipe) for source, length in too_long]
        failures += [attempt_row("pack", seqset_id, uri, error, uri=uri) for uri, error in refused]
        lake.append(ATTEMPTS, failures, run.run_id)
        rows = pack(documents, recipe.context_len, recipe.seed, split_texts=recipe.split_texts)
        lake.append(SEQUENCES, sequence_rows(rows, seqset_id), run.run_id)
        num_tokens = sum(row.num_tokens for row in rows)
        set_row = {
            "name": name,
            "seqset_id": seqset_id,
            "curated_ids": curated_ids,
            "tokenizer_id": tokenizer_id,
            "recipe": recipe.canonical_json(),
            "vocabulary": vocabulary.to_json(),
            "text_tokenizer": text_json,
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
        if conversations:
            run.outcome |= {"conversations": len(chats), "conversations_refused": len(refused)}
    fill = num_tokens / (len(rows) * recipe.context_len)
    return PackReport(name, seqset_id, len(rows), num_tokens, fill, num_without, len(too_long), False, len(refused))


def _text_tokenizer_of(row: Mapping[str, object], recipe: PackRecipe, tokenizer_id: str) -> str:
    """A sequence set's row -> its stored text tokenizer. Raises: ConfigError if its codes are others than the recipe's."""
    num_codes = Vocabulary.from_json(str(row["vocabulary"])).num_codes
    if (num_codes, row["tokenizer_id"]) != (recipe.num_codes, tokenizer_id):
        raise ConfigError(
            f"{row['name']!r} has {num_codes} codes of the vision tokenizer {row['tokenizer_id']}, and these are "
            f"{recipe.num_codes} of {tokenizer_id}: a model that read it knows no others"
        )
    return str(row["text_tokenizer"])


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
    path = lake.folder / "cache" / f"rows-{row['seqset_id']}.arrow"
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
    answers = [[one for chat in chats or () for one in chat["answers"]] for chats in rows["chats"].to_pylist()]
    write_sequence_file(path, tokens, rows["segments"].to_pylist(), answers)
    return path


def sequence_data(lake: Lake, name: str) -> SequenceData:
    """A sequence set as a training reads it, on this machine's disk. Raises: ConfigError if there is none; as `materialise`."""
    row = sequence_set(lake, name)
    return SequenceData(
        path=materialise(lake, name),
        data_id=str(row["seqset_id"]),
        sha256=str(row["content_sha256"]),
        vocabulary=Vocabulary.from_json(str(row["vocabulary"])),
        text=text_tokenizer_from_json(str(row["text_tokenizer"])),
        context_len=int(str(row["context_len"])),
        vision=tokenizer_folder(lake, str(row["tokenizer_id"])),
    )


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
    columns = [name for name in SEQUENCES.content_columns if name != "chats"]
    if rows["chats"].null_count < len(rows):  # sets without conversations keep the hash they had before there were any
        columns.append("chats")
    return content_sha256(rows, columns, SEQUENCES.key)


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


def _sources(
    lake: Lake, clip_ids: Sequence[str], tokenizer_id: str, recipe: PackRecipe
) -> tuple[dict[str, _Source], list[_Source], list[_Source]]:
    """Every clip with tokens by its id; the texts; and the clips that have a caption, all in the order of ids."""
    captions = {row["clip_id"]: row for row in _best_captions(lake, clip_ids, recipe.captioner)}
    wanted = set(clip_ids)
    clips: dict[str, _Source] = {}
    columns = ["clip_id", "tokenizer_id", "kind", "t", "h", "w", "fps", "codes", "crc32"]
    for batch in lake.iter_batches(VISION_TOKENS, columns):
        for row in batch.to_pylist():
            clip_id = row["clip_id"]
            if row["tokenizer_id"] != tokenizer_id or clip_id not in wanted:
                continue
            if zlib.crc32(row["codes"]) != row["crc32"]:
                raise SchemaError(f"vision tokens of {clip_id} do not match their checksum; the file is damaged")
            said = captions.get(clip_id)
            caption, captioner_id = (said["text"], said["captioner_id"]) if said else ("", None)
            grid = (row["t"], row["h"], row["w"])
            clips[clip_id] = _Source(row["kind"], clip_id, caption, row["codes"], grid, row["fps"], captioner_id)
    captioned = sorted((clips[one] for one in clips if one in captions), key=lambda clip: (clip.kind, clip.item_id))
    texts: list[_Source] = []
    if recipe.include_texts:
        rows = lake.read(TEXTS, ["text_id", "text"]).to_pylist()
        texts = sorted((_Source("text", row["text_id"], row["text"]) for row in rows), key=lambda text: text.item_id)
    return clips, texts, captioned


def _chats(
    lake: Lake, clips: Mapping[str, _Source], files: Sequence[Path]
) -> tuple[list[_ChatSource], list[tuple[str, RowError]]]:
    """Files of conversations -> those about clips with tokens, each once, in the order of ids; and the others with reasons."""
    if not files:
        return [], []
    wanted = pa.array(sorted(clips), pa.string())
    rows = lake.read(CLIPS, ["clip_id", "media_id"])
    rows = rows.filter(pc.is_in(rows["clip_id"], value_set=wanted)).to_pylist()
    clips_of: dict[str, set[str]] = {}
    for row in rows:
        clips_of.setdefault(row["media_id"], set()).add(row["clip_id"])
    media = {row["uri"]: row["media_id"] for row in lake.read(LOCATIONS, ["uri", "media_id"]).to_pylist()}
    found: dict[str, _ChatSource] = {}
    refused: list[tuple[str, RowError]] = []
    for path in files:
        for conversation in read_conversations(path):
            uri = f"{path.absolute()}#row={conversation.index}"
            try:
                chat = _chat(conversation, uri, media, clips_of, clips)
            except RowError as error:
                refused.append((uri, error))
            else:
                found.setdefault(chat.item_id, chat)
    return [found[item_id] for item_id in sorted(found)], refused


def _chat(
    conversation: Conversation,
    uri: str,
    media: Mapping[str, str],
    clips_of: Mapping[str, set[str]],
    clips: Mapping[str, _Source],
) -> _ChatSource:
    """Raises: RowError if it is broken, or a picture is not in the lake or not one clip with tokens."""
    if conversation.error is not None:
        raise conversation.error
    shown: list[_Source] = []
    for path in conversation.media:
        places = [os.path.normpath(path), os.path.realpath(path)]
        medium = next((media[place] for place in places if place in media), None)
        if medium is None:
            raise RowError("UnknownMedium", f"{path} is no medium of this lake: ingest it first", terminal=False)
        candidates = sorted(clips_of.get(medium, ()))
        if len(candidates) != 1:
            found = f"{len(candidates)} clips with vision tokens"
            raise RowError("NoSingleClip", f"found {found} of {path} in the sets, expected one", terminal=False)
        shown.append(clips[candidates[0]])
    return _ChatSource(tuple(shown), conversation.exchanges, uri)


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


def _check_codes(clips: Mapping[str, _Source], num_codes: int) -> None:
    largest = max((int(np.frombuffer(clip.codes, "<u2").max()) for clip in clips.values()), default=-1)
    if largest >= num_codes:
        raise ConfigError(
            f"found the vision code {largest}, and num_codes is {num_codes}: give the size of the tokenizer's codebook"
        )


def _check_mixture(recipe: PackRecipe, set_names: Sequence[str]) -> None:
    """Raises: ConfigError if it weighs what is not packed."""
    unknown = sorted(set(recipe.mixture) - {*set_names, *OTHER_SOURCES})
    if unknown:
        raise ConfigError(
            f"found mixture.{unknown[0]}, expected one of the packed sets {list(set_names)}, or {' or '.join(OTHER_SOURCES)}"
        )


def _clip_weights(sets: Mapping[str, Sequence[str]], recipe: PackRecipe) -> dict[str, float]:
    weights: dict[str, float] = {}
    for set_name, members in sets.items():
        weight = recipe.mixture.get(set_name, 1.0)
        weights |= {clip_id: max(weight, weights.get(clip_id, 0.0)) for clip_id in members}
    return weights


def _num_copies(source: _Source | _ChatSource, recipe: PackRecipe, clip_weights: Mapping[str, float]) -> int:
    """How often a document is packed: its weight, the rest beyond a whole number by a draw of its own."""
    other = {"text": "texts", "chat": "conversations"}.get(source.kind)
    weight = recipe.mixture.get(other, 1.0) if other else clip_weights[source.item_id]
    return int(weight) + (_draw(recipe, "mixture", source) < weight % 1.0)


def _documents(
    sources: Sequence[_Source | _ChatSource],
    vocabulary: Vocabulary,
    text: TextTokenizer,
    recipe: PackRecipe,
    clip_weights: Mapping[str, float],
) -> tuple[list[PackedDocument], list[tuple[_Source | _ChatSource, int]]]:
    documents, too_long = [], []
    for source in sources:
        for copy in range(_num_copies(source, recipe, clip_weights)):
            document = _document(source, vocabulary, text, recipe, copy)
            is_whole = document.kind != "text" or not recipe.split_texts
            if is_whole and len(document.tokens) > recipe.context_len:
                too_long.append((source, len(document.tokens)))
                break
            documents.append(document)
    return documents, too_long


def _document(
    source: _Source | _ChatSource, vocabulary: Vocabulary, text: TextTokenizer, recipe: PackRecipe, copy: int
) -> PackedDocument:
    if isinstance(source, _ChatSource):
        blocks = [clip.block() for clip in source.clips]
        tokens, answers = write_chat(source.exchanges, blocks, vocabulary, text)
        clip_ids = tuple(clip.item_id for clip in source.clips)
        return PackedDocument("chat", source.item_id, tokens, clip_ids=clip_ids, answers=tuple(answers))
    if source.kind == "text":
        return PackedDocument("text", source.item_id, write_document(TextDocument(source.text), vocabulary, text))
    last = _draw(recipe, "understanding", source, copy) < getattr(recipe.understanding, source.kind)
    # Part of the prompts become empty so that the model learns the unconditional branch of guidance.
    null = not last and _draw(recipe, "null_prompt", source, copy) < recipe.null_prompt_ratio
    caption = "" if null else source.text
    tokens = write_document(VisionDocument(source.block(), caption, caption_last=last), vocabulary, text)
    return PackedDocument(source.kind, source.item_id, tokens, source.captioner_id if caption else None)


def _draw(recipe: PackRecipe, what: str, source: _Source | _ChatSource, copy: int = 0) -> float:
    """A number from 0 to 1 that depends on the document, which copy of it and the seed alone, so that more documents change
    nothing for the others.
    """
    parts = [recipe.seed, what, source.item_id]
    return int(short_hash(parts if copy == 0 else [*parts, copy]), 16) / 16**16


def _attempt(source: _Source | _ChatSource, length: int, seqset_id: str, recipe: PackRecipe) -> dict[str, object]:
    error = RowError("DocumentTooLong", f"{length} tokens, and a row holds {recipe.context_len}; it is not split")
    uri = source.uri if isinstance(source, _ChatSource) else None
    return attempt_row("pack", seqset_id, source.item_id, error, uri=uri)
