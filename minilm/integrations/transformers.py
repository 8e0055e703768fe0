"""minilm's attention for models of transformers.

    from minilm.integrations import transformers as minilm_attention

    minilm_attention.register()
    model = transformers.AutoModel.from_pretrained(name, attn_implementation="minilm")

`Trainer` here is transformers' Trainer for models of minilm (`minilm.integrations.trainer`).

In each layer, transformers calls the attention function with q, k and v as [B, H, S, D] and a mask. The mask
is made once per forward pass, by a function that is registered too. It returns not a matrix [B, 1, Sq, Sk]
but a `Mask`: which tokens are real, and which keys a query attends to. With it, the tokens are packed,
`minilm.ops.attention` is computed (on a GPU by the Triton kernels; see `minilm.backend`, `minilm.explain`),
and the result is padded again.

Padding on either side, causal attention, sliding windows, grouped heads, a cache (more keys than queries),
packed rows (position ids that restart), T5's position bias, soft-capping, dropout and gradients give the
results of attn_implementation="eager", except that the output at padding is zero. Custom masks, chunked
attention, attention sinks and attention maps as output are not supported and raise a ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops

NAME = "minilm"


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from .trainer import trainer_class

        return trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(name: str = NAME) -> None:
    """Register `attn_implementation=name` with transformers (5 or later)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


@dataclass
class Packing:
    """The positions of the real tokens in a padded batch."""

    q_index: Tensor
    """int64 [Tq]: row * Sq + column."""
    k_index: Tensor
    cu_q: Tensor
    """int32 [sequences + 1]."""
    cu_k: Tensor
    max_q: int
    max_k: int
    aligned: bool
    """Whether token i of a sequence is in column i of its row, for queries and keys."""


@dataclass
class Mask:
    """The result of `mask`; all layers of a forward pass share it."""

    batch: int
    queries: int
    keys: int
    offset: int
    """The column, among the keys, of the first query."""
    causal: bool
    window: int | None
    """As in `minilm.ops.attention`."""
    real: Tensor | None
    """bool [B, keys]; None: all keys are real."""
    rows: Tensor | None = None
    """For packed rows: the number of the sequence of each token, int64 [B, S]."""
    device: torch.device | str = "cpu"
    ndim: int = 0
    """Read by `generate`, which would convert masks of two dimensions."""

    @cached_property
    def packing(self) -> Packing | None:
        """The indices for packing, or None if nothing is left out. Reads the mask's values once."""
        if self.rows is None and not self._hides_keys():
            return None
        seen = torch.ones(self.batch, self.keys, dtype=torch.bool, device=self.device)
        if self.real is not None:
            seen &= self.real
        asked = seen.any(1, keepdim=True).expand(self.batch, self.queries)
        if self.causal or self.window is not None:  # self-attention: queries are a range of the keys
            seen[:, self.offset + self.queries :] = False  # unwritten places of a static cache
            asked = seen[:, self.offset : self.offset + self.queries]
        sequence = torch.arange(self.batch, device=self.device)[:, None]  # the sequence of each token
        if self.rows is not None:
            several = (sequence * (self.queries + 1) + self.rows).flatten()
            sequence = torch.unique_consecutive(several, return_inverse=True)[1].view_as(self.rows)
        count = int(sequence.max()) + 1 if sequence.numel() else 0
        q_index, k_index = (x.flatten().nonzero().squeeze(1) for x in (asked, seen))
        cu_q, max_q = _boundaries(sequence.expand_as(asked)[asked], count)
        cu_k, max_k = _boundaries(sequence.expand_as(seen)[seen], count)
        starts = seen.int().argmax(1)
        holes = bool((seen.sum(1) != self.keys - seen.flip(1).int().argmax(1) - starts)[seen.any(1)].any())
        if holes and self.window is not None:
            raise ValueError(
                "attention 'minilm' does not support a sliding window with padding between tokens"
            )
        aligned = self.rows is None and not holes and not bool(starts.any())
        return Packing(q_index, k_index, cu_q, cu_k, max_q, max_k, aligned)

    def _hides_keys(self) -> bool:
        beyond = self.causal and self.offset + self.queries < self.keys
        return beyond or (self.real is not None and not bool(self.real.all()))


def _boundaries(sequence: Tensor, count: int) -> tuple[Tensor, int]:
    """cu_seqlens and the longest length, from the sequence number of each token (ascending, below
    `count`)."""
    lengths = torch.bincount(sequence, minlength=count)
    ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return ends, int(lengths.max()) if count else 0


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Mask:
    """A mask function for transformers: combines `mask_function` with `attention_mask` [B, columns], which
    marks the real tokens. Raises ValueError for an unknown function."""
    if isinstance(attention_mask, Mask):
        return attention_mask
    causal, window, rows = False, None, None
    for kind, values in _kinds(mask_function):
        if kind == "causal_mask_function":
            causal = True
        elif kind == "sliding_window_overlay":
            window = int(values["sliding_window"])
        elif kind == "sliding_window_bidirectional_overlay":
            window = int(values["sliding_window"]) + 1  # up to and including this distance
        elif kind == "packed_sequence_mask_function":
            rows = values["packed_sequence_mask"]
        elif kind != "bidirectional_mask_function":
            raise ValueError(
                "attention 'minilm' supports causal and full attention, sliding windows and packed rows, "
                f"not the mask {kind}: use another attn_implementation"
            )
    real = None
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[1]
        padded = torch.nn.functional.pad(attention_mask != 0, (0, max(missing, 0)))
        real = padded[:, kv_offset : kv_offset + kv_length]
    offset = int(q_offset) - int(kv_offset)
    return Mask(batch_size, q_length, kv_length, offset, causal, window, real, rows, device)


def _kinds(function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mask functions whose intersection `function` is: their names in transformers, and the variables of
    their closures."""
    outer, _, inner = getattr(function, "__qualname__", repr(function)).partition(".<locals>.")
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        raise ValueError(
            f"attention 'minilm' does not support the custom mask {outer}: use another attn_implementation"
        )
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {name: cell.cell_contents for name, cell in cells}
    if outer == "and_masks" and inner:
        for part in values["mask_functions"]:
            yield from _kinds(part)
    else:
        yield outer, values


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers: query [B, H, Sq, D], key and value [B, Hkv, Sk, D] -> ([B, Sq,
    H, D], no maps)."""
    _refuse(attention_mask, kwargs)
    batch, _, queries, size = query.shape
    keys = key.shape[2]
    if attention_mask is None:  # models without masks have is_causal
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
        seen = Mask(batch, queries, keys, keys - queries, causal, sliding_window, None, None, query.device)
    else:
        assert isinstance(attention_mask, Mask)
        seen = attention_mask
        if (seen.queries, seen.keys) != (queries, keys):
            raise ValueError(
                f"attention 'minilm' got a mask for {seen.queries} queries and {seen.keys} keys with "
                f"{queries} queries and {keys} keys"
            )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * S, H, D]
    packing = seen.packing
    if packing is None:
        steps = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        lengths = steps * queries, steps * keys, queries, keys
    else:
        q, k, v = q[packing.q_index], k[packing.k_index], v[packing.k_index]
        lengths = packing.cu_q, packing.cu_k, packing.max_q, packing.max_k
    out = ops.attention(
        q,
        k,
        v,
        *lengths,
        scale=size**-0.5 if scaling is None else scaling,
        causal=seen.causal,
        window=seen.window,
        dropout_p=dropout,
        bias=None if position_bias is None else _bias(position_bias, packing),
        soft_cap=softcap,
    )
    if packing is not None:
        out = out.new_zeros(batch * queries, *out.shape[1:]).index_copy(0, packing.q_index, out)
    return out.view(batch, queries, *out.shape[1:]), None


def _bias(bias: Tensor, packing: Packing | None) -> Tensor:
    """[1, H, Sq, Sk] -> [H, Sq, Sk]; valid if the positions in a row are those in the sequence."""
    if bias.shape[0] != 1:
        raise ValueError(
            "attention 'minilm' supports one position bias [1, heads, queries, keys] for all "
            f"rows, and got {list(bias.shape)}"
        )
    if packing is not None and not packing.aligned:
        raise ValueError("attention 'minilm' supports a position bias only with padding on the right")
    return bias[0]


def _refuse(attention_mask: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for arguments that would change the result and are not supported."""
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        kind = (
            f"{attention_mask.dtype} {list(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else ""
        )
        raise ValueError(
            "attention 'minilm' supports masks [batch, tokens], as passed to the model, and got "
            f"{type(attention_mask).__name__} {kind}"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("attention 'minilm' does not return attention maps: use attn_implementation='eager'")
    for name in ("s_aux", "head_mask", "block_table", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention 'minilm' does not support {name}: use another attn_implementation")
