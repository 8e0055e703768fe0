"""Weights in the layout of the native kernels, and the native `linear` and `quantized_linear`.

The CPU kernels read a weight in panels (csrc/cpu/linear.h), which `pack` creates. A parameter, or the planes
of a quantised layer, is packed at its first use; the packed copy is kept as long as the weight exists and is
unchanged (`minilm.ops.backends.watch` detects changes). The copy is as large as the weight, and there is only
one: the native forward pass (`minilm.native.blocks`) shares its copies with the single layers (`share`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..quantized import QuantizedWeight, empty
from .watch import Watch

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, "int8": 3, "q8_0": 4, "q4_0": 5, "q4_1": 5}
"""Dtype or quantised format -> the kernels' number for it."""
ACTIVATIONS: dict[str | None, int] = {
    None: 0, "linear": 0, "gelu": 1, "gelu_python": 1, "gelu_new": 2, "gelu_fast": 2, "gelu_accurate": 2,
    "gelu_pytorch_tanh": 2, "gelu_python_tanh": 2, "silu": 3, "swish": 3, "relu": 4, "quick_gelu": 5,
    "tanh": 6,
}  # fmt: skip
"""Names of activation functions -> the kernels' number for it."""


class Packed(NamedTuple):
    """A weight [out, in] with its bias, in the kernels' layout."""

    data: Tensor
    """uint8."""
    format: int
    places: int
    """Number of outputs, padded to whole panels."""
    columns: int
    """Number of outputs; for a gated layer half of the weight's rows."""
    gated: bool = False
    """Whether panels of gate and up alternate."""
    heads: int = 0
    """Of a matrix whose rows are q, k and v of one head after the other: how many heads; the panels have q of
    all heads, then k, then v. Otherwise 0."""


def panel_width() -> int:
    """Number of outputs per panel, for the instruction set in use."""
    return int(importlib.import_module("minilm._C").panel_width())


def prefer_large_pages(memory: Tensor) -> None:
    """Ask the system for huge pages for a CPU tensor; its contents are lost. Weights that are read completely
    at every step cause many TLB misses with small pages."""
    if memory.device.type == "cpu" and importlib.util.find_spec("minilm._C") is not None:
        importlib.import_module("minilm._C").prefer_large_pages(memory.data_ptr(), memory.nbytes)


def give_back(memory: Tensor, parts: int) -> None:
    """Give the first `parts` of a contiguous CPU tensor back to the system; what they hold is lost. Whole
    large pages only, and the tensor keeps its address."""
    if memory.device.type == "cpu" and parts and importlib.util.find_spec("minilm._C") is not None:
        begin = memory.data_ptr()
        importlib.import_module("minilm._C").give_back(begin, parts * memory[0].nbytes)


def has_one_owner(memory: Tensor) -> bool:
    """Whether no other tensor, array, capsule or storage object shares the memory of this tensor. Another
    name for the same tensor object is not another owner. False where PyTorch cannot say."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or not hasattr(memory, "_use_count"):
        return False
    return _owners(memory, count) == _owners(torch.empty(1), count)


def _owners(memory: Tensor, count: Any) -> tuple[int, int, int]:
    """References to the storage, to its Python object, and to the tensor beside its Python object. How many
    there are of a new tensor depends on the versions of Python and PyTorch."""
    storage = memory.untyped_storage()
    return count(storage._cdata), sys.getrefcount(storage), memory._use_count()  # type: ignore[attr-defined]


def trim(*, code: bool = False) -> None:
    """Give memory that was freed back to the system, which the allocator would keep for later. `code`: and
    unmap the code of programs and libraries, of which a start touches much that is never used again (what is
    used comes back from the system's file cache). Does nothing without the native extension."""
    if importlib.util.find_spec("minilm._C") is not None:
        extension = importlib.import_module("minilm._C")
        extension.trim()
        if code:
            extension.unmap_code()


def places(rows: int, gated: bool, heads: int = 0) -> Tensor:
    """The row of the weight at each place of the panels, int32; -1: padding.

    If gated, the weight has the rows of gate, then those of up; panels of both alternate. `heads`: see
    `Packed`.
    """
    width = panel_width()
    columns = rows // 2 if gated else rows
    order = torch.full((-(-columns // width) * width,), -1, dtype=torch.int32)
    order[:columns] = torch.arange(columns, dtype=torch.int32)
    if heads:
        order[:columns] = order[:columns].view(heads, 3, -1).transpose(0, 1).flatten()
    if not gated:
        return order
    up = torch.where(order < 0, -1, order + columns)
    return torch.stack([order.view(-1, width), up.view(-1, width)], dim=1).flatten()


def pack(
    weight: Tensor | QuantizedWeight, bias: Tensor | None, *, gated: bool = False, heads: int = 0
) -> Packed:
    """Pack a weight [out, in] of a dtype or format in `FORMATS`, and its bias [out]; see `Packed`."""
    rows = weight.shape[0]
    order = places(rows, gated, heads)
    scales = minimums = None
    with torch.no_grad():
        if isinstance(weight, QuantizedWeight):
            values, scales, minimums = weight.codes, weight.scale.float(), weight.minimum
            columns, code = weight.columns, FORMATS[weight.format]
            if weight.format == "q4_0":  # scale (code - 8) = scale code + minimum
                minimums = -8 * scales
            minimums = None if minimums is None else minimums.float().contiguous()
            scales = scales.contiguous()
        else:
            values, columns, code = weight.detach(), weight.shape[1], FORMATS[weight.dtype]
        data = torch.ops.minilm.pack_linear(
            values.contiguous(),
            scales,
            minimums,
            None if bias is None else bias.detach().float().contiguous(),
            order,
            code,
            columns,
        )
    return Packed(data, code, len(order), rows // 2 if gated else rows, gated, heads)


def shape_of(weight: Tensor | QuantizedWeight, *, gated: bool = False, heads: int = 0) -> tuple[Packed, int]:
    """What `pack` gives for a weight, without its data, and the data's size in bytes."""
    rows, columns = weight.shape
    code = FORMATS[weight.format if isinstance(weight, QuantizedWeight) else weight.dtype]
    order = len(places(rows, gated))
    size = importlib.import_module("minilm._C").packed_bytes(code, columns, order)
    return Packed(torch.empty(0), code, order, rows // 2 if gated else rows, gated, heads), int(size)


def unpack(packed: Packed, format: str, rows: int, columns: int) -> QuantizedWeight:
    """The planes of the quantised weight [rows, columns] that was packed, bit for bit."""
    weight = empty(format, rows, columns, "cpu")
    torch.ops.minilm.unpack_linear.default(
        packed.data,
        places(rows, packed.gated, packed.heads),
        packed.format,
        columns,
        weight.codes,
        weight.scale,
        weight.minimum,
    )
    return weight


Sources = tuple[Any, ...]
"""The planes of a weight, the first of which is the key in `_kept`, and the bias or None."""


class _Kept:
    """A packed weight, with weak references to the tensors that it was packed from."""

    __slots__ = ("packed", "sources", "watch")

    def __init__(self, sources: Sources, packed: Packed | None = None) -> None:
        self.sources = tuple(None if source is None else weakref.ref(source) for source in sources)
        self.watch = Watch(_tensors(sources))
        self.packed = packed

    def is_of(self, sources: Sources) -> bool:
        """Whether it was packed from these objects, and they are unchanged."""
        same = len(sources) == len(self.sources) and all(
            source is (None if kept is None else kept())
            for source, kept in zip(sources, self.sources, strict=True)
        )
        return same and self.watch.holds(_tensors(sources))


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First tensor of a weight -> `_Kept`."""
_lock = threading.RLock()


def _tensors(sources: Sources) -> list[Tensor]:
    return [source for source in sources if source is not None]


def sources_of(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Sources:
    """The tensors of a weight and its bias."""
    planes = tuple(weight.planes.values()) if isinstance(weight, QuantizedWeight) else (weight,)
    return (*planes, bias)


def kept(weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Packed:
    """The packed weight; packs at the first call, and again if weight or bias were replaced or changed."""
    sources = sources_of(weight, bias)
    entry: _Kept | None = _kept.get(sources[0], None)  # type: ignore[no-untyped-call]
    if entry is None or not entry.is_of(sources):
        with _lock:  # if several threads come first, one packs
            entry = _kept.get(sources[0], None)  # type: ignore[no-untyped-call]
            if entry is None or not entry.is_of(sources):
                entry = _Kept(sources)
                entry.packed = pack(weight, bias)
                _kept[sources[0]] = entry
    assert entry.packed is not None
    return entry.packed


def share(sources: Sources, packed: Packed) -> None:
    """Let `kept` find a weight that was just packed elsewhere."""
    with _lock:
        _kept[sources[0]] = _Kept(sources, packed)


def forget_kept(weights: Iterable[Tensor]) -> None:
    """Drop the packed copies of weights, each identified by its first tensor."""
    with _lock:
        for weight in weights:
            _kept.pop(weight, None)  # type: ignore[no-untyped-call]


def product(x: Tensor, packed: Packed, activation: str | None) -> Tensor:
    """activation(x W^T + bias) of the packed weight, [..., out] in x's dtype; if gated, gate beside up."""
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    columns = packed.places if packed.gated else packed.columns
    y = torch.ops.minilm.packed_linear(
        rows, packed.data, packed.format, columns, packed.places, ACTIVATIONS[activation], False
    )
    if packed.gated:  # from alternating panels to all of gate, then all of up
        panels = y.view(len(y), -1, 2, panel_width()).transpose(1, 2).reshape(len(y), 2, -1)
        columns = 2 * packed.columns
        y = panels[..., : packed.columns].reshape(len(y), columns)
    if packed.heads:
        y = y.view(len(y), 3, packed.heads, -1).transpose(1, 2)
    return y.reshape(*x.shape[:-1], columns).to(x.dtype)  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `minilm.ops.linear`."""
    return product(x, kept(weight, bias), activation)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """See `minilm.ops.quantized_linear`. x is quantised too, to 8 bits over the range from the least to the
    largest of each group of 32 (int8 weights: 192; 4-bit weights: from minus to plus the largest magnitude of
    32)."""
    return product(x, kept(weight, bias), activation)


def supports_linear(traits: Any) -> str | None:
    """None, or why the packed kernels cannot run this call (`minilm.ops.LinearTraits`)."""
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype not in FORMATS:
        return f"the extension has no kernel for {traits.dtype}"
    if traits.activation not in ACTIVATIONS:
        return f"the extension does not have the activation {traits.activation}"
    if traits.grad:
        return "the packed kernels have no derivative"
    if not traits.kept:
        return "only parameters are packed, and only outside of torch.compile"
    return None


def supports_quantized_linear(traits: Any) -> str | None:
    """None, or why the packed kernels cannot run this call (`minilm.ops.QuantizedTraits`)."""
    if traits.device != "cpu":
        return f"the extension has no kernel for {traits.device}"
    if traits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the extension has no kernel for {traits.dtype}"
    if traits.activation not in ACTIVATIONS:
        return f"the extension does not have the activation {traits.activation}"
    if traits.grad:
        return "the packed kernels have no derivative"
    if not traits.kept:
        return "weights are packed only outside of torch.compile"
    return None


def _pack_fake(
    values: Tensor,
    scales: Tensor | None,
    minimums: Tensor | None,
    bias: Tensor | None,
    order: Tensor,
    format: int,
    in_features: int,
) -> Tensor:
    size = importlib.import_module("minilm._C").packed_bytes(format, int(in_features), int(order.shape[0]))
    return values.new_empty(size, dtype=torch.uint8)


def _packed_linear_fake(
    x: Tensor, packed: Tensor, format: int, columns: int, places: int, activation: int, gated: bool
) -> Tensor:
    return x.new_empty(x.shape[0], columns)


def _transformer_fake(embedded: Tensor, *arguments: Any) -> Tensor:
    return embedded.new_empty(embedded.shape)


def _decode_steps_fake(tokens: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, vocabulary, slots = tokens.shape[0], arguments[11], arguments[16]
    steps = slots.shape[0] // batch if batch else 1
    return tokens.new_empty(batch, vocabulary, dtype=torch.float32), tokens.new_empty(steps, batch)


def _embed_fake(tokens: Tensor, table: Tensor, *arguments: Any) -> Tensor:
    if table.dim() == 1:  # packed
        channels = arguments[13]
    else:
        channels = table.shape[1] * (2 if table.dtype == torch.uint8 else 1)
    return tokens.new_empty(tokens.shape[0], channels, dtype=torch.float32)


def _pool_fake(x: Tensor, cu_seqlens: Tensor, unit: bool) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])


def register_fakes() -> None:
    """Register fake implementations of the ops on packed weights, by which torch.compile infers shapes."""
    torch.library.register_fake("minilm::pack_linear", _pack_fake)
    torch.library.register_fake("minilm::unpack_linear", lambda *arguments: None)
    torch.library.register_fake("minilm::packed_linear", _packed_linear_fake)
    torch.library.register_fake("minilm::transformer", _transformer_fake)
    torch.library.register_fake("minilm::decode_steps", _decode_steps_fake)
    torch.library.register_fake("minilm::embed", _embed_fake)
    torch.library.register_fake("minilm::pool", _pool_fake)
