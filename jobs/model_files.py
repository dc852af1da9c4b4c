"""Which model a path or a name stands for: a digest of its files, or of its name and commit on a hub."""

from pathlib import Path

from schemas.errors import ConfigError
from schemas.identity import files_digest
from schemas.recipe import short_hash


def model_digest(model: str, revision: str | None, *, served: bool = False) -> str:
    """A folder -> the hash of its files' names and bytes, wherever it lies. A hub name -> the hash of name and commit. A
    name that an endpoint serves and that is no folder here -> the hash of name and revision: nothing more can be known.

    Raises: ConfigError if the folder holds no model, or neither hub nor cache knows the name.
    """
    folder = Path(model)
    if folder.is_dir() and (folder.is_absolute() or not served):
        return files_digest(model, "config.json")
    if served:
        return short_hash([model, revision])
    if folder.is_absolute():
        raise ConfigError(f"{model} is no folder")
    return short_hash([model, _commit(model, revision)])


def _commit(name: str, revision: str | None) -> str:
    """The commit that a hub name stands for: its configuration is fetched, or found in the cache, in a folder named so."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json"])).name
    except Exception as error:
        raise ConfigError(
            f"model {name!r} is neither a folder here nor found on the hub or in its cache ({type(error).__name__})"
        ) from error
