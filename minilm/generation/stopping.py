"""Incremental decoding of a generated text: finds stop strings, and returns text as soon as it is final."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from ..text import IncrementalDecoder


def stop_texts(name: str, value: Any) -> list[str]:
    """None, a text or several -> stop strings; ValueError for anything else, or an empty string."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name} must be non-empty texts, and is {value!r:.80}")
    return list(texts)


class GrowingText:
    """Decodes tokens one by one, and checks for stop strings.

        text = GrowingText(tokenizer, ["###"])
        found = text.push(token)      # the stop string that this token completes, or None
        text.piece()                  # the text that became final since the last call

    A stop string may start and end within tokens, and contain special tokens, whether they are shown or not.
    The text ends before a stop string, or after it with `include_stop`. The first `min_tokens` tokens are not
    searched. `prompt_ids` are the tokens before, which give context to the first word; with `search_prompt` a
    stop string may start in them.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
        search_prompt: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        stop_texts("stop", stop)
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens, prompt_ids)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._text = ""
        if search_prompt and stop:
            # A token without characters cannot complete a stop string.
            tail = list(prompt_ids)[-max(len(string.encode()) for string in stop) :]
            self._text = tokenizer.decode(tail, skip_special_tokens=skip_special_tokens)
        self._start = self._shown = len(self._text)
        self._ended = False
        self._special: _WithSpecial | None = None
        if skip_special_tokens and stop:
            names = _skipped(tokenizer)
            special = [string for string in stop if any(name in string for name in names)]
            if special:
                self._stop = tuple(string for string in stop if string not in special)
                decoder = IncrementalDecoder(tokenizer, False, prompt_ids)
                self._special = _WithSpecial(decoder, special, self._start)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text[self._start :]

    def push(self, token: int) -> str | None:
        """Add a token; returns the stop string that it completes, or None."""
        self._tokens += 1
        seen = len(self._text)
        self._text += self._decoder.push(token)
        found = _found(self._text, self._stop, seen)
        if self._special is not None:
            found += self._special.push(token, len(self._text))
        if self._tokens <= self._min_tokens or not found:
            return None
        at, string = min(found, key=lambda place: (place[0], -len(place[1])))
        self._text = self._text[:at] + (string if self._include_stop else "")
        self._ended = True
        return string

    def finish(self, tokens: Iterable[int] = ()) -> str:
        """End the text, after adding `tokens`, which are not searched; returns the whole text.

        Bytes of an incomplete character are dropped.
        """
        if not self._ended:
            rest = self._decoder.push(tokens) + self._decoder.flush()
            self._text += rest.rstrip("\ufffd")
            self._ended = True
        return self.text

    def piece(self) -> str:
        """The new text since the last call that is final, without an end that may be the start of a stop
        string."""
        end = len(self._text)
        if not self._ended:
            end -= _held(self._text, self._stop)
            if self._special is not None:
                end = min(end, self._special.certain())
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]


class _WithSpecial:
    """The text with the hidden special tokens, to search for stop strings that contain some."""

    def __init__(self, decoder: IncrementalDecoder, stop: Sequence[str], start: int) -> None:
        self._decoder = decoder
        self._stop = stop
        self._text = ""
        self._ends, self._shown = [0], [start]  # end of each token, in this text and in the shown one

    def push(self, token: int, shown: int) -> list[tuple[int, str]]:
        """Add a token, after which the shown text has `shown` characters; returns the stop strings that it
        completes, with their places in the shown text."""
        seen = len(self._text)
        self._text += self._decoder.push(token)
        self._ends.append(len(self._text))
        self._shown.append(shown)
        return [(self._place(at), string) for at, string in _found(self._text, self._stop, seen)]

    def certain(self) -> int:
        """Number of characters of the shown text that cannot be part of a later stop string."""
        return self._place(len(self._text) - _held(self._text, self._stop))

    def _place(self, at: int) -> int:
        """The place in the shown text; all places within a hidden token map to the same one."""
        token = bisect_right(self._ends, at) - 1
        within = self._shown[token] + at - self._ends[token]
        return min(within, self._shown[min(token + 1, len(self._shown) - 1)])


def _found(text: str, stop: Sequence[str], seen: int) -> list[tuple[int, str]]:
    """The first occurrence of each stop string that does not lie within the first `seen` characters."""
    places = [(text.find(string, max(0, seen - len(string) + 1)), string) for string in stop]
    return [place for place in places if place[0] >= 0]


def _held(text: str, stop: Sequence[str]) -> int:
    """Length of the end of `text` that may be the start of a stop string."""
    return max((_overlap(text, string) for string in stop), default=0)


def _skipped(tokenizer: Any) -> set[str]:
    """The tokens that `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}


def _overlap(text: str, string: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `string`."""
    return next(
        (size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0
    )
