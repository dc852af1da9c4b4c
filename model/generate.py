"""Prompts to images and clips: prefill, then one code after another, held to the document grammar.

Shapes: B rows of the batch (with guidance both branches of every request), R requests, L new tokens, S tokens in all,
D hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.sampling import SamplingConfig, choose, guide, place_noise
from model.transformer import MAX_STEP_LEN
from model.weights import LanguageModel
from schemas.document import Grammar, Grid, Kind, MetaTemplate, Tokens, prompt_tokens
from schemas.errors import ConfigError
from schemas.vocabulary import IntArray

CACHE_STEP = 512
TOKENS_PER_CODE = 5  # at most: a code, EOL, EOF, EOI and EOS

Progress = Callable[[int, int], None]  # codes chosen so far, codes to choose
OnRow = Callable[[int, int, IntArray], None]  # request, row of codes counted through all latent frames, its codes (w,)


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

    @property
    def given_codes(self) -> IntArray:
        """The latent frames that are there, (0, h, w) where there are none."""
        return np.zeros((0, *self.grid[1:]), np.int64) if self.context_codes is None else self.context_codes

    def captions(self, sampling: SamplingConfig) -> list[str]:
        """The prompt, and with guidance also the negative one: a branch for each."""
        return [self.prompt] if sampling.guidance == 1 else [self.prompt, sampling.negative_prompt]


@dataclass(frozen=True)
class Window:
    """How clips longer than one document are drawn: `num_frames` latent frames at once (None: as many as the context
    holds), each time beginning with the last `num_kept` of those that are there, at most half of the window.

    Paper: Emu3 report, section 3.4, extends clips of 2 s so; 12 latent frames are 2 s at 24 frames per second.
    """

    num_frames: int | None = None
    num_kept: int = 12

    def __post_init__(self) -> None:
        if self.num_kept < 1 or (self.num_frames is not None and self.num_frames < 2):
            raise ValueError(f"found {self}, expected at least 1 frame kept of a window of at least 2")


@dataclass(eq=False)
class _Sequence:
    """A request on its way: `written` is what is decided after IMG, of which the network has seen all but `queue`.

    `drafts` are guesses at the codes that come next. One pass feeds them along and gives the choice at each of their places.
    A choice depends on its place's noise and on what stands before it, so it is final as soon as that is: guesses that come
    out as themselves are decided together, and the first one that does not is replaced by what it should have been. So the
    codes are those of one pass for each, whatever is guessed. This is Jacobi decoding (as in arXiv 2410.01699), with noise
    fixed for each place instead of random acceptance.
    """

    grammar: Grammar
    prompts: list[Tokens]  # up to IMG: with the prompt, and with guidance also with the negative prompt
    noise: "_Noise"
    first_place: int  # of the clip's codes, the first that is chosen here
    num_codes: int  # to choose
    written: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)  # those of them that are codes chosen here, as tokens
    queue: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def write(self, tokens: list[int]) -> None:
        """Take decided tokens and all that is forced after them."""
        tokens = [*tokens, *self._forced(len(self.written) + len(tokens))]
        self.written += tokens
        self.queue += tokens

    def proposal(self, lookahead: int) -> tuple[list[int], list[int]]:
        """Tokens to feed, which are the queue and `lookahead` guesses, and which of them a code follows."""
        any_code = self.grammar.vocabulary.vision_offset
        num_drafts = min(lookahead, self.num_missing - 1)
        self.drafts = self.drafts[:num_drafts]
        if len(self.drafts) < num_drafts:
            # A place is most like the one before it; with nothing before, any code is as good.
            codes = (token for token in reversed(self.written) if token >= any_code)
            last = self.drafts[-1] if self.drafts else next(codes, any_code)
            self.drafts += [last] * (num_drafts - len(self.drafts))
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
        self.chosen += choices[: num_right + 1]
        return num_right + 1

    @property
    def num_missing(self) -> int:
        """Codes still to choose."""
        return self.num_codes - len(self.chosen)

    def _forced(self, num_written: int) -> list[int]:
        """What the grammar puts after so many tokens, up to the next code."""
        layout = self.grammar.layout
        end = num_written
        while end < len(layout) and layout[end] >= 0:
            end += 1
        return [int(token) for token in layout[num_written:end]]

    def places(self) -> range:
        """Those of the clip's codes that the proposal's choices are for."""
        start = self.first_place + len(self.chosen)
        return range(start, start + len(self.drafts) + 1)


class _Noise:
    """The noise of a request's places, one row for each code of the whole clip: neither the context nor the window nor what
    is guessed ahead changes the draw at a place.
    """

    def __init__(self, seed: int, num_ids: int) -> None:
        self._seed, self._num_ids = seed, num_ids
        self._rows: dict[int, Tensor] = {}

    def rows(self, places: range) -> list[Tensor]:
        """A row (V,) for each of the places. Those that were asked for last are at hand: guesses are checked again."""
        self._rows = {
            place: self._rows[place] if place in self._rows else place_noise(self._seed, place, self._num_ids)
            for place in places
        }
        return list(self._rows.values())


def check_requests(lm: LanguageModel, requests: Sequence[VisionRequest], sampling: SamplingConfig) -> None:
    """Raises: what `generate_vision` would raise for these requests, before anything is drawn."""
    for request in requests:
        _Clip(lm, request, sampling, MetaTemplate.OUTBACK, Window())


@torch.no_grad()
def generate_vision(
    lm: LanguageModel,
    requests: Sequence[VisionRequest],
    sampling: SamplingConfig,
    on_progress: Progress | None = None,
    *,
    meta: MetaTemplate = MetaTemplate.OUTBACK,
    lookahead: int = 0,
    window: Window = Window(),
    on_row: OnRow | None = None,
    compiled: bool = False,
) -> list[Tokens]:
    """Requests -> the tokens of each whole document, BOS to EOS, uint32; they always parse.

    All requests are one batch, with both guidance branches in the same forward pass. Only ids of codes are scored;
    tokens that the grammar forces are fed along with the code before them. `lookahead` codes are guessed and checked in each
    pass: the codes are the same, and the passes fewer. A clip of more frames than the window holds is drawn window by window.
    `compiled` steps have fixed shapes and are compiled at their first use, which takes a minute and a C++ compiler.
    `on_row` gets each row of codes as soon as it is whole; of a request its rows come in order, without those of its context.

    Raises: ConfigError if a document does not fit into the model's context; DocumentError if a request is contradictory;
        RuntimeError in train mode.
    """
    if lm.transformer.training:
        raise RuntimeError("the transformer is in train mode, expected eval mode: call .eval() first")
    clips = [_Clip(lm, request, sampling, meta, window) for request in requests]
    total = left = sum(clip.num_missing for clip in clips)
    while going := [clip for clip in clips if clip.num_missing]:
        sequences = [clip.next_window() for clip in going]
        later = left - sum(sequence.num_missing for sequence in sequences)
        pairs = list(zip(going, sequences, strict=True))

        def on_pass(missing: int, later: int = later, pairs: list[tuple[_Clip, _Sequence]] = pairs) -> None:
            if on_progress is not None:
                on_progress(total - later - missing, total)
            if on_row is not None:
                for clip, sequence in pairs:
                    for row, codes_W in clip.new_rows(sequence):
                        on_row(clips.index(clip), row, codes_W)

        _decode(lm, sequences, sampling, lookahead, on_pass, compiled)
        left = later
        for clip, sequence in pairs:
            clip.take(sequence)
    return [clip.document() for clip in clips]


class _Clip:
    """A request, and the codes that it has so far."""

    def __init__(
        self, lm: LanguageModel, request: VisionRequest, sampling: SamplingConfig, meta: MetaTemplate, window: Window
    ) -> None:
        self._lm, self._request, self._meta = lm, request, meta
        self._captions = request.captions(sampling)
        t, h, w = request.grid
        grammar = Grammar(lm.vocabulary, request.kind, request.grid, meta)
        grammar.write(request.given_codes)  # whether it fits
        self._codes = request.given_codes.astype(np.int64)
        self._next_row = len(self._codes) * h  # the first that was not reported
        self._noise = _Noise(request.seed, lm.vocabulary.num_codes)
        fitting = 1 + (self._limit - self._length(1)) // grammar.frame_length
        self._window_t = max(1, min(t, window.num_frames or t, fitting))
        if self._length(self._window_t) > self._limit:  # more frames, longer meta text
            self._window_t = max(1, self._window_t - 1)
        self._keep_t = min(window.num_kept, self._window_t // 2)
        if self._length(self._window_t) > self._limit or (self._window_t < t and not self._keep_t):
            found, shortest = self._length(min(t, 2)), (min(t, 2), h, w)
            raise ConfigError(
                f"found a document of {found} tokens for the grid {shortest}, expected at most {self._limit}, the model's "
                "context: ask for a smaller grid"
            )

    @property
    def _limit(self) -> int:
        return self._lm.transformer.config.max_position_embeddings

    def _length(self, num_frames: int) -> int:
        """Tokens of a window of so many latent frames, of the longer branch."""
        grammar = self._grammar(num_frames)
        return max(len(prompt) for prompt in self._prompts(grammar)) + grammar.length

    def _grammar(self, num_frames: int) -> Grammar:
        return Grammar(self._lm.vocabulary, self._request.kind, (num_frames, *self._request.grid[1:]), self._meta)

    def _prompts(self, grammar: Grammar) -> list[Tokens]:
        vocabulary, text, fps = self._lm.vocabulary, self._lm.text, self._request.fps
        return [
            prompt_tokens(caption, grammar.kind, grammar.grid, fps, vocabulary, text, meta=self._meta)
            for caption in self._captions
        ]

    @property
    def num_missing(self) -> int:
        """Codes still to choose."""
        return math.prod(self._request.grid) - self._codes.size

    def next_window(self) -> _Sequence:
        """What comes next as a document of its own, which begins with frames that are there."""
        t = self._request.grid[0]
        start = 0 if t == self._window_t or len(self._codes) < self._window_t else len(self._codes) - self._keep_t
        grammar = self._grammar(min(self._window_t, t - start))
        given = self._codes[start:]
        num_codes = math.prod(grammar.grid) - given.size
        sequence = _Sequence(grammar, self._prompts(grammar), self._noise, self._codes.size, num_codes)
        sequence.write(grammar.write(given).tolist())
        return sequence

    def new_rows(self, sequence: _Sequence) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Rows that have become whole since the last time."""
        w = self._request.grid[2]
        start = self._next_row * w - self._codes.size  # among the codes chosen in this window
        while start + w <= len(sequence.chosen):
            tokens = np.asarray(sequence.chosen[start : start + w])
            yield self._next_row, self._lm.vocabulary.token_to_code(tokens)
            self._next_row += 1
            start += w

    def take(self, sequence: _Sequence) -> None:
        """Add what was drawn."""
        drawn = self._lm.vocabulary.token_to_code(np.asarray(sequence.chosen))
        self._codes = np.concatenate([self._codes, drawn.reshape(-1, *self._request.grid[1:])])

    def document(self) -> Tokens:
        grammar = self._grammar(self._request.grid[0])
        return np.concatenate(
            [self._prompts(grammar)[0], grammar.write(self._codes), [self._lm.vocabulary.eos]]
        ).astype(np.uint32)


def _decode(
    lm: LanguageModel,
    active: list[_Sequence],
    sampling: SamplingConfig,
    lookahead: int,
    on_pass: Callable[[int], None],
    compiled: bool,
) -> None:
    device = lm.transformer.lm_head.weight.device
    num_branches = len(active[0].prompts)
    # Row order: every request's first branch, then every request's second.
    heads = [sequence.prompts[branch].tolist() for branch in range(num_branches) for sequence in active]
    longest = max(map(len, heads)) + max(sequence.grammar.length for sequence in active)
    room = longest + TOKENS_PER_CODE * (lookahead + 1)
    if compiled:  # other prompts and grids find the same shapes
        room = -(-(room + MAX_STEP_LEN) // CACHE_STEP) * CACHE_STEP
    cache = lm.transformer.new_cache(len(heads), room, is_static=compiled)
    while True:
        # Those that are finished stay, and feed nothing, where another number of rows would be compiled again.
        proposals = [sequence.proposal(lookahead) if sequence.num_missing else ([], []) for sequence in active]
        rows = [head + tokens for head, (tokens, _) in zip(heads, proposals * num_branches, strict=True)]
        width = max(map(len, rows))
        if compiled and width <= MAX_STEP_LEN:
            width = 1 << (width - 1).bit_length()
        tokens_BL = torch.tensor([row + [lm.vocabulary.pad] * (width - len(row)) for row in rows], device=device)
        hidden_BLD = lm.transformer.hidden(tokens_BL, kv_cache=cache)
        asked = [
            [len(head) + place for place in places]
            for head, (_, places) in zip(heads, proposals * num_branches, strict=True)
        ]
        choices = _choices(lm, active, hidden_BLD, asked, sampling)
        right = [sequence.decide(chosen) if chosen else 0 for sequence, chosen in zip(active, choices, strict=True)]
        kept = [
            places[count - 1] + 1 if count else 0 for places, count in zip(asked, right * num_branches, strict=True)
        ]
        cache.forget([width - count for count in kept])
        on_pass(sum(sequence.num_missing for sequence in active))
        going = [index for index, sequence in enumerate(active) if sequence.num_missing]
        if not going:
            return
        if len(going) < len(active) and not compiled:
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
    noise_NV = None
    if sampling.temperature > 0:
        noise = [
            row_V for sequence in active if sequence.num_missing for row_V in sequence.noise.rows(sequence.places())
        ]
        noise_NV = torch.stack(noise).to(device)
    chosen = iter((choose(scores_NV, noise_NV, sampling) + lm.vocabulary.vision_offset).tolist())
    return [[next(chosen) for _ in places] for places in asked[: len(active)]]
