import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from jobs.shipped import FOLDER, load_named
from schemas.recipe import Config

FACTS = ("Reads", "Expect", "Costs", "Run")
RECIPES = sorted(FOLDER.glob("*.toml"))
by_file = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def loader(command: str) -> Callable[[str], Config]:
    """The function by which a command reads its recipe."""
    if command == "curate":
        from jobs.curate import load_curate_recipe

        return load_curate_recipe
    if command == "train":
        from jobs.train import load_training_recipe

        return load_training_recipe
    return lambda name: load_named(model_of(command), name)


def model_of(command: str) -> type[Config]:
    if command == "ingest":
        from jobs.ingest import IngestConfig

        return IngestConfig
    if command == "scan":
        from pipeline.scan_medium import ScanConfig

        return ScanConfig
    if command == "caption":
        from pipeline.caption_clips import CaptionRecipe

        return CaptionRecipe
    if command == "tokenize":
        from jobs.tokenize_clips import TokenizeRecipe

        return TokenizeRecipe
    if command == "pack":
        from jobs.pack import PackRecipe

        return PackRecipe
    if command == "generate":
        from jobs.generate import GenerateRecipe

        return GenerateRecipe
    if command == "prefer":
        from jobs.prefer import PreferRecipe

        return PreferRecipe
    if command == "ask":
        from jobs.ask import AskRecipe

        return AskRecipe
    raise LookupError(f"no model is known for recipes of `outback {command}`: add it here")


def facts(path: Path) -> dict[str, str]:
    """The four facts of a recipe's opening comment."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    found = [re.match(rf"# ({'|'.join(FACTS)}) +(\S.*)", line) for line in comment]
    return {match[1]: match[2] for match in found if match}


def test_there_are_recipes() -> None:
    assert RECIPES


@by_file
def test_a_recipe_opens_with_what_it_is_and_its_four_facts(path: Path) -> None:
    assert re.match(r"# \S", path.read_text(encoding="utf-8")), "the first line says what the recipe is"
    assert tuple(facts(path)) == FACTS


@by_file
def test_a_recipe_can_be_run_as_it_says_and_is_valid(path: Path) -> None:
    from jobs.cli import app

    program, command, *arguments = shlex.split(facts(path)["Run"].replace("[", "").replace("]", ""))
    assert program == "outback"
    group = typer.main.get_command(app)
    context = group.make_context(program, [command, *arguments], resilient_parsing=False)
    subcommand = group.get_command(context, command)  # type: ignore[attr-defined]  # a group, as there are commands
    assert subcommand is not None, f"`outback {command}` does not exist"
    parsed = subcommand.make_context(command, list(arguments), parent=context)  # refuses options it does not know
    assert path.stem in parsed.params.values(), f"the Run line reads another recipe: {parsed.params}"
    assert isinstance(loader(command)(path.stem), Config)
