"""From texts to hidden states, for sentence embeddings and pipelines.

Texts are tokenised without padding, batched by length, and packed, so a text's result does not depend on the
other texts in its batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..model import Batch, PreTrainedModel, pack

if TYPE_CHECKING:
    from ..text import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """One tokenised text, or pair of texts."""

    ids: list[int]
    types: list[int] | None = None
    """Token types; None if all are 0."""

    def __len__(self) -> int:
        return len(self.ids)


class Ran(NamedTuple):
    """The output of a model's body for some texts."""

    hidden: Tensor
    """[T, C], packed in the order of the texts."""
    batch: Batch


def run(model: PreTrainedModel, texts: Sequence[Tokens]) -> Ran:
    """Run the body of `model` on one or more texts."""
    lengths = torch.tensor([len(text) for text in texts])
    columns = int(lengths.max())
    if columns == 0:
        nothing = torch.zeros(0, model.spec.hidden_size, dtype=model.dtype, device=model.device)
        tokens = torch.zeros(0, dtype=torch.int64, device=model.device)
        return Ran(nothing, Batch(tokens, tokens, pack(len(texts), 0, None, model.device)))
    real = torch.arange(columns) < lengths[:, None]
    types = None
    if any(text.types is not None for text in texts):
        types = _padded([text.types or [0] * len(text) for text in texts], real).to(model.device)
    ids = _padded([text.ids for text in texts], real).to(model.device)
    batch = model.pack(ids, real.to(model.device), types)
    return Ran(model.body(batch), batch)


def _padded(rows: Sequence[Sequence[int]], real: Tensor) -> Tensor:
    padded = torch.zeros(real.shape, dtype=torch.int64)
    padded[real] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    return padded


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `batch_size`, longest first, so that a lack of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    yield from (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of `size` (the last may be shorter), read lazily from the iterable."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def in_order(items: Any, expected: str) -> Iterator[Any]:
    """The items of a sequence, an iterator, or an object with a length and indexing (a torch Dataset).

    Raises TypeError for anything else, and for inputs without a clear order of items: a dict, a set, bytes, a
    tensor, an array or table that is not one-dimensional. `expected`: start of the message.
    """
    dimensions = getattr(items, "ndim", 1)
    none = isinstance(items, (bytes, bytearray, Mapping, set, frozenset, Tensor))
    if not none and dimensions == 1:
        if isinstance(items, Iterable):
            return iter(items)
        if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
            return (items[i] for i in range(len(items)))
    shape = "" if dimensions == 1 else f" of {dimensions} dimensions"
    raise TypeError(f"{expected} {type(items).__name__}{shape}")


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        """Count one finished batch."""


def progress_bar(total: int, shown: bool) -> Any:
    """A progress bar over batches, as a context manager with `update()`; does nothing unless `shown`."""
    if not shown:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, desc="Batches")


def check_batch_size(batch_size: object) -> int:
    """`batch_size`; raises ValueError unless it is a positive integer."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, and is {batch_size!r}")
    return batch_size


def window(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    """Maximum number of tokens of a text: the tokenizer's limit, or the model's if less."""
    return min(int(tokenizer.model_max_length or model.spec.max_positions), model.spec.max_positions)


def tokenise(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[Tokens], int]:
    """The tokens of texts (or pairs), at most `max_length` each, and how many texts were cut."""
    if not texts:
        return [], 0
    encoded = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_truncated=True,
    )
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    tokens = [
        Tokens(row, types[index] if types is not None and any(types[index]) else None)
        for index, row in enumerate(ids)
    ]
    return tokens, sum(encoded["truncated"])
