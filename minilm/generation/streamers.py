"""Streamers for `generate(streamer=...)`, with transformers' names: show a text while it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import Any, Protocol

from torch import Tensor

from ..text import context


class Streamer(Protocol):
    """The interface that `generate` calls: `put` with the prompt [B, S], then with the new tokens [B] of each
    step, and finally `end`."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TextStreamer:
    """Prints the text word by word. For one text at a time.

    `skip_prompt` leaves the prompt out. `decode_kwargs` go to ``tokenizer.decode``. Subclasses override
    `on_finalized_text` to receive the text.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._line: list[int] = []  # tokens since the last line break, after some for context
        self._printed = 0  # number of characters already printed of their text
        self._awaits_prompt = True

    def put(self, value: Tensor) -> None:
        """Add token ids, [S] or [1, S]. Raises ValueError for a batch."""
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
            # The next token may still change the last word, so it is shown once a space follows.
            sure = len(text) if text and _is_cjk(text[-1]) else text.rfind(" ") + 1
            piece = text[self._printed : sure]
            self._printed += len(piece)
        self.on_finalized_text(piece)

    def end(self) -> None:
        """Show the rest; the next `put` starts another text."""
        piece = self._decode(self._line)[self._printed :] if self._line else ""
        self._line, self._printed, self._awaits_prompt = [], 0, True
        self.on_finalized_text(piece, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each new piece of text, possibly empty."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _begin_after(self, ids: list[int]) -> None:
        """Start a new line, with `ids` as context: sentencepiece's first token would lose its space."""
        self._line, shown = context(self._decode, ids)
        self._printed = len(shown.rstrip("\ufffd"))  # an incomplete character

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, **self.decode_kwargs)
        return text


class TextIteratorStreamer(TextStreamer):
    """Passes the pieces of text to another thread, which iterates over the streamer.

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
        for piece in streamer: ...

    `timeout`: seconds to wait for a piece before raising `queue.Empty`; None: no limit. If `generate` fails
    in its thread, the iteration raises RuntimeError from that error (in transformers it would wait forever).
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[str | BaseException | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put the piece into the queue, and None after the last one."""
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def fail(self, error: BaseException) -> None:
        """End the iteration with `error`; the next `put` starts another text."""
        self._line, self._printed, self._awaits_prompt = [], 0, True
        self.text_queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        if isinstance(piece, BaseException):
            raise RuntimeError(f"generate failed, so the text is incomplete: {piece!r}") from piece
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
    """Whether it is a Chinese character: they are printed one by one, as no spaces separate them."""
    return any(low <= ord(character) <= high for low, high in _CJK)
