"""Captions as numbers: the worst window speaks for a clip, and similarity is CLIP's own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.score_captions import CaptionScoreConfig, CaptionScoreWorker, ClipSimilarity, score_texts
from schemas.captions import CAPTION_SCORES
from schemas.errors import ConfigError

SMALL_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of one layer with random weights: enough to see that pictures and texts reach it."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL_CLIP)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_the_worst_window_speaks_for_the_clip() -> None:
    texts = ["a dog runs over a wide green field", "a dog a dog a dog a dog a dog a dog"]
    found = score_texts(texts, [None, "repetition"])
    assert found["words"] == 8
    assert found["repetition"] > 0.5
    assert found["problems"] == 1
    assert score_texts(["one two"], [None]) == {"words": 2.0, "repetition": 0.0, "problems": 0.0}


def test_similarity_is_the_cosine_of_clip(clip: Path) -> None:
    import open_clip

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    texts = ["a cat", "a dog on a mat", "a blue square moving left"]
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{clip}")
    model.eval()
    with torch.inference_mode():
        seen = model.encode_image(torch.stack([transform(Image.fromarray(picture)) for picture in pictures]))
        said = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip}")(texts))
    expected = torch.nn.functional.cosine_similarity(seen, said).tolist()
    assert ClipSimilarity(str(clip), 1)(pictures, texts) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3


def test_a_clip_with_two_windows_has_the_lower_similarity(clip: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    span = {"window_start_ms": 0, "window_end_ms": 0, "problem": None}
    item = {
        "clip_id": "c",
        "uri": str(tmp_path / "a.png"),
        "kind": "image",
        "windows": [{"text": "a cat", **span}, {"text": "a dog", **span}],
    }
    worker = CaptionScoreWorker(CaptionScoreConfig(clip=str(clip)), "s", "c")
    (row,) = worker.process(item)[CAPTION_SCORES.name]
    assert row["clip_similarity"] == pytest.approx(min(ClipSimilarity(str(clip), 1)([pixels] * 2, ["a cat", "a dog"])))
    alone = CaptionScoreWorker(CaptionScoreConfig(), "s", "c")
    assert alone.process({**item, "uri": "/nowhere"})[CAPTION_SCORES.name][0]["clip_similarity"] is None


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no CLIP model"):
        ClipSimilarity(str(tmp_path), 1)
