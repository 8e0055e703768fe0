"""Beam search on a paged cache: the rows that hold the beams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KVCache
from ..model import AutoModelForCausalLM
from .engine import read_tokens


class BeamRows:
    """The step of `minilm.generation.beams.beam_search` on a paged cache: a beam is a row, and rows with the
    same beginning share its pages.

        rows = BeamRows(model, cache)
        beam_search(rows.read(prompts, budget), rows, options)
        rows.free()
    """

    def __init__(self, model: AutoModelForCausalLM, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.rows: list[int] = []

    def read(self, prompts: Sequence[Sequence[int]], budget: int) -> Tensor:
        """Read each prompt into a row, up to `budget` tokens at a time; returns the logits after each,
        [B, V]."""
        self.rows = self.cache.add_rows(len(prompts))
        self.cache.reserve(sum(map(len, prompts)))
        last: list[Tensor] = []
        left = [(row, list(prompt)) for row, prompt in zip(self.rows, prompts, strict=True)]
        while left:
            chunks: list[tuple[int, list[int]]] = []
            room, ends = budget, []
            while left and room:
                row, tokens = left[0]
                chunks.append((row, tokens[:room]))
                room -= len(chunks[-1][1])
                left[0] = row, tokens[len(chunks[-1][1]) :]
                if not left[0][1]:
                    left.pop(0)
                    ends.append(budget - room - 1)
            rows, parts = zip(*chunks, strict=True)
            hidden = read_tokens(self.model, self.cache, rows, parts)
            last.append(hidden[torch.tensor(ends, dtype=torch.int64, device=hidden.device)])
        return self.model.logits(torch.cat(last))

    def __call__(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """See `minilm.generation.beams.Step`."""
        old = self.rows
        kept = {old[parent] for parent in parents}
        self.rows = [row for row in old if row in kept]
        for row in old:
            if row not in kept:
                self.cache.free_row(row)
        rows: list[int] = []
        for parent in parents:
            row = old[parent]
            if row in kept:
                kept.remove(row)  # the first child goes on with the row itself
            else:
                row = self.cache.fork(row)
                self.rows.append(row)
            rows.append(row)
        self.rows = rows
        logits, _ = self.model.step(tokens, rows, self.cache)
        return logits

    def free(self) -> None:
        """Give all rows back."""
        for row in self.rows:
            self.cache.free_row(row)
        self.rows = []
