"""Seeing a text while it is written: what `generate(streamer=...)` feeds, under transformers' names."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import Any, Protocol

from torch import Tensor

from ..text import context


class Streamer(Protocol):
    """What `generate` asks of a streamer: it puts the prompt [B, S], then the new tokens [B] of each step,
    and ends."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TextStreamer:
    """Prints the text as soon as its words are whole. For one text at a time.

    `skip_prompt` leaves the prompt out. `decode_kwargs` go to ``tokenizer.decode``. Subclasses take the text
    by `on_finalized_text`.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._line: list[int] = []  # tokens since the last line break, behind some that give context
        self._printed = 0  # characters of their text that are out
        self._awaits_prompt = True

    def put(self, value: Tensor) -> None:
        """Take token ids, [S] or [1, S]. Raises ValueError for a batch."""
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"{type(self).__name__} shows one text, and got a batch of {value.shape[0]}")
        is_prompt, self._awaits_prompt = self._awaits_prompt, False
        ids = value.flatten().tolist()
        if is_prompt and self.skip_prompt:
            self._begin_after(ids)
            return
        self._line += ids
        text = self._decode(self._line)
        if text.endswith("\n"):
            piece = text[self._printed :]
            self._begin_after(self._line)
        else:
            # A word may still change with the next token, so it is shown once a space follows it.
            sure = len(text) if text and _is_cjk(text[-1]) else text.rfind(" ") + 1
            piece = text[self._printed : sure]
            self._printed += len(piece)
        self.on_finalized_text(piece)

    def end(self) -> None:
        """Show what is left; the next `put` begins another text."""
        piece = self._decode(self._line)[self._printed :] if self._line else ""
        self._line, self._printed, self._awaits_prompt = [], 0, True
        self.on_finalized_text(piece, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each new piece of text, which may be empty."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _begin_after(self, ids: list[int]) -> None:
        """Another line: sentencepiece's first token loses its space when nothing stands before it."""
        self._line, shown = context(self._decode, ids)
        self._printed = len(shown.rstrip("\ufffd"))  # a character of which there are only some bytes

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, **self.decode_kwargs)
        return text


class TextIteratorStreamer(TextStreamer):
    """Hands the pieces of text to another thread, which iterates over the streamer.

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        for piece in streamer: ...

    `timeout`: seconds that the iteration waits for a piece before it raises `queue.Empty`; None waits for
    ever. When `generate` fails in its thread, the iteration raises RuntimeError from its error (transformers'
    would wait).
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[str | BaseException | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put the piece into the queue, and None behind the last one."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def fail(self, error: BaseException) -> None:
        """No more pieces will come; the next `put` begins another text."""
        self._line, self._printed, self._awaits_prompt = [], 0, True
        self.text_queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        if isinstance(piece, BaseException):
            raise RuntimeError(f"generate failed, and the text has no end: {piece!r}") from piece
        return piece


_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_cjk(character: str) -> bool:
    """Chinese characters stand without spaces, and each is whole by itself."""
    return any(low <= ord(character) <= high for low, high in _CJK)
