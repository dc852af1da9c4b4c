"""Training of the vision tokenizer: squared error through the codebook, on chunks of four frames.

The published objective also has a perceptual and an adversarial term, whose weights are not public; they are not part
of this one, so fine texture comes out soft.

Shapes: B chunks, T frames, C channels, H W pixels, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES, VisionTokenizerConfig
from model.vision_tokenizer.pixels import pixels_from_rgb
from model.vision_tokenizer.tokenizer import VisionTokenizer
from model.weights import save_vision_tokenizer
from schemas.errors import ConfigError
from schemas.recipe import later_option
from train.batches import FRAMES_PER_CHUNK, FrameData, FrameFile, Frames, Rows, batch_indices, open_frames
from train.launch import run_training, training_identity
from train.loop import TrainingConfig
from train.losses import Term, vision_tokenizer_loss
from train.mesh import Mesh
from train.meter import Work
from train.optim import OptimConfig
from train.parallelize import copy_from_first, sum_over_workers
from train.progress import OnProgress, TrainingResult

OBJECTIVE = "vision_tokenizer"
CODE_USES = "code_uses_K"


class TokenizerTrainingConfig(TrainingConfig):
    """Options of a tokenizer training. `model` changes single numbers of the named size.

    Paper: Emu3 report, section 2.2, does not state them: weights, betas and learning rate are MoVQGAN's, from whose
    weights the published tokenizer started; the care of the codebook is ours.
    """

    size: str = "emu3"
    model: dict[str, int | float | list[int]] = Field(default_factory=dict)
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0)
    codebook_weight: float = Field(default=0.25, gt=0)
    commitment_weight: float = Field(default=1.0, gt=0)
    crop_px: int | None = Field(default=None, ge=8, multiple_of=8)
    """Side of a square cut from each chunk anew at each step; None trains on whole chunks."""
    free_steps: int = later_option(0)
    """Steps at the start without a codebook, which then is placed on latents that already tell things apart."""
    latent_batch: int = Field(default=32, ge=1)
    """Chunks whose latents the codebook, and later its unused codes, are placed on."""
    reset_every: int = Field(default=50, ge=1)
    """Steps between moves of codes that nothing chose."""
    reset_until_ratio: float = Field(default=0.7, ge=0, le=1)
    """Share of the training after which codes stay where they are."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.size not in VISION_TOKENIZER_SIZES:
            raise ValueError(f"found the size {self.size!r}, expected one of {', '.join(VISION_TOKENIZER_SIZES)}")
        if not 0 <= self.free_steps < self.steps:
            raise ValueError(f"found free_steps {self.free_steps}, expected 0 to less than the {self.steps} steps")
        self.tokenizer_config()
        return self

    def tokenizer_config(self) -> VisionTokenizerConfig:
        """The architecture."""
        return VisionTokenizerConfig.model_validate({**VISION_TOKENIZER_SIZES[self.size].model_dump(), **self.model})


@dataclass(frozen=True)
class TokenizerObjective:
    """Chunks of frames -> the reconstruction and codebook losses of a vision tokenizer."""

    config: TokenizerTrainingConfig
    data: FrameData

    def num_rows(self) -> int:
        """Chunks of the data."""
        return len(self._file())

    def side_px(self) -> tuple[int, int]:
        """Height and width of the chunks."""
        height, width = self._file().read(np.zeros(1, np.int64)).shape[2:4]
        return height, width

    def build_model(self, mesh: Mesh) -> nn.Module:
        """A fresh tokenizer, in the memory layout that convolutions on CPUs and GPUs are fastest in."""
        model = VisionTokenizer(self.config.tokenizer_config())
        model.pass_through_time()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(mesh.device)

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """How often each code was chosen since the last reset."""
        assert isinstance(model, VisionTokenizer)
        return {CODE_USES: torch.zeros(model.config.codebook_size, dtype=torch.int64)}

    def start(self, model: nn.Module, mesh: Mesh) -> None:
        """Place the codebook on latents of the data, unless there are steps without it first."""
        assert isinstance(model, VisionTokenizer)
        if self.config.free_steps == 0:
            with torch.no_grad():
                latents_BCthw = model.latents(self._pixels(self._latent_rows(0), 0, mesh.device))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.reset_running_stats()  # they belong to the steps
            self._place_codes(model, latents_BCthw, 0)

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """All rows together: they are normalised by what they have in common."""
        return [rows]

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """Chunks -> `loss`, and its `pixels` (squared error in [-1, 1]) and `commitment` parts."""
        pixels_BTCHW = self._pixels(rows, step, mesh.device)
        output = model(pixels_BTCHW, quantize=step >= self.config.free_steps)
        uses_K = torch.bincount(output.codes_BThw.flatten().cpu(), minlength=len(state[CODE_USES]))
        state[CODE_USES] += sum_over_workers(uses_K)
        return vision_tokenizer_loss(output, pixels_BTCHW, self.config.codebook_weight, self.config.commitment_weight)

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        """After the last free step, place the codebook; later, every `reset_every` steps, move codes that nothing chose."""
        assert isinstance(model, VisionTokenizer)
        done, free = step + 1, self.config.free_steps
        is_first = free > 0 and done == free
        late = done > self.config.reset_until_ratio * self.config.steps
        if not is_first and (done < free or done % self.config.reset_every or late):
            return
        with torch.no_grad():
            model.eval()  # the running statistics belong to the steps
            latents_BCthw = model.latents(self._pixels(self._latent_rows(done), done, device))
            model.train()
        self._place_codes(model, latents_BCthw, done, None if is_first else state[CODE_USES])
        state[CODE_USES].zero_()

    def _place_codes(
        self, model: VisionTokenizer, latents_BCthw: Tensor, done: int, uses_K: Tensor | None = None
    ) -> None:
        """Move the whole codebook onto latents, or the codes without a use in `uses_K`; on all workers alike."""
        generator = torch.Generator().manual_seed(self.config.seed + done)
        if uses_K is None:
            model.quantize.init_codebook_from_latents(latents_BCthw, generator)
        else:
            model.quantize.reset_dead_codes(uses_K, latents_BCthw, generator)
        copy_from_first(model.quantize.embedding.weight.data)

    def evaluate(self, model: nn.Module, mesh: Mesh) -> dict[str, Term]:
        """Nothing is held out."""
        return {}

    def work(self, rows: Rows) -> Work:
        """Frames."""
        return Work(len(rows) * FRAMES_PER_CHUNK, "frames")

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights as a folder."""
        assert isinstance(model, VisionTokenizer)
        save_vision_tokenizer(folder, model)

    def _latent_rows(self, step: int) -> Rows:
        """The same rows on every worker, so that all place codes alike."""
        return batch_indices(self.config.seed, step, min(self.config.latent_batch, self.num_rows()), self.num_rows())

    def _pixels(self, rows: Rows, step: int, device: torch.device) -> Tensor:
        chunks = self._file().read(rows)
        if self.config.crop_px is not None:
            chunks = np.stack([self._crop(chunk, int(row), step) for chunk, row in zip(chunks, rows, strict=True)])
        return pixels_from_rgb(chunks).to(device)

    def _crop(self, chunk: Frames, row: int, step: int) -> Frames:
        """A square at a place that seed, step and row decide, so it is the same on any worker."""
        side = self.config.crop_px or 0
        rng = np.random.default_rng([self.config.seed, step, row])
        top, left = (int(rng.integers(0, length - side + 1)) for length in chunk.shape[1:3])
        return chunk[:, top : top + side, left : left + side]

    def _file(self) -> FrameFile:
        return open_frames(self.data.path)


def train_vision_tokenizer(
    config: TokenizerTrainingConfig, data: FrameData, storage: Path, *, on_progress: OnProgress | None = None
) -> TrainingResult:
    """Chunks of frames -> a trained vision tokenizer in `storage`; at once if `storage` already holds it finished.

    Raises: ConfigError if options, data, folder or cluster do not fit one another.
    """
    objective = TokenizerObjective(config, data)
    architecture = config.tokenizer_config()
    if architecture.temporal_downsample_factor != FRAMES_PER_CHUNK:
        raise ConfigError(
            f"found temporal_downsample_factor {architecture.temporal_downsample_factor}, expected {FRAMES_PER_CHUNK}, "
            "the frames of a chunk"
        )
    if config.crop_px is not None and objective.num_rows() and config.crop_px > min(objective.side_px()):
        raise ConfigError(f"found crop_px {config.crop_px}, expected at most {objective.side_px()}, the chunks' size")
    if objective.num_rows() == 0:
        raise ConfigError(f"found no frames in {data.path}: choose a curated set that holds images or video")
    identity = training_identity(OBJECTIVE, config, data.data_id, data.sha256)
    return run_training(objective, identity, storage, on_progress)
