"""What each decoder costs for each use and codec: every frame, two frames a second, three frames of a video.

Usage: python benchmarks/decoders.py [--media FOLDER] [--repeats N] [--most N] [--write FILE]

Without a folder videos are made, one for each codec, with and without B-frames, with key frames often and seldom. Costs are
those of opening, decoding and converting to BGR, on one thread. Decoders and uses take turns, so that a machine that is busy
for a while is busy for all of them; CPU seconds are of the process. What a decoder cannot open another one would read in
its place: that is said, and not counted.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import av
import cv2
import numpy as np

from jobs.doctor import usual_priority
from pipeline.decode import BUILT_IN, VideoReader, open_video
from pipeline.decode_pyav import first_video_stream, open_container
from pipeline.read_frames import frames_at, moments
from schemas.errors import RowError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a file that is run finds no neighbours
from benchmarks.scan import SUFFIXES

WIDTH, HEIGHT, FPS, SECONDS = 854, 480, 25, 12
MADE: dict[str, tuple[str, dict[str, str]]] = {
    "H.264, no B-frames, key frame every 2 s": ("libx264", {"crf": "23", "bf": "0", "g": "50", "preset": "fast"}),
    "H.264, B-frames, key frame every 2 s": ("libx264", {"crf": "23", "bf": "3", "g": "50", "preset": "fast"}),
    "H.264, B-frames, one key frame": ("libx264", {"crf": "23", "bf": "3", "g": "999", "preset": "fast"}),
    "HEVC, B-frames": ("libx265", {"crf": "27", "preset": "superfast", "x265-params": "keyint=50:log-level=error"}),
    "VP9": ("libvpx-vp9", {"crf": "33", "b": "0", "g": "50", "cpu-used": "8", "deadline": "realtime"}),
    "AV1": ("libsvtav1", {"crf": "35", "preset": "11", "g": "50"}),
    "MPEG-4, B-frames": ("mpeg4", {"b": "2500000", "bf": "2", "g": "50"}),
}


@dataclass(frozen=True)
class Cost:
    """Of one use of one file."""

    cpu_s: float
    wall_s: float


def every_frame(reader: VideoReader, seconds: float) -> None:
    """A picture of each, in one pass."""
    for frame in reader:
        frame.bgr()


def at_times(fps: float | None, num_frames: int | None) -> Callable[[VideoReader, float], None]:
    """Pictures at given times, as `read_frames` has them: one pass, with leaps where the decoder knows them cheaper."""

    def use(reader: VideoReader, seconds: float) -> None:
        for frame in frames_at(reader, moments(0.0, seconds, fps, num_frames), 0.0, seconds):
            frame.bgr()

    return use


def by_seeks(fps: float | None, num_frames: int | None) -> Callable[[VideoReader, float], None]:
    """The same pictures, with a seek for each."""

    def use(reader: VideoReader, seconds: float) -> None:
        for target in moments(0.0, seconds, fps, num_frames):
            for frame in frames_at(reader, [target], min(target, seconds - 1 / FPS), seconds):
                frame.bgr()

    return use


def without_leaps(fps: float | None, num_frames: int | None) -> Callable[[VideoReader, float], None]:
    """The same pictures, in one pass over every frame."""
    use = at_times(fps, num_frames)

    def plain(reader: VideoReader, seconds: float) -> None:
        reader.leaps = lambda seconds: False  # type: ignore[method-assign]  # of this reader alone
        use(reader, seconds)

    return plain


USES: dict[str, Callable[[VideoReader, float], None]] = {
    "every frame": every_frame,
    "2 frames a second": at_times(2.0, None),
    "2 frames a second, a seek each": by_seeks(2.0, None),
    "3 frames": at_times(None, 3),
    "3 frames, a seek each": by_seeks(None, 3),
    "3 frames, every frame decoded": without_leaps(None, 3),
}


def make(folder: Path) -> dict[str, list[Path]]:
    """Videos of a camera that pans over grain, by kind."""
    rng = np.random.default_rng(0)
    rough = cv2.resize(
        rng.integers(30, 225, (20, 36, 3), dtype=np.uint8), (WIDTH + 400, HEIGHT), interpolation=cv2.INTER_CUBIC
    )
    wide = np.clip(rough + rng.normal(0, 5, (HEIGHT, WIDTH + 400, 1)), 0, 255).astype(np.uint8)
    found = {}
    for place, (kind, (codec, options)) in enumerate(MADE.items()):
        path = folder / f"{place}.mp4"
        with usual_priority(), av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=FPS, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for index in range(FPS * SECONDS):
                part = np.ascontiguousarray(wide[:, index : index + WIDTH])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="bgr24")))
            container.mux(stream.encode())
        found[kind] = [path]
    return found


def media(folder: Path, most: int) -> dict[str, list[Path]]:
    """Whole videos of a folder, over a second, by codec and B-frames: at most `most` of each kind, of middle size."""
    found: dict[str, list[Path]] = {}
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    for path in sorted(files, key=lambda path: path.stat().st_size):
        try:
            with open_container(path.absolute()) as container:
                context = first_video_stream(container, path).codec_context
                kind = context.codec.canonical_name + (", B-frames" if context.has_b_frames else "")
                if (container.duration or 0) > av.time_base:
                    found.setdefault(kind, []).append(path)
        except (RowError, av.error.FFmpegError) as error:
            print(f"left out: {path.name}: {error}")
    chosen = {kind: [path for path in _middle(paths, most) if _is_whole(path)] for kind, paths in found.items()}
    return {kind: paths for kind, paths in chosen.items() if paths}


def _middle(paths: list[Path], most: int) -> list[Path]:
    first = max(0, len(paths) - most) // 2
    return paths[first : first + most]


def _is_whole(path: Path) -> bool:
    try:
        return length_s(path) > 1
    except RowError as error:
        print(f"left out: {path.name}: {error}")
        return False


def length_s(path: Path) -> float:
    """When the last frame of a video ends. Raises: RowError if it breaks before."""
    with open_video(path) as reader:
        for _ in reader:
            pass
        return reader.end_s


def cost(path: Path, decoder: str, use: str, seconds: float) -> Cost | None:
    """Of one use; None if the decoder does not read the file. Raises: RowError if it breaks."""
    cpu, wall = time.process_time(), time.perf_counter()
    with open_video(path, decoder) as reader:
        if reader.decoder != decoder:
            return None
        USES[use](reader, seconds)
    return Cost(time.process_time() - cpu, time.perf_counter() - wall)


def measured(files: dict[str, list[Path]], repeats: int) -> dict[tuple[str, str, str], Cost]:
    """Videos by kind -> the median cost of (kind, use, decoder), summed over its files; absent where one is not read."""
    lengths = {path: length_s(path) for path in itertools.chain(*files.values())}
    runs: dict[tuple[str, str, str], list[Cost]] = {}
    for _ in range(repeats):
        for (kind, paths), use, decoder in itertools.product(files.items(), USES, BUILT_IN):
            try:
                costs = [cost(path, decoder, use, lengths[path]) for path in paths]
            except RowError as error:
                print(f"{decoder}, {kind}, {use}: {error}")
                continue
            read = [one for one in costs if one is not None]
            if len(read) == len(costs):
                total = Cost(sum(one.cpu_s for one in read), sum(one.wall_s for one in read))
                runs.setdefault((kind, use, decoder), []).append(total)
    return {
        key: Cost(statistics.median(one.cpu_s for one in costs), statistics.median(one.wall_s for one in costs))
        for key, costs in runs.items()
    }


def tables(found: dict[tuple[str, str, str], Cost], kinds: list[str]) -> Iterator[str]:
    """One table for each use: CPU and wall milliseconds, and CPU time beside the first decoder's."""
    for use in USES:
        yield f"\n**{use[0].upper() + use[1:]}**\n"
        yield f"| | {' | '.join(f'{name}: CPU ms (wall ms)' for name in BUILT_IN)} |"
        yield "|---" * (len(BUILT_IN) + 1) + "|"
        for kind in kinds:
            yield f"| {kind} | {' | '.join(_cell(found, kind, use, decoder) for decoder in BUILT_IN)} |"
        for decoder in BUILT_IN[1:]:
            both = [kind for kind in kinds if {(kind, use, decoder), (kind, use, BUILT_IN[0])} <= found.keys()]
            if both:
                ours, theirs = (sum(found[kind, use, name].cpu_s for kind in both) for name in (BUILT_IN[0], decoder))
                yield f"\n{decoder} costs {theirs / ours:.2f} of {BUILT_IN[0]} over the {len(both)} kinds that both read."


def _cell(found: dict[tuple[str, str, str], Cost], kind: str, use: str, decoder: str) -> str:
    one, first = found.get((kind, use, decoder)), found.get((kind, use, BUILT_IN[0]))
    if one is None:
        return "does not read it"
    beside = "" if first is None or decoder == BUILT_IN[0] else f", x{one.cpu_s / first.cpu_s:.2f}"
    return f"{one.cpu_s * 1000:.0f} ({one.wall_s * 1000:.0f}){beside}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, help="a folder of videos")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--most", type=int, default=2, help="videos of a codec, of a folder")
    parser.add_argument("--write", type=Path, help="a page to whose end the tables are added")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = media(options.media, options.most) if options.media else make(Path(folder))
        found = measured(files, options.repeats)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("av", "opencv-python-headless", "decord"))
    what = "media, by codec" if options.media else f"{SECONDS} s of {WIDTH}x{HEIGHT}, made"
    machine = f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, {libraries}"
    head = f"\n{what}; median of {options.repeats}, {machine}."
    page = "\n".join([head, *tables(found, list(files))]) + "\n"
    print(page)
    if options.write:
        with options.write.open("a") as file:
            file.write(page)


if __name__ == "__main__":
    main()
