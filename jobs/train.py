"""Train: a vision tokenizer on a curated set, or a language model on a sequence set; the recipe says which.

A training is identified by its recipe and the content of its data. The same training is resumed when it was interrupted and
found again when it is finished; its checkpoint is a row that names the data.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.curate import read_set
from jobs.pack import materialise, sequence_set, text_tokenizer_from_json
from jobs.progress import Advance, progress
from jobs.run import Run, recorded
from jobs.tokenize_clips import clip_items
from pipeline.frame_chunks import ChunkConfig, frame_chunks
from pipeline.sandbox import Sandbox
from schemas.catalog import Lake
from schemas.checkpoints import CHECKPOINTS
from schemas.columns import CLIP_ID
from schemas.curated import CURATED_SETS
from schemas.errors import ConfigError, RowError
from schemas.recipe import Config, short_hash
from schemas.runs import ATTEMPTS
