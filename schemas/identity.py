"""Ids that come from content: the same bytes and the same span have the same id on every machine."""

import hashlib
from pathlib import Path

READ_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """A file -> the 64 hex digits of the SHA-256 of its bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def media_id(digest: str) -> str:
    """SHA-256 of a medium's bytes in hex -> its id, the first 16 digits."""
    return digest[:16]


def clip_id(media: str, start_ms: int, end_ms: int) -> str:
    """A span of a medium in milliseconds -> `media_id-start_ms-end_ms`, zero padded so that ids sort by time."""
    return f"{media}-{start_ms:09d}-{end_ms:09d}"


def window_id(clip: str, window: int) -> str:
    """A clip's id and the index of one of its windows -> the id under which a caption of it is asked for."""
    return f"{clip}#{window}"
