"""Every table of the lake, in the order of the road."""

from schemas.answers import ANSWERS
from schemas.captions import CAPTION_SCORES, CAPTIONERS, CAPTIONS
from schemas.checkpoints import CHECKPOINTS
from schemas.clips import CLIPS, SCANS
from schemas.curated import CURATED, CURATED_SETS, RECIPES
from schemas.embeddings import EMBEDDINGS
from schemas.fingerprints import FINGERPRINTS
from schemas.generations import GENERATIONS, PREFERENCE_PAIRS, PREFERENCE_SETS
from schemas.media import LOCATIONS, MEDIA
from schemas.runs import ATTEMPTS, RUNS
from schemas.scores import AESTHETIC, CONTINUITY, DUPLICATE, FAMILIES, SEMANTIC
from schemas.sequences import SEQUENCE_SETS, SEQUENCES
from schemas.table import Table
from schemas.texts import TEXTS
from schemas.vision_tokens import TOKENIZERS, VISION_TOKENS

TABLES: tuple[Table, ...] = (
    MEDIA,
    LOCATIONS,
    TEXTS,
    CLIPS,
    SCANS,
    *FAMILIES,
    AESTHETIC,
    EMBEDDINGS,
    FINGERPRINTS,
    DUPLICATE,
    SEMANTIC,
    CONTINUITY,
    RECIPES,
    CURATED,
    CURATED_SETS,
    CAPTIONERS,
    CAPTIONS,
    CAPTION_SCORES,
    TOKENIZERS,
    VISION_TOKENS,
    SEQUENCES,
    SEQUENCE_SETS,
    CHECKPOINTS,
    GENERATIONS,
    PREFERENCE_PAIRS,
    PREFERENCE_SETS,
    ANSWERS,
    ATTEMPTS,
    RUNS,
)
