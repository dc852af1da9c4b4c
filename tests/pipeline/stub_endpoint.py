"""An endpoint that answers as it is told: a double for what a real server does only when it is ill."""

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

MODEL = "stub"


@dataclass(frozen=True)
class Reply:
    """What goes back: status, body, headers, and how long it takes."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


def caption_reply(text: str | None, finish_reason: str = "stop", after_s: float = 0.0) -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    return Reply(body=json.dumps({"choices": [choice], "usage": usage}).encode(), after_s=after_s)


@dataclass
class Endpoint:
    """A running stub: where it is, the requests it got, and how many it had at once."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


def frames_of(request: dict[str, Any]) -> list[npt.NDArray[np.uint8]]:
    """The pictures of a chat request, decoded, RGB."""
    found = []
    for part in request["messages"][-1]["content"]:
        url = part.get(part["type"], {}).get("url", "") if part["type"] != "text" else ""
        for encoded in url.partition(",")[2].split(",") if url else []:
            stored = np.frombuffer(base64.b64decode(encoded), np.uint8)
            found.append(np.asarray(cv2.imdecode(stored, cv2.IMREAD_COLOR))[..., ::-1])
    return found


@contextmanager
def serving(
    answer: Callable[[dict[str, Any], int], Reply], port: int = 0, owner: str = "stub", models: bytes | None = None
) -> Iterator[Endpoint]:
    """Serves `answer(request, index)` on localhost; `index` counts requests from 0. `models`: what it says it serves."""
    lock, running = threading.Lock(), [0]
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            connections.append(self.request)
            super().setup()

        def do_GET(self) -> None:
            self._send(Reply(body=models or json.dumps({"data": [{"id": MODEL, "owned_by": owner}]}).encode()))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                index = len(endpoint.requests)
                endpoint.requests.append(request)
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                running[0] += 1
                endpoint.most_at_once = max(endpoint.most_at_once, running[0])
            reply = answer(request, index)
            time.sleep(reply.after_s)
            with lock:
                running[0] -= 1
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            try:
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:
                self.close_connection = True  # whoever asked has stopped waiting

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        for connection in connections:  # as when the server is killed: connections that are kept alive end too
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join()
