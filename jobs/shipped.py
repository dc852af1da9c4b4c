"""Recipes by name: those that ship with Outback, or any TOML file by path."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from schemas.errors import ConfigError
from schemas.recipe import Config, load_recipe

FOLDER = Path(__file__).parent / "recipes"
C = TypeVar("C", bound=Config)


def recipe_file(name_or_path: str) -> Path:
    """The shipped recipe of that name, or the file at that path. Raises: ConfigError naming the shipped ones."""
    shipped = FOLDER / f"{name_or_path}.toml"
    if _exists(shipped):
        return shipped
    path = Path(name_or_path)
    if not _exists(path):
        names = sorted(file.stem for file in FOLDER.glob("*.toml"))
        raise ConfigError(f"no recipe {name_or_path!r}: neither a file nor one of the shipped {names}")
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than any file's, or with a NUL in it
        return False


def load_named(model: type[C], name_or_path: str, overrides: Sequence[str] = ()) -> C:
    """A recipe by name or path, with `key=value` overrides, validated."""
    return load_recipe(model, recipe_file(name_or_path), overrides)
