"""Beam search: the most probable texts, found by keeping the best few beginnings at each step.

    live      the `num_beams` best beginnings      each step: 1. every live beam with every next token is a
    finished  the `num_beams` best complete texts                candidate; its score is the sum of log-probs
                                                              2. the best candidates that end are finished, at
                                                                 score / length ** length_penalty
                                                              3. the best of the others live on

A text is complete when it holds `num_beams` finished ones that no live beam can beat any more. The algorithm
is Lowerre's (1976), with the length normalisation of Wu et al. 2016 (arXiv:1609.08144, section 7) in the form
of Freitag & Al-Onaizan 2017 (arXiv:1702.01806); sampled candidates are drawn without replacement, as by Kool
et al. 2019 (arXiv:1903.06059). What is kept, and when the search stops, is as in transformers.

The search sees the model as one function, `Step`, so decoders and encoder-decoders share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .values import number, whole

Step = Callable[[Tensor, Sequence[int]], Tensor]
"""(tokens int64 [b], parents [b]) -> logits [b, V]. Row i of the batch is from now on a copy of row
``parents[i]`` of the batch before, continued with ``tokens[i]``. A row can have several children, or none:
then it is dropped."""


def check_penalty(length_penalty: float, longest: int) -> None:
    """Raise ValueError, with both values, if a length to this power is no number."""
    try:
        possible = math.pow(longest, length_penalty) > 0
    except OverflowError:
        possible = False
    if not possible:
        raise ValueError(
            f"length_penalty={length_penalty!r} is too large for {longest} tokens: scores are divided by the "
            "number of tokens to this power"
        )


@dataclass(frozen=True)
class BeamOptions:
    """How to search. Raises ValueError, with the value, for those that make no sense."""

    num_beams: int
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    """Tokens that end a text."""
    length_penalty: float = 1.0
    """The exponent of the length by which the score of a finished text is divided: above 0, longer texts are
    preferred; below 0, shorter ones."""
    early_stopping: bool | Literal["never"] = False
    """True: stop at `num_beams` finished texts. False: stop when the best live beam, if it ended now, would
    be worse than all of them. "never": only when it can end nowhere better."""
    do_sample: bool = False
    """Draw the candidates from their probabilities, without replacement."""

    def __post_init__(self) -> None:
        whole("num_beams", self.num_beams, 1)
        number("length_penalty", self.length_penalty)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping must be True, False or "never", and is {self.early_stopping!r}')
        check_penalty(self.length_penalty, self.max_new_tokens)

    @property
    def candidates(self) -> int:
        """How many candidates to look at: if all of the best end, enough remain to go on."""
        return max(2, 1 + len(self.ends)) * self.num_beams

    def normalised(self, score: float, length: int) -> float:
        """The score of a finished text of so many tokens."""
        return score / math.pow(length, self.length_penalty)


@dataclass(frozen=True)
class Beam:
    """A beginning of text number `text`."""

    text: int
    place: int
    """Among the live beams of its text, best first; for a candidate, its rank."""
    tokens: tuple[int, ...] = ()
    """Generated so far, without the prompt."""
    score: float = 0.0
    """Sum of the log-probabilities, after processing."""
    parents: tuple[int, ...] = ()
    """For each token, the place of the beam that it continued."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished text."""

    tokens: tuple[int, ...]
    """Without the prompt; the last one ended it, or stands at the limit."""
    score: float
    """Sum of the log-probabilities, divided by ``length ** length_penalty``."""
    parents: tuple[int, ...]
    """See `Beam.parents`."""


Process = Callable[[Tensor, Sequence[Beam]], Tensor]
"""(logits float32 [b, V], the live beam of each row) -> processed log-probabilities [b, V]; -inf: excluded"""
Stops = Callable[[Sequence[Beam]], Sequence[bool]]
"""Candidates, by text and rank -> which of them end there, beside those that end with an end token."""
Noise = Callable[[Sequence[int], int, int], Tensor]
"""(texts, step, n) -> Exp(1) noise float32 [texts, n], to sample with."""


@dataclass
class _Search:
    """The search of one text."""

    options: BeamOptions
    live: list[Beam]
    finished: list[Hypothesis] = field(default_factory=list)

    def advance(self, candidates: Sequence[tuple[Beam, bool]]) -> None:
        """Go on with these candidates, in order of rank; with each, whether it ends."""
        options = self.options
        full = len(self.finished) == options.num_beams
        for beam, ends in candidates[: options.num_beams]:
            if ends and not (full and options.early_stopping is True):
                score = options.normalised(beam.score, len(beam.tokens))
                self.finished.append(Hypothesis(beam.tokens, score, beam.parents))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[options.num_beams :]
        going = [beam for beam, ends in candidates if not ends]
        going.sort(key=lambda beam: -beam.score)  # sampled ones have another order
        del going[options.num_beams :]
        self.live = [
            Beam(beam.text, place, beam.tokens, beam.score, beam.parents) for place, beam in enumerate(going)
        ]
        if self.live and self._complete():
            self.live = []

    def _complete(self) -> bool:
        options, best = self.options, self.live[0]
        if len(self.finished) < options.num_beams:
            return False
        if options.early_stopping is True:
            return True
        length = len(best.tokens)
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = options.max_new_tokens  # scores are negative: the longest text divides it most
        return options.normalised(best.score, length) <= self.finished[-1].score


def beam_search(
    logits: Tensor,
    step: Step,
    options: BeamOptions,
    *,
    process: Process | None = None,
    stops: Stops | None = None,
    noise: Noise | None = None,
) -> list[list[Hypothesis]]:
    """Search a continuation of each text of a batch.

    logits [B, V]: those after the prompts, one row per text; `step` then runs the beams, see `Step`. Returns
    up to `num_beams` hypotheses per text, best first; fewer only if fewer are possible, because `process`
    excludes the other tokens. `noise`, needed to sample, gives ``-log(uniform)`` for each candidate.
    """
    searches = [_Search(options, [Beam(text, 0)]) for text in range(len(logits))]
    for length in range(1, options.max_new_tokens + 1):
        live = [beam for search in searches for beam in search.live]
        logits = logits.float()
        scores = logits.log_softmax(-1) if process is None else process(logits, live)
        scores = scores + scores.new_tensor([beam.score for beam in live])[:, None]
        drawn = None if noise is None else _noise(noise, live, length, scores, options)
        candidates = _candidates(scores, live, options, drawn)
        ended = [beam.tokens[-1] in options.ends or length == options.max_new_tokens for beam in candidates]
        if stops is not None:
            ended = [one or bool(other) for one, other in zip(ended, stops(candidates), strict=True)]
        places = {(beam.text, beam.place): row for row, beam in enumerate(live)}
        own: dict[int, list[tuple[Beam, bool]]] = {beam.text: [] for beam in live}
        for beam, ends in zip(candidates, ended, strict=True):
            own[beam.text].append((beam, ends))
        for text, each in own.items():
            searches[text].advance(each)
        live = [beam for search in searches for beam in search.live]
        if not live:
            break
        tokens = torch.tensor([beam.tokens[-1] for beam in live], device=logits.device)
        logits = step(tokens, [places[beam.text, beam.parents[-1]] for beam in live])
    return [search.finished for search in searches]


def _noise(noise: Noise, live: list[Beam], length: int, scores: Tensor, options: BeamOptions) -> Tensor:
    texts = list(dict.fromkeys(beam.text for beam in live))
    return noise(texts, length, options.num_beams * scores.shape[1]).to(scores.device)


def _candidates(scores: Tensor, live: list[Beam], options: BeamOptions, noise: Tensor | None) -> list[Beam]:
    """The best or drawn continuations of each text, in order of rank; scores [b, V] are those of the beams.

    Without noise they are the best. With noise E ~ Exp(1), those with the largest p / E: that draws without
    replacement from the probabilities p (Efraimidis & Spirakis 2006), as torch.multinomial does.
    """
    beams, vocabulary = options.num_beams, scores.shape[1]
    texts = list(dict.fromkeys(beam.text for beam in live))
    row_of = {text: row for row, text in enumerate(texts)}
    rows = torch.tensor([row_of[beam.text] * beams + beam.place for beam in live], device=scores.device)
    grid = scores.new_full((len(texts) * beams, vocabulary), -torch.inf).index_copy_(0, rows, scores)
    grid = grid.view(len(texts), beams * vocabulary)
    if bool(grid.amax(-1).isnan().any()):
        raise ValueError("beam search found NaN among the scores, of the model or of a logits_processor")
    count = min(options.candidates, grid.shape[1])
    if noise is None:
        best = grid.topk(count)
        values, places = best.values, best.indices
    else:
        places = (grid.softmax(-1) / noise).topk(count).indices
        values = grid.gather(1, places)
    found = []
    parent = {(beam.text, beam.place): beam for beam in live}
    for text, sums, chosen in zip(texts, values.tolist(), places.tolist(), strict=True):
        for rank, (score, place) in enumerate(zip(sums, chosen, strict=True)):
            if score == -torch.inf:  # excluded, or no beam
                continue
            old = parent[text, place // vocabulary]
            tokens, parents = (*old.tokens, place % vocabulary), (*old.parents, old.place)
            found.append(Beam(text, rank, tokens, score, parents))
    return found
