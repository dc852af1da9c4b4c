"""A raw corpus made on the spot, with its ground truth: the demo walks the whole road on it, tests check against it.

`shapes/` is the world to be learnt: exact captions in one manifest, which leaves a hundred clips for a captioner to
name, and questions with answers about what it names. A few smaller clips, whose shapes start where no other clip of
their kind does, are for asking what was learnt. `photos/` are real photographs at rest, panned and cut together at
known frames, with captions in sidecars; `defects/` is what curation must refuse, one file per reason; `texts/` is
language data. `truth.json` says of every file offered what must become of it.

The same seed and options give the same bytes. Every file is made under another name and then renamed, and the truth
is written last: a run that was killed is simply run again.
"""

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import skimage.data
from pydantic import Field

from jobs import shapes
from schemas.errors import ConfigError
from schemas.recipe import Config

CORPUS_VERSION = 4  # raised when the same seed and options would give other bytes than before
PHOTO_SIZE = (640, 512)
PHOTO_FPS = 24
ROOM = 1.3  # how much larger than the frame a photograph is scaled, so that the camera has room to move
PAN_PX_PER_FRAME = 2.0
CC0 = "CC0-1.0"
OWN_LICENCE = "CC0-1.0"
VIDEO_CRF = 20
SMALL_CRF = 14  # small pictures show H.264's traces more
PLACES_KEPT = 2  # of each kind of moving shape, for what nothing is trained on
THRESHOLD_LUMA = 12  # PySceneDetect's ThresholdDetector cuts in the middle of the frames whose mean is below this

# Bundled with scikit-image: file, caption, licence as scikit-image states it.
PHOTOS: dict[str, tuple[str, str, str]] = {
    "cat": ("chelsea.png", "the face of a tabby cat looking to the right", CC0),
    "coffee": ("coffee.png", "a cup of espresso on a red saucer with a spoon, on a wooden table", CC0),
    "astronaut": ("astronaut.png", "an astronaut in an orange suit smiling in front of a flag", "public domain (NASA)"),
    "rocket": ("rocket.jpg", "a rocket on its launch pad at dusk", "public domain (SpaceX)"),
    "retina": ("retina.jpg", "the back of an eye with its blood vessels", CC0),
}
FADING_PHOTOS = ("cat", "coffee", "astronaut")  # bright, and of no colour strong enough to outlast the fade
GREY_PHOTOS: dict[str, tuple[str, str, str]] = {
    "photographer": ("camera.png", "a man with a camera on a tripod, in black and white", CC0),
    "bricks": ("brick.png", "a wall of bricks, in black and white", CC0),
}


RuleName = Literal["resolution", "duration", "motion", "text", "sharpness", "exposure", "colour", "letterbox"]


class CorpusConfig(Config):
    """How much of everything the corpus holds. The defaults are what the demo trains on in minutes."""

    num_shape_images: int = Field(default=640, ge=0)
    num_shape_videos: int = Field(default=64, ge=0)
    shape_size_px: int = Field(default=512, ge=64, multiple_of=2)
    shape_video_frames: int = Field(default=24, ge=2)
    shape_video_fps: int = Field(default=12, ge=1)
    num_named_clips: int = Field(default=404, ge=0)
    num_unnamed_clips: int = Field(default=36, ge=0)
    clip_size_px: int = Field(default=192, ge=64, lt=512, multiple_of=2)
    num_unseen_clips: int = Field(default=50, ge=0)
    unseen_size_px: int = Field(default=168, ge=64, lt=512, multiple_of=2)
    clip_frames: int = Field(default=16, ge=2)
    clip_fps: int = Field(default=8, ge=1)
    num_pans: int = Field(default=4, ge=0)
    num_zooms: int = Field(default=2, ge=0)
    num_cut_videos: int = Field(default=3, ge=0)
    num_fade_videos: int = Field(default=2, ge=0)
    pan_frames: int = Field(default=84, ge=48)
    num_texts: int = Field(default=96, ge=3)


class FadeTruth(Config):
    """A fade through black: the cut belongs in the middle of the dark frames, give or take."""

    frame: int
    tolerance_frames: int = 2


class FileTruth(Config):
    """What a file is and what must become of it. `path` is relative to the corpus.

    `rule` is the rule that must refuse every clip of a rejected file (others may too), `reason` the class of the
    attempt that a failed file leaves. `caption` came with the file; `shows` is what nobody says of it. A duplicate
    shares the fate of the file it copies.
    """

    path: str
    kind: Literal["image", "video", "text"]
    what: str
    outcome: Literal["kept", "rejected", "failed"]
    rule: RuleName | None = None
    stage: Literal["ingest", "scan"] | None = None
    reason: str | None = None
    caption: str | None = None
    shows: str | None = None
    licence: str | None = None
    num_frames: int | None = None
    fps: int | None = None
    cut_frames: tuple[int, ...] = ()
    fades: tuple[FadeTruth, ...] = ()
    duplicate_of: str | None = None
    num_texts: int | None = None


class CorpusTruth(Config):
    """The whole of `truth.json`. `sources` is what to hand to `outback ingest`, in order."""

    version: int
    seed: int
    config: CorpusConfig
    sources: tuple[str, ...]
    files: tuple[FileTruth, ...]


@dataclass(frozen=True)
class PlannedFile:
    """A file to be made: where, how, and its truth; manifests and sidecars have none of their own."""

    path: str
    make: Callable[[], bytes]
    truth: FileTruth | None = None


SOURCES = ("shapes/manifest.jsonl", "photos", "defects", "texts")
CONVERSATIONS = "shapes/conversations.json"
SHAPE, UNSEEN_SHAPE = "shape", "unseen shape"  # `what` the files of shapes are: learnt from, and kept from all training


def make_corpus(folder: Path, seed: int = 0, config: CorpusConfig | None = None) -> Path:
    """A folder, a seed and options -> the path of `truth.json`, once the whole corpus stands in the folder.

    A finished corpus is left alone; an unfinished one is completed; the bytes are the same either way.

    Raises: ConfigError if the folder holds something else, such as the corpus of another seed.
    """
    config = config or CorpusConfig()
    truth_path = folder / "truth.json"
    _claim(folder, {"version": CORPUS_VERSION, "seed": seed, **config.model_dump(mode="json")})
    if truth_path.exists():
        return truth_path
    photos = list(_plan_photos(seed, config))
    plan = [*_plan_shapes(seed, config), *photos, *_plan_defects(seed, photos), *_plan_texts(config)]
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for _ in pool.map(partial(_make_file, folder), plan):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    files = tuple(item.truth for item in plan if item.truth is not None)
    truth = CorpusTruth(version=CORPUS_VERSION, seed=seed, config=config, sources=SOURCES, files=files)
    _write(truth_path, (truth.model_dump_json(indent=1) + "\n").encode())
    return truth_path


def load_truth(path: Path) -> CorpusTruth:
    """`truth.json` -> what it says."""
    return CorpusTruth.model_validate_json(path.read_bytes())


def _claim(folder: Path, plan: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "plan.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found != plan:
            different = sorted(key for key in {*found, *plan} if found.get(key) != plan.get(key))
            was = ", ".join(f"{key}={found.get(key)!r} (asked for {plan.get(key)!r})" for key in different)
            raise ConfigError(f"{folder} holds a corpus with {was}. Choose another folder or delete this one.")
    else:
        foreign = [entry.name for entry in folder.iterdir() if entry.name != "plan.json.partial"]
        if foreign:
            raise ConfigError(f"{folder} holds {foreign[0]!r}, which is no corpus of ours. Choose an empty folder.")
        _write(marker, (json.dumps(plan, indent=1) + "\n").encode())


def _make_file(folder: Path, item: PlannedFile) -> None:
    target = folder / item.path
    if not target.exists():
        _write(target, item.make())


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_path = target.with_name(target.name + ".partial")
    partial_path.write_bytes(data)
    os.replace(partial_path, target)


def _truth(path: str, kind: str, what: str, **rest: object) -> FileTruth:
    return FileTruth.model_validate({"path": path, "kind": kind, "what": what, "outcome": "kept", **rest})


def _utf8(text: str) -> bytes:
    return (text + "\n").encode()


# ---------------------------------------------------------------------------------------------------------- shapes


def _plan_shapes(seed: int, config: CorpusConfig) -> Iterator[PlannedFile]:
    """Images with captions; videos without any; clips too small for the curated set, which a captioner learns from; and
    smaller ones that nothing learns from.
    """
    lines: list[dict[str, str]] = []
    said: list[dict[str, object]] = []
    drawn: set[shapes.ShapeScene] = set()
    for group, index, facts, place in _wanted_shapes(seed, config):
        rng = np.random.default_rng([seed, ("image", "video", "clip", "unseen").index(group), index])
        scene = shapes.make_scene(facts, int(rng.integers(2**31)), place)
        while scene in drawn:  # two files of the same bytes are one medium
            scene = shapes.make_scene(facts, int(rng.integers(2**31)), place)
        drawn.add(scene)
        is_named = group == "image" or (group == "clip" and index < config.num_named_clips)
        # One phrase: so few pictures leave a model no chance to tell whim from meaning.
        caption = shapes.write_caption(facts)
        name = f"{group}_{index:04d}.{'png' if group == 'image' else 'mp4'}"
        line = {"path": name, "licence": OWN_LICENCE, "source": f"outback demo, seed {seed}"}
        lines.append({**line, "caption": caption} if is_named else line)
        if is_named and (group == "clip" or index % 2 == 0):
            said.append(_conversation(name, group, index, facts))
        stated = {"caption" if is_named else "shows": caption, "licence": OWN_LICENCE}
        kind = "image" if group == "image" else "video"
        truth = _truth(f"shapes/{name}", kind, UNSEEN_SHAPE if group == "unseen" else SHAPE, **stated)
        if group == "image":
            yield PlannedFile(truth.path, partial(_shape_image, scene, config), truth)
        elif group == "video":
            length = {"num_frames": config.shape_video_frames, "fps": config.shape_video_fps}
            yield PlannedFile(truth.path, partial(_shape_video, scene, config), truth.model_copy(update=length))
        else:
            fate = {"outcome": "rejected", "rule": "resolution", "num_frames": config.clip_frames}
            fate["fps"] = config.clip_fps
            size_px = config.clip_size_px if group == "clip" else config.unseen_size_px
            yield PlannedFile(truth.path, partial(_shape_clip, scene, config, size_px), truth.model_copy(update=fate))
    manifest = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield PlannedFile("shapes/manifest.jsonl", lambda: manifest)
    yield PlannedFile(CONVERSATIONS, lambda: json.dumps(said, indent=1).encode())


def _wanted_shapes(
    seed: int, config: CorpusConfig
) -> Iterator[tuple[str, int, shapes.ShapeFacts, shapes.Place | None]]:
    """Group, number in the group, facts, and for moving shapes the place that they start at.

    The places of each kind of moving shape are shuffled and taken by turns, but for the last few: those are left to what
    nothing is trained on. So what is unseen is a shape at a place where none like it was, not a scene in another tint.
    """
    still, moving = shapes.all_facts(moving=False), shapes.all_facts(moving=True)
    for index in range(config.num_shape_images):
        yield "image", index, still[index % len(still)], None
    places = [
        [found[at] for at in np.random.default_rng([seed, 0x91ACE, kind]).permutation(len(found))]
        for kind, found in enumerate(shapes.all_places(facts) for facts in moving)
    ]
    shown = [("video", index) for index in range(config.num_shape_videos)]
    shown += [("clip", index) for index in range(config.num_named_clips + config.num_unnamed_clips)]
    for number, (group, index) in enumerate(shown):
        turn, kind = divmod(number, len(moving))
        seen = places[kind][:-PLACES_KEPT]
        yield group, index, moving[kind], seen[turn % len(seen)]
    for index in range(config.num_unseen_clips):
        turn, kind = divmod(index, len(moving))
        yield "unseen", index, moving[kind], places[kind][-1 - turn % PLACES_KEPT]


def _conversation(name: str, group: str, index: int, facts: shapes.ShapeFacts) -> dict[str, object]:
    """All that can be asked of a clip, or one thing of an image, in LLaVA's layout; another question first each time."""
    asked = [(question, getattr(facts, fact)) for fact, question in shapes.QUESTIONS.items()]
    asked = [(question, answer) for question, answer in asked if answer is not None]
    # By the turn as well: facts repeat with a period that the number of questions divides.
    first = (index + index // len(shapes.all_facts(group != "image"))) % len(asked)
    asked = asked[first:] + asked[:first]
    asked = asked[:1] if group == "image" else asked
    kind = "image" if group == "image" else "video"
    turns: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(asked):
        shown = f"<{kind}>\n" if number == 0 else ""
        turns += [{"from": "human", "value": shown + question}, {"from": "gpt", "value": answer}]
    return {"id": Path(name).stem, kind: name, "conversations": turns}


def _shape_image(scene: shapes.ShapeScene, config: CorpusConfig) -> bytes:
    return _encode_image(shapes.render_image(scene, config.shape_size_px), ".png")


def _shape_video(scene: shapes.ShapeScene, config: CorpusConfig) -> bytes:
    fps = config.shape_video_fps
    return _encode_video(shapes.render_video(scene, config.shape_video_frames, fps, config.shape_size_px), fps)


def _shape_clip(scene: shapes.ShapeScene, config: CorpusConfig, size_px: int) -> bytes:
    frames = shapes.render_video(scene, config.clip_frames, config.clip_fps, size_px)
    return _encode_video(frames, config.clip_fps, SMALL_CRF)


# ---------------------------------------------------------------------------------------------------------- photos


@dataclass(frozen=True)
class Shot:
    """One camera move over one photograph."""

    photo: str
    num_frames: int
    seed: int
    zooms: bool = False


@dataclass(frozen=True)
class Fade:
    """A fade-out over the last `frames` of a shot, `dark` black frames, and a fade-in over the first of the next.

    Colour leaves before light does: the hue of nearly black pixels jumps about, and ContentDetector would see cuts.
    """

    frames: int
    dark: int


def _plan_photos(seed: int, config: CorpusConfig) -> Iterator[PlannedFile]:
    for index, name in enumerate(PHOTOS):
        suffix = ".jpg" if index % 2 else ".png"
        truth = _truth(f"photos/{name}{suffix}", "image", "photograph")
        yield from _with_sidecar(truth, partial(_still, name, suffix), name, as_json=index % 3 == 0)
    rng = np.random.default_rng([seed, 0xF070])
    names: Iterator[str] = itertools.cycle(str(name) for name in rng.permutation(list(PHOTOS)))

    def shot(num_frames: int, zooms: bool = False) -> Shot:
        return Shot(next(names), num_frames, int(rng.integers(2**31)), zooms)

    for index in range(config.num_pans + config.num_zooms):
        move = "pan" if index < config.num_pans else "zoom"
        take = shot(config.pan_frames, zooms=move == "zoom")
        truth = _truth(f"photos/{move}_{index:02d}.mp4", "video", move, num_frames=take.num_frames, fps=PHOTO_FPS)
        yield from _with_sidecar(truth, partial(_shots_video, (take,)), take.photo, as_json=index % 2 == 0)
    for index in range(config.num_cut_videos):
        takes = tuple(shot(int(rng.integers(40, 57))) for _ in range(2 + index % 2))
        *cuts, end = itertools.accumulate(take.num_frames for take in takes)
        path = f"photos/cut_{index:02d}.mp4"
        truth = _truth(path, "video", "hard cuts", num_frames=end, fps=PHOTO_FPS, cut_frames=tuple(cuts))
        yield PlannedFile(path, partial(_shots_video, takes), truth)
    names = itertools.cycle(str(name) for name in rng.permutation(FADING_PHOTOS))
    for index in range(config.num_fade_videos):
        takes = (shot(int(rng.integers(60, 73))), shot(int(rng.integers(60, 73))))
        fade = Fade(frames=30, dark=int(rng.integers(6, 11)))
        path = f"photos/fade_{index:02d}.mp4"
        end = sum(take.num_frames for take in takes) + fade.dark
        fades = (FadeTruth(frame=_dark_middle(_render_shots(takes, fade))),)
        truth = _truth(path, "video", "fade through black", num_frames=end, fps=PHOTO_FPS, fades=fades)
        yield PlannedFile(path, partial(_shots_video, takes, fade), truth)


def _with_sidecar(truth: FileTruth, make: Callable[[], bytes], photo: str, as_json: bool) -> Iterator[PlannedFile]:
    """The medium, and its caption beside it: JSON with a licence, or plain text that states none.

    A video of several photographs gets none: no caption would be true of each of its clips.
    """
    caption, licence = PHOTOS[photo][1:]
    side = json.dumps({"caption": caption, "licence": licence}) if as_json else caption
    yield PlannedFile(str(Path(truth.path).with_suffix(".json" if as_json else ".txt")), partial(_utf8, side))
    said = {"caption": caption, "licence": licence if as_json else None}
    yield PlannedFile(truth.path, make, truth.model_copy(update=said))


@cache
def _photo(name: str) -> shapes.Pixels:
    file_name = (PHOTOS | GREY_PHOTOS)[name][0]
    path = Path(skimage.data.data_dir) / file_name
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ConfigError(f"{path} cannot be read: the demo needs the photographs that scikit-image's wheel carries")
    rgb = np.asarray(bgr[..., ::-1], np.uint8)
    if name == "retina":  # a round picture on black: only its inside is a photograph
        rgb = rgb[256:1156, 256:1156]
    return np.ascontiguousarray(rgb)


def _fit(name: str, size: tuple[int, int], room: float = 1.0) -> shapes.Pixels:
    """A photograph scaled so that it covers `size` (width, height), `room` times over in each direction."""
    image = _photo(name)
    scale = room * max(size[0] / image.shape[1], size[1] / image.shape[0])
    wide, high = (max(edge, round(side * scale)) for edge, side in zip(size, image.shape[1::-1], strict=True))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (wide, high), interpolation=how), np.uint8)


def _cropped(name: str, size: tuple[int, int] = PHOTO_SIZE) -> shapes.Pixels:
    image = _fit(name, size)
    top, left = (image.shape[0] - size[1]) // 2, (image.shape[1] - size[0]) // 2
    return np.ascontiguousarray(image[top : top + size[1], left : left + size[0]])


def _still(name: str, suffix: str) -> bytes:
    image = _photo(name)
    scale = max(1.0, 544 / min(image.shape[:2]))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return _encode_image(_fit(name, size), suffix)


def _render_shot(shot: Shot, size: tuple[int, int] = PHOTO_SIZE) -> shapes.Pixels:
    """A shot -> uint8 RGB frames (T, H, W, 3): an even pan in a random direction, or an even zoom in or out."""
    rng = np.random.default_rng(shot.seed)
    image = _fit(shot.photo, size, ROOM)
    progress = np.linspace(0.0, 1.0, shot.num_frames)
    whole = np.array([image.shape[1], image.shape[0]], np.float64)
    if shot.zooms:
        scales = 1.0 / (1.0 + (ROOM - 1.0) * (progress if rng.random() < 0.5 else progress[::-1]))
        starts = (whole - np.array(size) / scales[:, None]) / 2
    else:
        scales = np.ones(shot.num_frames)
        spare = whole - size
        angle = rng.uniform(0, 2 * np.pi)
        travel = PAN_PX_PER_FRAME * shot.num_frames * np.array([np.cos(angle), np.sin(angle)])
        travel = np.clip(travel, -spare, spare)
        starts = np.maximum(-travel, 0.0) + rng.random(2) * (spare - abs(travel)) + np.outer(progress, travel)
    frames = np.empty((shot.num_frames, size[1], size[0], 3), np.uint8)
    for index, ((left, top), scale) in enumerate(zip(starts, scales, strict=True)):
        window = np.array([[scale, 0.0, -left * scale], [0.0, scale, -top * scale]])
        frames[index] = cv2.warpAffine(image, window, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return frames


def _render_shots(shots: Sequence[Shot], fade: Fade | None) -> shapes.Pixels:
    takes = [_render_shot(shot) for shot in shots]
    if fade is None:
        return np.concatenate(takes)
    light = np.linspace(1.0, 0.0, fade.frames + 1)[1:]
    takes[0][-fade.frames :] = _faded(takes[0][-fade.frames :], light)
    takes[1][: fade.frames] = _faded(takes[1][: fade.frames], light[::-1])
    return np.concatenate([takes[0], np.zeros((fade.dark, *takes[0].shape[1:]), np.uint8), takes[1]])


def _faded(frames: shapes.Pixels, light: npt.NDArray[np.float64]) -> shapes.Pixels:
    """Frames (T, H, W, 3) and per frame how much light is left, 0 to 1 -> the frames in that light."""
    faded = np.empty_like(frames)
    for index, gain in enumerate(light):
        frame = frames[index].astype(np.float32)
        grey = frame.mean(axis=2, keepdims=True)
        faded[index] = np.rint(gain * (grey + max(0.0, 1.5 * gain - 0.5) * (frame - grey)))
    return faded


def _dark_middle(frames: shapes.Pixels) -> int:
    """Frames with one fade through black -> the frame where ThresholdDetector, by its own rule, puts the cut."""
    dark = np.flatnonzero(frames[:, ::4, ::4].mean(axis=(1, 2, 3)) < THRESHOLD_LUMA)
    return int(dark[0] + dark[-1] + 1) // 2


def _shots_video(shots: Sequence[Shot], fade: Fade | None = None, container: str = "mp4") -> bytes:
    return _encode_video(_render_shots(shots, fade), PHOTO_FPS, container=container)


# --------------------------------------------------------------------------------------------------------- defects


def _plan_defects(seed: int, kept: Sequence[PlannedFile]) -> Iterator[PlannedFile]:
    """One file per reason to refuse, and a copy of the first image and of the first video of `kept`."""
    rng = np.random.default_rng([seed, 0xDEF])
    noise_seed = int(rng.integers(2**31))
    yield from _plan_failures(noise_seed)
    yield from _plan_refused_images()
    yield from _plan_refused_videos(noise_seed)
    for kind, name in (("image", "copy of a photograph & co. (ü)"), ("video", "copy_of_a_video")):
        first = next((item for item in kept if item.truth is not None and item.truth.kind == kind), None)
        if first is not None and first.truth is not None:
            path = f"defects/{name}{Path(first.path).suffix}"
            said = {"path": path, "caption": None, "licence": None, "duplicate_of": first.path}
            yield PlannedFile(path, first.make, first.truth.model_copy(update=said))


def _plan_failures(noise_seed: int) -> Iterator[PlannedFile]:
    take = Shot("coffee", 96, noise_seed)
    video = cache(partial(_shots_video, (take,)))

    def failing(name: str, what: str, reason: str, make: Callable[[], bytes], stage: str = "ingest") -> PlannedFile:
        path = f"defects/{name}"
        kind = "video" if name.endswith((".mp4", ".mkv")) else "image"
        return PlannedFile(path, make, _truth(path, kind, what, outcome="failed", stage=stage, reason=reason))

    def junk(size: int) -> bytes:
        return np.random.default_rng(noise_seed).bytes(size)

    def garbled(share_kept: float) -> bytes:
        """Header and index stay sound; the packets are random bytes after a share of them."""
        data = video()
        start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
        start += round(share_kept * (end - start))
        return data[:start] + junk(end - start) + data[end:]

    def half(data: bytes) -> bytes:
        return data[: len(data) // 2]

    def cut_short() -> bytes:
        return half(_shots_video((take,), container="matroska"))  # which has its header in front

    yield failing("image_named.mp4", "an image named as a video", "WrongExtension", partial(_still, "coffee", ".png"))
    yield failing("video_named.png", "a video named as an image", "WrongExtension", video)
    yield failing("text_named.jpg", "text named as an image", "WrongExtension", partial(_utf8, "This is no picture."))
    yield failing("empty.mp4", "an empty file", "Empty", bytes)
    yield failing("no_index.mp4", "a video without its index", "Unreadable", lambda: video().partition(b"moov")[0][:-4])
    yield failing("garbage.mp4", "a sound header before packets of garbage", "Unreadable", lambda: garbled(0.0))
    yield failing("half.jpg", "half of an image", "Truncated", lambda: half(_still("cat", ".jpg")))
    yield failing("half.png", "half of an image", "Truncated", lambda: half(_still("rocket", ".png")))
    yield failing("half.mkv", "half of a video", "Truncated", cut_short, stage="scan")
    yield failing("turned.mp4", "a video that turns into garbage", "Corrupt", lambda: garbled(0.5), stage="scan")


def _plan_refused_images() -> Iterator[PlannedFile]:
    def refused(name: str, what: str, rule: str, make: Callable[[], shapes.Pixels]) -> PlannedFile:
        path = f"defects/{name}"
        encode = partial(_call, make, partial(_encode_image, suffix=Path(name).suffix))
        return PlannedFile(path, encode, _truth(path, "image", what, outcome="rejected", rule=rule))

    yield refused("small.jpg", "a small image", "resolution", lambda: _cropped("cat", (320, 256)))
    yield refused("page.png", "a page of text", "text", lambda: _page(PHOTO_SIZE[1]))
    yield refused("dark.jpg", "a nearly black image", "exposure", lambda: _levels(_cropped("rocket"), 0.05, 0.0))
    yield refused("bright.jpg", "a nearly white image", "exposure", lambda: _levels(_cropped("coffee"), 0.2, 225.0))
    yield refused("blurred.jpg", "a blurred image", "sharpness", lambda: _blurred(_cropped("astronaut")))
    yield refused("bars.jpg", "an image between black bars", "letterbox", lambda: _barred(_cropped("cat")[None])[0])
    for name, (_, what, _) in GREY_PHOTOS.items():
        yield refused(f"{name}.png", what, "colour", partial(_cropped, name))


def _plan_refused_videos(noise_seed: int) -> Iterator[PlannedFile]:
    def refused(name: str, what: str, rule: str, fps: int, make: Callable[[], shapes.Pixels]) -> PlannedFile:
        path = f"defects/{name}"
        encode = partial(_call, make, partial(_encode_video, fps=fps))
        return PlannedFile(path, encode, _truth(path, "video", what, outcome="rejected", rule=rule, fps=fps))

    yield refused("small.mp4", "a small video", "resolution", 24, lambda: _render_shot(Shot("cat", 48, 1), (426, 320)))
    yield refused("brief.mp4", "a third of a second", "duration", 24, lambda: _render_shot(Shot("coffee", 8, 2)))
    yield refused("frozen.mp4", "a photograph that never moves", "motion", 12, lambda: np.stack([_cropped("cat")] * 24))
    yield refused("whip_pan.mp4", "a camera torn aside", "motion", 12, lambda: _whip_pan(24))
    yield refused("snow.mp4", "the snow of a television", "colour", 12, lambda: _snow(noise_seed, 24))
    yield refused("scrolling.mp4", "text scrolling by", "text", 12, lambda: _scrolling_text(24))
    bars = partial(_barred_video, Shot("cat", 48, 3))
    yield refused("bars.mp4", "a video between black bars", "letterbox", 24, bars)


def _call(make: Callable[[], shapes.Pixels], encode: Callable[[shapes.Pixels], bytes]) -> bytes:
    return encode(make())


def _levels(image: shapes.Pixels, gain: float, offset: float) -> shapes.Pixels:
    levelled: shapes.Pixels = np.clip(np.rint(image * gain + offset), 0, 255).astype(np.uint8)
    return levelled


def _blurred(image: shapes.Pixels) -> shapes.Pixels:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 14), dtype=np.uint8)


def _barred(frames: shapes.Pixels) -> shapes.Pixels:
    barred = frames.copy()
    bar = frames.shape[1] // 5
    barred[:, :bar] = barred[:, -bar:] = 0
    return barred


def _barred_video(shot: Shot) -> shapes.Pixels:
    return _barred(_render_shot(shot))


def _whip_pan(num_frames: int) -> shapes.Pixels:
    """A pan of about a fifth of the frame each half second, five times as fast as the others."""
    width, height = PHOTO_SIZE
    image = _fit("astronaut", PHOTO_SIZE, 2.0)
    return np.stack([image[:height, 20 * index : 20 * index + width] for index in range(num_frames)])


def _snow(seed: int, num_frames: int) -> shapes.Pixels:
    """Grey noise, too weak for ContentDetector to see cuts in it."""
    width, height = PHOTO_SIZE
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 40, (num_frames, height // 16, width // 16)).clip(0, 255).astype(np.uint8)
    return np.stack([np.repeat(cv2.resize(frame, PHOTO_SIZE)[..., None], 3, axis=2) for frame in coarse])


def _page(height: int) -> shapes.Pixels:
    """A page of dense dark text on cream, `height` px high."""
    page = np.full((height, PHOTO_SIZE[0], 3), (252, 240, 208), np.uint8)
    for line, text in enumerate(itertools.islice(itertools.cycle(_sentences()), height // 32)):
        padded = f"{text} {text}"[:34]
        cv2.putText(page, padded, (10, 26 + 32 * line), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (20, 20, 20), 2, cv2.LINE_AA)
    return page


def _scrolling_text(num_frames: int) -> shapes.Pixels:
    step = 3
    page = _page(PHOTO_SIZE[1] + step * num_frames)
    return np.stack([page[step * index : step * index + PHOTO_SIZE[1]] for index in range(num_frames)])


# ----------------------------------------------------------------------------------------------------------- texts


def _plan_texts(config: CorpusConfig) -> Iterator[PlannedFile]:
    """One plain file, one JSONL and one Parquet, together `num_texts` documents, no two of them alike."""
    documents = list(itertools.islice(_documents(), config.num_texts))
    middle = 1 + (len(documents) - 1) // 2
    rows = [{"text": text, "licence": OWN_LICENCE} for text in documents]
    lines = "".join(json.dumps(row) + "\n" for row in rows[1:middle]).encode()
    for name, make, count in (
        ("about_shapes.txt", partial(_utf8, documents[0]), 1),
        ("shapes.jsonl", lambda: lines, middle - 1),
        ("shapes.parquet", partial(_parquet, rows[middle:]), len(rows) - middle),
    ):
        licence = None if name.endswith(".txt") else OWN_LICENCE
        path = f"texts/{name}"
        yield PlannedFile(path, make, _truth(path, "text", "sentences", num_texts=count, licence=licence))


def _documents() -> Iterator[str]:
    yield " ".join(_sentences())
    for facts in shapes.all_facts(moving=True):
        other = next(name for name in shapes.COLOURS if name != facts.colour)
        yield (
            f"There is a {facts.colour} {facts.shape}. It is moving {facts.direction}. "
            f"The {facts.shape} is {facts.colour}, not {other}."
        )
        yield (
            f"A {facts.shape} can be {facts.colour} or {other}. When a {facts.colour} {facts.shape} is moving "
            f"{facts.direction}, it stays {facts.colour} and it stays a {facts.shape}."
        )


def _sentences() -> list[str]:
    return [
        "A circle is round and has no corners.",
        "A square has four corners and four equal sides.",
        "A triangle has three corners and three sides.",
        "Red, green, blue and yellow are colours.",
        "A shape that moves left was further to the right before.",
        "A shape that moves up was further down before.",
        "A picture shows one moment, a video shows many.",
        "The ground behind a shape is dark grey.",
    ]


def _parquet(rows: Sequence[dict[str, str]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


# -------------------------------------------------------------------------------------------------------- encoding


def _encode_image(pixels: shapes.Pixels, suffix: str) -> bytes:
    options = [cv2.IMWRITE_PNG_COMPRESSION, 3] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, 92]
    done, data = cv2.imencode(suffix, pixels[..., ::-1], options)
    if not done:
        raise ConfigError(f"OpenCV cannot write {suffix} files here")
    return bytes(data)


def _encode_video(frames: shapes.Pixels, fps: int, crf: int = VIDEO_CRF, container: str = "mp4") -> bytes:
    """uint8 RGB frames (T, H, W, 3) -> an H.264 file; an MP4's index stands at its end.

    One thread, because x264's decisions depend on how many there are; no metadata, because it holds the time.
    """
    sink = io.BytesIO()
    options = {"preset": "ultrafast", "crf": str(crf), "g": str(2 * fps), "threads": "1"}
    with av.open(sink, "w", format=container, container_options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return sink.getvalue()
