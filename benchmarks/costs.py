"""Bytes and operations of each op by formula: the minimum that any implementation must move and compute.

Letters as in `minilm.config`: T tokens, S context, H query heads, Hkv key/value heads, D head size, C
channels, F inner channels, V vocabulary; b, wb, cb = bytes of an element of the data, the weights and the
cache.

Bytes: every input is read once and every output written once, whatever the caches do. Operations: a
multiplication and an addition count one each, so a multiply-add is two; an exponential, a square root or an
activation counts as one. What an implementation does beyond this (padding, a second pass, a copy) lowers its
share of the limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The minimum that must be read and written (bytes) and computed (operations; `exponentials` are among
    them)."""

    read: float = 0.0
    written: float = 0.0
    operations: float = 0.0
    exponentials: float = 0.0

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read,
            self.written + other.written,
            self.operations + other.operations,
            self.exponentials + other.exponentials,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(
            self.read * times, self.written * times, self.operations * times, self.exponentials * times
        )


def visible_pairs(new: int, context: int, causal: bool, window: int | None = None) -> int:
    """(query, key) pairs of one sequence that attention computes: `new` queries, the last at the last of
    `context` keys.

    Causal: new * context - new (new - 1) / 2. A window of w lets a query see the keys at a distance below w.
    """
    if new == 0 or context == 0:
        return 0
    if window is None:
        return new * context - new * (new - 1) // 2 if causal else new * context
    pairs = 0
    for query in range(context - new, context):
        first = max(0, query - window + 1)
        last = query if causal else min(context - 1, query + window - 1)
        pairs += max(0, last - first + 1)
    return pairs


def layer_norm(T: int, C: int, b: int = 4, wb: int = 4, bias: bool = True) -> Cost:
    """x read, y written. An element: sum 1, centre 1, square and sum 2, scale 1, affine 2."""
    return Cost(T * C * b + (1 + bias) * C * wb, T * C * b, T * C * (6 + bias))


def add_layer_norm(T: int, C: int, b: int = 4, wb: int = 4, bias: bool = True) -> Cost:
    """x and residual read, y and the sum written: 4 T C b and the parameters."""
    return layer_norm(T, C, b, wb, bias) + Cost(T * C * b, T * C * b, T * C)


def rms_norm(T: int, C: int, b: int = 4, wb: int = 4) -> Cost:
    """x read, y written. An element: square and sum 2, scale 1, weight 1."""
    return Cost(T * C * b + C * wb, T * C * b, 4 * T * C)


def add_rms_norm(T: int, C: int, b: int = 4, wb: int = 4) -> Cost:
    """x and residual read, y and the sum written."""
    return rms_norm(T, C, b, wb) + Cost(T * C * b, T * C * b, T * C)


def attention(
    lengths: Sequence[int],
    H: int,
    Hkv: int,
    D: int,
    causal: bool,
    window: int | None = None,
    contexts: Sequence[int] | None = None,
    b: int = 4,
) -> Cost:
    """q, k, v read once, the result written once; 4 D operations per head and visible pair (q k^T and p v),
    and one exponential."""
    contexts = lengths if contexts is None else contexts
    pairs = sum(visible_pairs(n, s, causal, window) for n, s in zip(lengths, contexts, strict=True))
    read = (sum(lengths) * H + 2 * sum(contexts) * Hkv) * D * b
    return Cost(read, sum(lengths) * H * D * b, H * pairs * (4 * D + 1), H * pairs)


def paged_attention(
    lengths: Sequence[int],
    contexts: Sequence[int],
    H: int,
    Hkv: int,
    D: int,
    page: int = 32,
    window: int | None = None,
    b: int = 4,
    cb: int = 4,
) -> Cost:
    """`attention` (causal) over a cache in pages: keys and values in the cache's dtype, and 4 bytes per page
    of the table. With a window only the keys inside it are read."""
    seen = [s if window is None else min(s, n + window - 1) for n, s in zip(lengths, contexts, strict=True)]
    work = attention(lengths, H, Hkv, D, True, window, contexts, b)
    table = 4 * sum(-(-s // page) for s in contexts)
    read = sum(lengths) * H * D * b + 2 * sum(seen) * Hkv * D * cb + table
    return Cost(read, work.written, work.operations, work.exponentials)


def rope(T: int, H: int, Hkv: int, D: int, b: int = 4) -> Cost:
    """q and k read and written, cos and sin read in float32; 3 operations per element."""
    elements = T * (H + Hkv) * D
    return Cost(elements * b + T * D * 4, elements * b, 3 * elements)


def append_kv(T: int, Hkv: int, D: int, b: int = 4, cb: int = 4) -> Cost:
    """k and v read, written into the cache; 8 bytes per token for the positions."""
    return Cost(2 * T * Hkv * D * b + 8 * T, 2 * T * Hkv * D * cb)


def rope_append(T: int, H: int, Hkv: int, D: int, b: int = 4, cb: int = 4) -> Cost:
    """`rope`; v is read as well, and the rotated k and v are written into the cache."""
    return rope(T, H, Hkv, D, b) + Cost(T * Hkv * D * b + 8 * T, 2 * T * Hkv * D * cb)


def linear(T: int, I: int, O: int, b: int = 4, wb: float = 4, bias: bool = True, act: bool = False) -> Cost:  # noqa: E741
    """x [T, I], weight [O, I] and bias [O] read, y [T, O] written; 2 T I O operations, and one per output for
    each of bias and activation. `wb` may be a fraction: 4-bit blocks of 32 with two fp16 scales are 20/32
    byte."""
    read = T * I * b + O * I * wb + (O * b if bias else 0)
    return Cost(read, T * O * b, 2 * T * I * O + (bias + act) * T * O)


WEIGHT_BYTES = {"int8": (1, 0, 4), "q8_0": (1, 2, 0), "q4_0": (0.5, 2, 0), "q4_1": (0.5, 4, 0)}
"""Format of `minilm.ops.quantized` -> bytes of an element, of a group of 32, of a row."""


def weight_bytes(format: str, I: int, O: int) -> float:  # noqa: E741
    """Bytes of a quantised matrix [O, I], its scales and minima included."""
    element, group, row = WEIGHT_BYTES[format]
    return O * (I * element + I // 32 * group + row)


def quantized_linear(
    T: int,
    I: int,  # noqa: E741
    O: int,  # noqa: E741
    format: str,
    b: int = 4,
    bias: bool = True,
    act: bool = False,
) -> Cost:
    """`linear` with the weight read as it is stored. Unpacking it is not counted as an operation."""
    return linear(T, I, O, b, weight_bytes(format, I, O) / (I * O), bias, act)


def gated(T: int, F: int, b: int = 4) -> Cost:
    """gate and up read, the product written; activation and product."""
    return Cost(2 * T * F * b, T * F * b, 2 * T * F)


def cross_entropy(T: int, V: int, b: int = 4) -> Cost:
    """Logits and labels read; subtract, exponential and sum for each logit."""
    return Cost(T * V * b + 8 * T, 4, 3 * T * V, T * V)


def linear_cross_entropy(T: int, C: int, V: int, b: int = 4, wb: int = 4, backward: bool = False) -> Cost:
    """hidden [T, C], weight [V, C] and labels read; the logits are not stored. A product of 2 T V C
    operations and 3 operations per logit; with the gradients, which are written, three products and 5
    operations per logit (the softmax is scaled, and 1 is subtracted)."""
    read, gradients = T * C * b + V * C * wb + 8 * T, T * C * b + V * C * wb
    if not backward:
        return Cost(read, 4, 2 * T * V * C + 3 * T * V, T * V)
    return Cost(read, 4 + gradients, 6 * T * V * C + 5 * T * V, T * V)


def embedding(T: int, C: int, tables: int, b: int = 4) -> Cost:
    """One row of each table read for each token, their sum written."""
    return Cost(T * C * b * tables + 8 * T, T * C * b, T * C * (tables - 1))


FORMULAS: dict[str, Callable[..., Cost]] = {
    f.__name__: f
    for f in (
        layer_norm,
        add_layer_norm,
        rms_norm,
        add_rms_norm,
        attention,
        paged_attention,
        rope,
        append_kv,
        rope_append,
        linear,
        quantized_linear,
        gated,
        cross_entropy,
        linear_cross_entropy,
        embedding,
    )
}


@dataclass(frozen=True)
class Call:
    """One kind of call in a forward pass, and its number."""

    op: str
    dims: dict[str, Any]
    count: int
    where: str

    @property
    def cost(self) -> Cost:
        """The cost of one call."""
        return FORMULAS[self.op](**self.dims)


def forward(
    spec: Any,
    lengths: Sequence[int],
    *,
    contexts: Sequence[int] | None = None,
    logits: int = 0,
    cached: bool = False,
    b: int = 4,
    wb: float = 4,
    cb: int = 4,
) -> list[Call]:
    """The calls of one forward pass of the model that `spec` (a `minilm.config.ModelConfig`) describes.

    `lengths`: new tokens of each sequence. `contexts`: lengths including the past, for a decoder that
    continues. `cached`: keys and values are stored. `logits`: rows that go through the output projection.
    """
    T, C, L = sum(lengths), spec.hidden_size, spec.num_layers
    heads = {"H": spec.num_heads, "Hkv": spec.num_kv_heads, "D": spec.head_dim}
    inner, rms = spec.intermediate_size, spec.norm == "rms_norm"
    past = contexts is not None and list(contexts) != list(lengths)
    window = {spec.window(layer) for layer in range(L)} if spec.windows else {None}

    def norm(name: str, count: int, where: str) -> Call:
        dims = {"T": T, "C": C, "b": b, "wb": b} | ({} if rms else {"bias": True})
        return Call(f"{name}{spec.norm}", dims, count, where)

    def matrix(rows: int, I: int, O: int, count: int, where: str, bias: bool, act: bool = False) -> Call:  # noqa: E741
        dims = {"T": rows, "I": I, "O": O, "b": b, "wb": wb, "bias": bias, "act": act}
        return Call("linear", dims, count, where)

    tables = 1 + (spec.type_vocab_size > 0) + (spec.positions == "learned")
    calls = [Call("embedding", {"T": T, "C": C, "tables": tables, "b": b}, 1, "embeddings")]
    if spec.embedding_norm:
        calls.append(norm("", 1, "embeddings"))
    if spec.pre_norm:
        calls += [norm("", 1, "attention"), norm("add_", L - 1, "attention"), norm("add_", L, "mlp")]
    else:
        calls.append(norm("add_", 2 * L, "attention, mlp"))
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    calls.append(matrix(T, C, qkv, L, "attention", spec.qkv_bias))
    kv = {"Hkv": heads["Hkv"], "D": heads["D"], "b": b, "cb": cb}
    if spec.rope is not None and cached:
        calls.append(Call("rope_append", {"T": T, **heads, "b": b, "cb": cb}, L, "attention"))
    elif spec.rope is not None:
        calls.append(Call("rope", {"T": T, **heads, "b": b}, L, "attention"))
    elif cached:
        calls.append(Call("append_kv", {"T": T, **kv}, L, "attention"))
    for w in sorted(window, key=lambda w: -1 if w is None else w):
        layers = L if not spec.windows else sum(spec.window(layer) == w for layer in range(L))
        shape = {"lengths": list(lengths), **heads, "window": w, "b": b}
        if past and contexts is not None:
            calls.append(
                Call("paged_attention", {**shape, "contexts": list(contexts), "cb": cb}, layers, "attention")
            )
        else:
            calls.append(Call("attention", {**shape, "causal": spec.causal}, layers, "attention"))
    calls.append(matrix(T, spec.q_size, C, L, "attention", spec.out_bias))
    calls.append(matrix(T, C, (1 + spec.gated_mlp) * inner, L, "mlp", spec.mlp_bias, not spec.gated_mlp))
    if spec.gated_mlp:
        calls.append(Call("gated", {"T": T, "F": inner, "b": b}, L, "mlp"))
    calls.append(matrix(T, inner, C, L, "mlp", spec.mlp_bias))
    if spec.final_norm:
        calls.append(norm("add_", 1, "final norm"))
    if logits:
        calls.append(matrix(logits, C, spec.vocab_size, 1, "head", False))
    return [call for call in calls if call.count > 0]


def total(calls: Sequence[Call]) -> Cost:
    """The cost of a whole pass if only weights, ids, logits and the KV cache go through memory: their bytes,
    and the operations of all ops.

    The activations between two ops are not counted in the bytes, since an engine may keep them in the
    processor's caches or in registers. So this is a lower limit, while the sum over the calls is not."""
    result = Cost()
    for call in calls:
        cost = call.cost
        read, written = 0.0, 0.0
        if call.op == "linear":
            weights = call.dims["O"] * call.dims["I"] * call.dims["wb"]
            read = weights
            written = cost.written if call.where == "head" else 0.0
        elif call.op == "paged_attention":
            queries = sum(call.dims["lengths"]) * call.dims["H"] * call.dims["D"] * call.dims["b"]
            read = cost.read - queries
        elif call.op in ("append_kv", "rope_append"):
            written = 2 * call.dims["T"] * call.dims["Hkv"] * call.dims["D"] * call.dims["cb"]
        elif call.op == "embedding":
            read = cost.read
        result = result + Cost(read, written, cost.operations, cost.exponentials) * call.count
    return result
