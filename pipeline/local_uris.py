"""Which paths and URLs name a file of this machine. Nothing is ever fetched: what names another place is refused unopened."""

import os
import re
from urllib.parse import unquote_to_bytes

from schemas.errors import RowError

URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[^/?#]*)(?P<path>.*)", re.IGNORECASE | re.DOTALL)
SHORT_FILE_URL = re.compile(r"file:(?P<path>/(?!/).*)", re.IGNORECASE | re.DOTALL)  # RFC 8089: without a host
DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
LOCAL_HOSTS = ("", "localhost")


def local_path(named: str) -> str:
    """A path or a file URL -> the path on this machine, perhaps relative. Bytes that are no UTF-8 become surrogates.

    A path may hold a colon, `?` or `#`; in a file URL the latter two are taken as part of the name, as most who write one mean.

    Raises: RowError with UrlNotAllowed for every other scheme or host. Its message names no more than these, for the rest of
        a URL may hold a password or a signature. BrokenRow for a NUL byte, which no file has in its name.
    """
    path = _named_path(named)
    if "\0" in path:
        raise RowError("BrokenRow", f"found the path {path!r}; no file has a NUL byte in its name")
    return path


def _named_path(named: str) -> str:
    if short := SHORT_FILE_URL.fullmatch(named):
        return _decoded(short["path"])
    if DATA_URL.match(named):
        raise RowError("UrlNotAllowed", "found a data: URL; write its content to a file and give the path")
    url = URL.fullmatch(named)
    if url is None:
        return "/" + named.lstrip("/") if named.startswith("//") else named
    scheme, host = url["scheme"].lower(), url["host"].rpartition("@")[2]
    if scheme != "file":
        raise RowError(
            "UrlNotAllowed",
            f"found a {scheme}:// URL of the host {host[:100]!r}; only files of this machine are read: mount the store or "
            "copy the file, and give its path",
        )
    if host.lower() not in LOCAL_HOSTS:
        raise RowError("UrlNotAllowed", f"found a file of the machine {host[:100]!r}; mount it and give its path")
    return _decoded(url["path"] or "/")


def _decoded(path: str) -> str:
    return os.fsdecode(unquote_to_bytes(os.fsencode(path)))
