"""The CUDA part of the `native` backend: kernels of csrc/cuda/, their registration with torch.compile ("fake"
implementations, which compute only output shapes), and their entries in the dispatch table.

They are in a separate library, minilm/_C_cuda.abi3.so. setup.py builds it if it finds nvcc and a CUDA build
of PyTorch; it is loaded when one of its ops, ``torch.ops.minilm_cuda``, is first called with a CUDA tensor.
The kernels run on the current stream without synchronising, and allocate only results and the partial results
of a split context, so a decode step can be captured in a CUDA graph (after one call outside of it, which
packs the weights).

The table has one implementation per op and backend; `by_device` combines the CPU and the CUDA one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import dispatch
from ..quantized import QuantizedWeight

DTYPES = (torch.float16, torch.bfloat16)
DECODE_HEADS = (32, 64, 80, 96, 128)
LARGEST_HEAD = 256
MOST_ROWS = 8
"""Maximum rows of x per launch of the linear kernel."""

WEIGHTS = {"int8": 1, "q8_0": 2, "q4_0": 3, "q4_1": 4}
"""Weight formats -> the kernels' number for them (csrc/cuda/params.h); 0 is 16-bit."""
NORMS = {None: 0, "rms_norm": 1, "layer_norm": 2}
ACTIVATIONS: dict[str | None, int] = {
    None: 0, "linear": 0, "gelu": 1, "gelu_python": 1, "gelu_new": 2, "gelu_fast": 2, "gelu_accurate": 2,
    "gelu_pytorch_tanh": 2, "gelu_python_tanh": 2, "silu": 3, "swish": 3, "relu": 4, "quick_gelu": 5,
}  # fmt: skip
"""Names of activation functions -> the kernels' number for them."""

LIBRARY = "minilm_cuda"
"""Namespace of the ops in use; tests replace it by that of the emulated ones."""


FILE = Path(__file__).parent.parent / "_C_cuda.abi3.so"


@cache
def load() -> str | None:
    """Load the library, once. Returns None, or the reason why it is unavailable."""
    if not FILE.is_file():
        return "the CUDA part of the extension is not built (setup.py says what it needs)"
    try:
        torch.ops.load_library(str(FILE))  # type: ignore[no-untyped-call]
    except OSError as error:  # a binary for another PyTorch
        return f"the CUDA part of the extension does not load: {error}"
    register_fakes(LIBRARY)
    return None


def _ops() -> Any:
    return getattr(torch.ops, LIBRARY)


# ---- the ops of minilm.ops ---------------------------------------------------------------------------------


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    max_context: int,
    scale: float,
    window: int | None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """See `minilm.ops.paged_attention`; one new token per sequence. A context length of 0 gives zeros."""
    y: Tensor = _ops().decode_attention(
        q, k_pages, v_pages, block_table, context_lens, max_context, scale, window, k_scales, v_scales
    )
    return y


def rope_append(*args: Tensor) -> tuple[Tensor, Tensor]:
    """See `minilm.ops.rope_append`. A slot outside the cache is not written."""
    q, k = _ops().rope_append(*args)
    return q, k


def append_kv(*args: Tensor) -> None:
    """See `minilm.ops.append_kv`. A slot outside the cache is not written."""
    _ops().append_kv(*args)


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """See `minilm.ops.quantized_linear`. The weight is packed at its first use, and the packed copy is kept
    as long as the weight exists. More than `MOST_ROWS` rows take several launches."""
    rows, packed = x.reshape(-1, x.shape[-1]), kept(weight)
    bias = None if bias is None else bias.to(x.dtype)
    parts = [fused_linear(part, packed, bias, activation=activation) for part in torch.split(rows, MOST_ROWS)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(*x.shape[:-1], weight.rows)


# ---- fused kernels of a decode step ------------------------------------------------------------------------


class Packed(NamedTuple):
    """A quantised weight [out, in] in the order in which the lanes of a warp read it."""

    kind: int
    rows: int
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None


def pack(weight: QuantizedWeight) -> Packed:
    """Pack a weight on a CUDA device; the copy has the same size (rows padded to 8, inputs to 128)."""
    columns = weight.columns

    def packed(plane: Tensor) -> Any:
        return plane if plane.dtype == torch.float32 else _ops().pack(plane, columns)

    minimum = None if weight.minimum is None else packed(weight.minimum)
    return Packed(WEIGHTS[weight.format], weight.rows, packed(weight.codes), packed(weight.scale), minimum)


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Codes of a weight -> (their address and version when packed, the packed weight)."""


def kept(weight: QuantizedWeight) -> Packed:
    """The packed weight; packs at the first call, and again if the codes have changed."""
    codes = weight.codes
    stamp = (codes.data_ptr(), 0 if codes.is_inference() else codes._version)
    entry = _kept.get(codes, None)  # type: ignore[no-untyped-call]
    if entry is None or entry[0] != stamp:
        entry = _kept[codes] = (stamp, pack(weight))
    packed: Packed = entry[1]
    return packed


def fused_linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(norm(x) weight^T + bias) + residual, in one launch.

    x [up to 8, in] in float16 or bfloat16; weight [out, in] in x's dtype, or packed; bias [out]. norm: None,
    "rms_norm" or "layer_norm", with norm_weight [in] and for the latter norm_bias [in]. `gated`: the first
    half of the weight's rows is gate, the second half up, and the result is activation(gate) * up
    (+ residual). Returns [rows, out], or [rows, out / 2] if gated.
    """
    kind, rows, values, scale, minimum = (
        weight if isinstance(weight, Packed) else Packed(0, weight.shape[0], weight, x, None)
    )
    if x.shape[1] % 8 and kind:  # packed weights are already padded with zeros
        x = F.pad(x, (0, -x.shape[1] % 8))
    y: Tensor = _ops().linear(
        x,
        values,
        kind,
        rows,
        scale if kind else None,
        minimum,
        bias,
        NORMS[norm],
        norm_weight,
        norm_bias,
        eps,
        ACTIVATIONS[activation],
        gated,
        residual,
    )
    return y


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    sequence: Tensor,
    step: Tensor,
) -> Tensor:
    """Sample the next token of each row, int64 [B], without synchronising.

    logits [B, V] in float32, float16 or bfloat16. All others are [B] on the same device: temperature, top_p
    and min_p float32, top_k int32, seed, sequence and step int64. Temperature 0 takes the token with the
    highest logit (the first among equals). Otherwise top-k, top-p and min-p filter the tokens, in this order,
    and one is sampled with Philox4x32-10 at (seed, sequence, step), so the result does not depend on the
    batch. Tokens with equal logits are kept or dropped together. The result is -1 if logits are NaN, if no
    token is left, or if sampling meets an infinite logit.
    """
    token: Tensor = _ops().sample(logits, temperature, top_k, top_p, min_p, seed, sequence, step)
    return token


# ---- registration with PyTorch and the dispatch table ------------------------------------------------------


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    weights: int,
    out: int,
    scale: Tensor | None = None,
    minimum: Tensor | None = None,
    bias: Tensor | None = None,
    norm: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    activation: int = 0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], out // 2 if gated else out)


def _pack_fake(plane: Tensor, columns: int) -> Tensor:
    panels, chunks = -(-plane.shape[0] // 8), -(-columns // 128)
    return plane.new_empty(panels * chunks * {torch.int8: 1024, torch.uint8: 512}.get(plane.dtype, 32))


def register_fakes(library: str) -> None:
    """Register fake implementations, by which torch.compile infers result shapes, for ops in `library`."""
    fakes: dict[str, Callable[..., Any]] = {
        "rope_append": lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
        "append_kv": lambda *_: None,
        "decode_attention": lambda q, *_: q.new_empty(q.shape),
        "pack": _pack_fake,
        "linear": _linear_fake,
        "sample": lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{library}::{name}", fake)


def _refusal(traits: Any) -> str | None:
    if traits.dtype not in DTYPES:
        return f"the CUDA kernels take float16 and bfloat16, not {traits.dtype}"
    return None


def _supports_cache(traits: Any) -> str | None:
    reason = _refusal(traits)
    if reason is None and traits.cache_dtype not in (traits.dtype, torch.int8):
        return f"the CUDA kernels support caches of {traits.dtype} and int8 here, not {traits.cache_dtype}"
    return reason


def supports_append(traits: Any) -> str | None:
    """None, or why the CUDA append cannot run this call (`minilm.ops.PagedTraits`)."""
    if traits.head_dim % 16 or not 16 <= traits.head_dim <= LARGEST_HEAD:
        return f"the CUDA append takes head sizes in steps of 16 up to {LARGEST_HEAD}, not {traits.head_dim}"
    return _supports_cache(traits)


def supports_decode(traits: Any) -> str | None:
    """None, or why the CUDA decode attention cannot run this call (`minilm.ops.PagedTraits`)."""
    if not traits.single_query:
        return "the CUDA kernel is for decoding, with one new token per sequence"
    if traits.head_dim not in DECODE_HEADS:
        return f"the CUDA kernel takes head sizes {', '.join(map(str, DECODE_HEADS))}, not {traits.head_dim}"
    return _supports_cache(traits)


def supports_quantized_linear(traits: Any) -> str | None:
    """None, or why the CUDA kernel cannot run this call (`minilm.ops.QuantizedTraits`)."""
    if not traits.few_rows:
        return "the CUDA kernel is for few rows, where the time goes into reading the weights"
    if traits.activation not in ACTIVATIONS:
        return f"the CUDA kernel does not have the activation {traits.activation}"
    if traits.grad:
        return "the CUDA kernel has no derivative"
    if torch.compiler.is_compiling():
        return "packed weights cannot be traced by torch.compile"
    return _refusal(traits)


def by_device(
    cuda: dispatch.Implementation,
    other: dispatch.Implementation | None,
    absent: Callable[[], str | None] = lambda: None,
) -> dispatch.Implementation:
    """One implementation that calls `cuda` for CUDA tensors and `other` for the rest. For CUDA tensors,
    `absent` is called first; it returns the reason if `cuda` cannot run at all."""

    def call(*args: Any, **options: Any) -> Any:
        chosen = cuda if other is None or args[0].is_cuda else other
        return chosen.call(*args, **options)

    def supports(traits: Any) -> str | None:
        if traits.device == "cuda":
            return absent() or cuda.supports(traits)
        if other is None:
            return f"the extension has no kernel for {traits.device}"
        return other.supports(traits)

    return dispatch.Implementation(cuda.op, cuda.backend, call, supports)


KERNELS = tuple(
    dispatch.Implementation(op, "native", call, supports)
    for op, call, supports in (
        ("paged_attention", paged_attention, supports_decode),
        ("rope_append", rope_append, supports_append),
        ("append_kv", append_kv, supports_append),
        ("quantized_linear", quantized_linear, supports_quantized_linear),
    )
)


def register_all() -> None:
    """Add the CUDA kernels to the implementations of the `native` backend, if they are built. Does not load
    the library or query devices yet."""
    if not FILE.is_file():
        return
    for kernel in KERNELS:
        present = dispatch.implementations(kernel.op).get("native")
        dispatch.register(by_device(kernel, present, load))
