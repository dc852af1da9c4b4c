"""Pictures that a language model draws while it is trained: the same prompts and seeds again and again, from its weights of the
moment. Nothing that is learnt depends on them: places of a picture have noise of their own, and torch's generators stay as they
are.

Shapes: T frames, H W pixels.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from model.generate import VisionRequest, check_requests, generate_vision
from model.pictures import Frames, decode_codes, write_png
from model.sampling import SamplingConfig
from model.transformer import Transformer, TransformerConfig
from model.weights import LanguageModel, load_vision_tokenizer
from schemas.document import DocumentError, Kind, VisionDocument, parse_document
from schemas.errors import ConfigError
from schemas.recipe import Config
from train.batches import SequenceData
from train.files import publish_folder

NAME_CHARS = 40


class SamplesConfig(Config):
    """What is drawn while a model is trained, how often, and how."""

    prompts: tuple[str, ...] = Field(min_length=1)
    every: int = Field(default=500, ge=1)
    """Steps between two drawings; they are drawn after the last step as well."""
    h: int = Field(default=64, ge=1)
    w: int = Field(default=64, ge=1)
    """Size in codes: 64 x 64 are 512 x 512 pixels."""
    video_t: int | None = Field(default=None, ge=1)
    """Latent frames of clips, which are drawn in place of images."""
    fps: float = Field(default=24.0, gt=0)
    seed: int = Field(default=0, ge=0)
    """Of the first prompt; the next ones count up."""
    lookahead: int = Field(default=8, ge=0)
    sampling: SamplingConfig = SamplingConfig()

    def requests(self) -> list[VisionRequest]:
        """What is asked of the model."""
        kind: Kind = "image" if self.video_t is None else "video"
        grid, fps = (self.video_t or 1, self.h, self.w), None if kind == "image" else self.fps
        return [VisionRequest(prompt, kind, grid, fps, self.seed + index) for index, prompt in enumerate(self.prompts)]


@dataclass(frozen=True, eq=False)
class Sample:
    """What was drawn for a prompt: frames (T, H, W, 3), one for an image."""

    prompt: str
    seed: int
    frames: Frames


def draw_samples(transformer: Transformer, data: SequenceData, config: SamplesConfig) -> list[Sample]:
    """What a model that is being trained draws by now; it is in train mode before and after."""
    assert data.vision is not None
    requests = config.requests()
    transformer.eval()
    try:
        lm = LanguageModel(transformer, data.vocabulary, data.text)
        drawn = generate_vision(lm, requests, config.sampling, lookahead=config.lookahead)
    finally:
        transformer.train()
    vision = load_vision_tokenizer(data.vision, device=transformer.lm_head.weight.device)
    documents = [parse_document(tokens, data.vocabulary, data.text) for tokens in drawn]
    blocks = [document.block for document in documents if isinstance(document, VisionDocument)]
    frames = [decode_codes(vision, block.codes, block.kind) for block in blocks]
    return [Sample(request.prompt, request.seed, picture) for request, picture in zip(requests, frames, strict=True)]


def write_samples(folder: Path, step: int, samples: list[Sample]) -> None:
    """Samples -> PNG files in a folder of the step, named by number and prompt; frames of a clip stand side by side."""
    with publish_folder(folder / f"step-{step:06d}") as draft:
        for index, sample in enumerate(samples):
            words = re.sub(r"\W+", "-", sample.prompt).strip("-")[:NAME_CHARS]
            facts = {"prompt": sample.prompt, "seed": str(sample.seed), "step": str(step)}
            write_png(draft / f"{index:02d}-{words}.png", np.concatenate(list(sample.frames), axis=1), facts)


def check_samples(config: SamplesConfig, data: SequenceData, architecture: TransformerConfig) -> None:
    """Raises: ConfigError if the samples cannot be drawn: there is no vision tokenizer of the data's codes, a prompt is none,
    or a document does not fit into the model's context.
    """
    if data.vision is None:
        raise ConfigError(
            f"found samples and no vision tokenizer of the codes of {data.data_id}, expected one to decode them: leave out "
            "the section samples"
        )
    num_codes = load_vision_tokenizer(data.vision).config.codebook_size
    if num_codes != data.vocabulary.num_codes:
        raise ConfigError(f"found a vision tokenizer of {num_codes} codes in {data.vision}, expected {data.vocabulary}")
    with torch.device("meta"):
        lm = LanguageModel(Transformer(architecture), data.vocabulary, data.text)
    try:
        check_requests(lm, config.requests(), config.sampling)
    except DocumentError as error:
        raise ConfigError(f"samples: {error}") from error
