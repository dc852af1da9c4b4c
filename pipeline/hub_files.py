"""Weights by path or by name on the Hugging Face hub: `hf-hub:ORG/NAME`, for one file `hf-hub:ORG/NAME/FILE`.

What is in the hub's cache is not downloaded again. Whether a model's folder is complete the hub is asked each time: without a
network that takes half a minute, and with HF_HUB_OFFLINE=1 no time.
"""

from pathlib import Path

from schemas.errors import ConfigError

HUB_PREFIX = "hf-hub:"


def local_folder(name: str) -> Path:
    """A folder's path as it is; a hub name -> the folder of its files in the cache, all of them, so that it has the same
    digest as one downloaded by hand. Raises: ConfigError if the hub does not give it.
    """
    if not name.startswith(HUB_PREFIX):
        return Path(name)
    from huggingface_hub import snapshot_download

    repository, inside = _parts(name)
    if inside:
        raise ConfigError(f"{name}: expected {HUB_PREFIX}ORG/NAME, a whole model")
    try:
        return Path(snapshot_download(repository))
    except Exception as error:  # whatever network, hub and cache raise
        raise _not_there(name, f"hf download {repository} --local-dir FOLDER", error) from error


def local_file(name: str) -> Path:
    """A file's path as it is; a hub name -> the file in the cache. Raises: ConfigError if the hub does not give it."""
    if not name.startswith(HUB_PREFIX):
        return Path(name)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, inside = _parts(name)
    if not inside:
        raise ConfigError(f"{name}: expected {HUB_PREFIX}ORG/NAME/FILE, one file of a model")
    try:
        cached = try_to_load_from_cache(repository, inside)
        return Path(cached if isinstance(cached, str) else hf_hub_download(repository, inside))
    except Exception as error:  # as above
        raise _not_there(name, f"hf download {repository} {inside} --local-dir FOLDER", error) from error


def _parts(name: str) -> tuple[str, str]:
    """A hub name -> its repository and the path inside it, empty for all of it."""
    parts = name.removeprefix(HUB_PREFIX).split("/")
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{name}: expected {HUB_PREFIX}ORG/NAME, or {HUB_PREFIX}ORG/NAME/FILE for one file")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _not_there(name: str, command: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return ConfigError(
        f"{name} is not in the hub's cache and could not be downloaded ({type(error).__name__}: {reason}). Where there is a "
        f"network, run `{command}`, bring what it gives here, and give its path instead of the name"
    )
