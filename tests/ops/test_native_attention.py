"""Attention, rotary embedding, RMSNorm and the paged cache in the native extension: against float64, bit by
bit where results must not depend on something, and what the ops refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_as_good_as_eager
from hypothesis import given
from hypothesis import strategies as st
from native_runs import (
    OTHER_ISAS,
    at_the_end,
    examples,
    guarded,
    passes_with,
    random,
    require_extension,
    with_threads,
)
from torch import Tensor

from minilm import ops
from minilm.ops import reference
from minilm.ops.backends import native

CACHES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (1, 2, 8, 20, 31, 32, 33, 64, 80, 128, 136)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _extension_is_there() -> None:
    require_extension()


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def projection(
    tokens: int, heads: int, kv_heads: int, size: int, seed: int, layout: str
) -> tuple[Tensor, ...]:
    """q, k, v: parts of one fused projection, tensors of their own, or of a layout that has to be copied."""
    both = random(tokens, heads + 2 * kv_heads, size, seed=seed)
    q, k, v = torch.split(both, [heads, kv_heads, kv_heads], dim=1)
    if layout == "fused":
        return q, k, v
    if layout == "heads first":
        return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    if layout == "v apart":
        return q.contiguous(), k, v.contiguous()
    return q.contiguous(), k.contiguous(), v.contiguous()


lengths_of_a_batch = st.lists(st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 33, 64, 100, 300]), max_size=4)


@examples(120)
@given(
    lengths=lengths_of_a_batch,
    longer=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    size=st.sampled_from(HEAD_SIZES),
    causal=st.booleans(),
    window=st.none() | st.sampled_from([1, 2, 5, 16, 100, 10**9]),
    scale=st.sampled_from([1.0, 0.3, 0.05]),
    layout=st.sampled_from(["fused", "apart", "v apart", "heads first"]),
    seed=st.integers(0, 2**20),
)
def test_attention_is_close(
    lengths: list[int],
    longer: list[int],
    kv_heads: int,
    group: int,
    size: int,
    causal: bool,
    window: int | None,
    scale: float,
    layout: str,
    seed: int,
) -> None:
    """Sequences whose queries are the last of their keys; without keys at all, a query gets zeros."""
    keys = [n + extra for n, extra in zip(lengths, longer, strict=False)]
    q, k, v = projection(sum(keys), kv_heads * group, kv_heads, size, seed, layout)
    q_ends, k_ends = ends(lengths), ends(keys)
    q = q[: q_ends[-1]]
    rest = q_ends, k_ends, max(lengths, default=0), max(keys, default=0), scale, causal, window, 0.0
    with ops.backend("native"):
        out = ops.attention(q, k, v, *rest[:4], scale=scale, causal=causal, window=window)
    assert out.is_contiguous()
    exact = reference.attention(q.double(), k.double(), v.double(), *rest)[0]
    floor = 4 * torch.finfo(torch.float32).eps * (float(v.abs().max()) if v.numel() else 0.0)
    assert_as_good_as_eager(out, reference.attention(q, k, v, *rest)[0], exact, floor=floor)


def in_pairs(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    """q [H, Q, D], k and v [H, K, D], seen [Q, K] -> attention of what is rounded to bfloat16, in float64,
    and how much each of its results can change where a probability is rounded to the other side."""
    q, k, v = ((x.bfloat16().double()) for x in (q * (scale * torch.tensor(1.4426950408889634)), k, v))
    scores = torch.where(seen, q @ k.mT, -torch.inf)
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    total = p.sum(-1, keepdim=True)
    rounded = p.float().bfloat16().double()
    return rounded @ v / total, 2.0**-8 * (p @ v.abs()) / total


@examples(80)
@given(
    keys=st.lists(st.sampled_from([1, 2, 3, 12, 13, 15, 33, 64, 101]), min_size=1, max_size=3),
    queries=st.sampled_from([2, 5, 16, 17, 40, 101]),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    size=st.sampled_from(HEAD_SIZES),
    window=st.none() | st.sampled_from([1, 2, 5, 16]),
    pages=st.none() | st.sampled_from(CACHES),
    scale=st.sampled_from([1.0, 0.3, 0.05]),
    seed=st.integers(0, 2**20),
)
def test_attention_in_pairs_is_that_of_rounded_numbers(
    keys: list[int],
    queries: int,
    kv_heads: int,
    group: int,
    size: int,
    window: int | None,
    pages: torch.dtype | None,
    scale: float,
    seed: int,
) -> None:
    """Where the instruction set has no products of bfloat16, it is attention in float32, bit by bit."""
    new = [min(queries, n) for n in keys]
    q = random(sum(new), kv_heads * group, size, seed=seed)
    if pages is None:
        k, v = (random(sum(keys), kv_heads, size, seed=seed + s) for s in (1, 2))
        op = torch.ops.minilm.attention
        arguments = (q, k, v, ends(new), ends(keys), scale, True, window)
    else:
        k_pages, v_pages, table, context = paged(keys, kv_heads, size, 3, pages, seed)
        rows = [(t[: -(-n // 3)], n) for t, n in zip(table.long(), keys, strict=True)]
        k, v = (torch.cat([x[t].flatten(0, 1)[:n] for t, n in rows]).float() for x in (k_pages, v_pages))
        op = torch.ops.minilm.paged_attention
        arguments = (q, k_pages, v_pages, table, ends(new), context, scale, window)
    out = op(*arguments, pairs=True)
    if native.cpu_isa() != "avx512_bf16" or (pages is not None and max(new) == min(new) == 1):
        assert torch.equal(out, op(*arguments))
        return
    parts = zip(out.split(new), q.split(new), k.split(keys), v.split(keys), strict=True)
    for some, q, k, v in parts:
        k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
        back = torch.arange(len(some))[:, None] + k.shape[1] - len(some) - torch.arange(k.shape[1])
        seen = (back >= 0) & (back < (window or 10**9))
        expected, allowed = in_pairs(q.transpose(0, 1), k, v, scale, seen)
        error = (some.transpose(0, 1) - expected).abs()
        assert bool((error <= allowed + 1e-6).all()), f"{(error / (allowed + 1e-6)).max():.3g} times allowed"


@pytest.mark.parametrize("size", [32, 33])
def test_a_prompt_in_pairs_does_not_depend_on_its_parts_or_on_threads(size: int) -> None:
    q, k, v = projection(101, 4, 2, size, 0, "fused")
    op = torch.ops.minilm.attention

    def whole() -> Tensor:
        out: Tensor = op(q, k, v, ends([101]), ends([101]), 0.3, True, None, pairs=True)
        return out

    first, *others = with_threads(whole)
    assert all(torch.equal(first, other) for other in others)
    for begin, end in ((0, 1), (1, 40), (40, 77), (77, 101)):
        part = op(
            q[begin:end], k[:end], v[:end], ends([end - begin]), ends([end]), 0.3, True, None, pairs=True
        )
        assert torch.equal(part, first[begin:end])


def test_a_query_without_keys_gets_zeros() -> None:
    q, k = random(3, 2, 20, seed=0), random(1, 1, 20, seed=1)
    out = torch.ops.minilm.attention(q, k, k, ends([2, 1]), ends([0, 1]), 1.0, False, None)
    assert torch.equal(out[:2], torch.zeros(2, 2, 20))
    torch.testing.assert_close(out[2], k[0].expand(2, 20))


def paged(
    contexts: list[int], kv_heads: int, size: int, page_size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_pages, v_pages, block_table, context_lens: pages in any order, among others that are NaN, and entries
    of the table that nobody may look at."""
    needed = [-(-n // page_size) for n in contexts]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed))
    table = torch.full((len(contexts), max(needed, default=0) + 1), -7, dtype=torch.int32)
    used = 0
    for row, count in enumerate(needed):
        table[row, :count] = order[used : used + count]
        used += count
    k_pages, v_pages = (
        random(len(order), page_size, kv_heads, size, seed=seed + s, dtype=dtype) for s in (1, 2)
    )
    for page in order[used:]:
        k_pages[page] = v_pages[page] = torch.nan
    return k_pages, v_pages, table, torch.tensor(contexts, dtype=torch.int32)


CONTEXTS = st.sampled_from([1, 2, 3, 17, 31, 64, 255, 256, 257, 300, 512, 513, 800])


@examples(120)
@given(
    contexts=st.lists(CONTEXTS, min_size=1, max_size=3),
    new=st.lists(st.sampled_from([0, 1, 2, 5, 33, 300]), min_size=3, max_size=3),
    decoding=st.booleans(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    size=st.sampled_from(HEAD_SIZES),
    page_size=st.sampled_from([1, 3, 16, 32]),
    dtype=st.sampled_from(CACHES),
    window=st.none() | st.sampled_from([1, 3, 100, 300, 10**9]),
    scale=st.sampled_from([1.0, 0.2]),
    seed=st.integers(0, 2**20),
)
def test_paged_attention_is_close(
    contexts: list[int],
    new: list[int],
    decoding: bool,
    kv_heads: int,
    group: int,
    size: int,
    page_size: int,
    dtype: torch.dtype,
    window: int | None,
    scale: float,
    seed: int,
) -> None:
    """Steps of decoding, with contexts of several stretches, and prompts that go on."""
    lengths = [1 if decoding else min(n, c) for n, c in zip(new, contexts, strict=False)]
    pages = paged(contexts, kv_heads, size, page_size, dtype, seed)
    q = projection(sum(lengths), kv_heads * group, kv_heads, size, seed + 3, "fused")[0]
    rest = ends(lengths), pages[3], max(lengths), max(contexts)
    with ops.backend("native"):
        out = ops.paged_attention(q, *pages[:3], *rest, scale=scale, window=window)
    wide = [p.float() for p in pages[:2]]
    eager = reference.paged_attention(q, *wide, pages[2], *rest, scale, window)
    exact = reference.paged_attention(q.double(), *(p.double() for p in wide), pages[2], *rest, scale, window)
    floor = 4 * torch.finfo(torch.float32).eps * float(wide[1].nan_to_num().abs().max())
    assert_as_good_as_eager(out, eager, exact, floor=floor)


@pytest.mark.parametrize("size", [20, 64])
@pytest.mark.parametrize("window", [None, 9])
def test_a_sequence_does_not_depend_on_batch_or_threads(size: int, window: int | None) -> None:
    lengths = [33, 1, 150, 0, 7]
    q, k, v = projection(sum(lengths), 6, 2, size, 0, "fused")
    at = ends(lengths)

    def run() -> Tensor:
        out: Tensor = torch.ops.minilm.attention(q, k, v, at, at, 0.2, True, window)
        return out

    whole = run()
    assert all(torch.equal(whole, other) for other in with_threads(run))
    for a, b in zip(at.tolist(), at.tolist()[1:], strict=False):
        alone = ends([b - a])
        part = torch.ops.minilm.attention(q[a:b], k[a:b], v[a:b], alone, alone, 0.2, True, window)
        assert torch.equal(part, whole[a:b])


@pytest.mark.parametrize("dtype", CACHES, ids=str)
def test_a_step_of_decoding_does_not_depend_on_batch_threads_or_pages(dtype: torch.dtype) -> None:
    contexts = [5, 700, 512, 1, 300]  # 512 is cut into more stretches than 700
    k_pages, v_pages, table, context = paged(contexts, 2, 20, 16, dtype, 0)
    q = random(5, 10, 20, seed=1)
    at = ends([1] * 5)

    def run() -> Tensor:
        out: Tensor = torch.ops.minilm.paged_attention(q, k_pages, v_pages, table, at, context, 0.2, None)
        return out

    whole = run()
    assert all(torch.equal(whole, other) for other in with_threads(run))
    for row in range(5):
        one = q[row : row + 1], k_pages, v_pages, table[row : row + 1], ends([1]), context[row : row + 1]
        assert torch.equal(torch.ops.minilm.paged_attention(*one, 0.2, None), whole[row : row + 1])
    moved = torch.randperm(len(k_pages), generator=torch.Generator().manual_seed(5))
    renamed = torch.where(table < 0, table, torch.argsort(moved)[table.clamp(min=0)].int())
    again = torch.ops.minilm.paged_attention(
        q, k_pages[moved], v_pages[moved], renamed, at, context, 0.2, None
    )
    assert torch.equal(again, whole)


@pytest.mark.parametrize("window", [None, 60, 300])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("length", "size"), [(150, 20), (620, 20), (1030, 34)])
def test_a_prompt_in_parts_is_bitwise_the_prompt(
    length: int, size: int, pairs: bool, window: int | None
) -> None:
    """Read from pages, in any parts of more than one token. The longest is cut into blocks of queries, and
    its parts into chunks of keys."""
    k_pages, v_pages, table, _ = paged([length], 2, size, 16, torch.bfloat16, 0)
    q = random(length, 6, size, seed=1)

    def run(first: int, last: int) -> Tensor:
        part = q[first:last], k_pages, v_pages, table, ends([last - first])
        context = torch.tensor([last], dtype=torch.int32)
        out: Tensor = torch.ops.minilm.paged_attention(*part, context, 0.2, window, None, None, pairs)
        return out

    whole = run(0, length)
    assert length < 1000 or length * 6 * -(-length // 256) * 64 > 1 << 20
    for cut in (2, 31, 100, 255, 256, 257, 512, length - 2):
        if cut < length:
            assert torch.equal(torch.cat((run(0, cut), run(cut, length))), whole)


@pytest.mark.parametrize("dtype", [*CACHES, torch.int8], ids=str)
def test_new_tokens_over_pages_do_not_depend_on_batch_threads_or_pages(dtype: torch.dtype) -> None:
    contexts, new = [5, 700, 512, 1, 300, 257], [5, 2, 30, 1, 0, 2]
    scales: Any = ()
    k_pages, v_pages, table, context = paged(contexts, 2, 20, 16, torch.float32, 0)
    if dtype == torch.int8:
        scales = tuple(random(*k_pages.shape[:3], seed=s).abs() / 100 for s in (7, 8))
        k_pages, v_pages = ((p.nan_to_num() * 40).clamp(-127, 127).to(torch.int8) for p in (k_pages, v_pages))
    else:
        k_pages, v_pages = k_pages.to(dtype), v_pages.to(dtype)
    q, at = random(sum(new), 10, 20, seed=1), ends(new)

    def run(rows: slice = slice(None), queries: slice = slice(None), at: Tensor = at) -> Tensor:
        part = q[queries], k_pages, v_pages, table[rows], at, context[rows]
        out: Tensor = torch.ops.minilm.paged_attention(*part, 0.2, None, *scales)
        return out

    whole = run()
    assert whole.isfinite().all()
    assert all(torch.equal(whole, other) for other in with_threads(run))
    for row, (first, last) in enumerate(zip(at.tolist(), at.tolist()[1:], strict=False)):
        if new[row] > 1:  # one query alone is a step of decoding
            own = run(slice(row, row + 1), slice(first, last), ends([last - first]))
            assert torch.equal(own, whole[first:last])


def test_few_queries_see_what_the_reference_sees_in_a_long_context() -> None:
    contexts, new = [1500, 900, 300], [3, 40, 2]
    for window in (None, 5, 300, 1100):
        for dtype in (torch.float32, torch.float16):
            pages = paged(contexts, 2, 33, 16, dtype, 2)
            q = random(sum(new), 6, 33, seed=4)
            rest = ends(new), pages[3], max(new), max(contexts)
            with ops.backend("native"):
                out = ops.paged_attention(q, *pages[:3], *rest, scale=0.4, window=window)
            wide = [p.double() for p in pages[:2]]
            exact = reference.paged_attention(q.double(), *wide, pages[2], *rest, 0.4, window)
            torch.testing.assert_close(out.double(), exact, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("window", [None, 300])
def test_nan_over_pages_stays_in_its_head(window: int | None) -> None:
    """Of a value, in the queries that see its key."""
    k_pages, v_pages, table, context = paged([700], 2, 20, 16, torch.float32, 0)
    q, at = random(9, 4, 20, seed=1), ends([9])
    clean = torch.ops.minilm.paged_attention(q, k_pages, v_pages, table, at, context, 0.2, window)
    v_pages[table[0, 600 // 16], 600 % 16, 1, 7] = torch.nan
    out = torch.ops.minilm.paged_attention(q, k_pages, v_pages, table, at, context, 0.2, window)
    assert out[:, 2:, 7].isnan().all()
    out[:, 2:, 7] = clean[:, 2:, 7]
    assert torch.equal(out, clean)


def test_nan_stays_in_its_sequence_and_head() -> None:
    lengths = [40, 30, 20]
    q, k, v = (x.clone() for x in projection(90, 4, 2, 20, 0, "apart"))
    at = ends(lengths)
    clean = torch.ops.minilm.attention(q, k, v, at, at, 0.2, False, None)
    k[45, 1, 3] = torch.nan
    out = torch.ops.minilm.attention(q, k, v, at, at, 0.2, False, None)
    assert out[40:70, 2:].isnan().all()
    out[40:70, 2:] = clean[40:70, 2:]
    assert torch.equal(out, clean)

    k_pages, v_pages, table, context = paged([500, 300], 2, 20, 16, torch.float32, 0)
    q, at = random(2, 4, 20, seed=1), ends([1, 1])
    clean = torch.ops.minilm.paged_attention(q, k_pages, v_pages, table, at, context, 0.2, None)
    v_pages[table[0, 3], 5, 0, 7] = torch.nan
    out = torch.ops.minilm.paged_attention(q, k_pages, v_pages, table, at, context, 0.2, None)
    assert out[0, :2, 7].isnan().all()
    out[0, :2, 7] = clean[0, :2, 7]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("size", [5, 16, 33])
def test_nothing_beyond_the_last_element_is_read(size: int) -> None:
    q, k, v = projection(19, 3, 3, size, 0, "apart")
    at = ends([19])
    out = torch.ops.minilm.attention(q, k, v, at, at, 0.2, True, None)
    for position in range(3):
        arguments = [q, k, v]
        with guarded(q.nbytes) as memory:
            arguments[position] = at_the_end(memory, arguments[position])
            assert torch.equal(torch.ops.minilm.attention(*arguments, at, at, 0.2, True, None), out)
    for dtype in CACHES:
        pages = [random(3, 4, 1, size, seed=s, dtype=dtype) for s in (1, 2)]
        table = torch.tensor([[0, 2, 1]], dtype=torch.int32)
        for queries in (1, 2):
            rest = table, ends([queries]), torch.tensor([12], dtype=torch.int32), 0.2, None
            out = torch.ops.minilm.paged_attention(q[:queries], *pages, *rest)
            for position in range(2):
                moved = list(pages)
                with guarded(pages[0].nbytes) as memory:
                    moved[position] = at_the_end(memory, pages[position])
                    assert torch.equal(torch.ops.minilm.paged_attention(q[:queries], *moved, *rest), out)


# Pages of int8


def codes_and_scales(
    contexts: list[int], kv_heads: int, size: int, page_size: int, seed: int
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Pages of codes, their scales, block_table, context_lens; what nobody may look at has a scale of NaN."""
    *pages, table, context = paged(contexts, kv_heads, size, page_size, torch.float32, seed)
    quantised = [reference.quantise(p) for p in pages]
    return [codes for codes, _ in quantised], [scale.contiguous() for _, scale in quantised], table, context


@examples(60)
@given(
    contexts=st.lists(CONTEXTS, min_size=1, max_size=3),
    new=st.lists(st.sampled_from([0, 1, 2, 33]), min_size=3, max_size=3),
    decoding=st.booleans(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    size=st.sampled_from(HEAD_SIZES),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.none() | st.sampled_from([1, 7, 300]),
    seed=st.integers(0, 2**20),
)
def test_attention_over_codes_is_close(
    contexts: list[int],
    new: list[int],
    decoding: bool,
    kv_heads: int,
    group: int,
    size: int,
    page_size: int,
    window: int | None,
    seed: int,
) -> None:
    lengths = [1 if decoding else min(n, c) for n, c in zip(new, contexts, strict=False)]
    pages, scales, table, context = codes_and_scales(contexts, kv_heads, size, page_size, seed)
    q = projection(sum(lengths), kv_heads * group, kv_heads, size, seed + 3, "fused")[0]
    rest = ends(lengths), context, max(lengths), max(contexts)
    with ops.backend("native"):
        out = ops.paged_attention(
            q, *pages, table, *rest, scale=0.3, window=window, k_scales=scales[0], v_scales=scales[1]
        )
    eager = reference.paged_attention(q, *pages, table, *rest, 0.3, window, *scales)
    wide = [p.double() * s.double()[..., None] for p, s in zip(pages, scales, strict=True)]
    exact = reference.paged_attention(q.double(), *wide, table, *rest, 0.3, window)
    floor = 4 * torch.finfo(torch.float32).eps * float(wide[1].nan_to_num().abs().max())
    assert_as_good_as_eager(out, eager, exact, floor=floor)


@pytest.mark.parametrize("size", [1, 5, 16, 33, 64, 80])
def test_codes_and_scales_are_those_of_the_reference(size: int) -> None:
    """Bit by bit; heads of zeros, large and tiny ones among them."""
    k, v = (random(7, 3, size, seed=s) * 10.0 ** torch.arange(-18, 17, 5)[:7, None, None] for s in (0, 1))
    k[3, 1] = 0
    k[4] = k[4].round()  # with ties
    slots = torch.tensor([11, 0, 5, 4, 9, 2, 1])
    found = {}
    for backend in ("native", "reference"):
        pages = [torch.full((3, 4, 3, size), 9, dtype=torch.int8) for _ in range(2)]
        scales = [torch.full((3, 4, 3), 9.0) for _ in range(2)]
        with ops.backend(backend):
            ops.append_kv(k, v, *pages, slots, *scales)
        found[backend] = [*pages, *scales]
    for ours, theirs in zip(found["native"], found["reference"], strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_finite_stays_that_in_its_head() -> None:
    k = random(2, 2, 20, seed=0)
    k[0, 1, 3], k[1, 0, 7] = torch.nan, torch.inf
    pages = [torch.zeros(1, 2, 2, 20, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(1, 2, 2) for _ in range(2)]
    with ops.backend("native"):
        ops.append_kv(k, k, *pages, torch.tensor([0, 1]), *scales)
    assert scales[0].isfinite().tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize("queries", [1, 2])
def test_nothing_beyond_codes_or_scales_is_read(queries: int) -> None:
    pages, scales, table, context = codes_and_scales([12], 1, 33, 4, 0)
    pages, scales = [p[table[0, :3].long()] for p in pages], [s[table[0, :3].long()] for s in scales]
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    q = random(queries, 3, 33, seed=1)

    def run(given: list[Tensor]) -> Tensor:
        rest = table, ends([queries]), context, 0.2, None
        out: Tensor = torch.ops.minilm.paged_attention(q, *given[:2], *rest, *given[2:])
        return out

    expected = run([*pages, *scales])
    assert expected.isfinite().all()
    for position in range(4):
        moved = [*pages, *scales]
        with guarded(moved[position].nbytes) as memory:
            moved[position] = at_the_end(memory, moved[position])
            assert torch.equal(run(moved), expected)


# Rotary embedding and the cache


@examples(80)
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 31, 200]),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    half=st.sampled_from([1, 3, 4, 10, 16, 17, 32, 40]),
    page_size=st.integers(1, 9),
    dtype=st.sampled_from(CACHES),
    layout=st.sampled_from(["fused", "apart", "v apart", "heads first"]),
    seed=st.integers(0, 2**20),
)
def test_rope_and_append_are_close(
    tokens: int,
    heads: int,
    kv_heads: int,
    half: int,
    page_size: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    q, k, v = projection(tokens, heads, kv_heads, 2 * half, seed, layout)
    angles = random(tokens, half, seed=seed + 1)
    cos, sin = angles.cos(), angles.sin()
    before = q.clone(), k.clone(), v.clone()
    exact = reference.rope(q.double(), k.double(), cos.double(), sin.double())
    eager = reference.rope(q, k, cos, sin)
    with ops.backend("native"):
        turned = ops.rope(q, k, cos, sin)
    for triple in zip(turned, eager, exact, strict=True):
        assert_as_good_as_eager(*triple)
    slots = torch.randperm(tokens + 5, generator=torch.Generator().manual_seed(seed))[:tokens]
    empty = torch.full((-(-(tokens + 5) // page_size), page_size, kv_heads, 2 * half), 7.0, dtype=dtype)
    pages, expected = [empty.clone(), empty.clone()], [empty.clone(), empty.clone()]
    with ops.backend("native"):
        again = ops.rope_append(q, k, v, cos, sin, *pages, slots)
        assert all(map(torch.equal, again, turned))
        reference.append_kv(turned[1], v, *expected, slots)
        assert all(map(torch.equal, pages, expected))
        ops.append_kv(k, v, *pages, slots)
    reference.append_kv(k, v, *expected, slots)
    assert all(map(torch.equal, pages, expected))
    assert all(map(torch.equal, before, (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_appended_numbers_are_rounded_as_pytorch_rounds(dtype: torch.dtype) -> None:
    """Ties, subnormals, what overflows, infinities and NaN."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = torch.cat((halves, (halves[1:] + halves[:-1]) / 2, halves * 1.00390625))
    x = torch.nn.functional.pad(between, (0, -len(between) % 48)).view(-1, 2, 24)
    pages = [torch.zeros(len(x), 1, 2, 24, dtype=dtype) for _ in range(2)]
    torch.ops.minilm.append_kv(x, -x, *pages, torch.arange(len(x)))
    torch.testing.assert_close(pages[0][:, 0], x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pages[1][:, 0], -x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_rope_does_not_depend_on_batch_or_threads() -> None:
    q, k, _ = projection(900, 3, 2, 20, 0, "fused")
    angles = random(900, 10, seed=1)
    cos, sin = angles.cos(), angles.sin()
    whole = torch.cat(torch.ops.minilm.rope(q, k, cos, sin), dim=1)
    for other in with_threads(lambda: torch.cat(torch.ops.minilm.rope(q, k, cos, sin), dim=1)):
        assert torch.equal(other, whole)
    for row in (0, 450, 899):
        one = torch.ops.minilm.rope(*(x[row : row + 1] for x in (q, k, cos, sin)))
        assert torch.equal(torch.cat(one, dim=1), whole[row : row + 1])


# RMSNorm

NORM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@examples(150)
@given(
    leading=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2)]),
    channels=st.sampled_from([1, 2, 7, 16, 31, 64, 127, 200, 384, 1000]),
    dtype=st.sampled_from(NORM_DTYPES),
    wide_weight=st.booleans(),
    residual=st.booleans(),
    mean=st.sampled_from([0.0, -3.0, 100.0]),
    rows_apart=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_rms_norm_is_close(
    leading: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    wide_weight: bool,
    residual: bool,
    mean: float,
    rows_apart: bool,
    eps: float,
    seed: int,
) -> None:
    x, r = (random(*leading, channels, seed=seed + s, dtype=dtype) + m for s, m in ((0, mean), (1, 0.0)))
    if rows_apart:
        x = torch.cat((x, x + 1), dim=-1)[..., :channels]
    weight = random(channels, seed=seed + 2).to(
        torch.float32 if wide_weight and dtype.itemsize == 2 else dtype
    )
    with ops.backend("native"):
        if residual:
            y, total = ops.add_rms_norm(x, r, weight, eps)
            assert torch.equal(total, x + r)
        else:
            y, total = ops.rms_norm(x, weight, eps), x
    assert y.is_contiguous()
    exact = reference.rms_norm(total.double(), weight.double(), eps)
    eager = reference.rms_norm(total, weight, eps).to(dtype)
    floor = (
        8 * torch.finfo(dtype).eps * float(exact.abs().max())
        if dtype == torch.float64 and y.numel()
        else None
    )
    assert_as_good_as_eager(y, eager, exact, floor=floor)


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
def test_a_normalised_row_does_not_depend_on_batch_or_threads(dtype: torch.dtype) -> None:
    x, r, weight = (random(*s, seed=i, dtype=dtype) for i, s in enumerate(((301, 200), (301, 200), (200,))))
    whole = torch.ops.minilm.add_rms_norm(x, r, weight, EPS)[0]
    for other in with_threads(lambda: torch.ops.minilm.add_rms_norm(x, r, weight, EPS)[0]):
        assert torch.equal(other, whole)
    for row in (0, 150, 300):
        assert torch.equal(torch.ops.minilm.rms_norm((x + r)[row], weight, EPS), whole[row])


def test_gradients_of_rms_norm_are_those_of_the_formula() -> None:
    shapes = ((3, 5), (3, 5), (5,))
    inputs = [random(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]

    def both(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return native.add_rms_norm(x, r.sin(), w, EPS)

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)
    assert torch.autograd.gradcheck(lambda x, w: native.rms_norm(x, w, EPS), (inputs[0], inputs[2]))
    for needs in ("x", "r", "w"):
        some = [i.detach().requires_grad_(name == needs) for name, i in zip("xrw", inputs, strict=True)]
        assert torch.autograd.gradcheck(both, some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_rms_norm_are_close_to_eager(dtype: torch.dtype) -> None:
    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
        torch.autograd.backward(function(*leaves, EPS), [g.to(dtype) for g in upstream])
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    inputs = [random(*s, seed=i, dtype=dtype) for i, s in enumerate(((6, 384), (6, 384), (384,)))]
    upstream = [random(6, 384, seed=i, dtype=dtype) for i in (4, 5)]
    ours, eager = gradients(native.add_rms_norm, dtype), gradients(reference.add_rms_norm, dtype)
    exact = gradients(reference.add_rms_norm, torch.float64)
    assert len(ours) == 3
    for triple in zip(ours, eager, exact, strict=True):
        assert_as_good_as_eager(*triple)


# What is chosen, and what is refused


def attention_call(**options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    q, k, v = (x.to(dtype) for x in projection(4, 2, 1, 8, 0, "apart"))
    if options.pop("grad", False):
        q.requires_grad_()
    at = ends([4])
    call = ops.attention_with_lse if options.pop("lse", False) else ops.attention
    return call(q, k, v, at, at, 4, 4, scale=1.0, causal=True, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.bfloat16}, "no kernel for torch.bfloat16"),
        ({"grad": True}, "no derivative"),
        ({"dropout_p": 0.1}, "has no dropout"),
        ({"lse": True}, "has no log-sum-exp"),
        ({"bias": torch.zeros(2, 4, 4)}, "has no bias"),
        ({"alibi_slopes": torch.ones(2)}, "has no ALiBi"),
    ],
)
def test_attention_that_cannot_be_native_says_why(options: dict[str, Any], reason: str) -> None:
    with ops.backend("native"), pytest.raises(ops.BackendError, match=reason):
        attention_call(**options)
    ops.explain(reset=True)
    attention_call(**dict(options))
    assert "native" not in ops.explain().backends("attention")
    attention_call()
    assert "native" in ops.explain().backends("attention")


def test_the_cache_and_rope_say_why_they_cannot_be_native() -> None:
    q, k, v = projection(2, 2, 1, 8, 0, "apart")
    cos, slots = torch.ones(2, 4), torch.arange(2)
    pages = [torch.zeros(1, 4, 1, 8) for _ in range(2)]
    needs = q.clone().requires_grad_()
    cases = [
        ("no derivative", lambda: ops.rope(needs, k, cos, cos)),
        ("no kernel for torch.float64", lambda: ops.rope(q.double(), k.double(), cos, cos)),
        ("no derivative", lambda: ops.rope_append(needs, k, v, cos, cos, *pages, slots)),
        ("no derivative", lambda: ops.append_kv(k, needs[:, :1], *pages, slots)),
        ("a cache in torch.float64", lambda: ops.append_kv(k, v, *(p.double() for p in pages), slots)),
    ]
    for reason, call in cases:
        with ops.backend("native"), pytest.raises(ops.BackendError, match=reason):
            call()
    ops.rope_append(needs, k, v, cos, cos, *pages, slots)[0].sum().backward()  # goes elsewhere
    assert needs.grad is not None


GOOD: dict[str, dict[str, Any]] = {
    "attention": {
        "q": random(5, 4, 6, seed=0),
        "k": random(7, 2, 6, seed=1),
        "v": random(7, 2, 6, seed=2),
        "cu_seqlens_q": ends([2, 3]),
        "cu_seqlens_k": ends([4, 3]),
        "scale": 1.0,
        "causal": True,
        "window": None,
    },
    "paged_attention": {
        "q": random(5, 4, 6, seed=0),
        "k_pages": random(6, 2, 2, 6, seed=1),
        "v_pages": random(6, 2, 2, 6, seed=2),
        "block_table": torch.tensor([[5, 1], [0, 3]], dtype=torch.int32),
        "cu_seqlens_q": ends([2, 3]),
        "context_lens": torch.tensor([4, 3], dtype=torch.int32),
        "scale": 1.0,
        "window": None,
    },
    "rope_append": {
        "q": random(3, 4, 6, seed=0),
        "k": random(3, 2, 6, seed=1),
        "v": random(3, 2, 6, seed=2),
        "cos": random(3, 3, seed=3),
        "sin": random(3, 3, seed=4),
        "k_pages": random(2, 2, 2, 6, seed=5),
        "v_pages": random(2, 2, 2, 6, seed=6),
        "slots": torch.tensor([3, 0, 1]),
    },
    "rms_norm": {"x": random(2, 6, seed=0), "weight": random(6, seed=1), "eps": EPS},
}


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("attention", {"q": random(5, 24, seed=0)}, "q must be float32"),
    ("attention", {"q": random(5, 4, 6, seed=0).half()}, "q must be float32"),
    ("attention", {"q": random(5, 3, 6, seed=0)}, "3 query heads of size 6 cannot be shared evenly by 2"),
    (
        "attention",
        {"k": random(7, 2, 5, seed=0)},
        r"k must be float32 \[\*, \*, 6\], and is float32 \[7, 2, 5\]",
    ),
    ("attention", {"k": random(7, 0, 6, seed=0), "v": random(7, 0, 6, seed=0)}, "shared evenly by 0"),
    ("attention", {"v": random(6, 2, 6, seed=0)}, "v must be"),
    ("attention", {"v": random(7, 2, 6, seed=0).double()}, "v must be float32"),
    ("attention", {"cu_seqlens_q": ends([2, 2])}, "must grow from 0 to 5"),
    ("attention", {"cu_seqlens_q": ends([6, -1])}, "must grow from 0 to 5"),
    ("attention", {"cu_seqlens_q": torch.tensor([1, 2, 5], dtype=torch.int32)}, "must grow from 0 to 5"),
    ("attention", {"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q must be int32"),
    ("attention", {"cu_seqlens_q": torch.empty(0, dtype=torch.int32)}, "must grow from 0 to 5"),
    ("attention", {"cu_seqlens_k": ends([4, 4])}, "must grow from 0 to 7"),
    ("attention", {"cu_seqlens_k": ends([3, 3, 1])}, "2 sequences of queries and 3 of keys"),
    ("attention", {"cu_seqlens_k": ends([1, 6])}, "sequence 0 has 2 queries and 1 keys"),
    ("attention", {"window": 0}, "window must be at least 1, and is 0"),
    ("attention", {"window": -(2**40)}, "window must be at least 1"),
    ("paged_attention", {"k_pages": random(6, 2, 12, seed=0)}, "k_pages must be"),
    ("paged_attention", {"k_pages": random(6, 2, 2, 5, seed=0)}, "k_pages must be"),
    ("paged_attention", {"v_pages": random(5, 2, 2, 6, seed=0)}, "v_pages must be"),
    ("paged_attention", {"v_pages": random(6, 2, 2, 6, seed=0).half()}, "v_pages must be float32"),
    ("paged_attention", {"v_pages": random(2, 6, 2, 6, seed=0).transpose(0, 1)}, "must be contiguous"),
    ("paged_attention", {"k_pages": torch.ones(6, 2, 2, 6, dtype=torch.int8)}, "v_pages must be int8"),
    (
        "paged_attention",
        {name: torch.ones(6, 2, 2, 6, dtype=torch.int8) for name in ("k_pages", "v_pages")},
        "int8 pages come with k_scales",
    ),
    (
        "paged_attention",
        {"k_pages": torch.ones(6, 2, 2, 6).double(), "v_pages": torch.ones(6, 2, 2, 6).double()},
        "k_pages must be float32, bfloat16, float16 or int8",
    ),
    ("paged_attention", {"block_table": table([5, 1])}, r"block_table must be int32 \[2, \*\]"),
    ("paged_attention", {"block_table": table([5, 1], [0, 6])}, "names the page 6, and there are 6"),
    ("paged_attention", {"block_table": table([5, -1], [0, 3])}, "names the page -1"),
    ("paged_attention", {"block_table": table([5], [0])}, "room for 1"),
    ("paged_attention", {"block_table": table([5, 1], [0, 3]).long()}, "block_table must be int32"),
    ("paged_attention", {"context_lens": torch.tensor([4, 5], dtype=torch.int32)}, "take 3 pages"),
    ("paged_attention", {"context_lens": torch.tensor([1, 3], dtype=torch.int32)}, "a context of 1"),
    ("paged_attention", {"context_lens": torch.tensor([2**31 - 1, 3], dtype=torch.int32)}, "room for 2"),
    ("paged_attention", {"context_lens": torch.tensor([-4, 3], dtype=torch.int32)}, "a context of -4"),
    ("paged_attention", {"context_lens": torch.tensor([4], dtype=torch.int32)}, "context_lens must be"),
    ("paged_attention", {"cu_seqlens_q": ends([2, 4])}, "must grow from 0 to 5"),
    ("paged_attention", {"window": 0}, "window must be at least 1"),
    ("rope_append", {"q": random(2, 4, 6, seed=0)}, "k must be float32"),
    ("rope_append", {"q": random(3, 4, 8, seed=0)}, "k must be float32"),
    ("rope_append", {"q": random(3, 4, 5, seed=0), "k": random(3, 2, 5, seed=1)}, "must be even, and is 5"),
    ("rope_append", {"k": random(3, 2, 6, seed=0).half()}, "k must be float32"),
    ("rope_append", {"v": random(3, 1, 6, seed=0)}, "v must be"),
    ("rope_append", {"cos": random(3, 6, seed=0)}, r"cos must be float32 \[3, 3\]"),
    ("rope_append", {"sin": random(2, 3, seed=0)}, "sin must be"),
    ("rope_append", {"sin": random(3, 3, seed=0).double()}, "sin must be float32"),
    ("rope_append", {"k_pages": random(2, 2, 1, 6, seed=0)}, "k_pages must be"),
    ("rope_append", {"v_pages": random(2, 2, 2, 6, seed=0).bfloat16()}, "v_pages must be float32"),
    ("rope_append", {"slots": torch.tensor([3, 0, 4])}, "slots holds 4, and the pages .* have 4 slots"),
    ("rope_append", {"slots": torch.tensor([-1, 0, 1])}, "slots holds -1"),
    ("rope_append", {"slots": torch.tensor([2**62, 0, 1])}, "slots holds"),
    ("rope_append", {"slots": torch.tensor([3, 0])}, "slots must be"),
    ("rope_append", {"slots": torch.tensor([3, 0, 1], dtype=torch.int32)}, "slots must be int64"),
    ("rope_append", {"k_pages": torch.empty(0, 2, 2, 6), "v_pages": torch.empty(0, 2, 2, 6)}, "have 0 slots"),
    ("rms_norm", {"x": torch.ones(2, 0)}, "C >= 1"),
    ("rms_norm", {"weight": torch.ones(5)}, "weight must be"),
    ("rms_norm", {"weight": torch.ones(6).double()}, "weight must be float32"),
    ("rms_norm", {"x": torch.ones(2, 6, dtype=torch.int64)}, "x must be float32, float64"),
]


@pytest.mark.parametrize(("op", "changed", "message"), BAD)
def test_the_ops_refuse(op: str, changed: dict[str, Any], message: str) -> None:
    call = getattr(torch.ops.minilm, op)
    good = {k: v.clone() if isinstance(v, Tensor) else v for k, v in GOOD[op].items()}
    call(*good.values())
    before = [t.clone() for t in good.values() if isinstance(t, Tensor)]
    with pytest.raises(RuntimeError, match=message):
        call(*{**good, **changed}.values())
    assert all(map(torch.equal, before, [t for t in good.values() if isinstance(t, Tensor)]))


@pytest.mark.parametrize("op", [*GOOD, "append_kv", "rope", "add_rms_norm"])
def test_opcheck(op: str) -> None:
    arguments = dict(GOOD.get(op) or GOOD["rope_append"])
    if op == "append_kv":
        arguments = {k: v for k, v in arguments.items() if k not in ("q", "cos", "sin")}
    if op == "rope":
        arguments = {k: arguments[k] for k in ("q", "k", "cos", "sin")}
    if op == "add_rms_norm":
        arguments = {"x": random(2, 6, seed=0), "residual": random(2, 6, seed=1), **GOOD["rms_norm"]}
        arguments = {k: arguments[k] for k in ("x", "residual", "weight", "eps")}
    if "rms_norm" in op:
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()
        }
    torch.library.opcheck(getattr(torch.ops.minilm, op).default, tuple(arguments.values()))


def test_compiles_without_a_graph_break() -> None:
    """A step of a decoder, with the cache written in place."""
    k_pages, v_pages, block_table, context = paged([5, 9], 2, 8, 4, torch.float32, 0)
    angles = random(2, 4, seed=1)
    slots = block_table[[0, 1], [1, 2]].long() * 4

    def run(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        q, k = ops.rope_append(q, k, v, angles.cos(), angles.sin(), k_pages, v_pages, slots)
        at = ends_of_two
        out = ops.paged_attention(q, k_pages, v_pages, block_table, at, context, 1, 9, scale=0.3)
        fresh = ops.attention(q, k, v, at, at, 1, 1, scale=0.3, causal=True)
        return ops.rms_norm(out + fresh, torch.ones(8), EPS)

    ends_of_two = ends([1, 1])
    q, k, v = projection(2, 4, 2, 8, 3, "fused")
    pages = k_pages.clone(), v_pages.clone()
    expected = run(q, k, v, k_pages, v_pages)
    with torch.no_grad():
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v, *pages)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(pages, (k_pages, v_pages), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa: str) -> None:
    """This file again, in a process that is told to use another instruction set than the best."""
    passes_with(isa, __file__, chosen="(close and not eager) or depend or nan or beyond or rounded or zeros")
