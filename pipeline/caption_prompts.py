"""Prompts for captioners: versioned files, so that a caption can name the very words that asked for it."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from schemas.errors import ConfigError
from schemas.recipe import Config, load_recipe, short_hash

FOLDER = Path(__file__).parent / "prompts"
Kind = Literal["image", "video"]
Words = Annotated[str, StringConstraints(strip_whitespace=True)]
"""Without the blank lines that TOML's quotes leave around them."""


class Prompt(Config):
    """What is asked about an image and about a video, and what the system is told before, if anything."""

    image: Words = Field(min_length=1)
    video: Words = Field(min_length=1)
    system: Words = ""

    def asked(self, kind: Kind) -> str:
        """The words for a kind of clip."""
        return self.image if kind == "image" else self.video


def load_prompt(name_or_path: str) -> tuple[str, Prompt]:
    """A shipped prompt such as `dense.v1`, or the path of a TOML file -> its id and text.

    The id names it and hashes its words: a file that was edited under an old name is another prompt.

    Raises: ConfigError if there is none, or it does not validate.
    """
    path = next((path for path in (FOLDER / f"{name_or_path}.toml", Path(name_or_path)) if _is_file(path)), None)
    if path is None:
        known = sorted(file.name.removesuffix(".toml") for file in FOLDER.glob("*.toml"))
        raise ConfigError(f"no prompt {name_or_path!r}: neither a file nor one of the shipped {known}")
    prompt = load_recipe(Prompt, path)
    return f"{path.name.removesuffix('.toml')}-{short_hash(prompt.model_dump())[:8]}", prompt


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
