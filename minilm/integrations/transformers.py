"""Models of transformers on minilm's attention.

    from minilm.integrations import transformers as minilm_attention

    minilm_attention.register()
    model = transformers.AutoModel.from_pretrained(name, attn_implementation="minilm")

`Trainer` here is transformers', for models of minilm (`minilm.integrations.trainer`).

transformers hands an attention function q, k and v as [B, H, S, D] and a mask, once a layer. The mask is
made once a forward pass, by a function of ours too, which returns not a matrix [B, 1, Sq, Sk] but a `Mask`:
which tokens are real, and what is seen. From it the tokens are packed, attended to by `minilm.ops.attend`
(on a GPU the Triton kernels, chosen as everywhere: `minilm.backend`, `minilm.explain`), and laid out as they
came.

Padding on either side, causal, sliding windows, grouped heads, a cache (more keys than queries), packed rows
(position ids that start again), T5's position bias, soft-cap, dropout and gradients work as with
attn_implementation="eager", except that a query at padding gets zeros where nobody looks. What cannot be done
is a ValueError that says so: masks of one's own, chunks, attention sinks, attention maps as output.
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
    """Make `attn_implementation=name` known to transformers (5 or later)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


@dataclass
class Packing:
    """Where the real tokens of a padded batch are."""

    q_index: Tensor
    """int64 [Tq]: row * Sq + column."""
    k_index: Tensor
    cu_q: Tensor
    """int32 [sequences + 1]."""
    cu_k: Tensor
    max_q: int
    max_k: int
    aligned: bool
    """Token i of a sequence stands in column i of its row, both for queries and for keys."""


@dataclass
class Mask:
    """What transformers' mask functions make for this attention; shared by all layers of a forward pass."""

    batch: int
    queries: int
    keys: int
    offset: int
    """Column of the keys in which the first query stands."""
    causal: bool
    window: int | None
    """As `minilm.ops.attend` counts it."""
    real: Tensor | None
    """bool [B, keys], or None if all are."""
    rows: Tensor | None = None
    """Packed rows: the number of its sequence for each token, int64 [B, S]."""
    device: torch.device | str = "cpu"
    ndim: int = 0
    """Looked at by `generate`, which makes masks out of those that have two."""

    @cached_property
    def packing(self) -> Packing | None:
        """How to pack, or None if there is nothing to leave out; looks at the mask once."""
        if self.rows is None and not self._hides_keys():
            return None
        seen = torch.ones(self.batch, self.keys, dtype=torch.bool, device=self.device)
        if self.real is not None:
            seen &= self.real
        asked = seen.any(1, keepdim=True).expand(self.batch, self.queries)
        if self.causal or self.window is not None:  # queries are the tokens of some of the keys
            seen[:, self.offset + self.queries :] = False  # of a static cache: not written yet
            asked = seen[:, self.offset : self.offset + self.queries]
        sequence = torch.arange(self.batch, device=self.device)[:, None]  # of each token
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
            raise ValueError("attention 'minilm': a sliding window over a mask with padding between tokens")
        aligned = self.rows is None and not holes and not bool(starts.any())
        return Packing(q_index, k_index, cu_q, cu_k, max_q, max_k, aligned)

    def _hides_keys(self) -> bool:
        beyond = self.causal and self.offset + self.queries < self.keys
        return beyond or (self.real is not None and not bool(self.real.all()))


def _boundaries(sequence: Tensor, count: int) -> tuple[Tensor, int]:
    """cu_seqlens of tokens by the number of their sequence, which rises to `count`, and the longest."""
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
    """transformers' interface for masks: what `mask_function` shows of the keys that `attention_mask`
    [B, columns] says are real. Raises ValueError for a function that is not known."""
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
                f"attention 'minilm' knows causal and full attention, sliding windows and packed rows, not "
                f"the mask {kind}: use another attn_implementation"
            )
    real = None
    if attention_mask is not None:
        missing = kv_length + kv_offset - attention_mask.shape[1]
        padded = torch.nn.functional.pad(attention_mask != 0, (0, max(missing, 0)))
        real = padded[:, kv_offset : kv_offset + kv_length]
    offset = int(q_offset) - int(kv_offset)
    return Mask(batch_size, q_length, kv_length, offset, causal, window, real, rows, device)


def _kinds(function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mask functions that `function` is the intersection of: the name under which transformers has them,
    and the variables they close over."""
    outer, _, inner = getattr(function, "__qualname__", repr(function)).partition(".<locals>.")
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        raise ValueError(f"attention 'minilm' cannot tell what the mask {outer} shows")
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
    """transformers' interface for attention: query [B, H, Sq, D], key and value [B, Hkv, Sk, D] ->
    ([B, Sq, H, D], no maps)."""
    _refuse(attention_mask, kwargs)
    batch, _, queries, size = query.shape
    keys = key.shape[2]
    if attention_mask is None:  # a model without masks says itself what it is
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
        seen = Mask(batch, queries, keys, keys - queries, causal, sliding_window, None, None, query.device)
    else:
        assert isinstance(attention_mask, Mask)
        seen = attention_mask
        if (seen.queries, seen.keys) != (queries, keys):
            raise ValueError(
                f"attention 'minilm': a mask of {seen.queries} queries and {seen.keys} keys came with "
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
    """[1, H, Sq, Sk] as [H, Sq, Sk], if positions in a row are positions in the sequence."""
    if bias.shape[0] != 1:
        raise ValueError(f"attention 'minilm': a position bias of its own for each row, {list(bias.shape)}")
    if packing is not None and not packing.aligned:
        raise ValueError("attention 'minilm': a position bias needs rows that are padded on the right")
    return bias[0]


def _refuse(attention_mask: Any, kwargs: dict[str, Any]) -> None:
    """What would change the result and is not there."""
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        kind = (
            f"{attention_mask.dtype} {list(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else ""
        )
        raise ValueError(
            f"attention 'minilm' takes the masks [batch, tokens] that models are called with, not one made "
            f"by hand ({type(attention_mask).__name__} {kind})"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("attention 'minilm' keeps no attention maps: use attn_implementation='eager'")
    for name in ("s_aux", "head_mask", "block_table", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention 'minilm' has no {name}: use another attn_implementation")
