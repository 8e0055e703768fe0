"""The decoding loop, with continuous batching: takes requests, generates tokens for many texts at a time.

    waiting   prompts not yet read           step(): 1. prefill: read waiting prompts, packed, as capacity
    running   texts being generated                     allows
                                                     2. decode: one new token for every running text, as one
                                                        packed batch; several tokens at once if decoding is
                                                        greedy and nothing has to happen between them

A text that ends leaves the batch at once and frees its pages of the cache, and a waiting prompt takes its
place (continuous batching: Yu et al. 2022, "Orca"). Several samples of one prompt share its prefill. A prompt
longer than the limit per step is read in chunks, so that it does not delay the other texts; one that begins
like a text that has ended can be read from where they differ (`prefixes`). `generate` and `LLM` both use this
loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..cache import KVCache
from ..config import ModelConfig
from ..model import AutoModelForCausalLM, Packed
from .sampling import Sampling, draw, process
from .values import whole

if TYPE_CHECKING:
    from .prefixes import Prefixes


@dataclass(eq=False)
class Sample:
    """One text that is generated for a request."""

    request: Request
    index: int
    """Number of this sample within the request, from 0."""
    tokens: list[int] = field(default_factory=list)
    """The generated tokens, including the one that ended the text."""
    finish_reason: Literal["stop", "length"] | None = None
    """None while running; "stop": an end token or a stop string; "length": the limit of tokens."""
    stop_reason: int | str | None = None
    """The end token or the stop string."""
    watch: Callable[[int], str | None] | None = None
    """Called with each token that does not end the text; if it returns a stop string, that ends the text."""
    logprobs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    """Per step: token -> (log-probability, rank from 1), for the best tokens and the chosen one."""
    row: int = -1
    """Its row in the cache; -1 before and after."""
    whole: bool = True
    """False if an error was raised while a token was appended: `watch` may have missed the token."""

    def take(self, token: int) -> bool:
        """Append a token; returns whether the text ends with it."""
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
    """A prompt and its generation options."""

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    """Tokens that end a text."""
    n: int = 1
    """Number of samples to generate."""
    logprobs: int | None = None
    """Record the log-probabilities of this many best tokens (the model's, before any processing)."""
    at_once: bool = False
    """The samples are not streamed, so a step may generate several tokens of each."""
    row: int = -1
    """The cache row for the prompt; set by the caller to continue from what the row already holds."""
    reused: int = field(default=0, init=False)
    """How many tokens of the prompt were taken from a text that has ended."""
    given_up: bool = field(default=False, init=False)
    """Whether the request was removed from the engine, finished or not."""
    samples: list[Sample] = field(init=False)

    def __post_init__(self) -> None:
        self.samples = [Sample(self, index) for index in range(self.n)]

    @property
    def finished(self) -> bool:
        """Whether all samples have ended."""
        return all(sample.finish_reason for sample in self.samples)


STRIDE = 8
"""Tokens per step for texts that are not streamed: the work between two calls of the model is then done once
for all of them, and a new request still does not wait long."""

LEAST_ROOM = 64
"""Minimum number of new tokens to reserve cache pages for when a text starts (or its limit, if less)."""

Drawer = Callable[[Tensor, Sequence[Sample]], Tensor]
"""(processed logits [B, V], the sample of each row) -> tokens int64 [B]."""
Processor = Callable[[Sequence[Sample], Tensor], Tensor]
"""(samples, their logits [B, V] after the penalties) -> new logits. `allowed` is called before the rules that
force tokens, `processor` after them."""
Criterion = Callable[[Sequence[Sample]], list[bool]]
"""Called after each step: samples that got a token -> which of them end."""
Recorder = Callable[[Sequence[Sample], Tensor, Tensor], None]
"""Called at each step with the samples, the model's logits and the processed ones, float32 [B, V]."""


def draw_by_seed(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Sample each row with its request's seed, its index and its step; without a seed, the global generator
    provides one."""
    keys = []
    for sample in samples:
        seed = sample.request.sampling.seed
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        keys.append((seed, sample.index, len(sample.tokens)))
    return draw(logits, keys)


class Engine:
    """Runs requests on a model.

    `max_num_seqs`: maximum number of running texts. `max_num_batched_tokens`: maximum prompt tokens per step.
    `together`: read all waiting prompts before sampling the first token, so that all samples are at the same
    step. `keep_rows`: finished texts stay in the cache, in the caller's hands. `keep_prefixes`: this many
    tokens of finished texts stay in it for prompts that begin like them. `inference_mode=False` is for
    results or a cache that are used with autograd later.
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
        keep_prefixes: int = 0,
        inference_mode: bool = True,
        drawer: Drawer = draw_by_seed,
        recorder: Recorder | None = None,
        processor: Processor | None = None,
        allowed: Processor | None = None,
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
        self.prefixes: Prefixes | None = None
        if keep_prefixes:
            from .prefixes import Prefixes

            self.prefixes = Prefixes(self.cache, keep_prefixes)
        self._grad_mode = torch.inference_mode if inference_mode else torch.no_grad
        self._draw = drawer
        self._record = recorder
        self._processor = processor
        self._allowed = allowed
        self._criterion = criterion
        self._stepping = False
        self._begun: list[Request] = []
        self._given_up: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queue a request. The caller must have checked that it fits the model's window (`check_length`)."""
        if not request.prompt:
            raise ValueError("the prompt is empty: there is no token to continue from")
        self.waiting.append(request)

    def abort_later(self, request: Request) -> None:
        """Remove a request at the end of this or the next step, without blocking the calling thread."""
        self._given_up.append(request)

    def abort(self, request: Request) -> None:
        """Remove a request, finished or not, and free its pages; during a step, at its end."""
        if self._stepping:  # a garbage collection during a step can drop a stream
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
        """Remove all requests."""
        for request in {*self.waiting, *(sample.request for sample in self.running)}:
            self.abort(request)

    @property
    def busy(self) -> bool:
        """Whether some request is not finished."""
        return bool(self.waiting or self.running)

    def run(self) -> None:
        """Step until all requests are finished."""
        while self.busy:
            self.step()

    def step(self) -> list[Sample]:
        """Read waiting prompts as capacity allows, and generate one token of each running text (or several,
        see `Request.at_once`). Returns the samples that got tokens.

        After an error the state is as before the step, so that it can be repeated, except for texts that have
        already got their token, and requests whose own `watch` raised the error: those are removed.
        """
        if self._stepping:
            raise RuntimeError("step() was called during a step, by the model, a hook or a watch function")
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
        """Undo an unfinished step; `lengths` are the lengths of the cache's rows before it."""
        samples = [*self.running, *(s for r in self._begun for s in r.samples if s not in self.running)]
        for request in reversed(self._begun):
            started = [bool(sample.tokens) for sample in request.samples]
            if not any(started):  # its prompt is read again, except for what the row held before
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
                length = lengths.get(request.row, 0)
                self.cache.crop_row(request.row, length)
                request.reused = min(request.reused, length)
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
                        self._end(sample)
            return grown

    def _end(self, sample: Sample) -> None:
        if self.prefixes is None:
            self._free(sample)
            return
        row, sample.row = sample.row, -1
        self.prefixes.keep(row, [*sample.request.prompt, *sample.tokens])

    def _free(self, sample: Sample) -> None:
        self.cache.free_row(sample.row)
        sample.row = -1

    # Prefill
    def _admit(self) -> list[tuple[Request, int]]:
        """The next prompts to read, and how many tokens of each: all that remain, except for the last
        prompt."""
        chunks: list[tuple[Request, int]] = []
        seats = self.max_num_seqs - len(self.running)
        budget = self.max_num_batched_tokens
        for request in self.waiting:
            seats -= request.n
            # A request with more samples than max_num_seqs runs alone.
            if not budget or (seats < 0 and (self.running or chunks)):
                break
            if request.row < 0 and self.prefixes is not None:
                request.row, request.reused = self.prefixes.begin(request.prompt)
            elif request.row < 0:
                (request.row,) = self.cache.add_rows(1)
            count = min(budget, len(request.prompt) - self.cache.lengths[request.row])
            chunks.append((request, count))
            budget -= count
        return chunks

    def _read(self, chunks: list[tuple[Request, int]]) -> tuple[list[Sample], Tensor]:
        """Read chunks of prompts; returns the samples whose prompt is complete, and their first logits
        [B, V]."""
        tokens: list[list[int]] = []
        samples: list[Sample] = []
        last: list[int] = []  # per sample, the packed index of its prompt's last token
        read = 0
        for request, count in chunks:
            start = self.cache.lengths[request.row]
            tokens.append(request.prompt[start : start + count])
            read += count
            if start + count == len(request.prompt):
                samples += request.samples
                last += [read - 1] * request.n
        self._make_room(chunks)
        hidden = read_tokens(self.model, self.cache, [request.row for request, _ in chunks], tokens)
        self._begun += [sample.request for sample in samples if sample.index == 0]
        for sample in samples:
            request = sample.request
            if sample.index == 0:
                self.waiting.popleft()  # only the last chunk can belong to a request that keeps waiting
                sample.row, request.row = request.row, -1
            else:
                sample.row = self.cache.fork(request.samples[0].row)
        return samples, self.model.logits(hidden[torch.tensor(last, dtype=torch.int64, device=hidden.device)])

    def _make_room(self, chunks: list[tuple[Request, int]]) -> None:
        """Reserve cache pages for the texts that start, since growing the cache later copies it.

        A text gets room for as many new tokens as its prompt has, and for more when it needs it."""
        size, pages = self.cache.page_size, 0
        for request, _ in chunks:
            if self.cache.lengths[request.row] == request.reused:
                length = len(request.prompt)
                length += min(request.max_new_tokens, max(length - request.reused, LEAST_ROOM))
                pages += request.n * (-(-length // size) - request.reused // size)
        self.cache.reserve(pages * size)

    # Decoding
    def _write(self, samples: list[Sample]) -> None:
        """Feed the last token of each sample, and generate the next ones."""
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
                if sample.finish_reason is None and sample.take(token):  # drop the tokens after its end
                    length = self.cache.lengths[sample.row] - (len(before) - step)
                    self.cache.crop_row(sample.row, length)
        growing = [place for place, sample in enumerate(samples) if sample.finish_reason is None]
        if growing:
            chosen = slice(None) if len(growing) == len(samples) else growing
            self._choose([samples[place] for place in growing], logits[chosen], found[-1][chosen])

    def _stride(self, samples: list[Sample]) -> int:
        """How many tokens to generate in one step: several only if all are certain to be greedy choices."""
        if self.waiting or self._record or self._processor or self._allowed or self._criterion:
            return 1
        for request in {sample.request for sample in samples}:
            rule = request.sampling
            if not request.at_once or request.logprobs is not None or rule.do_sample or rule.counts:
                return 1
        return min(STRIDE, *(s.request.max_new_tokens - len(s.tokens) for s in samples))

    def _choose(self, samples: list[Sample], logits: Tensor, best: Tensor | None = None) -> None:
        """Append the next token to each sample; logits [B, V], `best` [B] their argmax."""
        tokens = self._likeliest(samples, logits, best)
        if tokens is None:
            rules = [sample.request.sampling for sample in samples]
            logits = logits.float()
            prompts = [sample.request.prompt for sample in samples]
            texts = [sample.tokens for sample in samples]
            own, allowed = (
                None if each is None else partial(each, samples) for each in (self._processor, self._allowed)
            )
            scores = process(logits, rules, prompts, texts, own, allowed=allowed)
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
        """The argmax tokens, if every sample's options lead to them; else None."""
        rules = [sample.request.sampling for sample in samples]
        if self._record or self._processor or self._allowed:
            return None
        if any(rule.do_sample or rule.counts for rule in rules):
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


def read_tokens(
    model: AutoModelForCausalLM, cache: KVCache, rows: Sequence[int], tokens: Sequence[Sequence[int]]
) -> Tensor:
    """Append tokens to rows of the cache; returns their hidden states, packed [T, C]."""
    device = model.device
    lengths = [len(each) for each in tokens]
    positions: list[int] = []
    ends = [0]
    for row, count in zip(rows, lengths, strict=True):
        start = cache.lengths[row]
        positions += range(start, start + count)
        ends.append(ends[-1] + count)
    packed = Packed(
        len(lengths),
        max(lengths),
        None,
        lengths,
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(positions, device=device),
    )
    flat = torch.tensor([token for each in tokens for token in each], device=device)
    return model.run_packed(flat, packed, cache=cache, rows=list(rows))


def best_logprobs(logits: Tensor, count: int, token: int) -> dict[int, tuple[float, int]]:
    """token -> (log-probability, rank from 1), for `token` and the `count` best; logits [V]."""
    logs = logits.float().log_softmax(-1)
    own = float(logs[token])
    found = {token: (own, 1 + int((logs > own).sum()))}
    best = logs.topk(min(count, len(logs)))
    for rank, (value, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        found.setdefault(index, (value, rank + 1))
    return found


def context_window(config: ModelConfig) -> int | None:
    """The longest sequence that the model supports, prompt and new tokens together; None if rope adapts to
    any length.

    Checkpoints state the window either before or after `linear` and `yarn` rope scaling; the larger reading
    is allowed.
    """
    rope = config.rope
    if rope is None or rope.type in ("default", "llama3"):
        return config.max_positions
    if rope.type == "dynamic":
        return None
    stretched = rope.factor * (rope.original_max_positions if rope.type == "yarn" else config.max_positions)
    return max(config.max_positions, int(stretched))


def check_length(prompt: int, new: int, window: int | None) -> None:
    """Raise ValueError, with both lengths, if prompt and new tokens do not fit the window."""
    if window is not None and prompt + new > window:
        raise ValueError(
            f"the prompt has {prompt} tokens, with {new} new tokens {prompt + new}, "
            f"and the model's window is {window} tokens"
        )
