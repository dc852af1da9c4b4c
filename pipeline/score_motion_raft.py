"""Motion scores by RAFT, the paper's flow: dearer than the scan's, on a GPU or for few clips, as a scorer of its own.

Rows go to `score_motion` under another `scorer_id`, which names the weights: both scorers measure the same thing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.camera_motion import STILL, Flow, PairMotion, pair_motion
from pipeline.clip_scorer import ClipScorer, Columns, ScorerConfig
from pipeline.samples import Image, Sample, SampleSpec
from pipeline.score_motion import steps_between, summarise
from schemas.errors import ConfigError
from schemas.identity import file_digest
from schemas.scores import MOTION, OWN_COMMON

STRIDE_PX = 8  # sides that RAFT takes are multiples of this
LEAST_SIDE_PX = 128  # the coarsest of its correlation volumes would be empty below
PUBLISHED = {  # in torchvision.models.optical_flow
    "large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth, whose address is Raft_Large_Weights.C_T_SKHT_V2.url",
    "small": "raft_small_C_T_V2-01064c6d.pth, whose address is Raft_Small_Weights.C_T_V2.url",
}

Pairs = NDArray[np.uint8]
"""Pictures, red first: uint8 [pair, before and after, height, width, 3]."""


class RaftConfig(ScorerConfig):
    """Paper: RAFT (Teed and Deng 2020) as the Emu3 report names it; the size of the network is not stated."""

    samples: SampleSpec = SampleSpec()
    size: Literal["small", "large"] = "large"  # ours
    weights: Path | None = None
    """A state dict of torchvision's `raft_large` or `raft_small`."""
    iterations: int = Field(12, ge=1)  # torchvision's default
    pairs_at_once: int = Field(8, ge=1)

    def identity(self) -> dict[str, Any]:
        """Parameters, and the weights by their bytes, wherever they lie. Raises: ConfigError if there are no weights."""
        parameters = self.model_dump(mode="json", include={"samples", "size", "iterations"})
        return {"flow": "raft", **parameters, "weights": file_digest(weights_of(self))}


class FlowNetwork(Protocol):
    """Pairs of pictures -> the flow from the first to the second of each, float32 [pair, height, width, (right, down)]."""

    def __call__(self, pairs: Pairs) -> NDArray[np.float32]:
        """Sides of the pictures are multiples of 8, of 128 pixels at least."""
        ...


class RaftScorer(ClipScorer[RaftConfig]):
    """Measures consecutive samples, several pairs at once. On CPUs results are the same bits for one number of threads."""

    table = MOTION
    config_type = RaftConfig
    in_worker = True

    def __init__(self, config: RaftConfig, network: FlowNetwork | None = None) -> None:
        super().__init__(config)
        self._network = network or Raft(config)
        self._step_s = 1 / config.samples.fps
        self._pairs_at_once = config.pairs_at_once

    def score(self, samples: Sequence[Sample]) -> Columns:
        """Samples of one clip -> the columns that DIS has too."""
        scores = asdict(summarise(list(self.pairs(samples)), len(samples)))
        return {name: value for name, value in scores.items() if name not in OWN_COMMON}

    def pairs(self, samples: Sequence[Sample]) -> Iterator[PairMotion]:
        """Samples of one clip, in order, of one size -> the motion of each pair of neighbours, per sampling step."""
        for first in range(0, len(samples) - 1, self._pairs_at_once):
            yield from self._measured(samples[first : first + self._pairs_at_once + 1])

    def _measured(self, samples: Sequence[Sample]) -> Iterator[PairMotion]:
        height, width = samples[0].image.shape[:2]
        pictures = np.stack([_padded(sample.image[..., ::-1]) for sample in samples])
        flows = self._network(np.stack([pictures[:-1], pictures[1:]], axis=1))
        for before, after, flow in zip(samples[:-1], samples[1:], flows, strict=True):
            if np.array_equal(before.image, after.image):
                yield STILL
                continue
            shown: Flow = np.ascontiguousarray(flow[:height, :width])
            yield pair_motion(shown, _grey(before.image), steps_between(before, after, self._step_s))


class Raft:
    """torchvision's RAFT with weights from a file, on a GPU that the process sees or else on the CPU."""

    def __init__(self, config: RaftConfig) -> None:
        """Raises: ConfigError if there are no weights, or they are not of this network."""
        import torch
        from torchvision.models.optical_flow import raft_large, raft_small

        path = weights_of(config)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._iterations = config.iterations
        self._model = {"large": raft_large, "small": raft_small}[config.size](weights=None, progress=False)
        try:
            self._model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever the file makes them raise
            raise ConfigError(
                f"{path} is no state dict of torchvision's raft_{config.size} ({type(error).__name__}: {error}). Expected is "
                f"{PUBLISHED[config.size]} in torchvision.models.optical_flow"
            ) from error
        self._model.eval().to(self._device)

    def __call__(self, pairs: Pairs) -> NDArray[np.float32]:
        """Pairs of pictures -> flows."""
        import torch

        pixels = (
            torch.from_numpy(np.ascontiguousarray(pairs)).to(self._device).permute(1, 0, 4, 2, 3).float() / 127.5 - 1
        )
        with torch.inference_mode():
            flow = self._model(pixels[0], pixels[1], num_flow_updates=self._iterations)[-1]
        found: NDArray[np.float32] = flow.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return found


def weights_of(config: RaftConfig) -> Path:
    """A config -> its file of weights. Raises: ConfigError that says where to get one if there is none."""
    if config.weights is not None and config.weights.is_file():
        return config.weights
    found = "no weights are named" if config.weights is None else f"{config.weights} is no file"
    raise ConfigError(
        f"motion_raft needs the weights of raft_{config.size}: {found}. Download {PUBLISHED[config.size]} in "
        "torchvision.models.optical_flow, and give its path by --set weights=PATH; without them `outback scan` measures "
        "motion by DIS."
    )


def _padded(image: Image) -> Image:
    """A picture -> the same with its last rows and columns repeated, up to sides that RAFT takes."""
    height, width = image.shape[:2]
    sides = [max(LEAST_SIDE_PX, -(-side // STRIDE_PX) * STRIDE_PX) for side in (height, width)]
    return np.pad(image, ((0, sides[0] - height), (0, sides[1] - width), (0, 0)), mode="edge")


def _grey(image: Image) -> NDArray[np.uint8]:
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # type: ignore[return-value]  # uint8 in, uint8 out
