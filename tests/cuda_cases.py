"""The CUDA ops against their specification. The same cases run on a GPU (test_gpu_cuda.py) and in the
emulation on a CPU (test_cuda_emulation.py); the reference is computed on the CPU in both."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from close import assert_as_good_as_eager
from hypothesis import strategies as st
from torch import Tensor

from minilm.generation import sampling
from minilm.ops import reference
from minilm.ops.backends import cuda
from minilm.ops.quantized import dequantise, quantise

HALF, BF16 = torch.float16, torch.bfloat16
HEADS = (32, 64, 80, 96, 128)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    """Normal numbers around `mean`, the same for the same arguments."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x + mean).to(dtype)


def apart(x: Tensor, odd: int = 0) -> Tensor:
    """The values of x [T, ...] as a slice of something wider; `odd` elements off the alignment."""
    rows = x.flatten(1)
    wide = torch.full((len(rows), rows.shape[1] + 24), math.nan, dtype=x.dtype)
    wide[:, 8 + odd : 8 + odd + rows.shape[1]] = rows
    return wide[:, 8 + odd : 8 + odd + rows.shape[1]].unflatten(1, x.shape[1:])


# ---- decode attention --------------------------------------------------------------------------------------

decodes = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([HALF, BF16]),
        "int8": st.booleans(),
        "head_dim": st.sampled_from(HEADS),
        "group": st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17]),
        "kv_heads": st.sampled_from([1, 2, 3]),
        "lengths": st.lists(
            st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.integers(1, 150)),
            min_size=1,
            max_size=3,
        ),
        "page_size": st.sampled_from([1, 5, 16, 32]),
        "window": st.one_of(st.none(), st.sampled_from([1, 16, 33, 1000])),
        "splits": st.sampled_from([None, 1, 2, 3, 5]),
        "mean": st.sampled_from([0.0, 2.0]),
        "seed": st.integers(0, 2**32),
    }
)


def decode(
    device: str,
    dtype: torch.dtype,
    int8: bool,
    head_dim: int,
    group: int,
    kv_heads: int,
    lengths: list[int],
    page_size: int,
    window: int | None,
    splits: int | None,
    mean: float,
    seed: int,
) -> None:
    """What no token of a sequence is stored in holds NaN, and so does the page that unused entries of the
    block table name."""
    batch, heads = len(lengths), group * kv_heads
    counts = [-(-length // page_size) for length in lengths]
    width = max(counts) + 1
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    poison = order.pop()
    table = torch.full((batch, width + 3), poison, dtype=torch.int32)
    used = torch.zeros(sum(counts) + 1, page_size, dtype=torch.bool)
    for row, count in enumerate(counts):
        for i in range(count):
            table[row, i] = page = order.pop()
            used[page, : lengths[row] - i * page_size] = True
    shape = (sum(counts) + 1, page_size, kv_heads, head_dim)
    q = apart(random(batch, heads, head_dim, seed=seed, dtype=dtype), odd=8 * (seed % 2))
    pages: list[Tensor] = []
    scales: list[Tensor] = []
    for i in (1, 2):
        x = random(*shape, seed=seed + i, mean=mean)
        if int8:
            codes, scale = reference.quantise(x)
            scales.append(scale.masked_fill(~used[..., None], math.nan))
            pages.append(codes)
        else:
            pages.append(x.to(dtype).masked_fill(~used[..., None, None], math.nan))
    table = table[:, :width]  # rows apart
    lens = torch.tensor(lengths, dtype=torch.int32)
    scale = 1 / math.sqrt(head_dim)

    out = (
        getattr(torch.ops, cuda.LIBRARY)
        .decode_attention(
            q.to(device),
            *(x.to(device) for x in pages),
            table.to(device),
            lens.to(device),
            max(lengths),
            scale,
            window,
            *([x.to(device) for x in scales] or (None, None)),
            splits,
        )
        .cpu()
    )

    some = lens > 0
    assert not out[~some].any(), "a sequence without tokens has zeros"
    if not some.any():
        return

    def expected(dtype: torch.dtype) -> Tensor:
        wide = [x.to(torch.float64) for x in pages] if dtype == torch.float64 else pages
        ends = torch.arange(int(some.sum()) + 1, dtype=torch.int32)
        args = (table[some], ends, lens[some], 1, max(lengths), scale, window)
        return reference.paged_attention(q[some].to(dtype), *wide, *args, *scales)

    exact = expected(torch.float64)
    floor = torch.finfo(dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(out[some], expected(dtype), exact, floor=floor, what="decode attention")


# ---- rope and append ---------------------------------------------------------------------------------------

appends = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([HALF, BF16]),
        "int8": st.booleans(),
        "tokens": st.sampled_from([0, 1, 2, 5, 33]),
        "head_dim": st.sampled_from([16, 32, 64, 80, 96, 128, 256]),
        "group": st.sampled_from([1, 3, 4]),
        "kv_heads": st.sampled_from([1, 2, 5]),
        "page_size": st.sampled_from([1, 7, 16]),
        "turned": st.booleans(),
        "odd": st.booleans(),
        "seed": st.integers(0, 2**32),
    }
)


def append(
    device: str,
    dtype: torch.dtype,
    int8: bool,
    tokens: int,
    head_dim: int,
    group: int,
    kv_heads: int,
    page_size: int,
    turned: bool,
    odd: bool,
    seed: int,
) -> None:
    """One of the tokens has no slot; what no token goes to keeps its value."""
    heads = group * kv_heads
    fused = apart(random(tokens, heads + 2 * kv_heads, head_dim, seed=seed, dtype=dtype), int(odd))
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    if tokens > 1:
        v = v.clone()
        v[0] = 0  # int8: a scale of 0
    angles = random(tokens, head_dim // 2, seed=seed + 1).double() * 3
    cos, sin = angles.cos().float(), angles.sin().float()
    count = -(-(tokens + 3) // page_size)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(count * page_size, generator=generator)[:tokens]
    if tokens > 2:
        slots[1], slots[2] = -1, count * page_size
    kept = (slots >= 0) & (slots < count * page_size)
    shape = (count, page_size, kv_heads, head_dim)
    kind = torch.int8 if int8 else dtype
    before = [torch.full(shape, 7, dtype=kind) for _ in range(2)]
    scales_before = [torch.full(shape[:3], 0.5) for _ in range(2)] if int8 else []
    pages, scales = ([x.clone().to(device) for x in xs] for xs in (before, scales_before))
    q_in, k_in, v_in, cos_in, sin_in, slots_in = (x.to(device) for x in (q, k, v, cos, sin, slots))
    if device == "cpu":  # .to() has copied nothing: the layout is the caller's
        assert q_in is q

    ops = getattr(torch.ops, cuda.LIBRARY)
    if turned:
        q_out, k_out = ops.rope_append(q_in, k_in, v_in, cos_in, sin_in, *pages, slots_in, *scales)
        exact = reference.rope(q.double(), k.double(), cos.double(), sin.double())
        eager = reference.rope(q, k, cos, sin)
        for name, actual, e, x in zip("qk", (q_out, k_out), eager, exact, strict=True):
            assert_as_good_as_eager(actual.cpu(), e, x, what=name)
        stored = k_out.cpu()
    else:
        ops.append_kv(k_in, v_in, *pages, slots_in, *scales)
        stored = k

    reference.append_kv(stored[kept], v[kept], *before, slots[kept], *scales_before)
    for name, actual, expected in zip(
        ("k_pages", "v_pages", "k_scales", "v_scales"),
        (*pages, *scales),
        (*before, *scales_before),
        strict=False,
    ):
        assert torch.equal(actual.cpu(), expected), name


# ---- linear ------------------------------------------------------------------------------------------------

linears = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([HALF, BF16]),
        "format": st.sampled_from([None, "int8", "q8_0", "q4_0", "q4_1"]),
        "rows": st.integers(1, 8),
        "out": st.sampled_from([1, 5, 8, 16, 17, 33, 100, 250]),
        "groups": st.sampled_from([1, 3, 4, 5, 18, 33]),
        "less": st.sampled_from([0, 8, 24]),
        "norm": st.sampled_from([None, "rms_norm", "layer_norm"]),
        "bias": st.booleans(),
        "activation": st.sampled_from([None, "gelu", "gelu_new", "silu", "relu", "quick_gelu"]),
        "gated": st.booleans(),
        "residual": st.booleans(),
        "mean": st.sampled_from([0.0, 3.0]),
        "seed": st.integers(0, 2**32),
    }
)


def linear(
    device: str,
    dtype: torch.dtype,
    format: str | None,
    rows: int,
    out: int,
    groups: int,
    less: int,
    norm: str | None,
    bias: bool,
    activation: str | None,
    gated: bool,
    residual: bool,
    mean: float,
    seed: int,
) -> None:
    columns = 32 * groups - (less if format in (None, "int8") else 0)
    out *= 16 if gated else 1
    width = out // 2 if gated else out
    x = apart(random(rows, columns, seed=seed, dtype=dtype, mean=mean), odd=seed % 2)
    matrix = random(out, columns, seed=seed + 1, mean=0.1) / math.sqrt(columns)
    weight: Any = matrix.to(dtype) if format is None else quantise(matrix, format)
    vectors = {
        "bias": random(out, seed=seed + 2, dtype=dtype) if bias else None,
        "norm_weight": random(columns, seed=seed + 3, dtype=dtype, mean=1.0) if norm else None,
        "norm_bias": random(columns, seed=seed + 4, dtype=dtype) if norm == "layer_norm" and bias else None,
        "residual": apart(random(rows, width, seed=seed + 5, dtype=dtype)) if residual else None,
    }

    def expected(dtype: torch.dtype) -> Tensor:
        v = {name: None if t is None else t.to(dtype) for name, t in vectors.items()}
        y = x.to(dtype)
        if norm == "rms_norm":
            y = reference.rms_norm(y, v["norm_weight"], 1e-5)
        elif norm == "layer_norm":
            y = reference.layer_norm(y, v["norm_weight"], v["norm_bias"], 1e-5)
        w = weight.to(dtype) if format is None else dequantise(weight, dtype)
        y = F.linear(y, w, v["bias"])
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = (gate if activation is None else reference.ACTIVATIONS[activation](gate)) * up
        elif activation is not None:
            y = reference.ACTIVATIONS[activation](y)
        return y if v["residual"] is None else y + v["residual"]

    on_device = {name: None if t is None else t.to(device) for name, t in vectors.items()}
    if format is not None:
        planes = (None if t is None else t.to(device) for t in weight[1:])
        packed: Any = cuda.pack(type(weight)(format, *planes))
    else:
        packed = weight.to(device)
    y = cuda.fused_linear(
        x.to(device), packed, norm=norm, eps=1e-5, activation=activation, gated=gated, **on_device
    )
    exact = expected(torch.float64)
    assert_as_good_as_eager(y.cpu(), expected(dtype), exact, what="linear")


# ---- sampling ----------------------------------------------------------------------------------------------


def philox(seed: int, sequence: int, step: int) -> int:
    """64 bits of Philox4x32-10, written after the paper."""
    low, high, mask = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0xFFFFFFFF
    c = [step & mask, step >> 32 & mask, sequence & mask, sequence >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ low, b & mask, a >> 32 ^ c[3] ^ high, a & mask]
        low, high = low + 0x9E3779B9 & mask, high + 0xBB67AE85 & mask
    return c[0] << 32 | c[1]


draws = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, HALF, BF16]),
        "vocabulary": st.sampled_from([1, 2, 31, 32, 33, 511, 1000]),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 2, 40, 5000]),
        "top_p": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5]),
        "banned": st.sampled_from([0.0, 0.5]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "step": st.integers(0, 2**40),
    }
)


def options(rows: int, device: str, **values: Any) -> dict[str, Tensor]:
    """The arguments of `cuda.sample`, each for all rows."""
    types = {"top_k": torch.int32} | dict.fromkeys(("seed", "sequence", "step"), torch.int64)
    defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    defaults |= {"sequence": 0, "step": 0} | values
    return {
        name: torch.as_tensor(value).to(types.get(name, torch.float32)).expand(rows).contiguous().to(device)
        for name, value in defaults.items()
    }


def draw(
    device: str,
    dtype: torch.dtype,
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: float,
    seed: int,
    step: int,
) -> None:
    """The token is where Philox's number falls among the probabilities that the filters leave; alone and in a
    batch."""
    rows = 2
    logits = apart(random(rows, vocabulary, seed=seed % 2**32, dtype=dtype) * 3)
    out = torch.rand(rows, vocabulary, generator=torch.Generator().manual_seed(step)) < banned
    out[:, seed % vocabulary] = False
    logits.masked_fill_(out, -math.inf)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sequences = torch.arange(rows)
    on_device = logits.to(device)
    tokens = cuda.sample(
        on_device, **options(rows, device, **filters, seed=seed, step=step, sequence=sequences)
    )
    alone = cuda.sample(on_device[1:], **options(1, device, **filters, seed=seed, step=step, sequence=1))
    assert alone.item() == tokens[1].item()
    for row, token in enumerate(tokens.tolist()):
        scores = logits[row : row + 1].double()
        if temperature == 0:
            assert token == int(logits[row].float().argmax())
            continue
        scores = scores / temperature
        if top_k:
            scores = sampling.keep_top_k(scores, top_k)
        weights = (scores - scores.max()).exp()[0]
        if top_p < 1:  # equal scores stand or fall together
            best, order = weights.sort(descending=True)
            reached = (best.cumsum(0) < top_p * best.sum() * (1 - 1e-6)).sum().clamp(max=vocabulary - 1)
            least = best[reached]
            weights = torch.where(weights >= least, weights, 0.0)
            del order
        weights = torch.where(weights >= min_p, weights, 0.0)
        assert weights[token] > 0, "a token that the filters rule out"
        cumulative = weights.cumsum(0)
        point = philox(seed, row, step) / 2**64 * cumulative[-1]
        slack = 1e-5 * cumulative[-1]
        assert cumulative[token] - weights[token] - slack <= point <= cumulative[token] + slack
