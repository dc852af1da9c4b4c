"""Train: a vision tokenizer or a captioner on a curated set, a language model on a sequence set or on preferences; the recipe
says which.

A training is identified by its recipe and the content of its data. The same training is resumed when it was interrupted and
found again when it is finished; its checkpoint is a row that names the data.
"""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from jobs.captioners import PROVIDED, find_captioner
from jobs.checkpoints import LANGUAGE_OBJECTIVES, checkpoint_row, language_data
from jobs.clip_items import clip_items
from jobs.cluster import ensure_ray, num_cpus
from jobs.curate import read_set, set_row
from jobs.model_files import model_digest
from jobs.pack import sequence_data, sequence_set
from jobs.preference_sets import materialise_pairs, preference_set
from jobs.progress import Advance, progress
from jobs.run import recorded
from jobs.shipped import load_named
from model.weights import CONFIG_FILE, digest
from pipeline.caption_prompts import load_prompt
from pipeline.caption_windows import WindowConfig, window_frames
from pipeline.frame_chunks import ChunkConfig, frame_chunks
from pipeline.sandbox import SandboxPool
from pipeline.stage import attempt_row
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.errors import ConfigError, RowError
from schemas.identity import window_id
from schemas.recipe import Config, later_option, short_hash
from schemas.runs import ATTEMPTS
from train.batches import FrameData, write_frame_file
from train.captioner import CaptionData, CaptionerTrainingConfig, CaptionExample, train_captioner, write_examples
from train.language import Start
from train.preference import DpoConfig, train_preferences
from train.pretrain import PretrainConfig, pretrain
from train.progress import Progress, TrainingResult
from train.vision_tokenizer import TokenizerTrainingConfig, train_vision_tokenizer

Frames = npt.NDArray[np.uint8]
ID_DIGITS = 16  # of a digest, which name a checkpoint


class ExampleConfig(Config):
    """What a captioner learns from: whose captions, of which frames, asked for by which prompt. Use the same windows and
    prompt when it captions.
    """

    captioner: str = PROVIDED
    """Whose captions: `provided` for those that came with the media, or the id of a captioner, or a beginning of one."""
    prompt: str = "dense.v1"
    windows: WindowConfig = WindowConfig()
    max_caption_chars: int = Field(default=8192, ge=1)
    """Longer captions are left out: one of megabytes would be a batch that no memory holds."""


class TrainRecipe(Config):
    """What to train. Exactly the sections that the objective names are given."""

    objective: Literal["vision_tokenizer", "pretrain", "captioner", "dpo"]
    frames: ChunkConfig | None = None
    vision_tokenizer: TokenizerTrainingConfig | None = None
    pretrain: PretrainConfig | None = None
    examples: ExampleConfig | None = None
    captioner: CaptionerTrainingConfig | None = None
    dpo: DpoConfig | None = later_option(None)


SECTIONS = {
    "vision_tokenizer": {"frames", "vision_tokenizer"},
    "pretrain": {"pretrain"},
    "captioner": {"examples", "captioner"},
    "dpo": {"dpo"},
}


@dataclass(frozen=True)
class TrainReport:
    """A finished training: its checkpoint, and whether it had been finished before."""

    objective: str
    checkpoint_id: str
    step: int
    folder: Path
    losses: list[dict[str, float]]
    already_there: bool


def load_training_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> TrainRecipe:
    """A training recipe by name or path. Raises: ConfigError if its sections do not fit its objective."""
    recipe = load_named(TrainRecipe, name_or_path, overrides)
    needed = SECTIONS[recipe.objective]
    given = {name for names in SECTIONS.values() for name in names if getattr(recipe, name) is not None}
    if needed != given:
        raise ConfigError(
            f"recipe {name_or_path}: objective {recipe.objective!r} needs {sorted(needed)}, found {sorted(given)}"
        )
    return recipe


def train(
    lake: Lake, recipe: TrainRecipe, data_name: str, start: str | None = None, held_out: str | None = None
) -> TrainReport:
    """Train on a named set, resuming what was begun; a finished training is found, not repeated.

    `start` names weights to begin with, of a language model: a checkpoint's id, the beginning of one, `latest`, or a folder
    with published ones. `latest` is another one once this training is finished. `held_out` names a set of
    the same kind as the data, that it is evaluated on and never learns from.

    Raises: ConfigError if recipe, data, start and held-out data do not fit one another.
    """
    if recipe.objective == "pretrain":
        return _pretrain(lake, recipe, data_name, start, held_out)
    if recipe.objective == "dpo":
        return _train_preferences(lake, recipe, data_name, start, held_out)
    if start is not None:
        raise ConfigError(
            f"found weights to begin with and the objective {recipe.objective!r}: only language models take them so"
        )
    if recipe.objective == "vision_tokenizer":
        return _train_vision_tokenizer(lake, recipe, data_name, held_out)
    if held_out is not None:
        raise ConfigError(f"found held-out data and the objective {recipe.objective!r}, which is not evaluated on any")
    return _train_captioner(lake, recipe, data_name)


def _train_vision_tokenizer(lake: Lake, recipe: TrainRecipe, set_name: str, held_out: str | None) -> TrainReport:
    assert recipe.frames is not None
    assert recipe.vision_tokenizer is not None
    config, chunks = recipe.vision_tokenizer, recipe.frames
    curated, left_out = set_row(lake, set_name), config.left_out()
    if held_out is not None:
        _check_apart(lake, set_name, held_out)

    def start(training_id: str, advance: Advance, run_id: str) -> TrainingResult:
        for term, reason in left_out.items():
            print(f"train vision_tokenizer: without the {term} term, {reason}", file=sys.stderr, flush=True)
        data = _frame_data(lake, set_name, chunks, run_id, advance)
        kept = _frame_data(lake, held_out, chunks, run_id, advance) if held_out is not None else None
        storage = training_folder(lake, training_id)
        return train_vision_tokenizer(config, data, storage, held_out=kept, on_progress=_advance(advance))

    options = [config.by_content().identity(), chunks.identity()]
    said = {"left_out": left_out} if left_out else {}
    return _run(lake, recipe, options, curated["curated_id"], curated["content_sha256"], start, said=said)


def _check_apart(lake: Lake, set_name: str, held_out: str) -> None:
    """Raises: ConfigError if two curated sets share clips."""
    learnt, kept = (set(read_set(lake, name)["clip_id"].to_pylist()) for name in (set_name, held_out))
    shared = learnt & kept
    if shared:
        raise ConfigError(
            f"found {len(shared)} clips in both {set_name!r} and the held-out {held_out!r}, such as {min(shared)}: hold "
            "out others"
        )


def _train_captioner(lake: Lake, recipe: TrainRecipe, set_name: str) -> TrainReport:
    assert recipe.examples is not None
    assert recipe.captioner is not None
    config, curated = recipe.captioner, set_row(lake, set_name)
    wanted = recipe.examples.model_copy(update={"captioner": find_captioner(lake, recipe.examples.captioner)})
    recipe = recipe.model_copy(update={"examples": wanted})  # lineage reads from it whose captions were learnt
    items = _captioned_windows(lake, set_name, wanted)
    prompt_id, prompt = load_prompt(wanted.prompt)
    said = [[item["clip_id"], item["window_start_ms"], item["window_end_ms"], item["caption"]] for item in items]
    shape = {"windows": wanted.windows.identity(), "prompt": prompt_id, "captions": short_hash(said)}
    data_id = short_hash([curated["curated_id"], shape])

    def start(training_id: str, advance: Advance, run_id: str) -> TrainingResult:
        path = lake.folder / "cache" / f"examples-{data_id}.arrow"
        if not path.exists():
            _write_examples(lake, path, items, wanted.windows, data_id, run_id, advance)
        data = CaptionData(
            path=path,
            data_id=str(curated["curated_id"]),
            sha256=_derived_sha256(curated, data_id),
            image_prompt=prompt.image,
            video_prompt=prompt.video,
            system=prompt.system,
        )
        return train_captioner(config, data, training_folder(lake, training_id), on_progress=_advance(advance))

    options: list[Any] = [config.identity(), shape]
    if config.base is not None:
        options.append(model_digest(config.base, None))
    return _run(lake, recipe, options, curated["curated_id"], curated["content_sha256"], start)


def _captioned_windows(lake: Lake, set_name: str, wanted: ExampleConfig) -> list[dict[str, Any]]:
    """The windows of a set's clips that this captioner captioned without a problem, each with a place of its medium."""
    clips = {clip["clip_id"]: clip for clip in clip_items(lake, set_name).to_pylist()}
    columns = ["clip_id", "window", "captioner_id", "text", "problem", "window_start_ms", "window_end_ms"]
    rows = lake.read_where(CAPTIONS, "captioner_id", [wanted.captioner], columns).to_pylist()
    found = [
        {**clips[row["clip_id"]], **row, "caption": row["text"]}
        for row in rows
        if row["clip_id"] in clips and row["problem"] is None and len(row["text"]) <= wanted.max_caption_chars
    ]
    if not found:
        raise ConfigError(
            f"no clip of {set_name!r} has a sound caption by {wanted.captioner}; run `outback caption {set_name}`"
        )
    return sorted(found, key=lambda item: (item["clip_id"], item["window"]))


def _write_examples(
    lake: Lake,
    path: Path,
    items: list[dict[str, Any]],
    windows: WindowConfig,
    data_id: str,
    run_id: str,
    advance: Advance,
) -> None:
    """The frames and captions of windows as one file in the lake's cache, read from the originals once."""
    failures: list[tuple[dict[str, Any], RowError]] = []

    def examples() -> Iterator[CaptionExample]:
        limits = windows.timeout_s, windows.memory_mb
        for index, (item, frames) in enumerate(_read_all(items, partial(window_frames, config=windows), *limits)):
            if isinstance(frames, RowError):
                failures.append(({**item, "clip_id": window_id(item["clip_id"], item["window"])}, frames))
            else:
                yield CaptionExample(item["kind"], frames, item["caption"])
            advance(index + 1, len(items), "windows read")
        _record(lake, failures, data_id, run_id, len(items))

    write_examples(path, examples())


def _record(
    lake: Lake, failures: list[tuple[dict[str, Any], RowError]], data_id: str, run_id: str, num_items: int
) -> None:
    """Write down what could not be read.

    Raises: ConfigError if some of it may be readable another time: training data does not depend on when it was read.
    """
    rows = [attempt_row("train_frames", data_id, item["clip_id"], error, uri=item["uri"]) for item, error in failures]
    lake.append(ATTEMPTS, rows, run_id)
    passing = [(item, error) for item, error in failures if not error.terminal]
    if passing or len(failures) == num_items:
        item, error = (passing or failures)[0]
        raise ConfigError(
            f"{len(failures)} of {num_items} clips or windows of the set cannot be read, such as {item['uri']}: "
            f"{error.message}. Make them readable and run the same command again"
        )


def _pretrain(lake: Lake, recipe: TrainRecipe, name: str, start_name: str | None, held_out: str | None) -> TrainReport:
    assert recipe.pretrain is not None
    config = recipe.pretrain
    row = sequence_set(lake, name)
    begin = _start(lake, start_name, str(row["tokenizer_id"])) if start_name is not None else None
    if held_out is not None:
        _check_codes(lake, held_out, str(row["tokenizer_id"]))

    def start(training_id: str, advance: Advance, run_id: str) -> TrainingResult:
        data, storage = sequence_data(lake, name), training_folder(lake, training_id)
        kept = sequence_data(lake, held_out) if held_out is not None else None
        return pretrain(config, data, storage, start=begin, held_out=kept, on_progress=_advance(advance))

    options: list[Any] = [config.identity()]
    if begin is not None:
        options.append(begin.digest)
    return _run(lake, recipe, options, str(row["seqset_id"]), str(row["content_sha256"]), start, begin)


def _train_preferences(
    lake: Lake, recipe: TrainRecipe, name: str, start_name: str | None, held_out: str | None
) -> TrainReport:
    assert recipe.dpo is not None
    config = recipe.dpo
    if start_name is None:
        raise ConfigError(
            "found no weights to begin with, expected those whose drawings were judged: preferences change a model, they "
            "make none. Give --from CHECKPOINT"
        )
    row = preference_set(lake, name)
    begin = _start(lake, start_name, str(row["tokenizer_id"]))
    if held_out is not None:
        _check_codes(lake, held_out, str(row["tokenizer_id"]))

    def start(training_id: str, advance: Advance, run_id: str) -> TrainingResult:
        data, storage = materialise_pairs(lake, name), training_folder(lake, training_id)
        kept = sequence_data(lake, held_out) if held_out is not None else None
        return train_preferences(config, data, storage, start=begin, held_out=kept, on_progress=_advance(advance))

    options = [config.identity(), begin.digest]
    data_id, data_sha256 = str(row["pairset_id"]), str(row["content_sha256"])
    return _run(lake, recipe, options, data_id, data_sha256, start, begin)


def _check_codes(lake: Lake, held_out: str, tokenizer_id: str) -> None:
    """Raises: ConfigError if a held-out set holds codes of another vision tokenizer than this one."""
    known = sequence_set(lake, held_out)["tokenizer_id"]
    if known != tokenizer_id:
        raise ConfigError(
            f"found the held-out sequences {held_out!r} in codes of the vision tokenizer {known}, expected those of "
            f"{tokenizer_id}, which are trained on"
        )


def _start(lake: Lake, name: str, tokenizer_id: str) -> Start:
    """A checkpoint's name or a folder -> its weights.

    Raises: ConfigError if it is neither, or learnt the codes of another vision tokenizer than this one.
    """
    folder = Path(name)
    if not (folder / CONFIG_FILE).is_file():
        try:
            folder = Path(str(checkpoint_row(lake, name, *LANGUAGE_OBJECTIVES)["uri"]))
        except ConfigError as error:
            raise ConfigError(f"{name!r} is no folder of a model (it has no {CONFIG_FILE}), and {error}") from None
    found = digest(folder)
    for known in lake.read_where(CHECKPOINTS, "checkpoint_id", [found[:ID_DIGITS]], ["data_id"])["data_id"].to_pylist():
        learnt = language_data(lake, known)
        if learnt is not None and learnt["tokenizer_id"] != tokenizer_id:
            raise ConfigError(
                f"checkpoint {found[:ID_DIGITS]} learnt codes of the vision tokenizer {learnt['tokenizer_id']}, and these "
                f"sequences hold those of {tokenizer_id}: pack with --tokenizer {learnt['tokenizer_id']}, or prefer among "
                "drawings in its codes"
            )
    return Start(folder.resolve(), found)


def _run(
    lake: Lake,
    recipe: TrainRecipe,
    options: list[Any],
    data_id: str,
    data_sha256: str,
    start: Callable[[str, Advance, str], TrainingResult],
    begin: Start | None = None,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> TrainReport:
    """Find the finished training, or run it and register its checkpoint. What is `said` of it joins the run's outcome."""
    training_id = short_hash([recipe.objective, options, data_id, data_sha256])
    rows = lake.read_where(CHECKPOINTS, "training_id", [training_id]).to_pylist()
    if rows:
        row = rows[0]
        folder = Path(row["uri"])
        if not folder.exists():
            raise ConfigError(f"checkpoint {row['checkpoint_id']} is registered at {folder}, and that folder is gone")
        losses = json.loads(row["losses"])
        return TrainReport(recipe.objective, row["checkpoint_id"], row["step"], folder, losses, True)
    inputs = {"data_id": data_id, "data_sha256": data_sha256, "training_id": training_id}
    if begin is not None:
        inputs["start"] = str(begin.folder)
    title = f"train {recipe.objective} {training_id}"
    with recorded(lake, "train", recipe, inputs) as run, progress(title) as advance:
        ensure_ray()
        result = start(training_id, advance, run.run_id)
        checkpoint_id = result.checkpoint_digest[:ID_DIGITS]
        row = {
            "checkpoint_id": checkpoint_id,
            "objective": recipe.objective,
            "training_id": training_id,
            "recipe": recipe.canonical_json(),
            "data_id": data_id,
            "data_sha256": data_sha256,
            "step": result.step,
            "start_id": begin.digest[:ID_DIGITS] if begin else None,
            "losses": json.dumps(result.losses),
            "uri": str(result.folder),
        }
        lake.append(CHECKPOINTS, [row], run.run_id)
        run.outcome |= {"checkpoint_id": checkpoint_id, "step": result.step, "resumed_from": result.resumed_from_step}
        run.outcome |= said
    return TrainReport(recipe.objective, checkpoint_id, result.step, result.folder, result.losses, False)


def _derived_sha256(curated: Mapping[str, Any], data_id: str) -> str:
    """What names the content of a file that is made of a curated set in the way that `data_id` says."""
    return hashlib.sha256(f"{curated['content_sha256']}{data_id}".encode()).hexdigest()


def training_folder(lake: Lake, training_id: str) -> Path:
    """Where a training keeps all that it writes."""
    return lake.folder / "checkpoints" / training_id


def _advance(advance: Advance) -> Callable[[Progress], None]:
    def say(said: Progress) -> None:
        speeds = [
            f"{value:,.0f} {name.removesuffix('_per_s')}/s"
            for name, value in said.speed.items()
            if name.endswith("_per_s")
        ]
        advance(said.step, said.steps, ", ".join([f"loss {said.loss:.4f}", *speeds]))

    return say


def _frame_data(lake: Lake, set_name: str, config: ChunkConfig, run_id: str, advance: Advance) -> FrameData:
    """The set's training pictures as one memory-mappable file in the lake's cache, read from the originals once."""
    curated = set_row(lake, set_name)
    data_id = short_hash([curated["curated_id"], config.identity()])
    path = lake.folder / "cache" / f"frames-{data_id}.npy"
    data = FrameData(path, str(curated["curated_id"]), _derived_sha256(curated, data_id))
    if path.exists():
        return data
    path.parent.mkdir(parents=True, exist_ok=True)
    items = clip_items(lake, set_name).to_pylist()
    found: list[Frames] = []
    failures: list[tuple[dict[str, Any], RowError]] = []
    read = partial(frame_chunks, config=config)
    for index, (item, result) in enumerate(_read_all(items, read, config.timeout_s, config.memory_mb)):
        if isinstance(result, RowError):
            failures.append((item, result))
        else:
            found.append(result)
        advance(index + 1, len(items), "clips read")
    _record(lake, failures, data_id, run_id, len(items))
    chunks = np.concatenate(found)
    write_frame_file(path, chunks, len(chunks), (config.side_px, config.side_px))
    return data


def _read_all(
    items: list[dict[str, Any]], read_item: Callable[[dict[str, Any]], Frames], timeout_s: float, memory_mb: int
) -> Iterator[tuple[dict[str, Any], Frames | RowError]]:
    """Every item's frames or its error, in order, by as many child processes as there are CPUs."""
    workers = num_cpus()
    sandboxes = SandboxPool(workers, timeout_s, memory_mb)

    def read(item: dict[str, Any]) -> Frames | RowError:
        try:
            return sandboxes.run(read_item, item)
        except RowError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        # A few ahead of whoever takes them, not all: frames of a large set fill the memory.
        begun: deque[tuple[dict[str, Any], Future[Frames | RowError]]] = deque()
        for item in items:
            begun.append((item, pool.submit(read, item)))
            if len(begun) > 2 * workers:
                first, result = begun.popleft()
                yield first, result.result()
        for first, result in begun:
            yield first, result.result()
    sandboxes.close()
