"""Training of a captioner: next-token prediction of captions, given pictures and a prompt, on a transformers checkpoint.

A checkpoint is fine-tuned whole, or with its vision tower kept; or a small one is trained from scratch. What comes out is the
folder that transformers and vLLM load. Paper: Emu3 report, appendix on data: captioners are fine-tuned for the purpose.

Shapes: B examples, L tokens, V vocabulary, T frames, H W pixels.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from model.captioner import CaptionerSize, load_captioner, write_captioner
from schemas.captions import frame_times
from schemas.errors import ConfigError
from train.batches import Frames, Rows
from train.files import publish_file, publish_folder, sync
from train.launch import run_training, training_identity
from train.loop import TrainingConfig, WeightsOnly
from train.losses import Term
from train.mesh import Mesh
from train.progress import OnProgress, TrainingResult

OBJECTIVE = "captioner"
CACHE_BYTES = 1 << 30
IGNORED = -100  # cross_entropy's own mark for what is not learnt
EXAMPLE_SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("frames", pa.list_(pa.field("element", pa.large_binary(), nullable=False)), nullable=False),  # PNG
        pa.field("caption", pa.string(), nullable=False),
    ]
)


class CaptionerTrainingConfig(TrainingConfig):
    """Options of a captioner training. Exactly one of `base`, a checkpoint to fine-tune, and `size` is given."""

    base: str | None = None
    """A folder or a hub name that transformers loads as an image-text-to-text model."""
    size: CaptionerSize | None = None
    freeze_vision: bool = False
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if (self.base is None) == (self.size is None):
            raise ValueError("give base, a checkpoint to fine-tune, or size, to train a small one from scratch")
        if self.freeze_vision and self.base is None:
            raise ValueError("freeze_vision keeps what a checkpoint has learnt; with size there is nothing to keep")
        return self


@dataclass(frozen=True)
class CaptionExample:
    """What a captioner should say of some frames: uint8 RGB (T, H, W, 3), T = 1 for an image."""

    kind: Literal["image", "video"]
    frames: Frames
    caption: str


@dataclass(frozen=True)
class CaptionData:
    """Examples, materialised, and the words that ask for a caption, as they are asked when captioning."""

    path: Path
    data_id: str
    sha256: str
    image_prompt: str
    video_prompt: str
    system: str


def write_examples(path: Path, examples: Iterable[CaptionExample]) -> int:
    """Examples in order -> an Arrow IPC file, published whole; their number. Frames are kept as PNG, every pixel."""
    count = 0
    with (
        publish_file(path) as draft,
        pa.OSFile(str(draft), "wb") as sink,
        pa.ipc.new_file(sink, EXAMPLE_SCHEMA) as writer,
    ):
        for example in examples:
            row = {"kind": example.kind, "frames": [_png(f) for f in example.frames], "caption": example.caption}
            writer.write_batch(pa.RecordBatch.from_pylist([row], EXAMPLE_SCHEMA))
            count += 1
    return count


class ExampleFile:
    """Examples by index, without reading the rest. Raises: ConfigError if the file is missing or is no such file."""

    def __init__(self, path: Path) -> None:
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(f"the examples {path} cannot be read: {error}") from error
        if self._table.schema != EXAMPLE_SCHEMA:
            raise ConfigError(f"{path} holds the columns {self._table.schema.names}, expected {EXAMPLE_SCHEMA.names}")

    def __len__(self) -> int:
        return len(self._table)

    def read(self, row: int) -> CaptionExample:
        """One example."""
        kind, frames, caption = (self._table.column(name)[row] for name in EXAMPLE_SCHEMA.names)
        pictures = np.stack([_decoded(frame.as_buffer()) for frame in frames])
        return CaptionExample(kind.as_py(), pictures, caption.as_py())

    def captions(self) -> list[str]:
        """All captions, in order."""
        texts: list[str] = self._table.column("caption").to_pylist()
        return texts


@lru_cache(maxsize=1)
def open_examples(path: Path) -> ExampleFile:
    """A path -> its examples, opened once per process."""
    return ExampleFile(path)


@dataclass(frozen=True)
class CaptionerObjective(WeightsOnly):
    """Examples -> the cross-entropy of their captions."""

    config: CaptionerTrainingConfig
    data: CaptionData
    start_folder: str
    """Where weights, tokenizer and processor come from before the first step."""

    def num_rows(self) -> int:
        """Examples of the data."""
        return len(open_examples(self.data.path))

    def build_model(self, mesh: Mesh) -> nn.Module:
        """The checkpoint that is trained on, in float32."""
        model = load_captioner(self.start_folder)
        if self.config.freeze_vision:
            for parameter in _vision_tower(model).parameters():
                parameter.requires_grad_(False)
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        return model.to(mesh.device)

    def loss(self, model: nn.Module, rows: Rows, step: int, mesh: Mesh, state: dict[str, Tensor]) -> dict[str, Term]:
        """Examples -> `loss`: the mean over all caption tokens, their ends included."""
        inputs = _encoder(self).batch([int(row) for row in rows])
        labels_BL = inputs.pop("labels").to(mesh.device)
        logits_BLV = model(**{name: tensor.to(mesh.device) for name, tensor in inputs.items()}).logits
        total = functional.cross_entropy(
            logits_BLV[:, :-1].float().flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return {"loss": Term(total, (labels_BL[:, 1:] != IGNORED).sum())}

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights, tokenizer, processor and chat template as the folder that transformers and vLLM load."""
        from transformers import AutoProcessor

        with publish_folder(folder) as draft:
            model.save_pretrained(draft)  # type: ignore[operator]
            AutoProcessor.from_pretrained(self.start_folder).save_pretrained(draft)
            for path in draft.iterdir():
                path.chmod(0o644)
                sync(path)


class _Encoder:
    """Examples -> tensors, by the checkpoint's own processor. Encoded examples are kept up to a number of bytes."""

    def __init__(self, objective: CaptionerObjective) -> None:
        self._data, self._folder = objective.data, objective.start_folder
        self._examples = open_examples(objective.data.path)
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._bytes = 0

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._folder)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Rows -> model inputs and `labels`, padded on the right; pictures of all rows one after the other."""
        examples = [self._encoded(row) for row in rows]
        longest = max(example["input_ids"].shape[1] for example in examples)
        padding = {"input_ids": self._processor.tokenizer.pad_token_id, "labels": IGNORED}
        inputs: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for example in examples for name in example):
            parts = [example[name] for example in examples if name in example]
            if all(part.shape == example["input_ids"].shape for part, example in zip(parts, examples, strict=False)):
                parts = [
                    functional.pad(part, (0, longest - part.shape[1]), value=padding.get(name, 0)) for part in parts
                ]
            inputs[name] = torch.cat(parts)
        return inputs

    def _encoded(self, row: int) -> dict[str, Tensor]:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        encoded = self._encode(self._examples.read(row))
        self._kept[row] = encoded
        self._bytes += _num_bytes(encoded)
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return encoded

    def _encode(self, example: CaptionExample) -> dict[str, Tensor]:
        """Prompt and pictures as the processor writes them, then the caption and its end.

        The caption is text whatever it looks like: a string that reads like a control token becomes its characters.
        """
        tokenizer, is_video = self._processor.tokenizer, example.kind == "video"
        asked = self._data.video_prompt if is_video else self._data.image_prompt
        messages: list[dict[str, Any]] = [{"role": "system", "content": self._data.system}] if self._data.system else []
        messages.append({"role": "user", "content": [{"type": example.kind}, {"type": "text", "text": asked}]})
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = dict(self._processor(text=[text], return_tensors="pt", **pictures_as_captioned(example)))
        inputs = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, Tensor)}
        answer = tokenizer(example.caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tail = torch.tensor([[*answer, tokenizer.eos_token_id]])
        prompt_ids = inputs["input_ids"]
        for name in [name for name, tensor in inputs.items() if tensor.shape == prompt_ids.shape]:
            more = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}.get(name, torch.zeros_like(tail))
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name].dtype)], dim=1)
        inputs["labels"] = torch.cat([torch.full_like(prompt_ids, IGNORED), tail], dim=1)
        return inputs


@lru_cache(maxsize=1)
def _encoder(objective: CaptionerObjective) -> _Encoder:
    return _Encoder(objective)


def train_captioner(
    config: CaptionerTrainingConfig, data: CaptionData, storage: Path, *, on_progress: OnProgress | None = None
) -> TrainingResult:
    """Examples -> a trained captioner in `storage`; at once if `storage` already holds it finished.

    Raises: ConfigError if options, data, folder or cluster do not fit one another.
    """
    examples = open_examples(data.path)
    if not len(examples):
        raise ConfigError(f"found no example in {data.path}: choose a set whose clips have captions")
    identity = training_identity(OBJECTIVE, config, data.data_id, data.sha256)
    objective = CaptionerObjective(config, data, config.base or str(_scratch(config, data, storage)))
    return run_training(objective, identity, storage, on_progress)


def _scratch(config: CaptionerTrainingConfig, data: CaptionData, storage: Path) -> Path:
    """The untrained checkpoint of a training from scratch; its tokenizer is made for the captions and the prompts."""
    assert config.size is not None
    folder = storage.absolute() / "start"
    if not folder.exists():
        texts = [*open_examples(data.path).captions(), data.image_prompt, data.video_prompt, data.system]
        with publish_folder(folder) as draft:
            write_captioner(draft, config.size, [*texts, "system", "user", "assistant"], config.seed)
            for path in draft.iterdir():
                sync(path)
    return folder


def pictures_as_captioned(example: CaptionExample) -> dict[str, Any]:
    """Frames as the processor takes them, with the times that captioning gives them."""
    if example.kind == "image":
        return {"images": [example.frames[0]]}
    times = frame_times(len(example.frames))
    return {"videos": [example.frames], "video_metadata": [times], "do_sample_frames": False}


def _vision_tower(model: nn.Module) -> nn.Module:
    """The part of a vision-language model that sees. Raises: ConfigError if no part has one of the usual names."""
    towers: list[nn.Module] = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("visual", "vision_tower", "vision_model")
    ]
    if towers:
        return towers[0]
    raise ConfigError("freeze_vision: the model has no part named visual, vision_tower or vision_model")


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _png(frame: npt.NDArray[np.uint8]) -> bytes:
    import cv2

    ok, encoded = cv2.imencode(".png", frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert ok  # an RGB frame of positive size always is one
    return encoded.tobytes()


def _decoded(png: pa.Buffer) -> npt.NDArray[np.uint8]:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(np.asarray(pixels, np.uint8)[..., ::-1])
