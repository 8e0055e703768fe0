"""`generate` with `num_beams`: beam search with the options and results of transformers' `generate`, for
decoders and encoder-decoders."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cache import KVCache
from ..model import ModelOutput
from .beams import Beam, BeamOptions, Hypothesis, Noise, Step, beam_search
from .callbacks import allow_only, functions, padded, run_criteria, run_processors
from .sampling import Sampling, exponential, process
from .stopping import GrowingText
from .values import logger


@dataclass
class GenerateBeamOutput(ModelOutput):
    """sequences int64 [B * num_return_sequences, S + new], best first, and with output_scores their
    sequences_scores float32 [B * num_return_sequences]; scores and logits: one float32 [B * num_beams, V] per
    step, after and before processing, zeros for beams that the search did not need; beam_indices int32
    [B * num_return_sequences, new]: for each token the row of `scores` that it is from, -1 after the end.
    past_key_values is None: the beams that the search ends with are not the texts that it returns."""

    sequences: Tensor | None = None
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    past_key_values: KVCache | None = None


@dataclass
class BeamPrompts:
    """What a search starts from."""

    ids: Tensor
    """int64 [B, S], as passed, with padding."""
    rows: list[list[int]]
    """The tokens of each prompt, without."""
    rules: list[Sampling]
    """How scores are processed, for each prompt."""
    pad: int
    sources: list[list[int]] | None = None
    """The tokens that an encoder has read for each."""


@dataclass
class BeamExtras:
    """What a caller adds to a search."""

    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Any = None
    stop_strings: Sequence[str] = ()
    tokenizer: Any = None
    """To find the stop strings."""
    deadline: float | None = None
    """Of time.monotonic: all candidates end at the first step after it."""


class _Border:
    """Between the search, which knows live beams, and functions and results for the whole batch: text t's
    beam p is row ``t * num_beams + p``, whether it lives or not."""

    def __init__(self, prompts: BeamPrompts, options: BeamOptions, extras: BeamExtras) -> None:
        self.prompts, self.options, self.extras = prompts, options, extras
        self.processors = functions(
            "logits_processor", extras.logits_processor, "(input_ids, scores) -> scores"
        )
        self.criteria = functions(
            "stopping_criteria", extras.stopping_criteria, "(input_ids, scores) -> bool [B]"
        )
        allowed = extras.prefix_allowed_tokens_fn
        self.allowed = functions(
            "prefix_allowed_tokens_fn", [] if allowed is None else [allowed], "(row, tokens)"
        )
        self.scores: list[Tensor] | None = None
        self.logits: list[Tensor] | None = None

    def process(self, logits: Tensor, live: Sequence[Beam]) -> Tensor:
        """See `minilm.generation.beams.Process`."""
        prompts = self.prompts
        scores = process(
            logits.log_softmax(-1),
            [prompts.rules[beam.text] for beam in live],
            [prompts.rows[beam.text] for beam in live],
            [beam.tokens for beam in live],
            partial(self._call, live) if self.processors else None,
            allowed=partial(self._allow, live) if self.allowed else None,
            sources=None if prompts.sources is None else [prompts.sources[beam.text] for beam in live],
        )
        for kept, new in ((self.logits, logits), (self.scores, scores)):
            if kept is not None:
                kept.append(self._whole(new, live))
        return scores

    def stops(self, candidates: Sequence[Beam]) -> list[bool]:
        """See `minilm.generation.beams.Stops`."""
        extras = self.extras
        late = extras.deadline is not None and time.monotonic() > extras.deadline
        ended = [late or self._has_stop_string(beam) for beam in candidates]
        if self.criteria:
            each = self.options.candidates
            places = [beam.text * each + beam.place for beam in candidates]
            rows = self._rows(each, dict(zip(places, candidates, strict=True)))
            done = run_criteria(self.criteria, rows, None if self.scores is None else tuple(self.scores))
            ended = [one or bool(done[place]) for one, place in zip(ended, places, strict=True)]
        return ended

    def _places(self, live: Sequence[Beam]) -> list[int]:
        return [beam.text * self.options.num_beams + beam.place for beam in live]

    def _whole(self, part: Tensor, live: Sequence[Beam]) -> Tensor:
        """[live, V] -> [B * num_beams, V]; at the first step the beams of a text are all the same."""
        if not live[0].tokens:
            return part.repeat_interleave(self.options.num_beams, 0)
        index = torch.tensor(self._places(live), device=part.device)
        full = part.new_zeros(len(self.prompts.rows) * self.options.num_beams, part.shape[1])
        return full.index_copy_(0, index, part)

    def _rows(self, each: int, beams: dict[int, Beam]) -> Tensor:
        """int64 [B * each, S + new]: the texts of `beams` by row; the others are padding after the prompt."""
        ids = self.prompts.ids.repeat_interleave(each, 0)
        return padded(
            ids,
            [list(beams[row].tokens) if row in beams else [] for row in range(len(ids))],
            self.prompts.pad,
        )

    def _call(self, live: Sequence[Beam], scores: Tensor) -> Tensor:
        places, beams = self._places(live), self.options.num_beams
        texts = dict(zip(places, live, strict=True))
        if not live[0].tokens:
            texts = {row: live[row // beams] for row in range(len(live) * beams)}
        new = run_processors(self.processors, self._rows(beams, texts), self._whole(scores, live))
        return new[torch.tensor(places, device=new.device)]

    def _allow(self, live: Sequence[Beam], scores: Tensor) -> Tensor:
        (function,) = self.allowed
        ids = self.prompts.ids
        sent = [torch.cat((ids[beam.text], ids.new_tensor(beam.tokens))) for beam in live]
        return allow_only(function, [beam.text for beam in live], sent, scores)

    def _has_stop_string(self, beam: Beam) -> bool:
        if not self.extras.stop_strings:
            return False
        before = [*self.prompts.rows[beam.text], *beam.tokens[:-1]]
        text = GrowingText(
            self.extras.tokenizer,
            self.extras.stop_strings,
            prompt_ids=before,
            search_prompt=True,
            skip_special_tokens=False,
        )
        return text.push(beam.tokens[-1]) is not None


def beam_noise(
    seed: int | None, generator: torch.Generator | None, texts: int, device: torch.device
) -> Noise:
    """With a seed, from (seed, step) alone; else as torch.multinomial draws for the whole batch."""

    def noise(chosen: Sequence[int], step: int, n: int) -> Tensor:
        if seed is not None:
            return exponential(n, seed, 0, step).expand(len(chosen), n)
        drawn = torch.empty(texts, n, device=device).exponential_(1, generator=generator)
        return drawn[torch.tensor(chosen, device=device)]

    return noise


class GenerateBeamDecoderOnlyOutput(GenerateBeamOutput):
    """The result for a decoder."""


class GenerateBeamEncoderDecoderOutput(GenerateBeamOutput):
    """The result for an encoder-decoder."""


Begin = Callable[[], tuple[Tensor, Step]]
"""Reads the prompts: the logits after each, [B, V], and what runs the beams."""


def generate_beams(
    begin: Begin,
    prompts: BeamPrompts,
    options: BeamOptions,
    extras: BeamExtras,
    *,
    count: int,
    noise: Noise | None,
    result: type[GenerateBeamOutput] | None,
    output_scores: bool,
    output_logits: bool,
) -> Tensor | GenerateBeamOutput:
    """The `count` best texts of each prompt: a `result` with the fields that are asked for, or, if that is
    None, the sequences alone."""
    border = _Border(prompts, options, extras)
    border.scores = [] if result and output_scores else None
    border.logits = [] if result and output_logits else None
    stops = extras.stop_strings or extras.deadline is not None or border.criteria
    # Inference tensors could not be used with autograd later, nor be changed by custom functions.
    lasting = result or border.processors or border.criteria or border.allowed
    with torch.no_grad() if lasting else torch.inference_mode():
        logits, step = begin()
        found = beam_search(
            logits,
            step,
            options,
            process=border.process,
            stops=border.stops if stops else None,
            noise=noise,
        )
    chosen = [texts[:count] + [Hypothesis((), -torch.inf, ())] * (count - len(texts)) for texts in found]
    for text, texts in enumerate(found):
        if len(texts) < count:
            logger.warning(
                "beam search found %d texts for prompt %d, and num_return_sequences=%d: every other token "
                "was excluded; the rest is padding, with score -inf",
                *(len(texts), text, count),
            )
    flat = [hypothesis for texts in chosen for hypothesis in texts]
    ids = prompts.ids.repeat_interleave(count, dim=0)
    sequences = padded(ids, [list(hypothesis.tokens) for hypothesis in flat], prompts.pad)
    if result is None:
        return sequences
    indices = torch.full((len(flat), sequences.shape[1] - ids.shape[1]), -1, dtype=torch.int32)
    for row, hypothesis in enumerate(flat):
        first = row // count * options.num_beams
        parents = [first + parent for parent in hypothesis.parents]
        indices[row, : len(parents)] = torch.tensor(parents, dtype=torch.int32)
    scores = torch.tensor([hypothesis.score for hypothesis in flat], device=ids.device)
    return result(
        sequences=sequences,
        sequences_scores=scores if output_scores else None,
        scores=None if border.scores is None else tuple(border.scores),
        logits=None if border.logits is None else tuple(border.logits),
        beam_indices=indices.to(ids.device),
    )
