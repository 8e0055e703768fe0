"""A limit on how often the same sentence or line stands in a text: small models write some in circles."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_END = re.compile(r"\n|[.!?…。！？][\"'”’)\]*_]*\s*$")
_FENCE = "```"
_CERTAIN = 3
"""Tokens after which a sentence that begins as an earlier one is taken to be that one."""


@dataclass
class _Read:
    """What has been read of a text."""

    tokens: list[int] = field(default_factory=list)
    sentences: dict[tuple[str, ...], list[list[int]]] = field(default_factory=lambda: defaultdict(list))
    """Each sentence -> its tokens, with its end, each time that it was written."""
    begun: list[int] = field(default_factory=list)
    """The tokens since the last end."""
    line: str = ""
    code: bool = False


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
        self._read: list[_Read] = []  # of each text that grows, so that a token is read once

    def __call__(self, text: Sequence[int]) -> set[int]:
        """The tokens that may not come after this text."""
        read = self._up_to(list(text))
        begun = self._key(read.begun)
        banned: set[int] = set()
        if read.code or len(begun) < 2:
            return banned
        for sentence, written in read.sentences.items():
            certain = len(begun) >= min(_CERTAIN, len(sentence))
            if len(written) >= self.most and certain and sentence[: len(begun)] == begun:
                banned.update(tokens[len(begun)] for tokens in written)
        return banned

    def _up_to(self, text: list[int]) -> _Read:
        for read in self._read:
            if text[: len(read.tokens)] == read.tokens:
                break
        else:
            read = _Read()
            self._read.append(read)
        for token in text[len(read.tokens) :]:
            self._take(read, token)
        return read

    def _take(self, read: _Read, token: int) -> None:
        piece = self._text(token)
        read.tokens.append(token)
        read.begun.append(token)
        read.line += piece
        if not _END.search(piece):
            return
        key = self._key(read.begun[:-1])
        if not read.code and len(key) > 1 and any(c.isalpha() for c in "".join(key)):
            read.sentences[key].append(read.begun)
        if "\n" in piece:
            read.code ^= read.line.lstrip().startswith(_FENCE)
            read.line = piece.rpartition("\n")[2]
        read.begun = []

    def _key(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Without spaces: the first token of a line often has none."""
        return tuple(self._text(token).strip() for token in tokens)

    def _text(self, token: int) -> str:
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = self._decode(token)
        return found
