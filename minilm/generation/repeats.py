"""A limit on how often the same sentence or line stands in a text: small models write some in circles."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

_END = re.compile(r"\n|[.!?…。！？][\"'”’)\]*_]*\s*$")
_FENCE = "```"
_CERTAIN = 3
"""Tokens after which a sentence that begins as an earlier one is taken to be that one."""


class SameSentence:
    """The tokens that would write a sentence once more that a text already has `most` times.

    A sentence ends with a line or with a stop, and has a letter and at least two tokens; blocks of code
    (between lines of ```) have none. One that begins with the first three tokens of a full one may not go on
    with the fourth; a shorter one may not end as before. `decode`: a token -> its text.
    """

    def __init__(self, most: int, decode: Callable[[int], str]) -> None:
        self.most = most
        self._decode = decode
        self._texts: dict[int, str] = {}

    def __call__(self, text: Sequence[int]) -> set[int]:
        """The tokens that may not come after this text."""
        earlier, open_sentence = self._sentences(text)
        begun = self._key(open_sentence)
        banned: set[int] = set()
        if len(begun) < 2:
            return banned
        for sentence, written in earlier.items():
            certain = len(begun) >= min(_CERTAIN, len(sentence))
            if len(written) >= self.most and certain and sentence[: len(begun)] == begun:
                banned.update(tokens[len(begun)] for tokens in written)
        return banned

    def _sentences(self, text: Sequence[int]) -> tuple[dict[tuple[str, ...], list[list[int]]], list[int]]:
        """The sentences of a text -> the tokens of each time that it was written, with its end; and the
        tokens of the last one, which has no end yet."""
        found: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
        sentence: list[int] = []
        line, code = "", False
        for token in text:
            piece = self._text(token)
            sentence.append(token)
            line += piece
            if not _END.search(piece):
                continue
            key = self._key(sentence[:-1])
            if not code and len(key) > 1 and any(c.isalpha() for c in "".join(key)):
                found[key].append(sentence)
            if "\n" in piece:
                code ^= line.lstrip().startswith(_FENCE)
                line = piece.rpartition("\n")[2]
            sentence = []
        return found, [] if code else sentence

    def _key(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Without spaces: the first token of a line often has none."""
        return tuple(self._text(token).strip() for token in tokens)

    def _text(self, token: int) -> str:
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._decode(token)
        return found
