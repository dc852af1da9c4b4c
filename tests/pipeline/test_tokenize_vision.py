"""Frames for the tokenizer: sizes, counts, and codes on the right grid."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.frame_chunks import ChunkConfig, frame_chunks
from pipeline.tokenize_vision import Preparation, TokenizeWorker, clip_frames, num_frames, prepared_size
from schemas.errors import RowError
from schemas.vision_tokens import VISION_TOKENS
from tests.flows.small_media import write_image, write_video


def test_sizes_keep_the_aspect_ratio_about_the_area() -> None:
    assert prepared_size(512, 512, 512 * 512) == (512, 512)
    height, width = prepared_size(1080, 1920, 512 * 512)
    assert height % 8 == width % 8 == 0
    assert width / height == pytest.approx(16 / 9, rel=0.02)
    assert height * width == pytest.approx(512 * 512, rel=0.03)
    assert prepared_size(4000, 10, 64) == (160, 8)


def test_frames_come_in_fours_and_the_rest_is_left_out() -> None:
    preparation = Preparation(fps=8.0, max_frames=16)
    assert num_frames(2000, preparation) == 16
    assert num_frames(60_000, preparation) == 16
    assert num_frames(900, preparation) == 4
    with pytest.raises(RowError, match="TooShort"):
        num_frames(300, preparation)


def video_item(path: Path, start_ms: int, end_ms: int) -> dict[str, Any]:
    return {"clip_id": "c", "uri": str(path), "kind": "video", "start_ms": start_ms, "end_ms": end_ms}


def test_a_span_is_read_and_no_frame_outside_it(tmp_path: Path) -> None:
    path = tmp_path / "two_shots.mp4"
    write_video(path, seed=1, shots=2, frames_per_shot=20)  # dark, then light, cut at 1000 ms
    preparation = Preparation(area_px=32 * 32, fps=8.0, max_frames=16)
    dark = clip_frames(video_item(path, 0, 1000), preparation)
    light = clip_frames(video_item(path, 1000, 2000), preparation)
    assert dark.shape == light.shape == (8, 32, 32, 3)
    assert dark.mean(axis=(1, 2, 3)).max() < 115 < 130 < light.mean(axis=(1, 2, 3)).min()


def test_frames_that_fill_no_latent_frame_are_left_out_or_filled_up_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, seed=3)
    leave = Preparation(area_px=32 * 32, fps=8.0, max_frames=16)
    repeat = Preparation(area_px=32 * 32, fps=8.0, max_frames=16, remainder="repeat")
    item = video_item(path, 0, 750)
    left, repeated = clip_frames(item, leave), clip_frames(item, repeat)
    assert (len(left), len(repeated)) == (4, 8)
    assert np.array_equal(repeated[:4], left)
    assert not np.array_equal(repeated[4], repeated[5])
    assert np.array_equal(repeated[5], repeated[6])
    assert np.array_equal(repeated[5], repeated[7])
    for preparation, num_latents in ((leave, 1), (repeat, 2)):
        worker = TokenizeWorker(lambda: mean_code, "tok", preparation)
        row = worker.process(item)[VISION_TOKENS.name][0]
        assert (row["t"], row["source_frames"]) == (num_latents, 6)
        worker.sandbox.close()
    assert num_frames(100, repeat) == 1
    with pytest.raises(RowError, match="less than 1 frames"):
        num_frames(50, repeat)
    assert "remainder" not in leave.model_dump()  # ids from before there was a choice
    assert repeat.model_dump()["remainder"] == "repeat"


def test_chunks_for_training_are_square_and_in_fours(tmp_path: Path) -> None:
    video, image = tmp_path / "v.mp4", tmp_path / "i.png"
    write_video(video, seed=2)
    write_image(image, seed=2)
    config = ChunkConfig(side_px=32, fps=8.0, chunks_per_clip=2)
    assert frame_chunks(video_item(video, 0, 1000), config).shape == (2, 4, 32, 32, 3)
    still = frame_chunks({"uri": str(image), "kind": "image", "start_ms": 0, "end_ms": 0}, config)
    assert still.shape == (1, 4, 32, 32, 3)
    assert np.array_equal(still[0, 0], still[0, 3])


def mean_code(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    latent = frames.reshape(-(-len(frames) // 4), -1, *frames.shape[1:])
    return latent.mean(axis=(1, 4)).astype(np.int64)[:, ::8, ::8]


def test_a_worker_writes_codes_little_endian_on_their_grid(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path, seed=3)
    preparation = Preparation(area_px=32 * 32, fps=8.0, max_frames=8)
    worker = TokenizeWorker(lambda: mean_code, "tok", preparation)
    row = worker.process(video_item(path, 0, 1000))[VISION_TOKENS.name][0]
    assert (row["t"], row["h"], row["w"], row["fps"]) == (2, 4, 4, 8.0)
    codes = np.frombuffer(row["codes"], "<u2").reshape(2, 4, 4)  # type: ignore[call-overload]  # object values
    assert np.array_equal(codes, mean_code(clip_frames(video_item(path, 0, 1000), preparation)))
    worker.sandbox.close()
