"""Images and clips through vLLM, unpatched: the exported Llama, guidance by paired requests, the grammar as a logits processor.

Each request runs twice, with its prompt and with the negative one, under one seed. The processor finds both rows in the batch,
combines their scores, leaves what the grammar allows, and writes the same scores to both, so that both draw the same token.
If vLLM ever has one of them a token ahead of the other, nothing sensible could be drawn, and the processor stops the engine.

Shapes: V ids.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from model.generate import VisionRequest
from model.sampling import SamplingConfig, guide
from model.text_tokenizer import TextTokenizer
from schemas.document import Grammar, MetaTemplate, Tokens, prompt_tokens
from schemas.errors import ConfigError
from schemas.vocabulary import Vocabulary

ARGUMENT = "outback"  # of SamplingParams.extra_args
# All prompts of a batch go through in one pass, so that pairs begin together: room for these many tokens of each, and for
# two that fill the context, unless that is more than memory for one pass should be set aside for.
PROMPT_TOKENS = 512
LONGEST_PROMPTS = 32_768


# Prompt and parameters of one sequence, or of two when there is guidance.
_Pair = list[tuple[Tokens, SamplingParams]]


@dataclass(eq=False)
class _Row:
    """One sequence of the batch. `written` is vLLM's own list and grows with it."""

    pair: int
    is_negative: bool
    guidance: float
    layout: npt.NDArray[np.int64]
    vision_offset: int
    written: list[int]


class VisionGrammar(LogitsProcessor):  # type: ignore[misc]  # vLLM has no types
    """Guidance and grammar for the rows that ask for them. vLLM makes it, once per engine."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """The grammar forbids what is likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows as they come, go and move."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._rows.pop(index, None)
            asked = (params.extra_args or {}).get(ARGUMENT)
            if asked is not None:
                self._rows[index] = _row(asked, written)
        for source, target, direction in batch_update.moved:
            moving, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moving is not None:
                self._rows[target] = moving
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of the batch (rows, V) -> the same, guided and held to the grammar in the rows that ask for it.

        Raises: RuntimeError if one of a pair is missing or a token ahead.
        """
        for members in self._pairs().values():
            (index, row), place = members[0], len(members[0][1].written)
            if len(members) != (1 if row.guidance == 1 else 2) or any(len(r.written) != place for _, r in members):
                found = [(r.is_negative, len(r.written)) for _, r in members]
                raise RuntimeError(f"vLLM has separated the pair {row.pair}: {found} tokens written; lower max_pairs")
            indices = [member for member, _ in members]
            forced = int(row.layout[place]) if place < len(row.layout) else int(row.layout[-1])
            codes = slice(row.vision_offset, None)
            scores = logits[index, codes].float().clone()  # what it is a view of is written to below
            if len(members) == 2:
                scores = guide(scores, logits[indices[1], codes].float(), row.guidance)
            logits[indices] = -torch.inf
            if forced >= 0:
                logits[indices, forced] = 0.0
            else:
                logits[indices, codes] = scores.to(logits.dtype)
        return logits

    def _pairs(self) -> dict[int, list[tuple[int, _Row]]]:
        pairs: dict[int, list[tuple[int, _Row]]] = {}
        for index, row in sorted(self._rows.items(), key=lambda item: item[1].is_negative):
            pairs.setdefault(row.pair, []).append((index, row))
        return pairs


class VllmImages:
    """An engine on a folder that `export_language_model` wrote as a Llama. Close it to have its memory back.

    `max_pairs` requests run at once, each as two sequences when there is guidance.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        text: TextTokenizer,
        *,
        context_len: int,
        max_pairs: int = 8,
        dtype: str = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        cpu_kv_cache_gb: int = 4,
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cpu_kv_cache_gb))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._vocabulary, self._text = vocabulary, text
        self._context_len, self._max_pairs = context_len, max_pairs
        self._max_prompt_tokens = max(2 * max_pairs * PROMPT_TOKENS, min(2 * context_len, LONGEST_PROMPTS))
        # The scheduler in this process: in one of its own it runs as soon as the first of a pair has reached it.
        with _environment("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), _settable_threads():
            self._llm = LLM(
                str(folder),
                skip_tokenizer_init=True,
                dtype=dtype,
                max_num_seqs=2 * max_pairs,
                max_num_batched_tokens=self._max_prompt_tokens,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=enforce_eager,
                logits_processors=[f"{VisionGrammar.__module__}:{VisionGrammar.__name__}"],
            )

    def generate(
        self,
        requests: Sequence[VisionRequest],
        sampling: SamplingConfig,
        *,
        meta: MetaTemplate = MetaTemplate.OUTBACK,
    ) -> list[Tokens]:
        """Requests -> the tokens of each whole document, BOS to EOS, uint32; they always parse.

        Draws are vLLM's: a seed gives other codes than `generate_vision` gives, unless the temperature is 0.

        Raises: DocumentError if a request is contradictory; ConfigError if it is too long for the context, or its prompts
            for one pass; RuntimeError if a pair came apart.
        """
        documents: list[Tokens] = []
        sequences = [self._sequences(pair, request, sampling, meta) for pair, request in enumerate(requests)]
        for batch in self._batches(sequences):
            prompts = [{"prompt_token_ids": prompt.tolist()} for pair in batch for prompt, _ in pair]
            outputs = iter(
                self._llm.generate(prompts, [params for pair in batch for _, params in pair], use_tqdm=False)
            )
            for pair in batch:
                written = [list(next(outputs).outputs[0].token_ids) for _ in pair]
                if any(tokens != written[0] for tokens in written):
                    raise RuntimeError("vLLM drew other tokens for the two sequences of a pair")
                documents.append(np.concatenate([pair[0][0], np.asarray(written[0], np.uint32)]))
        return documents

    def _batches(self, sequences: Sequence[_Pair]) -> list[list[_Pair]]:
        """What can begin in one pass."""
        batches: list[list[_Pair]] = []
        room = 0
        for pair in sequences:
            length = sum(len(prompt) for prompt, _ in pair)
            if length > self._max_prompt_tokens:
                raise ConfigError(
                    f"found {length} tokens in the two prompts of a request, expected at most {self._max_prompt_tokens}: "
                    "give fewer latent frames to continue"
                )
            if not batches or length > room or len(batches[-1]) == self._max_pairs:
                batches.append([])
                room = self._max_prompt_tokens
            batches[-1].append(pair)
            room -= length
        return batches

    def _sequences(self, pair: int, request: VisionRequest, sampling: SamplingConfig, meta: MetaTemplate) -> _Pair:
        """Prompt and parameters with the prompt, and with guidance also with the negative one."""
        grammar = Grammar(self._vocabulary, request.kind, request.grid, meta)
        context = grammar.write(request.given_codes)
        sequences = []
        for branch, caption in enumerate(request.captions(sampling)):
            prompt = prompt_tokens(
                caption, request.kind, request.grid, request.fps, self._vocabulary, self._text, meta=meta
            )
            if len(prompt) + grammar.length > self._context_len:
                raise ConfigError(
                    f"found a document of {len(prompt) + grammar.length} tokens for the grid {request.grid}, expected at "
                    f"most {self._context_len}, the model's context: ask for a smaller grid"
                )
            asked = {
                "pair": pair, "negative": branch == 1, "guidance": sampling.guidance, "kind": request.kind,
                "grid": request.grid,
                "meta": meta.value, "given": len(context), "num_text": self._vocabulary.num_text,
                "num_codes": self._vocabulary.num_codes,
            }  # fmt: skip
            params = SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k or 0,
                top_p=sampling.top_p,
                seed=request.seed,
                max_tokens=grammar.length - len(context),
                ignore_eos=True,
                detokenize=False,
                extra_args={ARGUMENT: asked},
            )
            sequences.append((np.concatenate([prompt, context]), params))
        return sequences

    def close(self) -> None:
        """Gives its memory back."""
        self._llm.llm_engine.engine_core.shutdown()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def _settable_threads() -> Iterator[None]:
    """On CPU vLLM puts what does nothing in the place of `torch.set_num_threads`, for the whole process and for good."""
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads


def _row(asked: dict[str, Any], written: list[int]) -> _Row:
    vocabulary = Vocabulary(asked["num_text"], asked["num_codes"])
    grammar = Grammar(vocabulary, asked["kind"], tuple(asked["grid"]), MetaTemplate(asked["meta"]))
    layout = grammar.layout[asked["given"] :]
    return _Row(asked["pair"], asked["negative"], asked["guidance"], layout, vocabulary.vision_offset, written)
