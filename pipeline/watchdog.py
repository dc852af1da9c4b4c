"""Who holds what, told when a stage makes no progress: the item in hand, where, and since when.

Workers note what they have under way in Ray's own key-value store, seconds after it began, so that short items cost
nothing. An actor of our own in its place would cost a process, which a small machine feels.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self

STALL_S = 60.0
NOTE_EVERY_S = 1.0
NAMESPACE = b"outback"
NUM_SHOWN = 5


class InHand:
    """What one worker has under way. Its threads share it."""

    def __init__(self, run_id: str) -> None:
        self._key = f"{run_id}/{platform.node()}/{os.getpid()}".encode()
        self._items: dict[int, tuple[float, str]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._note, name="in-hand", daemon=True).start()

    @contextmanager
    def holding(self, item_id: str, uri: str | None) -> Iterator[None]:
        """An item is in hand while the block runs."""
        place = threading.get_ident()
        with self._lock:
            self._items[place] = (time.time(), item_id if uri is None else f"{item_id} ({uri})")
        try:
            yield
        finally:
            with self._lock:
                del self._items[place]

    def _note(self) -> None:
        from ray.experimental import internal_kv

        noted: list[tuple[float, str]] = []
        while internal_kv._internal_kv_initialized():
            with self._lock:
                held = sorted(self._items.values())
            if held != noted:
                internal_kv._internal_kv_put(self._key, json.dumps(held).encode(), namespace=NAMESPACE)
                noted = held
            time.sleep(NOTE_EVERY_S)


class Watchdog:
    """Says again and again what workers hold while a stage makes no progress. Ends nothing: limits of items do that."""

    def __init__(self, run_id: str, stall_s: float, tell: Callable[[str], None]) -> None:
        self._run_id, self._stall_s, self._tell = run_id, stall_s, tell
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progressed(self) -> None:
        """Something was finished just now."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        from ray.experimental import internal_kv

        self._over.set()
        self._thread.join()
        if error is None:  # else the store may be what is gone
            internal_kv._internal_kv_del(f"{self._run_id}/".encode(), del_by_prefix=True, namespace=NAMESPACE)

    def _watch(self) -> None:
        while not self._over.wait(self._stall_s):
            quiet_s = time.monotonic() - self._last
            if quiet_s >= self._stall_s:
                self._tell(f"no progress for {quiet_s:.0f} s: {_held(self._run_id)}")


def _held(run_id: str) -> str:
    """What workers of a run hold, the longest first."""
    import ray
    from ray.experimental import internal_kv

    held: list[tuple[float, str, str]] = []
    for key in internal_kv._internal_kv_list(f"{run_id}/".encode(), namespace=NAMESPACE):
        _, host, pid = key.decode().rsplit("/", 2)
        items: list[Any] = json.loads(internal_kv._internal_kv_get(key, namespace=NAMESPACE) or b"[]")
        held += [(since, item, f"worker {pid} on {host}") for since, item in items]
    if not held:
        free, there = ray.available_resources(), ray.cluster_resources()
        cpus = f"{free.get('CPU', 0):g} of {there.get('CPU', 0):g} CPUs"
        return (
            f"no worker has an item in hand; {cpus} and {free.get('GPU', 0):g} of {there.get('GPU', 0):g} GPUs are free"
        )
    told = [
        f"{worker} holds {item} since {datetime.fromtimestamp(since, UTC):%H:%M:%S} UTC"
        for since, item, worker in sorted(held)
    ]
    more = f"; and {len(told) - NUM_SHOWN} more" if len(told) > NUM_SHOWN else ""
    return "; ".join(told[:NUM_SHOWN]) + more
