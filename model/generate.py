"""Prompts to images and clips: prefill, then one code after another, held to the document grammar.

Shapes: B rows of the batch (with guidance both branches of every request), R requests, L new tokens, S tokens in all,
D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.sampling import SamplingConfig, choose, guide
from model.weights import LanguageModel
from schemas.document import Grammar, Grid, Kind, MetaTemplate, Tokens, prompt_tokens
from schemas.errors import ConfigError
from schemas.vocabulary import IntArray

Progress = Callable[[int, int], None]  # codes chosen so far, codes to choose


@dataclass(frozen=True, eq=False)
class VisionRequest:
    """One image or clip to make. The seed decides its codes, whatever else is in the batch.

    context_codes: the clip's first latent frames (k, h, w), k <= t, which are kept and continued.
    """

    prompt: str
    kind: Kind
    grid: Grid
    fps: float | None = None
    seed: int = 0
    context_codes: IntArray | None = None


@dataclass(eq=False)
class _Sequence:
    """A request on its way: `tokens` is what is decided, of which the network has seen all but `queue`."""

    grammar: Grammar
    prompts: list[Tokens]  # up to IMG: with the prompt, and with guidance also with the negative prompt
    uniforms: Tensor  # one for each code of the grid, so that a place's draw does not depend on the context
    num_missing: int  # codes still to choose
    written: list[int]  # after IMG
    queue: list[int] = field(default_factory=list)

    def write(self, token: int) -> None:
        """Take a chosen token and all that is forced after it."""
        self.written.append(token)
        self.queue.append(token)
        self.num_missing -= 1
        self.write_forced()

    def write_forced(self) -> None:
        while len(self.written) < self.grammar.length:
            forced = self.grammar.forced_token(len(self.written))
            if forced is None:
                return
            self.written.append(forced)
            self.queue.append(forced)

    def uniform(self) -> Tensor:
        """The number that decides the code at the place that comes next."""
        return self.uniforms[len(self.uniforms) - self.num_missing]

    def document(self) -> Tokens:
        return np.concatenate([self.prompts[0], np.asarray(self.written, np.uint32)])


@torch.no_grad()
def generate_vision(
    lm: LanguageModel,
    requests: Sequence[VisionRequest],
    sampling: SamplingConfig,
    on_progress: Progress | None = None,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
) -> list[Tokens]:
    """Requests -> the tokens of each whole document, BOS to EOS, uint32; they always parse.

    All requests are one batch, with both guidance branches in the same forward pass. Only ids of codes are scored;
    tokens that the grammar forces are fed along with the code before them.

    Raises: ConfigError if a document is longer than the model's context; DocumentError if a request is contradictory;
        RuntimeError in train mode.
    """
    if lm.transformer.training:
        raise RuntimeError("the transformer is in train mode, expected eval mode: call .eval() first")
    sequences = [_start(lm, request, sampling, meta) for request in requests]
    total = sum(sequence.num_missing for sequence in sequences)
    active = [sequence for sequence in sequences if sequence.num_missing]
    if active:
        _decode(lm, active, sampling, lambda left: on_progress(total - left, total) if on_progress else None)
    return [sequence.document() for sequence in sequences]


def _start(lm: LanguageModel, request: VisionRequest, sampling: SamplingConfig, meta: MetaTemplate) -> _Sequence:
    grammar = Grammar(lm.vocabulary, request.kind, request.grid, meta)
    captions = [request.prompt] if sampling.guidance == 1 else [request.prompt, sampling.negative_prompt]
    prompts = [
        prompt_tokens(caption, request.kind, request.grid, request.fps, lm.vocabulary, lm.text, meta=meta)
        for caption in captions
    ]
    longest, limit = max(map(len, prompts)) + grammar.length, lm.transformer.config.max_position_embeddings
    if longest > limit:
        raise ConfigError(
            f"found a document of {longest} tokens for the grid {request.grid}, expected at most {limit}, the model's "
            "context: ask for fewer latent frames or a smaller grid, or continue a clip from its last frames"
        )
    context_codes = (
        np.zeros((0, *request.grid[1:]), np.int64) if request.context_codes is None else request.context_codes
    )
    context = grammar.write(context_codes)
    t, h, w = request.grid
    generator = torch.Generator().manual_seed(request.seed)
    uniforms = torch.rand(t * h * w, generator=generator, dtype=torch.float64)
    sequence = _Sequence(grammar, prompts, uniforms, len(uniforms) - context_codes.size, context.tolist())
    sequence.write_forced()
    sequence.queue.clear()  # the prefill shows the network everything decided so far
    return sequence


def _decode(
    lm: LanguageModel, active: list[_Sequence], sampling: SamplingConfig, on_left: Callable[[int], None]
) -> None:
    transformer = lm.transformer
    device = transformer.lm_head.weight.device
    codes = slice(lm.vocabulary.vision_offset, lm.vocabulary.size)
    num_branches = len(active[0].prompts)
    # Row order: every request's first branch, then every request's second.
    rows = [
        [*sequence.prompts[branch].tolist(), *sequence.written] for branch in range(num_branches) for sequence in active
    ]
    width = max(map(len, rows))
    padding_B = torch.tensor([width - len(row) for row in rows], device=device)
    tokens_BL = torch.tensor([[lm.vocabulary.pad] * (width - len(row)) + row for row in rows], device=device)
    cache = transformer.new_cache(len(rows), width + max(len(s.grammar.layout) - len(s.written) for s in active))
    while True:
        places_S = torch.arange(cache.length + tokens_BL.shape[1], device=device)
        mask_BS = places_S >= padding_B.unsqueeze(1)
        positions_BL = (places_S[cache.length :] - padding_B.unsqueeze(1)).clamp_min(0)
        hidden_BLD = transformer.hidden(
            tokens_BL,
            positions_BL=positions_BL,
            kv_cache=cache,
            attention_mask_BL=mask_BS if bool(padding_B.any()) else None,
        )
        _choose_codes(lm, active, transformer.logits(hidden_BLD[:, -1], codes), sampling)
        on_left(sum(sequence.num_missing for sequence in active))
        going = [index for index, sequence in enumerate(active) if sequence.num_missing]
        if not going:
            return
        if len(going) < len(active):
            kept_B = torch.tensor(
                [b * len(active) + index for b in range(num_branches) for index in going], device=device
            )
            active = [active[index] for index in going]
            cache.select(kept_B)
            padding_B = padding_B[kept_B]
        # Rows whose grids differ have unequal queues; all advance by the shortest.
        num_new = min(len(sequence.queue) for sequence in active)
        fed = [sequence.queue[:num_new] for sequence in active]
        for sequence in active:
            del sequence.queue[:num_new]
        tokens_BL = torch.tensor(fed * num_branches, device=device)


def _choose_codes(lm: LanguageModel, active: list[_Sequence], logits_BV: Tensor, sampling: SamplingConfig) -> None:
    """Write a code into each sequence whose decided tokens the network has all seen."""
    ready = [index for index, sequence in enumerate(active) if not sequence.queue]
    rows_R = torch.tensor(ready, device=logits_BV.device)
    scores_RV = logits_BV[rows_R]
    if len(active[0].prompts) == 2:
        scores_RV = guide(scores_RV, logits_BV[rows_R + len(active)], sampling.guidance)
    uniforms_R = torch.stack([active[index].uniform() for index in ready]).to(logits_BV.device)
    chosen = choose(scores_RV, uniforms_R, sampling).tolist()
    for index, code in zip(ready, chosen, strict=True):
        active[index].write(lm.vocabulary.vision_offset + code)
