"""How well captioning feeds an engine: a stub of fixed speed, and a small vLLM engine beside ray.data.llm.

Usage: python benchmarks/caption.py reading | engine

`reading` makes 720p clips, measures how many of their frames per second two processes read, and then how busy the stage
keeps an engine that takes as many windows per second as a share of that rate allows.

`engine` captions the same images three ways with one small model: by single requests, by the stage, and by ray.data.llm. A
job is timed twice, with few and with many images, and the difference counts: engines take half a minute to start.
"""

import argparse
import base64
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.caption import caption_stage
from jobs.cluster import ensure_ray
from model.captioner import CaptionerSize, write_captioner
from pipeline.caption_clips import CaptionRecipe, CaptionWorker
from pipeline.caption_engine import Answer, Question, Sampling
from pipeline.caption_prompts import load_prompt
from pipeline.caption_vllm import VllmConfig, VllmEngine
from pipeline.caption_windows import WindowConfig, window_frames
from pipeline.stage import run_stage
from schemas.catalog import Lake

SIZE = (1280, 720)
FPS, CLIP_S, NUM_CLIPS = 24, 10, 6
NUM_READERS = 2
SLOTS = 8
SHARES = (0.5, 0.7, 0.9, 1.2)
WINDOWS_PER_LOAD = 60
FEW, MANY, NUM_ALONE = 128, 1152, 48
VLLM = VllmConfig(max_num_seqs=32, max_model_len=512, dtype="float32", enforce_eager=True, cpu_kv_cache_gb=1)
SAMPLING = Sampling(max_tokens=16)


# --- frames to an engine of fixed speed ---


def make_clips(folder: Path) -> list[Path]:
    """Pans over noise of several grains, as H.264 with the encoder's usual distance of key frames."""
    import av
    import cv2

    paths = []
    for number in range(NUM_CLIPS):
        rng = np.random.default_rng(number)
        fine = cv2.resize(rng.integers(0, 255, (90, 160, 3), np.uint8), (SIZE[0] * 2, SIZE[1] * 2))
        path = folder / f"pan{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
            stream.time_base = Fraction(1, FPS)
            for index in range(FPS * CLIP_S):
                left, top = 3 * index, 2 * index
                view = np.ascontiguousarray(fine[top : top + SIZE[1], left : left + SIZE[0]])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
            container.mux(stream.encode(None))
        paths.append(path)
    return paths


def seek_frames(path: Path, num_frames: int = 12) -> int:
    """What a decoder alone costs: seek to each of twelve moments, decode up to it, convert the picture."""
    import av

    count = 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        for at in np.linspace(0, CLIP_S - 1 / FPS, num_frames):
            container.seek(int(at / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= at - 0.5 / FPS:
                    count += len(frame.to_ndarray(format="rgb24")) > 0
                    break
    return count


def stage_frames(path: Path) -> int:
    """The same window as the stage reads it, in the process that asks."""
    return len(window_frames(_item(path, 0), WindowConfig()))


def reading_rate(read: Callable[[Path], int], paths: list[Path], rounds: int = 2) -> float:
    """Frames per second of two processes, once they are started."""
    with ProcessPoolExecutor(NUM_READERS) as pool:
        list(pool.map(read, paths[:NUM_READERS]))
        started = time.perf_counter()
        frames = sum(pool.map(read, paths * rounds))
        return frames / (time.perf_counter() - started)


class StubEngine:
    """Takes a fixed time for each window and as many windows at once as it has slots; notes when it worked."""

    name = "stub"

    def __init__(self, service_s: float, notes: Path) -> None:
        self._service_s, self._notes, self._slots = service_s, notes, threading.Semaphore(SLOTS)

    def answer(self, question: Question, sampling: Sampling) -> Answer:
        """Blocks for the service time."""
        with self._slots:
            started = time.time()
            time.sleep(self._service_s)
            with self._notes.open("a") as notes:
                notes.write(f"{started} {time.time()}\n")
        return Answer("a pan over a pattern of many colours", "stop", 1, 1)

    def close(self) -> None:
        """Nothing to end."""


def busy_share(lake: Lake, paths: list[Path], windows_per_s: float) -> tuple[float, float]:
    """An engine of so many windows per second behind the stage -> the share of its time it worked, and frames per second.

    Counted from when it had as many windows as slots to the start of its last, so that neither starting up nor running
    out is in it.
    """
    notes = lake.folder / f"notes-{windows_per_s:.3f}"
    recipe = CaptionRecipe(engine="endpoint", model="stub", readers=NUM_READERS, endpoint={"concurrency": SLOTS})
    items = [_item(paths[index % len(paths)], index) for index in range(WINDOWS_PER_LOAD)]
    run_captions(lake, recipe, partial(StubEngine, SLOTS / windows_per_s, notes), items, f"{windows_per_s:.3f}")
    spans = sorted(tuple(map(float, line.split())) for line in notes.read_text().splitlines())
    first, last = spans[SLOTS][0], spans[-1][0]
    worked = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    return worked / (SLOTS * (last - first)), 12 * (len(spans) - 1 - SLOTS) / (last - first)


def reading() -> None:
    """Print what reading costs, and how busy engines of several speeds are kept."""
    ensure_ray()
    with tempfile.TemporaryDirectory() as folder:
        lake, paths = Lake(Path(folder) / "lake"), make_clips(Path(folder))
        lake.folder.mkdir()
        rates: dict[str, list[float]] = {"seek": [], "stage": []}
        for _ in range(3):
            rates["seek"].append(reading_rate(seek_frames, paths))
            rates["stage"].append(reading_rate(stage_frames, paths))
        seek, limit = (statistics.median(rates[name]) for name in ("seek", "stage"))
        print(
            f"a seek for each frame: {seek:.0f} frames/s; as the stage reads: {limit:.0f}, {limit / seek:.2f} times that"
        )
        for share in SHARES:
            busy, rate = busy_share(lake, paths, share * limit / 12)
            print(
                f"engine of {share:.0%} of the reading rate: busy {busy:.1%}, fed {rate:.0f} frames/s, {rate / limit:.0%}"
            )


# --- images to vLLM ---


def make_images(folder: Path) -> list[Path]:
    """Small pictures of noise, each another one, so that no cache answers."""
    import cv2

    paths = [folder / f"image{index:05}.png" for index in range(MANY)]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8))
    return paths


def alone(model: Path, paths: list[Path]) -> float:
    """Seconds for one image when each waits for the one before it."""
    engine = VllmEngine(str(model), None, VLLM)
    prompt = load_prompt("short.v1")[1].asked("image")
    questions = [Question("image", window_frames(_item(path, 0, "image"), WindowConfig()), prompt) for path in paths]
    try:
        engine.answer(questions[0], SAMPLING)
        started = time.perf_counter()
        for question in questions[1:]:
            engine.answer(question, SAMPLING)
        return (time.perf_counter() - started) / (len(questions) - 1)
    finally:
        engine.close()


def by_the_stage(model: Path, paths: list[Path]) -> float:
    """Seconds of a whole job, commits included."""
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(Path(folder) / "lake")
        recipe = CaptionRecipe(
            engine="vllm", model=str(model), prompt="short.v1", vllm=VLLM, sampling=SAMPLING, second_sampling=SAMPLING,
            checks={"language": "any", "min_chars": 1, "may_be_truncated": True, "max_repetition": 1.0},
        )  # fmt: skip
        items = [_item(path, index, "image") for index, path in enumerate(paths)]
        started = time.perf_counter()
        run_captions(lake, recipe, partial(VllmEngine, str(model), None, VLLM), items, "vllm")
        return time.perf_counter() - started


def by_ray_data_llm(model: Path, paths: list[Path]) -> float:
    """Seconds of the same job by ray.data.llm, which writes nothing; its rows are counted."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    prompt = load_prompt("short.v1")[1].asked("image")
    config = vLLMEngineProcessorConfig(
        model_source=str(model),
        engine_kwargs={
            "max_model_len": VLLM.max_model_len, "max_num_seqs": VLLM.max_num_seqs, "dtype": VLLM.dtype,
            "enforce_eager": True, "disable_log_stats": True,
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        placement_group_config={"bundles": [{"CPU": 0.5}]},
        log_engine_metrics=False,
        batch_size=32,
        concurrency=1,
        prepare_multimodal_stage={"enabled": True, "num_cpus": 0.2},
        chat_template_stage={"enabled": True, "num_cpus": 0.2},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )  # fmt: skip

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        url = "data:image/png;base64," + base64.b64encode(Path(row["path"]).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        sampling = {"temperature": 0.0, "max_tokens": SAMPLING.max_tokens}
        return {"messages": [{"role": "user", "content": content}], "sampling_params": sampling}

    processor = build_processor(config, preprocess=ask, postprocess=lambda row: {"text": row["generated_text"]})
    started = time.perf_counter()
    rows = processor(ray.data.from_items([{"path": str(path)} for path in paths])).take_all()
    seconds = time.perf_counter() - started
    if len(rows) != len(paths):
        raise RuntimeError(f"ray.data.llm gave {len(rows)} rows for {len(paths)} images")
    return seconds


def engine() -> None:
    """Print images per second of the three ways, and their ratios."""
    import ray

    ray.init(num_cpus=4, log_to_driver=False)  # two stages of ray.data.llm wait for CPUs that an engine holds
    with tempfile.TemporaryDirectory() as folder:
        model, paths = Path(folder) / "model", make_images(Path(folder))
        size = CaptionerSize(side_px=64, temporal_patch_size=2)
        write_captioner(model, size, ["a picture of noise"], 0)
        rates = {"one at a time": 1 / alone(model, paths[:NUM_ALONE])}
        for name, job in (("the stage", by_the_stage), ("ray.data.llm", by_ray_data_llm)):
            few, many = job(model, paths[:FEW]), job(model, paths)
            rates[name] = (MANY - FEW) / (many - few)
            print(f"{name}: {FEW} images in {few:.1f} s, {MANY} in {many:.1f} s", flush=True)
        for name, rate in rates.items():
            print(f"{name}: {rate:.1f} images/s, {rate / rates['one at a time']:.1f} times one at a time")
        print(f"the stage against ray.data.llm: {rates['the stage'] / rates['ray.data.llm']:.2f}")


# --- both ---


def _item(path: Path, index: int, kind: str = "video") -> dict[str, Any]:
    span = {"window_start_ms": 0, "window_end_ms": CLIP_S * 1000 if kind == "video" else 0}
    clip = {"clip_id": f"{index:06}", "window_id": f"{index:06}#0", "window": 0, "kind": kind, "uri": str(path)}
    return {**clip, **span, "attempt": 1}


def run_captions(
    lake: Lake, recipe: CaptionRecipe, make_engine: Callable[[], Any], items: list[dict[str, Any]], captioner_id: str
) -> None:
    """The stage as `outback caption` runs it, on items of ours. Raises: RuntimeError unless each gave a caption."""
    prompt_id, prompt = load_prompt("short.v1")
    make_worker = partial(CaptionWorker, make_engine, recipe, captioner_id, prompt_id, prompt)
    stage = caption_stage(recipe, captioner_id, make_worker)
    outcome = run_stage(lake, stage, pa.Table.from_pylist(items), "benchmark", 1, lambda *_: None)
    if outcome.num_done != len(items):
        raise RuntimeError(f"{outcome.num_failed} of {len(items)} windows failed; see attempts in {lake.where}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["reading", "engine"])
    {"reading": reading, "engine": engine}[parser.parse_args().part]()
