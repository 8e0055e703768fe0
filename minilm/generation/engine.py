"""The one decoding loop: requests go in, tokens come out, many texts at a time.

    waiting   prompts not yet read           step(): 1. read prompts, packed end to end, while there is room
    running   texts that grow                        2. one new token for every running text, as one packed
    batch; several, where that is the likeliest and nobody waits for each

A text that ends leaves the batch at once and gives its pages of the cache back, and a waiting prompt takes
its place (continuous batching: Yu et al. 2022, "Orca"). Several samples of one prompt read it once. A prompt
longer than what one step may read is read in chunks, so that it does not hold up the others. `generate` and
`LLM` both run on this loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..cache import KVCache
from ..config import ModelConfig
from ..model import AutoModelForCausalLM, Packed
from .sampling import Sampling, draw, process
from .values import whole


@dataclass(eq=False)
class Sample:
    """One text that is being written for a request."""

    request: Request
    index: int
    """Which of the request's samples it is, from 0."""
    tokens: list[int] = field(default_factory=list)
    """What was written, the token that ended it included."""
    finish_reason: Literal["stop", "length"] | None = None
    """None while it grows; "stop" for an end token or a stop string, "length" for the limit of tokens."""
    stop_reason: int | str | None = None
    """The end token or the stop string."""
    watch: Callable[[int], str | None] | None = None
    """Called with each token that does not end the text; a stop string that it returns does."""
    logprobs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    """For each token: token -> (log-probability, rank from 1) of the best ones and of the one taken."""
    row: int = -1
    """Its sequence in the cache; -1 before and after."""
    whole: bool = True
    """False where an error came while a token was taken: whoever watches may have missed it."""

    def take(self, token: int) -> bool:
        """Write one more token; returns whether the text ends with it."""
        request = self.request
        self.whole = False
        self.tokens.append(token)
        if token in request.ends:
            self.finish_reason, self.stop_reason = "stop", token
        elif self.watch is not None and (found := self.watch(token)) is not None:
            self.finish_reason, self.stop_reason = "stop", found
        elif len(self.tokens) >= request.max_new_tokens:
            self.finish_reason = "length"
        self.whole = True
        return self.finish_reason is not None


@dataclass(eq=False)
class Request:
    """A prompt, and what is to be written after it."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    """Tokens that end a text."""
    n: int = 1
    """Samples to write."""
    logprobs: int | None = None
    """Of how many of the best tokens to keep the log-probabilities (those of the model, before any
    processing)."""
    at_once: bool = False
    """Nobody looks at the samples before they are finished: a step may write several of their tokens."""
    row: int = -1
    """The sequence in the cache that the prompt is read into; given by the caller to go on from what it
    holds."""
    given_up: bool = field(default=False, init=False)
    """It is no longer in the engine, finished or not."""
    samples: list[Sample] = field(init=False)

    def __post_init__(self) -> None:
        self.samples = [Sample(self, index) for index in range(self.n)]

    @property
    def finished(self) -> bool:
        """All samples have ended."""
        return all(sample.finish_reason for sample in self.samples)


STRIDE = 8
"""Tokens that texts which nobody watches grow by in one step: what stands between two calls of the model is
then done once for all of them, and nothing that happens meanwhile, a new request say, waits for long."""

LEAST_ROOM = 64
"""New tokens for which a text finds room in the cache when it begins, if it may have as many."""

Drawer = Callable[[Tensor, Sequence[Sample]], Tensor]
"""(processed logits [B, V], the sample of each row) -> tokens int64 [B]."""
Processor = Callable[[Sequence[Sample], Tensor], Tensor]
"""The samples and their logits [B, V] after the penalties -> the logits to go on with."""
Criterion = Callable[[Sequence[Sample]], list[bool]]
"""Asked after each step: the samples that grew -> which of them have ended."""
Recorder = Callable[[Sequence[Sample], Tensor, Tensor], None]
"""Told at each step: the samples, the model's logits and the processed ones, float32 [B, V]."""


def draw_by_seed(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Each row by its request's seed, its index and its step; without a seed the global generator gives
    one."""
    keys = []
    for sample in samples:
        seed = sample.request.sampling.seed
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        keys.append((seed, sample.index, len(sample.tokens)))
    return draw(logits, keys)


class Engine:
    """Runs requests on a model.

    `max_num_seqs`: texts that grow at the same time. `max_num_batched_tokens`: prompt tokens that one step
    reads. `together`: all waiting prompts are read before the first token is drawn, so that the samples go in
    step. `keep_rows`: ended texts stay in the cache. `inference_mode=False` where the results, or the cache,
    shall meet autograd later.
    """

    def __init__(
        self,
        model: AutoModelForCausalLM,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        together: bool = False,
        cache: KVCache | None = None,
        keep_rows: bool = False,
        inference_mode: bool = True,
        drawer: Drawer = draw_by_seed,
        recorder: Recorder | None = None,
        processor: Processor | None = None,
        criterion: Criterion | None = None,
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            whole(name, value, 1)
        self.model = model
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.cache = model.new_cache() if cache is None else cache
        self.cache.steps_a_look = 8
        self.waiting: deque[Request] = deque()
        self.running: list[Sample] = []
        self._together = together
        self._keep_rows = keep_rows
        self._grad_mode = torch.inference_mode if inference_mode else torch.no_grad
        self._draw = drawer
        self._record = recorder
        self._processor = processor
        self._criterion = criterion
        self._stepping = False
        self._begun: list[Request] = []
        self._given_up: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Put a request in the queue. The caller has checked that it fits the model's window
        (`check_length`)."""
        if not request.prompt:
            raise ValueError("the prompt is empty: there is no token to continue from")
        self.waiting.append(request)

    def abort_later(self, request: Request) -> None:
        """Forget a request at the end of this step or of the next: for threads that must not wait."""
        self._given_up.append(request)

    def abort(self, request: Request) -> None:
        """Forget a request, finished or not, and take its pages back; within a step, at its end."""
        if self._stepping:  # a stream can be dropped anywhere, also by a garbage collection in here
            self._given_up.append(request)
            return
        request.given_up = True
        if request in self.waiting:
            self.waiting.remove(request)
        if request.row >= 0:
            self.cache.free_row(request.row)
            request.row = -1
        self.running = [sample for sample in self.running if sample.request is not request]
        for sample in request.samples:
            if sample.row >= 0:
                self._free(sample)

    def clear(self) -> None:
        """Forget every request."""
        for request in {*self.waiting, *(sample.request for sample in self.running)}:
            self.abort(request)

    @property
    def busy(self) -> bool:
        """Some request is not finished."""
        return bool(self.waiting or self.running)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()

    def step(self) -> list[Sample]:
        """Read what prompts there is room for, and write one token of each running text (or several, see
        `Request.at_once`); returns what grew.

        After an error everything stands as before the step, so that it can be tried again, save texts that
        have taken their token already, and requests that an error in their own `watch` has broken: those are
        given up.
        """
        if self._stepping:
            raise RuntimeError(
                "a step cannot be made within a step: the model, a hook or a watch called back"
            )
        lengths = dict(self.cache.lengths)
        self._stepping, self._begun = True, []
        try:
            return self._step()
        except BaseException:
            self._recover(lengths)
            raise
        finally:
            self._stepping = False
            while self._given_up:
                self.abort(self._given_up.popleft())

    def _recover(self, lengths: dict[int, int]) -> None:
        """Take back what a step has begun; `lengths` are those of the cache before it."""
        samples = [*self.running, *(s for r in self._begun for s in r.samples if s not in self.running)]
        for request in reversed(self._begun):
            started = [bool(sample.tokens) for sample in request.samples]
            if not any(started):  # its prompt is read, as far as it was new, once more
                for sample in request.samples:
                    if sample.row >= 0 and sample.index:
                        self.cache.free_row(sample.row)
                    elif sample.row >= 0:
                        request.row = sample.row
                    sample.row = -1
                if request not in self.waiting:
                    self.waiting.appendleft(request)
            elif not all(started):
                self.abort_later(request)
        for request in self.waiting:
            if request.row >= 0:
                self.cache.crop_row(request.row, lengths.get(request.row, 0))
        self.running = []
        for sample in samples:
            request = sample.request
            if not sample.tokens:
                continue
            del sample.logprobs[len(sample.tokens) :]
            if not sample.whole:
                self.abort_later(request)
            if sample.finish_reason is None:
                self.running.append(sample)
                if sample.row >= 0:
                    self.cache.crop_row(sample.row, len(request.prompt) + len(sample.tokens) - 1)
            elif sample.row >= 0 and not self._keep_rows:
                self._free(sample)

    def _step(self) -> list[Sample]:
        with self._grad_mode():
            growing, begun = self.running, list[Sample]()
            first: list[Tensor] = []
            while chunks := self._admit():
                samples, logits = self._read(chunks)
                begun += samples
                first.append(logits)
                if not self._together:
                    break
            if begun:
                self._choose(begun, first[0] if len(first) == 1 else torch.cat(first))
            if growing:
                self._write(growing)
            grown = [*growing, *begun]
            self.running = [sample for sample in grown if sample.finish_reason is None]
            if not self._keep_rows:
                for sample in grown:
                    if sample.finish_reason is not None:
                        self._free(sample)
            return grown

    def _free(self, sample: Sample) -> None:
        self.cache.free_row(sample.row)
        sample.row = -1

    # Reading prompts
    def _admit(self) -> list[tuple[Request, int]]:
        """The next prompts to read, and how many tokens of each: all that remain, except of the last one."""
        chunks: list[tuple[Request, int]] = []
        seats = self.max_num_seqs - len(self.running)
        budget = self.max_num_batched_tokens
        for request in self.waiting:
            seats -= request.n
            # A request with more samples than there are seats runs alone.
            if not budget or (seats < 0 and (self.running or chunks)):
                break
            if request.row < 0:
                (request.row,) = self.cache.add_rows(1)
            count = min(budget, len(request.prompt) - self.cache.lengths[request.row])
            chunks.append((request, count))
            budget -= count
        return chunks

    def _read(self, chunks: list[tuple[Request, int]]) -> tuple[list[Sample], Tensor]:
        """Read parts of prompts; gives the samples whose prompt is read to its end, and their first logits
        [B, V]."""
        tokens: list[int] = []
        positions: list[int] = []
        ends = [0]
        samples: list[Sample] = []
        last: list[int] = []  # of each sample, the packed index of its prompt's last token
        for request, count in chunks:
            start = self.cache.lengths[request.row]
            tokens += request.prompt[start : start + count]
            positions += range(start, start + count)
            ends.append(len(tokens))
            if start + count == len(request.prompt):
                samples += request.samples
                last += [len(tokens) - 1] * request.n
        self._make_room(chunks)
        device = self.model.device
        lengths = [count for _, count in chunks]
        packed = Packed(
            len(lengths),
            max(lengths),
            None,
            lengths,
            torch.tensor(ends, dtype=torch.int32, device=device),
            torch.tensor(positions, device=device),
        )
        rows = [request.row for request, _ in chunks]
        hidden = self.model.run_packed(
            torch.tensor(tokens, device=device), packed, cache=self.cache, rows=rows
        )
        self._begun += [sample.request for sample in samples if sample.index == 0]
        for sample in samples:
            request = sample.request
            if sample.index == 0:
                self.waiting.popleft()  # only the last of the chunks can be of a request that stays
                sample.row, request.row = request.row, -1
            else:
                sample.row = self.cache.fork(request.samples[0].row)
        return samples, self.model.logits(hidden[torch.tensor(last, dtype=torch.int64, device=hidden.device)])

    def _make_room(self, chunks: list[tuple[Request, int]]) -> None:
        """Have pages ready for the texts that begin: a cache that has to grow between two steps is copied.

        A long text gets room for as much again as its prompt, and more when it needs it."""
        size, pages = self.cache.page_size, 0
        for request, _ in chunks:
            if self.cache.lengths[request.row] == 0:
                length = len(request.prompt)
                length += min(request.max_new_tokens, max(length, LEAST_ROOM))
                pages += request.n * -(-length // size)
        self.cache.reserve(pages * size)

    # Writing
    def _write(self, samples: list[Sample]) -> None:
        """Feed the last token of each sample, and write the next ones."""
        model, rows = self.model, [sample.row for sample in samples]
        tokens = torch.tensor([sample.tokens[-1] for sample in samples], device=model.device)
        steps = self._stride(samples)
        if steps == 1:
            logits, best = model.step(tokens, rows, self.cache)
            self._choose(samples, logits, best)
            return
        ends = {end for sample in samples for end in (*sample.request.ends, *sample.request.sampling.ends)}
        logits, found = model.steps(tokens, rows, self.cache, steps, ends)
        *before, _ = found.tolist()
        for step, likeliest in enumerate(before):
            for sample, token in zip(samples, likeliest, strict=True):
                if sample.finish_reason is None and sample.take(token):  # what came after it is forgotten
                    length = self.cache.lengths[sample.row] - (len(before) - step)
                    self.cache.crop_row(sample.row, length)
        growing = [place for place, sample in enumerate(samples) if sample.finish_reason is None]
        if growing:
            chosen = slice(None) if len(growing) == len(samples) else growing
            self._choose([samples[place] for place in growing], logits[chosen], found[-1][chosen])

    def _stride(self, samples: list[Sample]) -> int:
        """How many tokens to write in one step: more than one where it is known before that each is the
        likeliest."""
        if self.waiting or self._record or self._processor or self._criterion:
            return 1
        for request in {sample.request for sample in samples}:
            rule = request.sampling
            if not request.at_once or request.logprobs is not None or rule.do_sample or rule.counts:
                return 1
        return min(STRIDE, *(s.request.max_new_tokens - len(s.tokens) for s in samples))

    def _choose(self, samples: list[Sample], logits: Tensor, best: Tensor | None = None) -> None:
        """Append the next token to each sample; logits [B, V], of which `best` [B] are the likeliest."""
        tokens = self._likeliest(samples, logits, best)
        if tokens is None:
            rules = [sample.request.sampling for sample in samples]
            logits = logits.float()
            prompts = [sample.request.prompt for sample in samples]
            own = None if self._processor is None else partial(self._processor, samples)
            scores = process(logits, rules, prompts, [sample.tokens for sample in samples], own)
            if self._record is not None:
                self._record(samples, logits, scores)
            tokens = self._pick(samples, scores, [rule.do_sample for rule in rules])
        for row, (sample, token) in enumerate(zip(samples, tokens, strict=True)):
            if sample.request.logprobs is not None:
                sample.logprobs.append(best_logprobs(logits[row], sample.request.logprobs, token))
        for sample, token in zip(samples, tokens, strict=True):
            sample.take(token)
        if self._criterion is not None:
            for sample, ended in zip(samples, self._criterion(samples), strict=True):
                if ended and sample.finish_reason is None:
                    sample.finish_reason = "stop"

    def _likeliest(self, samples: list[Sample], logits: Tensor, best: Tensor | None) -> list[int] | None:
        """The likeliest tokens, if they are what every sample's rules come to; else None."""
        rules = [sample.request.sampling for sample in samples]
        if self._record or self._processor or any(rule.do_sample or rule.counts for rule in rules):
            return None
        tokens: list[int] = (logits.argmax(-1) if best is None else best).tolist()
        for sample, rule, token in zip(samples, rules, tokens, strict=True):
            if token in rule.ends and len(sample.tokens) < rule.min_new_tokens:
                return None
        return tokens

    def _pick(self, samples: list[Sample], scores: Tensor, drawn: list[bool]) -> list[int]:
        if all(drawn):
            return self._draw(scores, samples).tolist()
        tokens: list[int] = scores.argmax(-1).tolist()
        if any(drawn):
            rows = [row for row, is_drawn in enumerate(drawn) if is_drawn]
            part = scores[torch.tensor(rows, device=scores.device)]
            for row, token in zip(
                rows, self._draw(part, [samples[row] for row in rows]).tolist(), strict=True
            ):
                tokens[row] = token
        return tokens


def best_logprobs(logits: Tensor, count: int, token: int) -> dict[int, tuple[float, int]]:
    """token -> (log-probability, rank from 1), of `token` and of the `count` best; logits [V]."""
    logs = logits.float().log_softmax(-1)
    own = float(logs[token])
    found = {token: (own, 1 + int((logs > own).sum()))}
    best = logs.topk(min(count, len(logs)))
    for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        found.setdefault(index, (value, rank + 1))
    return found


def context_window(config: ModelConfig) -> int | None:
    """The longest sequence that the model can read, prompt and text together; None where rope adapts itself
    to any.

    Checkpoints state the window before or after `linear` and `yarn` rope scaling; both readings are let
    through.
    """
    rope = config.rope
    if rope is None or rope.type in ("default", "llama3"):
        return config.max_positions
    if rope.type == "dynamic":
        return None
    stretched = rope.factor * (rope.original_max_positions if rope.type == "yarn" else config.max_positions)
    return max(config.max_positions, int(stretched))


def check_length(prompt: int, new: int, window: int | None) -> None:
    """Raise ValueError, with both lengths, when prompt and new tokens do not fit the window."""
    if window is not None and prompt + new > window:
        raise ValueError(
            f"the prompt has {prompt} tokens, with the {new} to be written {prompt + new}, "
            f"and the model's window is {window} tokens"
        )
