"""CLIP from a folder, by open_clip."""

from pathlib import Path
from typing import Any

from schemas.errors import ConfigError

CONFIG_FILE = "open_clip_config.json"


def load_clip(folder: str, num_threads: int) -> tuple[Any, Any, str]:
    """A folder with open_clip_config.json and weights -> the model in eval mode, its transform of PIL pictures, and the
    device it is on: a GPU if the worker sees one.

    Raises: ConfigError if the folder holds no model that loads.
    """
    import open_clip
    import torch

    if not (Path(folder) / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} holds no CLIP model: there is no {CONFIG_FILE}")
    torch.set_num_threads(num_threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", device=device)
    except Exception as error:  # whatever its files make it raise
        raise ConfigError(f"{folder} holds no CLIP model that loads: {type(error).__name__}: {error}") from error
    return model.eval(), transform, device
