"""Custom functions that `generate` calls at each step: logits processors, stopping criteria and allowed
tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .engine import Sample


class Callbacks:
    """Calls the custom functions with the whole batch, as transformers does: all rows in the order of the
    result, those that have ended filled with `pad`.

    logits_processor: functions of (input_ids int64 [B, S], scores float32 [B, V]) -> scores, called between
    the penalties and the temperature. stopping_criteria: of (input_ids, scores) -> bool or bool [B], called
    after each token; a row for which one is true ends. prefix_allowed_tokens_fn: of (row, its tokens) -> the
    allowed next tokens. The batch includes rows that have ended, with zeros as scores.
    """

    def __init__(
        self,
        ids: Tensor,
        samples: Sequence[Sample],
        pad: int,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
    ) -> None:
        self._ids, self._samples, self._pad = ids, list(samples), pad
        self._places = {sample: place for place, sample in enumerate(samples)}
        self._processors = functions("logits_processor", logits_processor, "(input_ids, scores) -> scores")
        self._criteria = functions("stopping_criteria", stopping_criteria, "(input_ids, scores) -> bool [B]")
        self._allowed: list[Callable[..., Any]] = []
        if prefix_allowed_tokens_fn is not None:
            (function,) = functions("prefix_allowed_tokens_fn", [prefix_allowed_tokens_fn], "(row, tokens)")
            self._allowed.append(only_allowed(function))
        self.scores: list[Tensor] | None = None
        """The scores of the steps so far, which criteria receive too if `output_scores` is set."""

    @property
    def processor(self) -> Callable[[Sequence[Sample], Tensor], Tensor] | None:
        """For the engine: (running samples, their logits [b, V]) -> new logits; None: no processors."""
        return partial(self._process, self._processors) if self._processors else None

    @property
    def allowed(self) -> Callable[[Sequence[Sample], Tensor], Tensor] | None:
        """The same for prefix_allowed_tokens_fn."""
        return partial(self._process, self._allowed) if self._allowed else None

    @property
    def criterion(self) -> Callable[[Sequence[Sample]], list[bool]] | None:
        """For the engine: samples that got a token -> which of them end; None: no criteria."""
        return self._ended if self._criteria else None

    def _process(
        self, own: Sequence[Callable[..., Any]], samples: Sequence[Sample], logits: Tensor
    ) -> Tensor:
        index = torch.tensor([self._places[sample] for sample in samples], device=logits.device)
        scores = logits.new_zeros(len(self._samples), logits.shape[1]).index_copy_(0, index, logits)
        return run_processors(own, self._rows(), scores)[index]

    def _ended(self, samples: Sequence[Sample]) -> list[bool]:
        rows = self._rows()
        scores = None if self.scores is None else tuple(self.scores)
        done = run_criteria(self._criteria, rows, scores)
        return [bool(done[self._places[sample]]) for sample in samples]

    def _rows(self) -> Tensor:
        """int64 [B, S + new tokens]."""
        return padded(self._ids, [sample.tokens for sample in self._samples], self._pad)


def run_processors(processors: Sequence[Callable[..., Any]], rows: Tensor, scores: Tensor) -> Tensor:
    """Call each with the rows int64 [B, S] and the scores [B, V]; returns the last scores."""
    for function in processors:
        new = function(rows, scores)
        if not isinstance(new, Tensor) or new.shape != scores.shape:
            what = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"a logits_processor must return scores {list(scores.shape)}, and {_name(function)} "
                f"returned {what}"
            )
        scores = new
    return scores


def run_criteria(criteria: Sequence[Callable[..., Any]], rows: Tensor, scores: Any) -> Tensor:
    """Call each with the rows int64 [B, S] and the scores of all steps; returns bool [B], which rows end."""
    done = torch.zeros(len(rows), dtype=torch.bool)
    for function in criteria:
        found = torch.as_tensor(function(rows, scores)).bool().cpu()
        if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, len(done))):
            raise ValueError(
                f"stopping_criteria must return one bool, or one for each of {len(done)} rows, and "
                f"{_name(function)} returned {list(found.shape)}"
            )
        done |= found
    return done


def only_allowed(function: Callable[[int, Tensor], Iterable[int]]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that restricts each row's next token to those that `function` returns for it."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        return allow_only(function, range(len(ids)), list(ids), scores)

    return process


def allow_only(
    function: Callable[[int, Tensor], Iterable[int]],
    rows: Sequence[int],
    texts: Sequence[Tensor],
    scores: Tensor,
) -> Tensor:
    """Exclude what `function` does not return for (rows[b], texts[b]); scores [b, V]."""
    mask = torch.full_like(scores, -math.inf)
    for place, (row, sent) in enumerate(zip(rows, texts, strict=True)):
        allowed = list(function(row, sent))
        if not allowed:
            raise ValueError(
                f"prefix_allowed_tokens_fn allows no token for row {row}, which has {len(sent)} tokens"
            )
        mask[place, torch.as_tensor(allowed, device=scores.device)] = 0
    return scores + mask


def padded(prompts: Tensor, texts: Sequence[list[int]], pad: int) -> Tensor:
    """prompts [B, S] and the new tokens of each row -> [B, S + longest]."""
    width = max(map(len, texts))
    new = torch.tensor([text + [pad] * (width - len(text)) for text in texts], dtype=prompts.dtype)
    return torch.cat((prompts, new.view(len(texts), width).to(prompts.device)), dim=1)


def functions(name: str, given: Any, kind: str) -> list[Callable[..., Any]]:
    """The list of functions in None, a sequence of functions, or one of transformers' lists."""
    found = list(given) if isinstance(given, Iterable) else [] if given is None else [given]
    for function in found:
        if not callable(function):
            raise TypeError(f"{name} must hold functions {kind}, and holds {function!r:.80}")
    return found


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
