"""Ids that come from content: the same bytes and the same span have the same id on every machine."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from schemas.errors import ConfigError
from schemas.recipe import short_hash

READ_BYTES = 1 << 20
NOT_THE_MODEL = frozenset({".gitattributes", "README.md", "LICENSE"})


def file_digest(path: Path) -> str:
    """A file -> the 64 hex digits of the SHA-256 of its bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def files_digest(model: str, needed: str) -> str:
    """A folder -> the hash of its files' names and bytes. Raises: ConfigError if the needed file is not in it."""
    folder = Path(model)
    if not (folder / needed).is_file():
        raise ConfigError(f"{folder} holds no model: there is no {needed}")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in NOT_THE_MODEL and not _hidden(path.relative_to(folder))
    )
    with ThreadPoolExecutor(8) as threads:  # hashing large buffers releases the lock of the interpreter
        digests = threads.map(file_digest, files)
        named = zip((path.relative_to(folder).as_posix() for path in files), digests, strict=True)
        return short_hash(dict(named))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def media_id(digest: str) -> str:
    """SHA-256 of a medium's bytes in hex -> its id, the first 16 digits."""
    return digest[:16]


def clip_id(media: str, start_ms: int, end_ms: int) -> str:
    """A span of a medium in milliseconds -> `media_id-start_ms-end_ms`, zero padded so that ids sort by time."""
    return f"{media}-{start_ms:09d}-{end_ms:09d}"


def window_id(clip: str, window: int) -> str:
    """A clip's id and the index of one of its windows -> the id under which a caption of it is asked for."""
    return f"{clip}#{window}"
