"""The Triton attention over a paged cache in the interpreter: against float64 formulas, its NumPy twin, the
reference, and PyTorch's rules for ops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager, assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, seeds
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.kernels.decode import paged_attention_op, twin
from minilm.kernels.devices import CHIPS, assume
from minilm.kernels.heuristics import (
    MOST_PARTS,
    attention_shared_memory,
    combine_block,
    context_parts,
    paged_block,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Batch:
    """Sequences with a past; q [T, H, D], and what the cache holds of them, [sum of contexts, ...]."""

    q: Tensor
    stored: tuple[Tensor, ...]
    """k and v as the cache has them, and their scales if they are int8."""
    new: tuple[int, ...]
    contexts: tuple[int, ...]
    window: int = 0
    page_size: int = 16
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def row(self, index: int) -> Batch:
        """One of the sequences by itself."""
        q0, k0 = sum(self.new[:index]), sum(self.contexts[:index])
        new, context = self.new[index], self.contexts[index]
        stored = tuple(x[k0 : k0 + context] for x in self.stored)
        return replace(self, q=self.q[q0 : q0 + new], stored=stored, new=(new,), contexts=(context,))

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The attention in `dtype`, one sequence and one head at a time."""
        k, v, *scales = self.stored
        if scales:
            k, v = (x.to(dtype) * s.to(dtype)[..., None] for x, s in zip((k, v), scales, strict=True))
        group = self.q.shape[1] // k.shape[1]
        outputs, q0, k0 = [torch.empty(0, *self.q.shape[1:], dtype=dtype)], 0, 0
        for new, context in zip(self.new, self.contexts, strict=True):
            distance = torch.arange(context - new, context)[:, None] - torch.arange(context)
            hidden = (distance < 0) | (distance >= (self.window or context + 1))
            heads = []
            for h in range(self.q.shape[1]):
                keys, values = (x[k0 : k0 + context, h // group].to(dtype) for x in (k, v))
                s = self.q[q0 : q0 + new, h].to(dtype) @ keys.T * self.scale
                heads.append(s.masked_fill(hidden, -math.inf).softmax(-1) @ values)
            outputs.append(torch.stack(heads, dim=1))
            q0, k0 = q0 + new, k0 + context
        return torch.cat(outputs)

    def paged(self) -> tuple[list[Tensor], Tensor]:
        """Pages (and scales) in any order, and the block table.

        Wherever nothing may be read there is NaN (in int8, 127 times NaN): in slots without a token, and in
        the page that the table names beyond a sequence's last, and before those that its window reaches.
        """
        size = self.page_size
        counts = [-(-n // size) for n in self.contexts]
        order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(self.seed)).tolist()
        table = torch.full((len(counts), max(counts) + 2), order.pop(), dtype=torch.int32)
        stores = []
        for x in self.stored:
            nothing = 127 if x.dtype == torch.int8 else math.nan
            stores.append(torch.full((sum(counts) + 1, size, *x.shape[1:]), nothing, dtype=x.dtype))
        start = 0
        for row, (new, context) in enumerate(zip(self.new, self.contexts, strict=True)):
            reached = max(0, context - new - self.window + 1) if self.window else 0
            for number in range(counts[row]):
                page, at = order.pop(), number * size
                if at + size > reached:
                    table[row, number] = page
                for store, x in zip(stores, self.stored, strict=True):
                    part = x[start + at : start + min(at + size, context)]
                    store[page, : len(part)] = part
            start += context
        return stores, table

    def arguments(self, splits: int = 0) -> tuple[Any, ...]:
        """Those of the kernel's op."""
        stores, table = self.paged()
        scales = stores[2:] or [None, None]
        cu = torch.tensor([0, *accumulate(self.new)], dtype=torch.int32)
        context = torch.tensor(self.contexts, dtype=torch.int32)
        longest = max(self.new), max(self.contexts)
        pages = (*stores[:2], *scales)
        return (self.q, *pages, table, cu, context, *longest, self.scale, self.window, splits)

    def ours(self, splits: int = 0) -> Tensor:
        return paged_attention_op(*self.arguments(splits))


def batch(
    new: list[int], contexts: list[int], kv_heads: int = 2, group: int = 3, size: int = 32,
    dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None, strided: bool = False,
    seed: int = 0, **options: Any,
) -> Batch:  # fmt: skip
    """Random queries, and keys and values with a mean."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(sum(new), 2 * kv_heads * group, size, generator=g).to(dtype)
    k, v = torch.randn(2, sum(contexts), kv_heads, size, generator=g) + 0.5
    if cache_dtype == torch.int8:
        (k, k_scales), (v, v_scales) = ops.reference.quantise(k), ops.reference.quantise(v)
        stored: tuple[Tensor, ...] = (k, v, k_scales, v_scales)
    else:
        stored = tuple(x.to(cache_dtype or dtype) for x in (k, v))
    q = wide[:, ::2] if strided else wide[:, ::2].contiguous()
    return Batch(q, stored, tuple(new), tuple(contexts), seed=seed, **options)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    page_size = draw(st.sampled_from([1, 2, 7, 16, 32]))
    near = [1, max(page_size - 1, 1), page_size, page_size + 1]
    contexts = draw(
        st.lists(st.sampled_from([0, *near, 31, 127, 128, 129, 251, 300]), min_size=1, max_size=3)
    )
    contexts = contexts if any(contexts) else [1, *contexts]
    new = [min(n, draw(st.sampled_from([1, 1, 1, 2, 5, 23]))) for n in contexts]
    return batch(
        new,
        contexts,
        kv_heads=draw(st.sampled_from([1, 1, 2])),
        group=draw(st.integers(1, 9)),
        size=draw(st.sampled_from([16, 24, 32, 64, 80, 96, 128])),
        dtype=draw(st.sampled_from(FLOATS)),
        cache_dtype=draw(st.sampled_from([None, None, torch.int8, torch.float16, torch.float32])),
        strided=draw(st.booleans()),
        seed=draw(seeds()),
        window=draw(st.sampled_from([0, 0, 1, 5, 64, 130])),
        page_size=page_size,
    )


def judge(case: Batch, ours: Tensor) -> None:
    exact = case.formula(torch.float64)
    floor = 4 * torch.finfo(case.q.dtype).eps * float(exact.abs().max())
    assert_as_good_as_eager(ours, case.formula(case.q.dtype), exact, floor=floor)


@pytest.mark.slow
@examples(30)
@given(case=batches(), splits=st.integers(0, 7))
def test_errs_no_more_than_twice_eager(case: Batch, splits: int) -> None:
    judge(case, case.ours(splits))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_chunk_of_a_prompt(splits: int, cache_dtype: torch.dtype | None) -> None:
    """Many new tokens: tiles of 64 rows that begin and end within a token's group, blocks that all rows see
    in full, blocks that a window cuts off on one side."""
    for window in (0, 70):
        case = batch(
            [40, 3, 70], [290, 3, 71], 1, 3, 64, torch.float16, cache_dtype, window=window, seed=window
        )
        assert paged_block(64, 2, False, 210, CHIPS["sm_90"]).queries == 64
        judge(case, case.ours(splits))


@st.composite
def steps(draw: st.DrawFn) -> Batch:
    """Steps of decoding, or chunks of two or three tokens, of contexts in one part and in many."""
    new = draw(st.sampled_from([1, 1, 1, 2, 3]))
    contexts = draw(st.lists(st.sampled_from([3, 64, 127, 129, 300, 700, 1500]), min_size=2, max_size=3))
    return batch(
        [new] * len(contexts),
        contexts,
        group=draw(st.integers(1, 5)),
        size=draw(st.sampled_from([24, 32, 64])),
        dtype=draw(st.sampled_from(FLOATS)),
        cache_dtype=draw(st.sampled_from([None, torch.int8])),
        window=draw(st.sampled_from([0, 0, 200])),
        seed=draw(seeds()),
    )


@pytest.mark.slow
@examples(12)
@given(case=steps(), splits=st.sampled_from([0, 0, 0, 1, 4]), chip=st.sampled_from(sorted(CHIPS)))
def test_a_sequence_does_not_depend_on_its_batch(case: Batch, splits: int, chip: str) -> None:
    """Bit by bit, in parts that the heuristics choose for a chip, beside shorter and longer contexts."""
    with assume(CHIPS[chip]):
        together = case.ours(splits)
        start = 0
        for index, new in enumerate(case.new):
            assert torch.equal(case.row(index).ours(splits), together[start : start + new])
            start += new
    judge(case, together)


def test_splits_without_keys_count_for_nothing() -> None:
    """Five keys in seven parts: six of them are empty, and what their results' memory holds is not read."""
    case = batch([1, 2, 0], [5, 3, 0])
    torch.testing.assert_close(case.ours(7), case.ours(1), rtol=0, atol=2e-7)


def test_no_tokens() -> None:
    case = batch([0, 0], [3, 0])
    assert case.ours().shape == (0, 6, 32)


def test_a_gpu_would_split_a_long_context() -> None:
    case = batch([1], [600], 1, 4, 64, torch.float16)
    assert context_parts(64, 1, CHIPS["sm_90"]).keys == paged_block(64, 2, False, 4, CHIPS["sm_90"]).keys
    with assume(CHIPS["sm_90"]):
        chosen = case.ours()
    assert torch.equal(chosen, case.ours(5)), "600 keys are 5 parts of 128"
    assert not torch.equal(chosen, case.ours(1)), "as if it had not been split"
    judge(case, chosen)
    with assume(CHIPS["sm_90"]):  # a window of 100 keys is one
        assert torch.equal(replace(case, window=100).ours(), replace(case, window=100).ours(1))


@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("window", [0, 30])
def test_the_numpy_twin_says_the_same(splits: int, window: int) -> None:
    case = batch([4], [103], 1, 3, 16, window=window)
    block = paged_block(16, 4, False, 12, CHIPS["sm_90"]).keys
    q, k, v = (x.double().numpy() for x in (case.q, *case.stored))
    theirs = twin(q, k[:, 0], v[:, 0], case.scale, window or None, splits, 1, block)
    np.testing.assert_allclose(case.ours(splits).numpy(), theirs, atol=2e-6)
    np.testing.assert_allclose(case.formula(torch.float64).numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_through_the_op_interface(cache_dtype: torch.dtype) -> None:
    case = batch([2, 1], [40, 17], cache_dtype=cache_dtype, window=9, page_size=64)
    q, *stores, table, cu, context, new, longest, scale, window, _ = case.arguments()
    scales = {} if stores[2] is None else {"k_scales": stores[2], "v_scales": stores[3]}
    outs = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            outs.append(
                ops.paged_attention(
                    q, *stores[:2], table, cu, context, new, longest, scale=scale, window=window, **scales
                )
            )
    assert_close(outs[0], outs[1], atol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_opcheck(splits: int, cache_dtype: torch.dtype | None) -> None:
    case = batch([1, 2], [5, 70], size=16, cache_dtype=cache_dtype)
    torch.library.opcheck(paged_attention_op, case.arguments(splits))


def test_what_the_kernels_refuse() -> None:
    traits = ops.PagedTraits("cpu", torch.float32, torch.float32, 64, 4, 32, window=False, single_query=True)
    refused = {
        "take caches of 32 and 16 bits and int8, not torch.float64": traits._replace(
            cache_dtype=torch.float64
        ),
        "not torch.float64": traits._replace(dtype=torch.float64),
        "heads of 257": traits._replace(head_dim=257),
        "not on meta": traits._replace(device="meta"),
    }
    for reason, call in refused.items():
        with ops.backend("triton"), pytest.raises(ops.BackendError, match=reason):
            ops.dispatch.decide("paged_attention", call)
    with ops.backend("triton"):
        for dtype in (*FLOATS, torch.int8):
            call = traits._replace(cache_dtype=dtype)
            assert ops.dispatch.decide("paged_attention", call).chosen.backend == "triton"


def test_the_twin_cuts_by_the_least_number_of_keys_too() -> None:
    case = batch([1], [103], 1, 3, 16)
    q, k, v = (x.double().numpy() for x in (case.q, *case.stored))
    for keys in (1, 32, 1000):
        theirs = twin(q, k[:, 0], v[:, 0], case.scale, None, 4, keys, 16)
        np.testing.assert_allclose(case.formula(torch.float64).numpy(), theirs, atol=1e-12)


def test_context_parts() -> None:
    """One sequence alone gives every multiprocessor a program, as far as whole parts can."""
    assert context_parts(128, 8, CHIPS["sm_90"]) == (16, 128)
    assert context_parts(64, 3, CHIPS["sm_90"]) == (44, 128)
    assert context_parts(32, 12, CHIPS["sm_80"]) == (9, 256)
    for device in CHIPS.values():
        for tiles in (1, 2, 8, 60, 107, 500):
            parts, keys = context_parts(128, tiles, device)
            assert 1 <= parts <= MOST_PARTS
            assert parts * tiles <= max(device.processors, tiles)
            assert keys >= 64


def test_tiles_fit_every_chip() -> None:
    for device in CHIPS.values():
        for size in range(16, 257, 8):
            for itemsize, int8 in ((2, False), (2, True), (4, False), (4, True)):
                for rows in (1, 16, 17, 64, 5000):
                    block = paged_block(size, itemsize, int8, rows, device)
                    assert attention_shared_memory(size, itemsize, block, device) <= device.shared_memory
                    assert block.queries in (16, 32, 64)
                    assert block.keys >= 16
            combine = combine_block(size, device)
            for n in combine:
                assert n & (n - 1) == 0
            assert combine.parts * size <= 16 * 32 * combine.num_warps, "more than 16 numbers a lane"
