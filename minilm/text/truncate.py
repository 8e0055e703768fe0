"""Truncation of pairs of texts in linear memory.

The `tokenizers` library keeps everything it cuts off, for a pair the windows of both texts in every
combination, so two texts of 14,000 tokens take 1 GB. This code drops what is cut off, for calls that do not
request it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .vocabulary import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Encoding

_LONG = 4
"""A text of at most this many characters per token of `max_length` gives so few windows that the library may
keep them."""
_FIELDS = ("ids", "type_ids", "tokens", "words", "offsets", "special_tokens_mask", "attention_mask")


def many_windows(item: Any, max_length: int, strategy: str) -> bool:
    """Whether the library may keep too many windows of `item`, a text or a tuple of two."""
    if not isinstance(item, tuple):
        return False
    first, second = (sum(map(len, text)) if isinstance(text, list) else len(text) for text in item)
    if strategy == "longest_first":
        return min(first, second) > _LONG * max_length
    cut, kept = (first, second) if strategy == "only_first" else (second, first)
    return cut > _LONG * max_length and kept > max_length // 8


def lengths(first: int, second: int, room: int, strategy: str) -> tuple[int, int]:
    """How many tokens to keep of texts of `first` and `second` tokens, with `room` for both, by the library's
    rule. "longest_first" keeps a text whole if it fits into half the room."""
    if first + second <= room:
        return first, second
    if room <= 0:
        return 0, 0
    if strategy == "longest_first":
        short = min(first, second)
        long = max(short, room - short)
        if short > room or short + long > room:
            short, long = room // 2, room // 2 + room % 2
        return (short, long) if first <= second else (long, short)
    kept = second if strategy == "only_first" else first
    if room <= kept:
        raise TokenizerError(
            f"encoding: truncation={strategy!r} cannot help: the other text has {kept} tokens, and there is "
            f"room for {room}"
        )
    return (room - kept, kept) if strategy == "only_first" else (kept, room - kept)


def read(encoding: Encoding, most: int, side: str) -> int:
    """How many tokens of a text the library reads before it cuts to `most`: up to the end of the word. This
    decides which of two texts counts as longer, and gets the odd token."""
    count = len(encoding)
    if count <= most or most < 1:
        return min(count, most)
    words = encoding.word_ids[::-1] if side == "left" else encoding.word_ids
    end = most
    while end < count and words[end] is not None and words[end] == words[end - 1]:
        end += 1
    return end


def shorten(encoding: Encoding, length: int, side: str) -> Encoding:
    """Only the first `length` tokens of an encoding; with "left", the last."""
    from tokenizers import Encoding

    count = len(encoding.ids)
    if length >= count:
        return encoding
    state: dict[str, Any] = json.loads(encoding.__getstate__())
    kept = slice(count - length, count) if side == "left" else slice(length)
    for name in _FIELDS:
        values: Sequence[Any] = state[name]
        state[name] = values[kept]
    state["overflowing"] = []
    result = Encoding()
    result.__setstate__(json.dumps(state).encode())
    return result
