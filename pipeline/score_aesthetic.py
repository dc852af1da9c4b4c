"""Aesthetic score: LAION's predictor over CLIP embeddings of three frames of a clip, the lowest of which counts.

Paper: Emu3 report, section 2.1 and appendix on video data. The predictor (github.com/christophschuhmann/improved-aesthetic-
predictor) is a chain of linear layers without anything between them in use; it learnt on unit vectors of OpenAI's ViT-L/14.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.clip_model import CONFIG_FILE, load_clip
from pipeline.clip_scorer import ClipScorer, Columns, FrameCount, ScoreExecution, ScorerConfig
from pipeline.hub_files import local_file, local_folder
from pipeline.samples import Sample
from pipeline.stage import Rows
from schemas.embeddings import EMBEDDINGS
from schemas.errors import ConfigError
from schemas.identity import file_digest, files_digest
from schemas.scores import AESTHETIC

if TYPE_CHECKING:
    import torch

WHERE_CLIP_IS = (
    "on the hub it is hf-hub:timm/vit_large_patch14_clip_224.openai, which may be given for the path, or downloaded whole into "
    "one folder"
)
WHERE_HEAD_IS = (
    "in github.com/christophschuhmann/improved-aesthetic-predictor it is sac+logos+ava1-l14-linearMSE.pth, 3.7 MB"
)


class AestheticConfig(ScorerConfig):
    """Where the weights are, and how many frames speak for a clip."""

    samples: FrameCount = FrameCount(num_frames=3, short_edge_px=None)  # paper: three frames
    clip: str | None = None
    """Open_clip's ViT-L/14 with OpenAI's weights: a folder, or `hf-hub:ORG/NAME`."""
    weights: str | None = None
    """The predictor's layers as published, .pth or .safetensors: a file, or `hf-hub:ORG/NAME/FILE`."""
    execution: ScoreExecution = ScoreExecution(num_cpus=2)

    def files(self) -> tuple[Path, Path]:
        """CLIP's folder and the predictor's file, downloaded where they are named on the hub and not in its cache.

        Raises: ConfigError if one is not given or not there.
        """
        for option, value, where in (("clip", self.clip, WHERE_CLIP_IS), ("weights", self.weights, WHERE_HEAD_IS)):
            if value is None:
                raise ConfigError(f"aesthetic scores need --set {option}=PATH: {where}")
        clip, weights = local_folder(str(self.clip)), local_file(str(self.weights))
        if not (clip / CONFIG_FILE).is_file():
            raise ConfigError(f"{clip} holds no CLIP model, there is no {CONFIG_FILE}: {WHERE_CLIP_IS}")
        if not weights.is_file():
            raise ConfigError(f"there is no file {weights} with the aesthetic predictor: {WHERE_HEAD_IS}")
        return clip, weights

    def identity(self) -> dict[str, Any]:
        """Frames, and both models by their bytes."""
        clip, weights = self.files()
        frames = self.model_dump(mode="json", include={"samples"})
        return {**frames, "clip": files_digest(str(clip), CONFIG_FILE), "weights": file_digest(weights)}


class AestheticScorer(ClipScorer[AestheticConfig]):
    """Both models, on a GPU if the worker sees one."""

    table = AESTHETIC
    config_type = AestheticConfig
    in_worker = True
    keeps = (EMBEDDINGS,)

    def __init__(self, config: AestheticConfig) -> None:
        super().__init__(config)
        clip, weights = config.files()
        self._layers = load_layers(weights)
        self._model, self._transform, self._device = load_clip(str(clip), config.execution.num_cpus)
        self._model_id = files_digest(str(clip), CONFIG_FILE)

    def score(self, samples: Sequence[Sample]) -> Columns:
        """Frames of one clip -> the lowest prediction."""
        return {"aesthetic": float(predict(self._layers, self.embed(samples)).min())}

    def score_and_keep(self, clip_id: str, samples: Sequence[Sample]) -> tuple[Columns, Rows]:
        """The same, and every frame's embedding."""
        vectors = self.embed(samples)
        rows = [
            {
                "clip_id": clip_id,
                "frame_ms": round(sample.seconds * 1000),
                "model_id": self._model_id,
                "dim": len(vector),
                "embedding": vector.astype("<f2").tobytes(),
            }
            for sample, vector in zip(samples, vectors, strict=True)
        ]
        return {"aesthetic": float(predict(self._layers, vectors).min())}, {EMBEDDINGS.name: rows}

    def embed(self, samples: Sequence[Sample]) -> NDArray[np.float32]:
        """Frames -> CLIP's vectors of unit length [frames, dim]."""
        import torch
        from PIL import Image

        pictures = [self._transform(Image.fromarray(np.ascontiguousarray(s.image[..., ::-1]))) for s in samples]
        with torch.inference_mode():
            vectors = self._model.encode_image(torch.stack(pictures).to(self._device), normalize=True)
        found: NDArray[np.float32] = vectors.float().cpu().numpy()
        return found


Layer = tuple[NDArray[np.float32], NDArray[np.float32]]


def predict(layers: Sequence[Layer], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors [frames, dim] -> predictions [frames]. Raises: ConfigError if the predictor is for another CLIP."""
    if vectors.shape[1] != layers[0][0].shape[1]:
        raise ConfigError(
            f"CLIP gives vectors of {vectors.shape[1]} numbers, the aesthetic predictor takes {layers[0][0].shape[1]}: it "
            f"learnt on ViT-L/14; {WHERE_CLIP_IS}"
        )
    for weight, bias in layers:
        vectors = vectors @ weight.T + bias
    return vectors[:, 0]


def load_layers(path: Path) -> list[Layer]:
    """The predictor's state dict -> weight [out, in] and bias [out] of each layer, in order.

    Raises: ConfigError if the file is no state dict of linear layers that end in one number.
    """
    try:
        state = _state_dict(path)
        names = sorted((name.removesuffix("weight") for name in state if name.endswith("weight")), key=_place)
        layers = [(_array(state[f"{name}weight"]), _array(state[f"{name}bias"])) for name in names]
        left = sorted(set(state) - {f"{name}{part}" for name in names for part in ("weight", "bias")})
    except Exception as error:  # whatever a file that is something else makes its reader raise
        raise ConfigError(f"{path} holds no aesthetic predictor: {type(error).__name__}: {error}") from error
    fits = all(weight.ndim == 2 and bias.shape == weight.shape[:1] for weight, bias in layers) and all(
        before.shape[0] == after.shape[1] for (before, _), (after, _) in itertools.pairwise(layers)
    )
    if not layers or left or not fits or layers[-1][0].shape[0] != 1:
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise ConfigError(f"{path}: expected linear layers that end in one number, found {str(shapes)[:300]}")
    return layers


def _state_dict(path: Path) -> "Mapping[str, torch.Tensor]":
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    loaded: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _place(name: str) -> list[tuple[int, str]]:
    """`layers.10.` after `layers.9.`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _array(tensor: "torch.Tensor") -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.float().numpy()
    return found
