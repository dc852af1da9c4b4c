"""A captioning in a process of its own, which commits at every chance, so that a kill finds work done and work undone.

python -m tests.flows.caption_driver LAKE SET RECIPE KEY=VALUE... [--hold MARKER]
"""

import argparse
import os
from pathlib import Path

from jobs.caption import caption
from jobs.shipped import load_named
from pipeline import stage
from pipeline.caption_clips import CaptionRecipe
from schemas.catalog import Lake
from tests.pipeline.small_vllm import engines_of


def hold_engines(marker: Path) -> None:
    """The engines of this process stand still from the first commit on; `marker` says when it is made.

    The committing process stops them itself: whoever looks from outside comes too late on a fast machine.
    """
    commit = stage._Committer.commit

    def first_commit(committer: stage._Committer) -> None:
        stage._Committer.commit = commit  # type: ignore[method-assign]
        for engine in engines_of(os.getpid()):
            engine.suspend()
        commit(committer)
        marker.touch()

    stage._Committer.commit = first_commit  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("lake", type=Path)
    parser.add_argument("set_name")
    parser.add_argument("recipe")
    parser.add_argument("options", nargs="*")
    parser.add_argument("--hold", type=Path)
    args = parser.parse_args()
    stage.COMMIT_SECONDS = 0.0
    if args.hold:
        hold_engines(args.hold)
    recipe = load_named(CaptionRecipe, args.recipe, args.options)
    print(caption(Lake.open(args.lake), args.set_name, recipe).num_new)
