"""A captioning in a process of its own, which commits at every chance, so that a kill finds work done and work undone.

python -m tests.flows.caption_driver LAKE SET RECIPE KEY=VALUE...
"""

import sys
from pathlib import Path

from jobs.caption import caption
from jobs.shipped import load_named
from pipeline import stage
from pipeline.caption_clips import CaptionRecipe
from schemas.catalog import Lake

if __name__ == "__main__":
    stage.COMMIT_SECONDS = 0.0
    recipe = load_named(CaptionRecipe, sys.argv[3], sys.argv[4:])
    print(caption(Lake.open(Path(sys.argv[1])), sys.argv[2], recipe).num_new)
