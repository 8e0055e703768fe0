"""The search of `LLM.beam_search`, with vLLM's rules.

They differ from those of `generate` (`minilm.generation.beams`): every end token among the candidates of a
beam finishes a text, the search never stops early, and the length that a score is divided by counts the
prompt too, and no end token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .outputs import BeamSearchSequence, Logprob
from .params import BeamSearchParams
from .rows import BeamRows


@dataclass
class Search:
    """A prompt and its beams."""

    prompt: list[int]
    most: int
    """New tokens at most: max_tokens, or what the window has room for."""
    beams: list[BeamSearchSequence]
    completed: list[BeamSearchSequence]

    @classmethod
    def of(cls, prompt: list[int], most: int) -> Search:
        """The search before its first step."""
        return cls(prompt, most, [BeamSearchSequence(list(prompt), [])], [])

    def advance(
        self, best: Sequence[dict[int, Logprob]], params: BeamSearchParams, ends: frozenset[int]
    ) -> list[int]:
        """Continue each beam with its best tokens; returns the beam that each new one continues."""
        new: list[tuple[float, int, int]] = []
        for place, (beam, step) in enumerate(zip(self.beams, best, strict=True)):
            for token, found in step.items():
                total = beam.cum_logprob + found.logprob
                if token in ends and not params.ignore_eos:
                    tokens, steps = [*beam.tokens, token], [*beam.logprobs, step]
                    self.completed.append(
                        BeamSearchSequence(tokens, steps, total, finish_reason="stop", stop_reason=token)
                    )
                else:
                    new.append((total, place, token))
        new.sort(key=lambda candidate: -candidate[0])
        del new[params.beam_width :]
        self.beams = [
            BeamSearchSequence(
                [*self.beams[place].tokens, token], [*self.beams[place].logprobs, best[place]], total
            )
            for total, place, token in new
        ]
        if self.beams and len(self.beams[0].tokens) == len(self.prompt) + self.most:
            for beam in self.beams:
                beam.finish_reason = "length"
            self.completed += self.beams
            self.beams = []
        return [place for _, place, _ in new] if self.beams else []

    def result(self, params: BeamSearchParams, ends: frozenset[int]) -> list[BeamSearchSequence]:
        """The best texts, best first."""

        def score(beam: BeamSearchSequence) -> float:
            length = len(beam.tokens) - (beam.tokens[-1] in ends)
            return beam.cum_logprob / math.pow(length, params.length_penalty)

        return sorted(self.completed, key=score, reverse=True)[: params.beam_width]


def run(
    rows: BeamRows,
    searches: Sequence[Search],
    params: BeamSearchParams,
    ends: frozenset[int],
    budget: int,
    lock: AbstractContextManager[object],
    decode: Callable[[int], str],
) -> None:
    """Run searches to their end. Each call of the model holds the lock; the rows are freed in any case."""
    try:
        with lock, torch.inference_mode():
            logits = rows.read([search.prompt for search in searches], budget)
        while True:
            best = _best(logits, params, decode)
            parents: list[int] = []
            row = 0
            for search in searches:
                count = len(search.beams)
                new = search.advance(best[row : row + count], params, ends) if count else []
                parents += [row + parent for parent in new]
                row += count
            if not parents:
                return
            tokens = [beam.tokens[-1] for search in searches for beam in search.beams]
            with lock, torch.inference_mode():
                logits = rows(torch.tensor(tokens, device=logits.device), parents)
    finally:
        with lock:
            rows.free()


def _best(logits: Tensor, params: BeamSearchParams, decode: Callable[[int], str]) -> list[dict[int, Logprob]]:
    """The candidates of each beam: twice as many as there are beams, so that enough remain if some end."""
    logs = (logits.float() / (params.temperature or 1.0)).log_softmax(-1)
    best = logs.topk(min(2 * params.beam_width, logs.shape[1]))
    return [
        {
            token: Logprob(value, rank + 1, decode(token))
            for rank, (value, token) in enumerate(zip(values, tokens, strict=True))
        }
        for values, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
