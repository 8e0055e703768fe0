"""From logits to the next token: penalties, filters and sampling.

The functions on logits are pure: float32 [B, V] -> float32 [B, V]; an excluded token gets -inf. They compute
the same as transformers' logits processors of these names, and `process` applies them in transformers' order.
A parameter is one number for all rows, or a column [B, 1] with one per row, so that requests with different
options share a batch. A row's result does not depend on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .values import is_whole, number, whole


class History(NamedTuple):
    """The tokens of a row."""

    source: Sequence[int]
    """What an encoder has read; of a decoder, the prompt."""
    prompt: Sequence[int]
    text: Sequence[int]
    """Generated so far."""


Rule = Callable[[Tensor, Sequence[History]], Tensor]
"""(scores float32 [B, V], the history of each row) -> scores [B, V]."""


@dataclass(frozen=True)
class Rules:
    """Rules in the order in which they run; `minilm.generation.processors` makes them from options."""

    before: tuple[Rule, ...] = ()
    """Before the penalties for repetition."""
    after: tuple[Rule, ...] = ()
    """After the penalties, the minimal length and prefix_allowed_tokens_fn, before a logits_processor."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen. The defaults leave the model's distribution unchanged.

    Raises ValueError for values out of range.
    """

    do_sample: bool = True
    """True: sample from the probabilities; False: take the most probable token (filters have no effect)."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt and text are divided by it, or multiplied if negative
    (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the generated text (not the prompt)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the generated text."""
    no_repeat_ngram_size: int = 0
    excluded: Callable[[Sequence[int]], Collection[int]] | None = None
    """A function of the generated text that names the tokens that may not come next."""
    min_new_tokens: int = 0
    ends: frozenset[int] = frozenset()
    """Tokens of the vocabulary that are excluded until the text has `min_new_tokens`."""
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_h: float | None = None
    """For these four see `minilm.generation.filters`."""
    renormalize: bool = False
    """The scores are log-probabilities again, after everything else."""
    keep: int = 1
    """Filters keep at least so many tokens (top_h: one)."""
    rules: Rules | None = None
    """Biases, bans and forced tokens."""
    seed: int | None = None
    """Sampling depends only on (seed, index of the sample, step); None: on the caller's generator."""

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            self._check(name, self._number(name) > 0, "a number above 0")
        for name in ("top_p", "min_p"):
            self._check(name, 0 <= self._number(name) <= 1, "a number between 0 and 1")
        for name in ("epsilon_cutoff", "eta_cutoff"):
            self._check(name, 0 <= self._number(name) < 1, "a number from 0 (off) to below 1")
        for name in ("typical_p", "top_h"):
            fine = getattr(self, name) is None or 0 < self._number(name) <= 1
            self._check(name, fine, "a number above 0, and at most 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name)
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            whole(name, getattr(self, name), 0, note=" (off)")
        self._check("seed", self.seed is None or is_whole(self.seed), "a whole number")

    def _number(self, name: str) -> float:
        return number(name, getattr(self, name))

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"{name} must be {expected}, and is {getattr(self, name)!r}")

    @cached_property
    def counts(self) -> bool:
        """Whether some penalty depends on the tokens so far."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram_size)
        return self.repetition_penalty != 1 or any(penalties) or bool(self.excluded or self.rules)

    @cached_property
    def untouched(self) -> bool:
        """Whether the model's logits are used unchanged."""
        filters = self.do_sample and (
            (self.temperature, self.top_k, self.top_p, self.min_p) != (1, 0, 1, 0) or self.filters_more
        )
        return not (self.counts or filters or self.renormalize or (self.min_new_tokens and self.ends))

    @cached_property
    def filters_more(self) -> bool:
        """Whether one of the rarer filters is on."""
        off = (1, 0, 0, None)
        return (self.typical_p, self.epsilon_cutoff, self.eta_cutoff, self.top_h) != off


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide the positive logits of `tokens` (int64 [B, S], padded with V) by `penalty`, multiply the
    negative ones."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(_count(tokens, logits) > 0, penalised, logits)


def penalise_presence(
    logits: Tensor, tokens: Tensor, presence: float | Tensor, frequency: float | Tensor
) -> Tensor:
    """Subtract `frequency` for each occurrence of a token in `tokens` (int64 [B, S], padded with V), and
    `presence` once."""
    counts = _count(tokens, logits)
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def _count(tokens: Tensor, logits: Tensor) -> Tensor:
    counts = logits.new_zeros(
        logits.shape[0], logits.shape[1] + 1
    )  # [B, V + 1]: the last column takes the padding
    counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=logits.dtype))
    return counts[:, :-1]


def ban_repeated_ngrams(logits: Tensor, tokens: Tensor, size: int) -> Tensor:
    """Exclude each token that would repeat an n-gram of `size` tokens.

    tokens int64 [B, S], padded on the left with V.
    """
    if tokens.shape[1] < size:
        return logits
    windows = tokens.unfold(1, size, 1)  # [B, windows, size]
    begun = tokens[:, tokens.shape[1] - size + 1 :]
    repeats = (windows[..., :-1] == begun[:, None]).all(-1) & (windows[..., 0] != logits.shape[1])
    last = torch.where(repeats, windows[..., -1], logits.shape[1])
    return logits.masked_fill(_count(last, logits) > 0, -math.inf)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Exclude tokens with lower logits than the `k`-th best (int, or int64 [B, 1]; 0: off)."""
    if isinstance(k, int):
        threshold = logits.topk(min(k, logits.shape[1])).values[:, -1:] if k else logits.new_tensor(-math.inf)
    else:
        k = k.clamp(max=logits.shape[1])
        best = logits.topk(max(1, int(k.max()))).values
        threshold = best.gather(1, (k - 1).clamp(min=0)).masked_fill(k == 0, -math.inf)
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float | Tensor, keep: int = 1) -> Tensor:
    """Keep the fewest best tokens whose probabilities sum to `p` or more (Holtzman et al. 2020,
    arXiv:1904.09751).

    1: off. At least `keep` tokens are kept.
    """
    if isinstance(p, Tensor):
        excess = torch.where(p < 1, 1 - p.double(), -1.0).to(logits.dtype)
    elif p < 1:
        excess = logits.new_tensor(1 - p)
    else:
        return logits
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= excess
    dropped[:, -keep:] = False
    return logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def keep_min_p(logits: Tensor, p: float | Tensor, keep: int = 1) -> Tensor:
    """Exclude tokens less probable than `p` times the most probable one (Nguyen et al. 2024,
    arXiv:2407.01082); at least `keep` are kept."""
    probabilities = logits.softmax(-1)
    best, index = probabilities.topk(min(keep, logits.shape[1]))
    return logits.masked_fill((probabilities < p * best[:, :1]).scatter(1, index, False), -math.inf)


def process(
    logits: Tensor,
    rules: Sequence[Sampling],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    processor: Callable[[Tensor], Tensor] | None = None,
    *,
    allowed: Callable[[Tensor], Tensor] | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Apply penalties and filters as each row's `rules` say, in transformers' order.

    logits float32 [B, V]; `prompts` and `texts` hold the tokens of each row's prompt and generated text.
    `processor` runs between the penalties and the filters, `allowed` before the `Rules.after`. `sources`: the
    tokens of each row that an encoder has read; None: the prompts.
    """
    if all(rule.untouched for rule in rules) and processor is None and allowed is None:
        return logits
    sources = prompts if sources is None else sources
    logits = _apply_rules(logits, rules, "before", (sources, prompts, texts))
    if any(rule.counts for rule in rules):
        logits = _process_history(logits, rules, prompts, texts)
    early = [
        (row, end)
        for row, (rule, text) in enumerate(zip(rules, texts, strict=True))
        if len(text) < rule.min_new_tokens
        for end in rule.ends
    ]
    if early:
        rows, ends = torch.tensor(early, device=logits.device).T
        logits = logits.index_put((rows, ends), logits.new_tensor(-math.inf))
    logits = logits if allowed is None else allowed(logits)
    logits = _apply_rules(logits, rules, "after", (sources, prompts, texts))
    logits = _filter(logits if processor is None else processor(logits), rules)
    if any(rule.renormalize for rule in rules):
        chosen = torch.tensor([[rule.renormalize] for rule in rules], device=logits.device)
        logits = torch.where(chosen, logits.log_softmax(-1), logits)
    return logits


def _apply_rules(
    logits: Tensor,
    rules: Sequence[Sampling],
    when: Literal["before", "after"],
    tokens: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[Sequence[int]]],
) -> Tensor:
    """`tokens`: the sources, prompts and texts of the rows."""
    if not any(rule.rules for rule in rules):
        return logits
    histories = [History(*row) for row in zip(*tokens, strict=True)]
    for own in dict.fromkeys(rule.rules for rule in rules if rule.rules is not None):
        rows = [row for row, rule in enumerate(rules) if rule.rules is own]
        index = torch.tensor(rows, device=logits.device)
        part = logits[index]
        for function in own.before if when == "before" else own.after:
            part = function(part, [histories[row] for row in rows])
        logits = logits.index_copy(0, index, part)
    return logits


def _process_history(
    logits: Tensor,
    rules: Sequence[Sampling],
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
) -> Tensor:
    def padded(histories: list[list[int]]) -> Tensor:
        width, nothing = max(map(len, histories)), logits.shape[1]
        return torch.tensor(
            [[nothing] * (width - len(h)) + h for h in histories], device=logits.device
        ).long()

    history = padded([[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)])
    if any(rule.repetition_penalty != 1 for rule in rules):
        penalty = _column([rule.repetition_penalty for rule in rules], logits)
        logits = penalise_repetition(logits, history, penalty)
    if any(rule.presence_penalty or rule.frequency_penalty for rule in rules):
        presence = _column([rule.presence_penalty for rule in rules], logits)
        frequency = _column([rule.frequency_penalty for rule in rules], logits)
        logits = penalise_presence(logits, padded([list(text) for text in texts]), presence, frequency)
    for size in {rule.no_repeat_ngram_size for rule in rules} - {0}:
        rows = [row for row, rule in enumerate(rules) if rule.no_repeat_ngram_size == size]
        index = torch.tensor(rows, device=logits.device)
        logits = logits.index_copy(0, index, ban_repeated_ngrams(logits[index], history[index], size))
    for row, (rule, text) in enumerate(zip(rules, texts, strict=True)):
        banned = sorted(rule.excluded(text)) if rule.excluded is not None else []
        if banned:
            at = torch.tensor([[row] * len(banned), banned], device=logits.device)
            logits = logits.index_put((at[0], at[1]), logits.new_tensor(-math.inf))
    return logits


def _filter(logits: Tensor, rules: Sequence[Sampling]) -> Tensor:
    drawn = [rule if rule.do_sample else _NO_FILTER for rule in rules]
    keep = max(rule.keep for rule in drawn)
    if any(rule.temperature != 1 for rule in drawn):
        logits = logits / _column([rule.temperature for rule in drawn], logits)
    more = any(rule.filters_more for rule in drawn)
    if more:
        logits = _filter_more(logits, drawn, ("top_h",))
    if any(rule.top_k for rule in drawn):
        ks = [min(max(rule.top_k, keep), logits.shape[1]) if rule.top_k else 0 for rule in drawn]
        same = len(set(ks)) == 1
        logits = keep_top_k(logits, ks[0] if same else torch.tensor(ks, device=logits.device)[:, None])
    if any(rule.top_p < 1 for rule in drawn):
        logits = keep_top_p(logits, _column([rule.top_p for rule in drawn], logits, torch.float64), keep)
    if any(rule.min_p for rule in drawn):
        logits = keep_min_p(logits, _column([rule.min_p for rule in drawn], logits), keep)
    return _filter_more(logits, drawn, ("typical_p", "epsilon_cutoff", "eta_cutoff")) if more else logits


def _filter_more(logits: Tensor, rules: Sequence[Sampling], names: Sequence[str]) -> Tensor:
    """Apply the rarer filters to the rows that have them on."""
    from . import filters

    for name in names:
        for value in {getattr(rule, name) for rule in rules} - {getattr(_NO_FILTER, name)}:
            rows = [row for row, rule in enumerate(rules) if getattr(rule, name) == value]
            index = torch.tensor(rows, device=logits.device)
            part, keep = logits[index], rules[rows[0]].keep
            if name == "top_h":
                part = filters.keep_top_h(part, value)
            elif name == "typical_p":
                part = filters.keep_typical(part, value, keep)
            elif name == "epsilon_cutoff":
                part = filters.keep_epsilon(part, value, keep)
            else:
                part = filters.keep_eta(part, value, keep)
            logits = logits.index_copy(0, index, part)
    return logits


_NO_FILTER = Sampling()


def _column(values: Sequence[float], logits: Tensor, dtype: torch.dtype | None = None) -> float | Tensor:
    """One number if all rows have the same value, else a column [B, 1] (in the dtype of `logits`)."""
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=dtype or logits.dtype, device=logits.device)[:, None]


def draw(logits: Tensor, keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """Sample a token per row, int64 [B], with randomness that depends only on the row's key (seed, index,
    step).

    Inverts the cumulative distribution, summed in float64, at `uniform(key)`, so the result is the same on
    any device and in any batch.
    """
    cumulative = _probabilities(logits).double().cumsum(-1)
    at = torch.tensor([uniform(*key) for key in keys], dtype=torch.float64, device=logits.device)[:, None]
    # The first token whose cumulative probability exceeds `at`; as 0 < at < 1, its probability is not 0.
    return torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True).squeeze(1)


def draw_rows(logits: Tensor, rows: Sequence[int], total: int, generator: torch.Generator | None) -> Tensor:
    """Sample a token per row, int64 [B], as ``torch.multinomial(probabilities, 1)`` does for a batch of
    `total` rows.

    Row b is row ``rows[b]`` of that batch; the random numbers of the other rows are drawn and discarded, so a
    batch from which finished rows were removed gives the same tokens as the whole batch.
    """
    probabilities = _probabilities(logits)
    noise = probabilities.new_empty(total, probabilities.shape[1]).exponential_(1, generator=generator)
    if len(rows) < total or list(rows) != list(range(total)):
        noise = noise[torch.tensor(rows, device=noise.device)]
    return probabilities.div_(noise).argmax(
        -1
    )  # the argmax of p / Exp(1) has these probabilities (as in torch.multinomial)


def _probabilities(logits: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    if bool(probabilities[:, 0].isnan().any()):  # one NaN, or nothing but -inf, makes the whole row NaN
        raise ValueError("no token can be sampled: the model's logits are NaN, or every token is excluded")
    return probabilities


def exponential(n: int, seed: int, index: int, step: int) -> Tensor:
    """`n` pseudo-random numbers from Exp(1), float32, with 24 random bits each: splitmix64, counted from the
    state that `uniform` makes of (seed, index, step). The same on any machine."""
    counts = torch.arange(1, n + 1) * _signed(0x9E3779B97F4A7C15) + _signed(_state(seed, index, step))
    bits = (counts ^ _shifted(counts, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    bits = _shifted(bits ^ _shifted(bits, 31), 40)
    return -((bits.double() + 0.5) / 2**24).log().float()


def _signed(x: int) -> int:
    """The int64 with the bits of a uint64."""
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of uint64, in int64."""
    shifted: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return shifted


def uniform(seed: int, index: int, step: int) -> float:
    """A pseudo-random number in (0, 1) with 32 random bits: splitmix64 over (seed, index, step)."""
    return ((_state(seed, index, step) >> 32) + 0.5) / 2**32


def _state(seed: int, index: int, step: int) -> int:
    state = 0
    for value in (seed, index, step):
        state = _mix((state ^ value) & _MASK)
    return state


_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit changes about half of the
    output's."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
