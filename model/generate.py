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

TOKENS_PER_CODE = 5  # at most: a code, EOL, EOF, EOI and EOS

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
    """A request on its way: `written` is what is decided after IMG, of which the network has seen all but `queue`.

    `drafts` are guesses at the codes that come next. One pass feeds them along and gives the choice at each of their places.
    A choice depends on its own number and on what stands before it, so it is final as soon as that is: guesses that come
    out as themselves are decided together, and the first one that does not is replaced by what it should have been. So the
    codes are those of one pass for each, whatever is guessed. This is Jacobi decoding (as in arXiv 2410.01699), with a number
    fixed for each place instead of random acceptance.
    """

    grammar: Grammar
    prompts: list[Tokens]  # up to IMG: with the prompt, and with guidance also with the negative prompt
    uniforms: Tensor  # one for each code of the grid, so that a place's draw does not depend on the context
    num_missing: int  # codes still to choose
    written: list[int] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def write(self, tokens: list[int]) -> None:
        """Take decided tokens and all that is forced after them."""
        tokens = [*tokens, *self._forced(len(self.written) + len(tokens))]
        self.written += tokens
        self.queue += tokens

    def proposal(self, lookahead: int) -> tuple[list[int], list[int]]:
        """Tokens to feed, which are the queue and `lookahead` guesses, and which of them a code follows."""
        guess = next(
            (token for token in reversed(self.written) if token >= self.grammar.vocabulary.vision_offset), None
        )
        self.drafts = self.drafts[: min(lookahead, self.num_missing - 1)]
        while len(self.drafts) < min(lookahead, self.num_missing - 1):
            # A place is most like the one before it; with nothing before, any code is as good.
            previous = self.drafts[-1] if self.drafts else guess
            self.drafts.append(self.grammar.vocabulary.vision_offset if previous is None else previous)
        tokens = list(self.queue)
        asked = [len(tokens) - 1]
        for draft in self.drafts:
            tokens += [draft, *self._forced(len(self.written) + len(tokens) - len(self.queue) + 1)]
            asked.append(len(tokens) - 1)
        return tokens, asked

    def decide(self, choices: list[int]) -> int:
        """Take the choices at the proposal's places as far as what stands before them is right; how many that are."""
        num_right = 0
        while num_right < len(self.drafts) and self.drafts[num_right] == choices[num_right]:
            num_right += 1
        self.drafts = choices[num_right + 1 :]
        for choice in choices[: num_right + 1]:
            self.queue.clear()  # all but the last choice are among what the network has just seen
            self.write([choice])
        self.num_missing -= num_right + 1
        return num_right + 1

    def _forced(self, num_written: int) -> list[int]:
        """What the grammar puts after so many tokens, up to the next code."""
        layout = self.grammar.layout
        end = num_written
        while end < len(layout) and layout[end] >= 0:
            end += 1
        return [int(token) for token in layout[num_written:end]]

    def numbers(self) -> Tensor:
        """Those that decide the codes at the proposal's places."""
        start = len(self.uniforms) - self.num_missing
        return self.uniforms[start : start + len(self.drafts) + 1]

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
    lookahead: int = 0,
) -> list[Tokens]:
    """Requests -> the tokens of each whole document, BOS to EOS, uint32; they always parse.

    All requests are one batch, with both guidance branches in the same forward pass. Only ids of codes are scored;
    tokens that the grammar forces are fed along with the code before them. `lookahead` codes are guessed and checked in each
    pass: the codes are the same, and the passes fewer.

    Raises: ConfigError if a document is longer than the model's context; DocumentError if a request is contradictory;
        RuntimeError in train mode.
    """
    if lm.transformer.training:
        raise RuntimeError("the transformer is in train mode, expected eval mode: call .eval() first")
    sequences = [_start(lm, request, sampling, meta) for request in requests]
    total = sum(sequence.num_missing for sequence in sequences)
    active = [sequence for sequence in sequences if sequence.num_missing]
    if active:
        _decode(lm, active, sampling, lookahead, lambda left: on_progress(total - left, total) if on_progress else None)
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
    sequence = _Sequence(grammar, prompts, uniforms, len(uniforms) - context_codes.size)
    sequence.write(context.tolist())
    return sequence


def _decode(
    lm: LanguageModel,
    active: list[_Sequence],
    sampling: SamplingConfig,
    lookahead: int,
    on_left: Callable[[int], None],
) -> None:
    device = lm.transformer.lm_head.weight.device
    num_branches = len(active[0].prompts)
    # Row order: every request's first branch, then every request's second.
    heads = [sequence.prompts[branch].tolist() for branch in range(num_branches) for sequence in active]
    longest = max(map(len, heads)) + max(sequence.grammar.length for sequence in active)
    cache = lm.transformer.new_cache(len(heads), longest + TOKENS_PER_CODE * (lookahead + 1))
    while True:
        proposals = [sequence.proposal(lookahead) for sequence in active]
        rows = [head + tokens for head, (tokens, _) in zip(heads, proposals * num_branches, strict=True)]
        width = max(map(len, rows))
        tokens_BL = torch.tensor([row + [lm.vocabulary.pad] * (width - len(row)) for row in rows], device=device)
        hidden_BLD = lm.transformer.hidden(tokens_BL, kv_cache=cache)
        asked = [
            [len(head) + place for place in places]
            for head, (_, places) in zip(heads, proposals * num_branches, strict=True)
        ]
        choices = _choices(lm, active, hidden_BLD, asked, sampling)
        right = [sequence.decide(chosen) for sequence, chosen in zip(active, choices, strict=True)]
        cache.forget([width - 1 - places[count - 1] for places, count in zip(asked, right * num_branches, strict=True)])
        on_left(sum(sequence.num_missing for sequence in active))
        going = [index for index, sequence in enumerate(active) if sequence.num_missing]
        if not going:
            return
        if len(going) < len(active):
            cache.select([branch * len(active) + index for branch in range(num_branches) for index in going])
            active = [active[index] for index in going]
        heads = [[]] * (len(active) * num_branches)


def _choices(
    lm: LanguageModel,
    active: list[_Sequence],
    hidden_BLD: Tensor,
    asked: list[list[int]],
    sampling: SamplingConfig,
) -> list[list[int]]:
    """The token that each sequence would take at each place that it asks about."""
    device = hidden_BLD.device
    rows = torch.tensor([row for row, places in enumerate(asked) for _ in places], device=device)
    places = torch.tensor([place for places in asked for place in places], device=device)
    codes = slice(lm.vocabulary.vision_offset, lm.vocabulary.size)
    scores_NV = lm.transformer.logits(hidden_BLD[rows, places], codes)
    if len(asked) > len(active):
        conditional_NV, unconditional_NV = scores_NV.chunk(2)
        scores_NV = guide(conditional_NV, unconditional_NV, sampling.guidance)
    uniforms_N = torch.cat([sequence.numbers() for sequence in active]).to(device)
    chosen = iter((choose(scores_NV, uniforms_N, sampling) + lm.vocabulary.vision_offset).tolist())
    return [[next(chosen) for _ in places] for places in asked[: len(active)]]
