"""Training of the vision tokenizer on chunks of four frames: squared error through the codebook, and by choice what the
published recipe has besides, LPIPS, a discriminator, and the average of the weights.

Shapes: B chunks, T frames, C channels, H W pixels, K codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.vision_tokenizer.config import VISION_TOKENIZER_SIZES, VisionTokenizerConfig
from model.vision_tokenizer.lpips import Lpips, LpipsConfig, load_lpips
from model.vision_tokenizer.pixels import pixels_from_rgb
from model.vision_tokenizer.tokenizer import TokenizerOutput, VisionTokenizer
from model.weights import save_vision_tokenizer
from schemas.errors import ConfigError
from schemas.identity import file_digest
from schemas.recipe import later_option
from train.adversarial import AdversarialConfig, AdversarialTokenizer, tokenizer_of
from train.batches import FRAMES_PER_CHUNK, FrameData, FrameFile, Frames, Rows, batch_indices, open_frames
from train.ema import average_name, averaged_tensors, load_average, update_average
from train.launch import run_training, training_identity
from train.loop import TrainingConfig
from train.losses import Term, clip_mean, codes_used, sum_of, vision_tokenizer_loss
from train.mesh import Mesh
from train.meter import Work
from train.optim import OptimConfig
from train.parallelize import copy_from_first, sum_over_workers
from train.progress import OnProgress, TrainingResult
from train.samples import Sample

OBJECTIVE = "vision_tokenizer"
CODE_USES = "code_uses_K"
CODEBOOK = "quantize.embedding.weight"


class TokenizerTrainingConfig(TrainingConfig):
    """Options of a tokenizer training. `model` changes single numbers of the named size.

    Paper: Emu3 report, section 2.2, names the terms (L2, LPIPS, GAN, commitment) and no number: weights, betas and learning
    rate are MoVQGAN's, from whose weights the published tokenizer started; the care of the codebook is ours.
    """

    size: str = "emu3"
    model: dict[str, int | float | list[int]] = Field(default_factory=dict)
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, betas=(0.5, 0.9), weight_decay=0.0, max_grad_norm=1.0)
    codebook_weight: float = Field(default=0.25, gt=0)
    commitment_weight: float = Field(default=1.0, gt=0)
    lpips: LpipsConfig = later_option(LpipsConfig())
    lpips_weight: float = later_option(0.1, gt=0)
    """Of the perceptual term, which takes part if `lpips` names files of weights."""
    adversarial: AdversarialConfig | None = later_option(None)
    """Options of the adversarial term; None leaves it out."""
    ema_decay: float | None = later_option(None, gt=0, lt=1)
    """The average of the weights looks back about 1 / (1 - decay) steps, and is what is exported; None exports the last."""
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

    def left_out(self) -> dict[str, str]:
        """Terms of the published objective that take no part, and why."""
        found = {}
        if self.lpips.features is None:
            found["perceptual"] = "which needs weights of LPIPS: name the files in lpips.features and lpips.heads"
        if self.adversarial is None:
            found["adversarial"] = "which needs a section adversarial"
        return found

    def by_content(self) -> Self:
        """The options with files named by what is in them: equal ones, equal training, wherever the files lie.

        Raises: ConfigError if a file cannot be read.
        """
        if self.lpips.features is None or self.lpips.heads is None:
            return self
        digests = {"features": _file_id(self.lpips.features), "heads": _file_id(self.lpips.heads)}
        return self.model_copy(update={"lpips": self.lpips.model_copy(update=digests)})


@dataclass(frozen=True)
class TokenizerObjective:
    """Chunks of frames -> the reconstruction and codebook losses of a vision tokenizer."""

    config: TokenizerTrainingConfig
    data: FrameData
    held_out: FrameData | None = None

    def num_rows(self) -> int:
        """Chunks of the data."""
        return len(self._file())

    def side_px(self) -> tuple[int, int]:
        """Height and width of the chunks."""
        height, width = self._file().read(np.zeros(1, np.int64)).shape[2:4]
        return height, width

    def build_model(self, mesh: Mesh) -> nn.Module:
        """A fresh tokenizer, in the memory layout that convolutions on CPUs and GPUs are fastest in, with its discriminator if
        it has one.
        """
        tokenizer = VisionTokenizer(self.config.tokenizer_config())
        tokenizer.pass_through_time()
        adversarial = self.config.adversarial
        model = AdversarialTokenizer(tokenizer, adversarial) if adversarial is not None else tokenizer
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(mesh.device)

    def networks(self, model: nn.Module) -> Sequence[tuple[nn.Module, OptimConfig]]:
        """The tokenizer and its discriminator."""
        tokenizer = (tokenizer_of(model), self.config.optim)
        if not isinstance(model, AdversarialTokenizer):
            return [tokenizer]
        assert self.config.adversarial is not None
        return [tokenizer, (model.discriminator, self.config.adversarial.optim)]

    def initial_state(self, model: nn.Module) -> dict[str, Tensor]:
        """How often each code was chosen since they were last counted afresh, and the average of the weights."""
        tokenizer = tokenizer_of(model)
        uses = {CODE_USES: torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)}
        return uses if self.config.ema_decay is None else {**uses, **averaged_tensors(tokenizer)}

    def start(self, model: nn.Module, mesh: Mesh) -> None:
        """Place the codebook on latents of the data, unless there are steps without it first."""
        tokenizer = tokenizer_of(model)
        if self.config.free_steps == 0:
            with torch.no_grad():
                latents_BCthw = tokenizer.latents(self._pixels(self._latent_rows(0), 0, mesh.device))
            for module in tokenizer.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.reset_running_stats()  # they belong to the steps
            self._place_codes(tokenizer, latents_BCthw, 0)

    def parts(self, rows: Rows) -> Sequence[Rows]:
        """All rows together: they are normalised by what they have in common."""
        return [rows]

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """Chunks -> `loss`, its parts (`pixels`, squared error in [-1, 1]; `commitment`; `perceptual`; `adversarial`), what
        the `discriminator` has to lower, `psnr` in dB, and `codes_used`, the share since codes were last counted afresh.
        """
        pixels_BTCHW = self._pixels(rows, step, mesh.device)
        output = tokenizer_of(model)(pixels_BTCHW, quantize=step >= self.config.free_steps)
        if model.training:
            uses_K = torch.bincount(output.codes_BThw.flatten().cpu(), minlength=len(state[CODE_USES]))
            state[CODE_USES] += sum_over_workers(uses_K)
        terms = vision_tokenizer_loss(output, pixels_BTCHW, self.config.codebook_weight, self.config.commitment_weight)
        terms["codes_used"] = clip_mean(codes_used(state[CODE_USES]).to(mesh.device), pixels_BTCHW)
        self._add_perceptual(terms, output, pixels_BTCHW)
        self._add_adversarial(terms, model, output, pixels_BTCHW, step)
        return terms

    def _add_perceptual(self, terms: dict[str, Term], output: TokenizerOutput, pixels_BTCHW: Tensor) -> None:
        if self.config.lpips.features is None:
            return
        lpips = _open_lpips(self.config.lpips, pixels_BTCHW.device)
        drawn_NCHW, real_NCHW = output.reconstruction_BTCHW.float().flatten(0, 1), pixels_BTCHW.flatten(0, 1)
        perceptual = lpips(drawn_NCHW, real_NCHW).mean()
        _add_to_loss(terms, self.config.lpips_weight * perceptual)
        terms["perceptual"] = clip_mean(perceptual.detach(), pixels_BTCHW)

    def _add_adversarial(
        self, terms: dict[str, Term], model: nn.Module, output: TokenizerOutput, pixels_BTCHW: Tensor, step: int
    ) -> None:
        options = self.config.adversarial
        if options is None or not isinstance(model, AdversarialTokenizer):
            return
        started = step >= options.start_step
        adversarial, judging = model.losses(output.reconstruction_BTCHW.float(), pixels_BTCHW, started)
        # The discriminator's loss lends its gradients and not its value: `loss` is the tokenizer's.
        _add_to_loss(terms, options.weight * adversarial + judging - judging.detach())
        terms["adversarial"] = clip_mean(adversarial.detach(), pixels_BTCHW, counts=started)
        terms["discriminator"] = clip_mean(judging.detach(), pixels_BTCHW, counts=started)

    def finish_step(self, model: nn.Module, step: int, device: torch.device, state: dict[str, Tensor]) -> None:
        """After the last free step, place the codebook; later, every `reset_every` steps, move codes that nothing chose. The
        average follows the weights, and takes their place after the last step.
        """
        tokenizer = tokenizer_of(model)
        moved_K = self._care_for_codes(tokenizer, step + 1, device, state)
        if self.config.ema_decay is None:
            return
        update_average(state, tokenizer, self.config.ema_decay, step)
        if moved_K is not None:  # the mean of where a code was and where it is stands for neither
            moved_K = moved_K.to(device)
            state[average_name(CODEBOOK)][moved_K] = tokenizer.quantize.embedding.weight.detach()[moved_K]
        if step + 1 == self.config.steps:
            load_average(state, tokenizer)

    def _care_for_codes(
        self, tokenizer: VisionTokenizer, done: int, device: torch.device, state: dict[str, Tensor]
    ) -> Tensor | None:
        """Place codes after `done` steps, if it is time; which ones moved."""
        is_first = 0 < self.config.free_steps == done
        if not is_first and (done < self.config.free_steps or done % self.config.reset_every):
            return None
        uses_K = None if is_first else state[CODE_USES].clone()
        state[CODE_USES].zero_()
        if done > self.config.reset_until_ratio * self.config.steps and not is_first:
            return None
        with torch.no_grad():
            tokenizer.eval()  # the running statistics belong to the steps
            latents_BCthw = tokenizer.latents(self._pixels(self._latent_rows(done), done, device))
            tokenizer.train()
        self._place_codes(tokenizer, latents_BCthw, done, uses_K)
        return torch.ones_like(state[CODE_USES], dtype=torch.bool) if uses_K is None else uses_K == 0

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
        """Reconstruction of the held-out chunks, whole ones: `loss`, `pixels`, `commitment`, `psnr` in dB, and `codes_used`,
        the share of the codebook that they are told with. Every worker works out all of it.
        """
        if self.held_out is None:
            return {}
        tokenizer, file = tokenizer_of(model), open_frames(self.held_out.path)
        found: list[dict[str, Term]] = []
        uses_K = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64)
        rows = np.arange(min(len(file), self.config.execution.held_out_rows))
        for start in range(0, len(rows), self.config.batch_size):
            pixels_BTCHW = pixels_from_rgb(file.read(rows[start : start + self.config.batch_size])).to(mesh.device)
            output = tokenizer(pixels_BTCHW)
            uses_K += torch.bincount(output.codes_BThw.flatten().cpu(), minlength=len(uses_K))
            weights = self.config.codebook_weight, self.config.commitment_weight
            found.append(vision_tokenizer_loss(output, pixels_BTCHW, *weights))
        used = Term(codes_used(uses_K).to(mesh.device), torch.ones((), device=mesh.device))
        return {name: sum_of([terms[name] for terms in found]) for name in found[0]} | {"codes_used": used}

    def samples(self, model: nn.Module, done: int, mesh: Mesh) -> list[Sample]:
        """Nothing is drawn."""
        return []

    def work(self, rows: Rows) -> Work:
        """Frames."""
        return Work(len(rows) * FRAMES_PER_CHUNK, "frames")

    def export(self, model: nn.Module, folder: Path) -> None:
        """The tokenizer's weights as a folder."""
        save_vision_tokenizer(folder, tokenizer_of(model))

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


def _add_to_loss(terms: dict[str, Term], more: Tensor) -> None:
    """Raise the mean that is trained on."""
    loss = terms["loss"]
    terms["loss"] = Term(loss.total + more * loss.weight, loss.weight)


@lru_cache(maxsize=1)
def _open_lpips(config: LpipsConfig, device: torch.device) -> Lpips:
    """The network, read once per process. No part of the model: it is neither trained nor kept in checkpoints."""
    return load_lpips(config, device)


def _file_id(file: str) -> str:
    try:
        return file_digest(Path(file))
    except OSError as error:
        raise ConfigError(f"the weights {file} cannot be read: {error}") from error


def train_vision_tokenizer(
    config: TokenizerTrainingConfig,
    data: FrameData,
    storage: Path,
    *,
    held_out: FrameData | None = None,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Chunks of frames -> a trained vision tokenizer in `storage`; at once if `storage` already holds it finished.

    Raises: ConfigError if options, data, folder or cluster do not fit one another.
    """
    objective = TokenizerObjective(config.model_copy(update={"lpips": config.lpips.absolute()}), data, held_out)
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
    if objective.config.lpips.features is not None:
        load_lpips(objective.config.lpips)  # wrong files stop here, before workers start
    identity = training_identity(OBJECTIVE, config.by_content(), data.data_id, data.sha256)
    return run_training(objective, identity, storage, on_progress)
