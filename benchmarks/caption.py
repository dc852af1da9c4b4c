"""How well captioning feeds an engine: a stub of fixed speed, and a small vLLM engine beside ray.data.llm.

Usage: python benchmarks/caption.py [reading | engine]

`reading` makes 720p clips and measures how many of their frames per second the stage hands to an engine that takes no time,
beside a seek of the bare decoder for each frame, and then how busy it keeps an engine of fixed speed, at shares of that rate.

`engine` captions the same images three ways with one small model: by single requests, by the stage, and by ray.data.llm, in
turn. Of a job counts what follows its first images, as engines take half a minute to start: from then to its end, the
stage's commits included.
"""

import argparse
import string
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jobs.caption import caption_stage
from jobs.cluster import ensure_ray
from model.captioner import CaptionerSize, load_captioner, write_captioner
from pipeline.caption_clips import CaptionRecipe, CaptionWorker
from pipeline.caption_engine import Answer, Question, Sampling
from pipeline.caption_prompts import load_prompt
from pipeline.caption_vllm import VllmConfig, VllmEngine
from pipeline.caption_windows import WindowConfig, window_frames
from pipeline.stage import run_stage
from schemas.captions import CAPTIONS
from schemas.catalog import Lake
from schemas.identity import window_id

SIZE = (1280, 720)
FPS, CLIP_S, NUM_CLIPS = 24, 10, 6
NUM_READERS = 2
SLOTS = 8
SHARES = (0.5, 0.8, 0.95)
WINDOWS_PER_LOAD = 80
NUM_FIRST, NUM_IMAGES, NUM_ALONE, ROUNDS = 256, 2048, 48, 3
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
        fine = cv2.resize(rng.integers(0, 255, (90, 160, 3), np.uint8), (SIZE[0] * 2, SIZE[1] * 2)).astype(np.uint8)
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


def seek_rate(paths: list[Path], rounds: int = 2) -> float:
    """Frames per second of bare seeking, in as many processes as the stage has readers, once they are started."""
    with ProcessPoolExecutor(NUM_READERS) as pool:
        list(pool.map(seek_frames, paths[:NUM_READERS]))
        started = time.perf_counter()
        frames = sum(pool.map(seek_frames, paths * rounds))
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


def fed(lake: Lake, paths: list[Path], service_s: float) -> tuple[float, float]:
    """An engine of that service time behind the stage -> the share of its time it worked, and frames per second.

    Counted from when it has had as many windows as slots to the start of its last, so that neither starting up nor running
    out is in it.
    """
    notes = lake.folder / f"notes-{uuid.uuid4().hex}"
    recipe = CaptionRecipe(engine="endpoint", model="stub", readers=NUM_READERS, endpoint={"concurrency": SLOTS})
    items = [_item(paths[index % len(paths)], index) for index in range(WINDOWS_PER_LOAD)]
    run_captions(lake, recipe, partial(StubEngine, service_s, notes), items, notes.name)
    spans = sorted(tuple(map(float, line.split())) for line in notes.read_text().splitlines())
    first, last = spans[SLOTS][0], spans[-1][0]
    worked = sum(max(0.0, min(end, last) - max(start, first)) for start, end in spans)
    return worked / (SLOTS * (last - first)), 12 * (len(spans) - 1 - SLOTS) / (last - first)


def reading() -> None:
    """Print what reading costs, and how busy engines of several speeds are kept. The limit is measured anew around each."""
    ensure_ray()
    with tempfile.TemporaryDirectory() as folder:
        lake, paths = Lake(Path(folder) / "lake"), make_clips(Path(folder))
        lake.folder.mkdir()
        limits = [fed(lake, paths, 0.0)[1]]
        for share in SHARES:
            seek = seek_rate(paths)
            print(
                f"seeks {seek:.1f} frames/s; the stage {limits[-1]:.1f}, {limits[-1] / seek:.2f} times that", flush=True
            )
            busy, rate = fed(lake, paths, SLOTS * 12 / (share * limits[-1]))
            limits.append(fed(lake, paths, 0.0)[1])
            print(
                f"engine of {share:.0%} of that: busy {busy:.1%}, fed {rate:.1f} frames/s; the limit right after: "
                f"{limits[-1]:.1f}",
                flush=True,
            )


# --- images to vLLM ---


def make_images(folder: Path) -> list[Path]:
    """Small pictures of noise, each another one, so that no cache answers."""
    import cv2

    paths = [folder / f"image{index:05}.png" for index in range(NUM_IMAGES)]
    for index, path in enumerate(paths):
        cv2.imwrite(str(path), np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8))
    return paths


def make_model(folder: Path) -> None:
    """A captioner of random weights that says letters and nothing else: an empty caption would be asked for twice."""
    import torch
    from transformers import AutoTokenizer

    write_captioner(folder, CaptionerSize(side_px=64, temporal_patch_size=2), ["a picture of noise"], 0)
    letters = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(string.ascii_letters))
    network = load_captioner(str(folder))
    with torch.no_grad():
        words = network.get_output_embeddings().weight  # type: ignore[operator]
        words[[token for token in range(len(words)) if token not in letters]] = 0
    network.save_pretrained(folder)  # type: ignore[operator]


def alone(model: Path, paths: list[Path]) -> float:
    """Images per second when each waits for the one before it."""
    engine = VllmEngine(str(model), None, VLLM)
    prompt = load_prompt("short.v1")[1].asked("image")
    questions = [
        Question("image", window_frames(_item(path, 0, "image"), WindowConfig()), prompt) for path in paths[:NUM_ALONE]
    ]
    try:
        engine.answer(questions[0], SAMPLING)
        started = time.perf_counter()
        for question in questions[1:]:
            engine.answer(question, SAMPLING)
        return (len(questions) - 1) / (time.perf_counter() - started)
    finally:
        engine.close()


class NotingEngine(VllmEngine):
    """Notes when it answered."""

    def __init__(self, notes: Path, model: Path) -> None:
        super().__init__(str(model), None, VLLM)
        self._notes = notes

    def answer(self, question: Question, sampling: Sampling) -> Answer:
        """See `Engine.answer`."""
        answered = super().answer(question, sampling)
        with self._notes.open("a") as notes:
            notes.write(f"{time.time()}\n")
        return answered


def by_the_stage(model: Path, paths: list[Path]) -> float:
    """Images per second of a job, which commits captions."""
    with tempfile.TemporaryDirectory() as folder:
        lake, notes = Lake(Path(folder) / "lake"), Path(folder) / "notes"
        recipe = CaptionRecipe(
            engine="vllm", model=str(model), prompt="short.v1", vllm=VLLM, sampling=SAMPLING, second_sampling=SAMPLING,
            checks={"language": "any", "min_chars": 1, "may_be_truncated": True, "max_repetition": 1.0},
        )  # fmt: skip
        items = [_item(path, index, "image") for index, path in enumerate(paths)]
        run_captions(lake, recipe, partial(NotingEngine, notes, model), items, "vllm")
        ended = time.time()
        if pc.max(lake.read(CAPTIONS, ["tries"])["tries"]).as_py() != 1:
            raise RuntimeError("some images were asked about twice: the two jobs cannot be compared")
        return _rate([float(line) for line in notes.read_text().splitlines()], ended)


def by_ray_data_llm(model: Path, paths: list[Path]) -> float:
    """Images per second of the same job by ray.data.llm, which writes nothing; its rows are counted.

    Its own stage for pictures imports what vLLM has since moved, so its engine stage gets pictures and prompts as they are.
    """
    import ray.data
    from PIL import Image
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from transformers import AutoProcessor

    content = [{"type": "image"}, {"type": "text", "text": load_prompt("short.v1")[1].asked("image")}]
    template = AutoProcessor.from_pretrained(model).apply_chat_template
    prompt = template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
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
        chat_template_stage={"enabled": False},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
    )  # fmt: skip

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": 0.0, "max_tokens": SAMPLING.max_tokens}
        picture = Image.open(row["path"]).convert("RGB")
        return {"prompt": prompt, "multimodal_data": {"image": picture}, "sampling_params": sampling}

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row["generated_text"], "at": time.time()}

    processor = build_processor(config, preprocess=ask, postprocess=told)
    rows = processor(ray.data.from_items([{"path": str(path)} for path in paths])).take_all()
    return _rate([row["at"] for row in rows], time.time())


def _rate(answered: list[float], ended: float) -> float:
    """Images per second after the first of them."""
    if len(answered) != NUM_IMAGES:
        raise RuntimeError(f"{len(answered)} answers for {NUM_IMAGES} images")
    return (NUM_IMAGES - NUM_FIRST) / (ended - sorted(answered)[NUM_FIRST - 1])


def engine() -> None:
    """Print images per second of the three ways, and their ratios."""
    ray.init(num_cpus=4, log_to_driver=False)  # two stages of ray.data.llm wait for CPUs that an engine holds
    with tempfile.TemporaryDirectory() as folder:
        model, paths = Path(folder) / "model", make_images(Path(folder))
        make_model(model)
        for _ in range(ROUNDS):
            single, ours, theirs = (way(model, paths) for way in (alone, by_the_stage, by_ray_data_llm))
            print(
                f"one at a time {single:.1f} images/s, the stage {ours:.1f}, ray.data.llm {theirs:.1f}: the stage is "
                f"{ours / single:.1f} times one at a time, {ours / theirs:.2f} times ray.data.llm",
                flush=True,
            )


# --- both ---


def _item(path: Path, index: int, kind: str = "video") -> dict[str, Any]:
    span = {"window_start_ms": 0, "window_end_ms": CLIP_S * 1000 if kind == "video" else 0}
    clip = {
        "clip_id": f"{index:06}",
        "window_id": window_id(f"{index:06}", 0),
        "window": 0,
        "kind": kind,
        "uri": str(path),
    }
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
    parser.add_argument("part", nargs="?", choices=["reading", "engine"], help="one of the two alone")
    part = parser.parse_args().part
    for measure in (reading, engine):
        if part in (None, measure.__name__):
            measure()
            ray.shutdown()
