"""Captions: text about a window of a clip, by a captioner. A second captioner adds rows."""

from typing import Any

import pyarrow as pa

from schemas.columns import CLIP_ID, RUN_ID, SCORER_ID, WRITTEN_AT
from schemas.table import Column, Table


def frame_times(num_frames: int) -> dict[str, Any]:
    """When a captioner believes that the frames of a clip were taken: one a second, which is what vLLM's server assumes of
    frames sent to it. In the keys of transformers' and vLLM's video metadata. Training and captioning must agree.
    """
    frames = list(range(num_frames))
    return {"fps": 1.0, "duration": float(num_frames), "total_num_frames": num_frames, "frames_indices": frames}


CAPTIONER_ID = Column("captioner_id", pa.string(), "hash of model digest, prompt, sampling, windowing and frames")
PROMPT_ID = Column(
    "prompt_id", pa.string(), "name, version and hash of the prompt; null where none was asked", nullable=True
)

CAPTIONERS = Table(
    name="captioners",
    doc="What a captioner id stands for: everything a caption depends on, and nothing else.",
    key=("captioner_id",),
    columns=(
        CAPTIONER_ID,
        Column("model", pa.string(), "path or name of the model as it was given; `provided`: came with the medium"),
        Column("model_digest", pa.string(), "hash of the model's files, or of name and revision where it is remote"),
        PROMPT_ID,
        Column("prompt", pa.string(), "JSON: the system, image and video prompts word for word"),
        Column("sampling", pa.string(), "JSON: sampling of the first try and of the second"),
        Column("windowing", pa.string(), "JSON: how clips are cut into windows and frames are chosen and sized"),
        Column("checks", pa.string(), "JSON: what a caption must pass"),
        RUN_ID,
        WRITTEN_AT,
    ),
)

CAPTIONS = Table(
    name="captions",
    doc="One row per clip, window and captioner. A caption that failed its checks is here too, with its `problem`.",
    key=("clip_id", "window", "captioner_id"),
    columns=(
        CLIP_ID,
        Column("window", pa.int32(), 'index of the window inside the clip, from 0; in SQL written "window"'),
        CAPTIONER_ID,
        Column("text", pa.string(), "the caption"),
        Column("problem", pa.string(), "the check it failed; null if it passed all", nullable=True),
        Column("language", pa.string(), "ISO 639-1; null where the text is too short to tell", nullable=True),
        Column("window_start_ms", pa.int64(), "start of the window inside the medium"),
        Column("window_end_ms", pa.int64(), "end of the window inside the medium"),
        Column("num_frames", pa.int32(), "frames shown to the model; null for provided captions", nullable=True),
        PROMPT_ID,
        Column("prompt_tokens", pa.int32(), "tokens in, pictures included, of all tries", nullable=True),
        Column("output_tokens", pa.int32(), "tokens out, of all tries", nullable=True),
        Column("finish_reason", pa.string(), "`stop`: the model ended; `length`: it was cut", nullable=True),
        Column("tries", pa.int32(), "1, or 2 if the first caption failed a check", nullable=True),
        Column("first_text", pa.string(), "the caption of the first try, where there was a second", nullable=True),
        Column("first_problem", pa.string(), "the check that the first try failed", nullable=True),
        Column(
            "engine",
            pa.string(),
            "what ran the model: vllm, endpoint; `provided` came with the medium",
            provenance=True,
        ),
        Column("origin", pa.string(), "for provided captions: manifest, sidecar_json or sidecar_txt", nullable=True),
        RUN_ID,
        WRITTEN_AT,
    ),
)

CAPTION_SCORES = Table(
    name="score_caption",
    doc="Captions as numbers, over all windows of a clip that one captioner captioned.",
    key=("clip_id", "scorer_id"),
    columns=(
        CLIP_ID,
        SCORER_ID,
        CAPTIONER_ID,
        Column("words", pa.float32(), "words of the shortest window's caption", nullable=True),
        Column("repetition", pa.float32(), "largest share of repeated 4-grams over the windows, 0 to 1", nullable=True),
        Column("problems", pa.float32(), "windows whose caption failed a check", nullable=True),
        Column(
            "clip_similarity",
            pa.float32(),
            "lowest CLIP cosine of caption and middle frame; null without weights",
            nullable=True,
        ),
        RUN_ID,
        WRITTEN_AT,
    ),
)
