"""Rules on scores that depend on the text: biases, bans and forced tokens, as transformers' options of these
names.

A rule is a function of the scores [B, V] and the `History` of each row, which holds tokens without padding.
`rules_of` makes them from the options of `generate`. Each computes the same as transformers' processor,
except that a sequence counts too if its beginning is all the tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import History, Rule, Rules, penalise_repetition
from .values import in_vocabulary, is_whole, logger, number, plain, token_ids, whole


def rules_of(
    settings: Mapping[str, Any], *, vocabulary: int, ends: Sequence[int], columns: int, new: int
) -> Rules | None:
    """The rules of the options of `generate`; None if no such option is set. `columns`: of the prompts;
    `new`: the most new tokens. Raises ValueError, with the value, for options that make no sense."""
    before: list[Rule] = []
    after: list[Rule] = []

    def ids(name: str) -> list[int]:
        return in_vocabulary(name, token_ids(name, settings.get(name)), vocabulary)

    if (value := settings.get("sequence_bias")) is not None:
        before.append(_bias("sequence_bias", _biases(value), vocabulary))
    if (value := settings.get("encoder_repetition_penalty")) is not None and value != 1:
        if number("encoder_repetition_penalty", value) <= 0:
            raise ValueError(f"encoder_repetition_penalty must be a number above 0, and is {value!r}")
        before.append(_prefer_source(float(value)))
    size = whole("encoder_no_repeat_ngram_size", settings.get("encoder_no_repeat_ngram_size") or 0, 0)
    if size:
        after.append(_ban_ngrams_of_source(size))
    if (value := settings.get("bad_words_ids")) is not None:
        words = [word for word in _words(value) if not (len(word) == 1 and word[0] in ends)]
        after.append(_bias("bad_words_ids", dict.fromkeys(words, -math.inf), vocabulary))
    if forced := ids("forced_bos_token_id"):
        if columns > 1:
            logger.warning(
                "forced_bos_token_id=%s has no effect: it is for prompts of one token, and these have %d",
                settings["forced_bos_token_id"],
                columns,
            )
        else:
            after.append(_force(forced, 0))
    begin = 1 if forced and columns == 1 else 0
    if forced := ids("forced_eos_token_id"):
        after.append(_force(forced, new - 1))
    if settings.get("remove_invalid_values"):
        after.append(_finite)
    if (value := settings.get("exponential_decay_length_penalty")) is not None:
        after.append(_decay(value, ends))
    if suppressed := ids("suppress_tokens"):
        after.append(_suppress(suppressed, None))
    if suppressed := ids("begin_suppress_tokens"):
        after.append(_suppress(suppressed, begin))
    return Rules(tuple(before), tuple(after)) if before or after else None


# Sequences


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    """{(token, ...): bias}, or [[[token, ...], bias], ...], as transformers takes them."""
    given = list(value.items()) if isinstance(value, Mapping) else value
    try:
        pairs = [(words, float(bias)) for words, bias in given]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or any(math.isnan(bias) for _, bias in pairs):
        raise ValueError(
            "sequence_bias must be {(token, ...): bias} or [[[token, ...], bias], ...], and is "
            f"{value!r:.80}"
        )
    words = _words([words for words, _ in pairs], "sequence_bias")
    return dict(zip(words, (bias for _, bias in pairs), strict=True))


def _words(value: Any, name: str = "bad_words_ids") -> list[tuple[int, ...]]:
    words = []
    given = value if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else []
    for word in given:
        tokens = [plain(t) for t in word] if isinstance(word, Sequence) and not isinstance(word, str) else []
        if not tokens or not all(is_whole(token) and token >= 0 for token in tokens):
            raise ValueError(f"{name} must hold non-empty lists of token ids, and holds {word!r:.80}")
        words.append(tuple(map(int, tokens)))
    if not words:
        raise ValueError(f"{name} must be a non-empty list of lists of token ids, and is {value!r:.80}")
    return words


def _bias(name: str, biases: Mapping[tuple[int, ...], float], vocabulary: int) -> Rule:
    """Add the bias of a sequence to its last token where the text ends with the tokens before it."""
    tables: dict[int, dict[tuple[int, ...], dict[int, float]]] = {}  # length -> beginning -> token -> bias
    for sequence, bias in biases.items():
        if max(sequence) >= vocabulary:
            raise ValueError(
                f"{name} holds token {max(sequence)}, and the vocabulary has {vocabulary} "
                f"(0 to {vocabulary - 1})"
            )
        *begun, last = sequence
        tables.setdefault(len(begun), {}).setdefault(tuple(begun), {})[last] = bias

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        rows, tokens, values = [], [], []
        for row, (_, prompt, text) in enumerate(histories):
            for length, table in tables.items():
                for token, bias in table.get(_tail(prompt, text, length), {}).items():
                    rows.append(row)
                    tokens.append(token)
                    values.append(bias)
        at = torch.tensor([rows, tokens], dtype=torch.int64, device=scores.device)
        added = torch.tensor(values, dtype=scores.dtype, device=scores.device)
        return scores.index_put((at[0], at[1]), added, accumulate=True)

    return rule


def _tail(prompt: Sequence[int], text: Sequence[int], length: int) -> tuple[int, ...]:
    """The last `length` tokens; all, if there are fewer."""
    if length == 0:
        return ()
    if length <= len(text):
        return tuple(text[-length:])
    return (*prompt[-(length - len(text)) :], *text)


# What an encoder has read


def _prefer_source(penalty: float) -> Rule:
    """Above 1: tokens of the source become more probable, below 1 less."""

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        width, nothing = max(len(h.source) for h in histories), scores.shape[1]
        padded = [[*h.source, *[nothing] * (width - len(h.source))] for h in histories]
        return penalise_repetition(scores, torch.tensor(padded, device=scores.device), 1 / penalty)

    return rule


def _ban_ngrams_of_source(size: int) -> Rule:
    """Exclude each token that would copy an n-gram of the source."""

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        rows, tokens = [], []
        for row, (source, prompt, text) in enumerate(histories):
            begun = _tail(prompt, text, size - 1)
            for place in range(len(source) - size + 1):
                if tuple(source[place : place + size - 1]) == begun:
                    rows.append(row)
                    tokens.append(source[place + size - 1])
        at = torch.tensor([rows, tokens], dtype=torch.int64, device=scores.device)
        return scores.index_put((at[0], at[1]), scores.new_tensor(-math.inf))

    return rule


# By the length of the text


def _at(scores: Tensor, histories: Sequence[History], length: int) -> Tensor:
    """bool [B, 1]: whether the text has so many tokens."""
    found = [[len(history.text) == length] for history in histories]
    return torch.tensor(found, device=scores.device)


def _force(tokens: list[int], length: int) -> Rule:
    """After `length` tokens, one of `tokens` comes next."""

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        only = torch.full_like(scores, -math.inf)
        only[:, tokens] = 0
        return torch.where(_at(scores, histories, length), only, scores)

    return rule


def _suppress(tokens: list[int], length: int | None) -> Rule:
    """Exclude tokens, or do so after `length` tokens only."""

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        without = scores.clone()
        without[:, tokens] = -math.inf
        return without if length is None else torch.where(_at(scores, histories, length), without, scores)

    return rule


def _decay(value: Any, ends: Sequence[int]) -> Rule:
    """After `start` tokens, raise the scores of end tokens more and more: by ``|score| * (factor ** n - 1)``
    at the n-th token since. An end token that is excluded stays so (transformers makes it NaN)."""
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(pair) != 2:
        raise ValueError(f"exponential_decay_length_penalty must be (start, factor), and is {value!r:.80}")
    start = whole("the start of exponential_decay_length_penalty", pair[0], 0)
    factor = number("the factor of exponential_decay_length_penalty", pair[1])
    if not ends:
        raise ValueError(f"exponential_decay_length_penalty={value!r} needs an eos_token_id to prefer")
    chosen = list(ends)

    def rule(scores: Tensor, histories: Sequence[History]) -> Tensor:
        powers = [[factor ** max(0, len(history.text) - start) - 1] for history in histories]
        own = scores[:, chosen]
        raised = own + own.abs() * torch.tensor(powers, dtype=scores.dtype, device=scores.device)
        scores = scores.clone()
        scores[:, chosen] = torch.where(own == -math.inf, own, raised)
        return scores

    return rule


def _finite(scores: Tensor, _: Sequence[History]) -> Tensor:
    """NaN becomes 0, and infinite scores the largest finite ones."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(nan=0.0, posinf=limits.max, neginf=limits.min)
