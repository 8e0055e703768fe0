"""Padding of texts that are already encoded, for collate functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .output import BatchEncoding
from .vocabulary import TokenizerError

if TYPE_CHECKING:
    from .encode import TextEncoder


def pad(
    tokenizer: TextEncoder,
    encoded: Any,
    padding: bool | str = True,
    *,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: str | None = None,
    return_attention_mask: bool | None = None,
    return_tensors: str | None = None,
    verbose: bool = True,
) -> BatchEncoding:
    """Pad one encoded text (`input_ids` a list) or several (a list of lists, or a list of dicts) with token
    types, attention masks and special-token masks; other values are unchanged. Tensors stay tensors of the
    same kind. See `Tokenizer.pad`."""
    if isinstance(encoded, (list, tuple)) and encoded and isinstance(encoded[0], Mapping):
        try:
            encoded = {key: [row[key] for row in encoded] for key in encoded[0]}
        except KeyError as missing:
            raise TokenizerError(f"the rows to pad have different keys: {missing} is not in all") from None
    if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
        found = list(encoded) if isinstance(encoded, Mapping) else type(encoded).__name__
        raise TokenizerError(f"expected encoded texts with input_ids, got {found!r:.80}")
    kind = return_tensors or _kind(encoded["input_ids"])
    data = {key: _plain(value) for key, value in encoded.items()}
    side = padding_side or tokenizer.padding_side
    if side not in ("left", "right"):
        raise TokenizerError(f"padding_side={side!r}: expected 'left' or 'right'")
    strategy, _, length = tokenizer._strategies(padding, None, max_length, pad_to_multiple_of, verbose)
    if return_attention_mask is None:
        return_attention_mask = "attention_mask" in tokenizer.model_input_names

    ids = data["input_ids"]
    if not ids:
        return BatchEncoding(
            {**data, "attention_mask": []} if return_attention_mask else data, tensor_type=kind
        )
    single = not isinstance(ids[0], (list, tuple))
    rows = [ids] if single else ids
    if return_attention_mask and "attention_mask" not in data:
        masks = [[1] * len(row) for row in rows]
        data["attention_mask"] = masks[0] if single else masks
    if strategy == "longest":
        length = max(map(len, rows))
    if length is not None and pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    if strategy != "do_not_pad" and length is not None:
        fill = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
        }
        for key, value in fill.items():
            if key not in data or (key == "attention_mask" and not return_attention_mask):
                continue
            columns = [data[key]] if single else data[key]
            if [len(column) for column in columns] != [len(row) for row in rows]:
                raise TokenizerError(f"{key} and input_ids to pad have different lengths")
            padded = []
            for column in columns:
                room = [value] * (length - len(column))
                padded.append(room + list(column) if side == "left" else list(column) + room)
            data[key] = padded[0] if single else padded
    return BatchEncoding(data, tensor_type=kind)


def _kind(value: Any) -> str | None:
    """The kind of tensors in `value`: "pt", "np", or None for lists."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not hasattr(value, "shape"):
        return None
    return "np" if type(value).__module__ == "numpy" else "pt"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
