"""Incremental decoding: token ids one by one -> pieces of text that can be shown immediately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 32


def context(decode: Callable[[list[int]], str], ids: Sequence[int]) -> tuple[list[int], str]:
    """The shortest suffix of `ids` that decodes cleanly on its own, and its text. Decoding it together with
    the tokens that follow keeps their leading space."""
    for size in range(1, min(len(ids), _MAX_PENDING) + 1):
        text = decode(list(ids[-size:]))
        if text.strip() and _REPLACEMENT not in text:
            return list(ids[-size:]), text
    tail = list(ids[-_MAX_PENDING:])
    return tail, decode(tail) if tail else ""


def continuation(decode: Callable[[list[int]], str], before: Sequence[int], after: Sequence[int]) -> str:
    """The text that the ids `after` add to that of the ids `before`. Decoded alone it would lose the space
    before its first word, and a character whose first bytes are in `before`."""
    tail, shown = context(decode, before)
    whole = decode([*tail, *after])
    for start in (shown, shown.rstrip(_REPLACEMENT)):
        if whole.startswith(start):
            return whole[len(start) :]
    return decode(list(after))


class IncrementalDecoder:
    """Decodes a growing sequence of ids.

        decoder = IncrementalDecoder(tokenizer)
        for token in generated: print(decoder.push(token), end="")
        print(decoder.flush())

    The results of `push` and `flush`, joined, equal `tokenizer.decode` of all ids. A character whose bytes
    are spread over several tokens is held back until it is complete. With `prompt_ids` the text continues a
    prompt, so the space before its first word is kept; the prompt itself is not returned.

    A token cannot be decoded alone (a leading space is dropped, "##ing" needs its stem), and decoding
    everything again for each token takes quadratic time. So a window is decoded twice, with and without the
    new tokens, and the difference is returned; the window advances whenever it ends in complete characters.

    Two kinds of text can differ from decoding all at once: clean-up of spaces across tokens
    (`clean_up_tokenization_spaces`), and bytes of sentencepiece that never become a character.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []  # context ids, then those whose text was not returned yet
        self._context = 0  # number of context ids
        self._shown = ""  # text of the window that was returned, or belongs to the context
        self._move_past([int(index) for index in list(prompt_ids)[-_MAX_PENDING:]])
        self._shown = self._shown.rstrip(_REPLACEMENT)  # an incomplete character at the end of the prompt

    def push(self, ids: int | Iterable[int]) -> str:
        """Add one id or several; returns the new text that is final, possibly empty."""
        return "".join(self._push(int(index)) for index in ([ids] if isinstance(ids, int) else ids))

    def flush(self) -> str:
        """Return the rest, complete or not. The decoder can be used for another sequence afterwards."""
        text = self._decode(self._window)
        if text.startswith(self._shown):
            piece = text[len(self._shown) :]
        else:
            piece = self._decode(self._window[self._context :])
        self._window, self._context, self._shown = [], 0, ""
        return piece

    def _push(self, index: int) -> str:
        self._window.append(index)
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        if len(self._window) - self._context > _MAX_PENDING:  # no character has so many tokens
            whole = text
        if whole.startswith(self._shown):
            piece = whole[len(self._shown) :]
            self._shown = whole
        elif whole == text:
            # sentencepiece decodes a run of bytes as a whole, so invalid bytes after valid ones change the
            # text of both. The valid ones have been shown, so the new ones are decoded without them.
            piece = self._decode(self._window[self._context :])
        else:
            return ""
        if whole == text and piece:
            self._move_past(self._window)
        return piece

    def _move_past(self, ids: list[int]) -> None:
        """Make the shortest suffix of `ids` that decodes cleanly the context for the next ids."""
        self._window, self._shown = context(self._decode, ids)
        self._context = len(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""
