"""The text of a sequence that grows token by token: stop strings are found in it, and what is certain can be
shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..text import IncrementalDecoder


class GrowingText:
    """Decodes tokens as they come, and looks for stop strings.

        text = GrowingText(tokenizer, ["###"])
        found = text.push(token)      # the stop string that this token completes, or None
        text.piece()                  # what can be shown since the last call

    A stop string may begin and end within tokens. Found, it ends the text: before it, or behind it with
    `include_stop`. It is not looked for in the first `min_tokens` tokens. `prompt_ids` are the tokens before,
    which give context to the first word; with `search_prompt` a stop string may begin in them.
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
        if not all(isinstance(string, str) and string for string in stop):
            raise ValueError(f"stop strings must be texts that are not empty, and are {list(stop)!r}")
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens, prompt_ids)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._text = ""
        if search_prompt and stop:
            # A token has at least one character, or none; then it makes no stop string either.
            tail = list(prompt_ids)[-max(len(string.encode()) for string in stop) :]
            self._text = tokenizer.decode(tail, skip_special_tokens=skip_special_tokens)
        self._start = self._shown = len(self._text)
        self._ended = False

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._text[self._start :]

    def push(self, token: int) -> str | None:
        """Take one more token; returns the stop string that it completes."""
        self._tokens += 1
        seen = len(self._text)
        self._text += self._decoder.push(token)
        if self._tokens <= self._min_tokens:
            return None
        found = self._find(seen)
        if found is not None:
            at, string = found
            self._text = self._text[: at + len(string) if self._include_stop else at]
            self._ended = True
            return string
        return None

    def _find(self, seen: int) -> tuple[int, str] | None:
        """The first stop string that does not lie within the `seen` characters; the longest, if several begin
        there."""
        places = ((self._text.find(string, max(0, seen - len(string) + 1)), string) for string in self._stop)
        return min(
            (place for place in places if place[0] >= 0), key=lambda p: (p[0], -len(p[1])), default=None
        )

    def finish(self, tokens: Iterable[int] = ()) -> str:
        """No more tokens will come, except for these, which are not searched; returns the whole text.

        The bytes of a character that has not become whole are dropped.
        """
        if not self._ended:
            rest = self._decoder.push(tokens) + self._decoder.flush()
            self._text += rest.rstrip("\ufffd")
            self._ended = True
        return self.text

    def piece(self) -> str:
        """The text that is certain and was not given before: nothing that may be the beginning of a stop
        string."""
        end = len(self._text)
        if not self._ended:
            end -= max((_overlap(self._text, string) for string in self._stop), default=0)
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a beginning of `string`, but not all of it."""
    return next(
        (size for size in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:size])), 0
    )
