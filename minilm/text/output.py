"""`BatchEncoding`: the result of a tokenizer, a dict that also maps tokens to words and characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .vocabulary import TokenizerError

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding


class CharSpan(NamedTuple):
    """Characters [start, end) of the original text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens [start, end) of an encoding."""

    start: int
    end: int


class BatchEncoding(dict[str, Any]):
    """`input_ids`, `attention_mask`, ... by key or attribute, as lists of integers or tensors [B, S].

    An integer index gives the `tokenizers.Encoding` of that text, a slice the same slice of every value. The
    methods that map between tokens, words and characters take (batch index, index), or only the index for
    the first text."""

    def __init__(
        self,
        data: Any = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data or {})
        if encoding is not None and not isinstance(encoding, Sequence):
            encoding = [encoding]
        self._encodings = list(encoding) if encoding is not None else None
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}, it has {', '.join(self)}") from None

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return super().__getitem__(item)
        if self._encodings is not None:
            return self._encodings[item]
        if isinstance(item, slice):
            return {key: value[item] for key, value in self.items()}
        raise KeyError(f"{item!r}: expected a name; only the result of a tokenizer has encodings by number")

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self._encodings, None, False, self._n_sequences)

    @property
    def data(self) -> dict[str, Any]:
        return self

    @property
    def encodings(self) -> list[Encoding] | None:
        """One `tokenizers.Encoding` per row, or None if the object is not a tokenizer's result (`pad`)."""
        return self._encodings

    @property
    def is_fast(self) -> bool:
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1 for single texts, 2 for pairs."""
        return self._n_sequences or (self._encodings[0].n_sequences if self._encodings else None)

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._encoding(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The word each token belongs to, None for special tokens."""
        return self._encoding(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """0 or 1 for tokens of the first or second text, None for special tokens."""
        return self._encoding(batch_index).sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._token(batch_or_token_index, token_index)
        return encoding.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, index = self._token(batch_or_token_index, token_index)
        found = encoding.token_to_word(index)
        # tokenizers returns (sequence, word) for a pair
        return found[1] if isinstance(found, tuple) else found

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, index = self._token(batch_or_token_index, token_index)
        span: Any = encoding.token_to_chars(index)
        if span is not None and isinstance(span[-1], tuple):
            span = span[-1]
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        batch, index = _pair(batch_or_char_index, char_index)
        return self._encoding(batch).char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        batch, index = _pair(batch_or_char_index, char_index)
        return self._encoding(batch).char_to_word(index, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        batch, index = _pair(batch_or_word_index, word_index)
        span = self._encoding(batch).word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        batch, index = _pair(batch_or_word_index, word_index)
        span = self._encoding(batch).word_to_chars(index, sequence_index)
        return None if span is None else CharSpan(*span)

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> BatchEncoding:
        """Convert every value to a torch ("pt") or numpy ("np") array, in place. Rows of different lengths
        are an error for torch, and an array of arrays for numpy."""
        if tensor_type is None:
            return self
        kind = str(getattr(tensor_type, "value", tensor_type))
        if kind not in ("pt", "np"):
            raise TokenizerError(f"return_tensors={tensor_type!r}: expected 'pt', 'np' or None")
        for key, value in self.items():
            if hasattr(value, "shape"):
                continue
            value = [value] if prepend_batch_axis else value
            try:
                self[key] = _tensor(value, kind)
            except (ValueError, TypeError) as problem:
                lengths = sorted({len(row) for row in value if isinstance(row, (list, tuple))})
                raise TokenizerError(
                    f"{key!r} has rows of the lengths {lengths} and cannot be one tensor: pass padding=True "
                    f"(and truncation=True)"
                ) from problem
        return self

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to `device`, in place, and return self. Token ids keep their integer type."""
        for key, value in self.items():
            if hasattr(value, "to"):
                self[key] = value.to(device=device, non_blocking=non_blocking)
        return self

    def _encoding(self, batch_index: int) -> Encoding:
        if self._encodings is None:
            raise TokenizerError("only the result of a tokenizer maps tokens, words and characters")
        return self._encodings[batch_index]

    def _token(self, batch_or_token: int, token: int | None) -> tuple[Encoding, int]:
        batch, index = _pair(batch_or_token, token)
        encoding = self._encoding(batch)
        return encoding, index + len(encoding) if index < 0 else index


def _pair(batch_or_index: int, index: int | None) -> tuple[int, int]:
    return (0, batch_or_index) if index is None else (batch_or_index, index)


def _tensor(value: Any, kind: str) -> Any:
    import numpy as np

    if kind == "np" and len({len(row) for row in value if isinstance(row, (list, tuple))}) > 1:
        array = np.empty(len(value), dtype=object)  # rows of different lengths, as transformers returns them
        array[:] = [np.asarray(row) for row in value]
        return array
    array = np.asarray(value)
    if array.size == 0:
        array = array.astype(np.int64)
    if kind == "np":
        return array
    import torch

    return torch.from_numpy(array)
