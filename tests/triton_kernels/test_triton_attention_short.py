"""The Triton kernel for short sequences in the interpreter: against float64, its NumPy twin, and the kernel
for any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from attention_formula import cumulative, formula

from minilm import ops
from minilm.kernels import heuristics
from minilm.kernels.attention import attention_op
from minilm.kernels.attention_short import attention_short_op, twin
from minilm.kernels.devices import CHIPS

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 101]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    q_lens = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3).filter(any))
    kv_heads, group = draw(st.sampled_from([(1, 1), (4, 1), (3, 1), (1, 4), (3, 2), (5, 1)]))
    return {
        "q_lens": q_lens,
        "k_lens": [n + draw(st.sampled_from([0, 0, 1, 20])) if n else 0 for n in q_lens],
        "kv_heads": kv_heads,
        "heads": kv_heads * group,
        "head_dim": draw(st.sampled_from([16, 32, 32, 64])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 5, 70])),
        "seed": draw(st.integers(0, 2**20)),
    }


@pytest.mark.slow
@settings(max_examples=12)
@given(problem=problems())
def test_forward_and_backward_err_no_more_than_twice_eager(problem: dict) -> None:  # type: ignore[type-arg]
    """q, k and v are views of one tensor, as the fused projection makes them."""
    g = torch.Generator().manual_seed(problem["seed"])
    q_lens, k_lens, d, dtype = (problem[name] for name in ("q_lens", "k_lens", "head_dim", "dtype"))
    heads, kv_heads = problem["heads"], problem["kv_heads"]
    fused = (torch.randn(sum(k_lens), heads + 2 * kv_heads, d, generator=g) + 0.5).to(dtype)
    upstream = torch.randn(sum(q_lens), heads, d, generator=g).to(dtype)
    scale, kind = d**-0.5, (problem["causal"], problem["window"])
    lengths = (cumulative(q_lens), cumulative(k_lens), max(q_lens), max(k_lens))

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaf = fused.to(dtype, copy=True).requires_grad_()
        q, k, v = leaf.split([heads, kv_heads, kv_heads], dim=1)
        if ours:
            out, _ = attention_short_op(q[: sum(q_lens)], k, v, *lengths, scale, *kind, True)
        else:
            out = formula(q[: sum(q_lens)], k, v, None, None, q_lens, k_lens, scale, *kind, 0.0)
        out.backward(upstream.to(dtype))
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    exact, eager, ours = run(torch.float64, False), run(dtype, False), run(dtype, True)
    unit = 4 * torch.finfo(dtype).eps
    terms = float(upstream.double().norm(dim=-1).max() * fused.double().norm(dim=-1).max() ** 2 * scale)
    assert_as_good_as_eager(ours[0], eager[0], exact[0], floor=unit * (1 + float(exact[0].abs().max())))
    floor = unit * (1 + float(exact[1].abs().max()) + terms)
    assert_as_good_as_eager(ours[1], eager[1], exact[1], floor=floor, what="gradient")


@pytest.mark.parametrize("causal", [False, True])
def test_the_numpy_twin_says_the_same(causal: bool) -> None:
    q, k, v = (torch.randn(n, h, 32) for n, h in ((37, 4), (50, 2), (50, 2)))
    lengths = (cumulative([37]), cumulative([50]), 37, 50)
    ours, _ = attention_short_op(q, k, v, *lengths, 0.25, causal, 0, False)
    theirs = twin(*(t.double().numpy() for t in (q, k, v)), 0.25, causal)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


@pytest.mark.parametrize("window", [0, 7])
def test_the_same_as_the_kernel_for_any_length(window: int) -> None:
    q, k, v = (torch.randn(90, h, 32) for h in (4, 2, 2))
    lengths = (cumulative([40, 0, 50]), cumulative([40, 0, 50]), 50, 50)
    short = attention_short_op(q, k, v, *lengths, 0.25, True, window, True)
    other = attention_op(q, k, v, None, None, *lengths, 0.25, True, window, 0.0, 0.0, 0, True)
    for a, b in zip(short, other, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


def test_values_of_other_sequences_do_not_reach_across() -> None:
    """The block of keys is wider than the sequence: what lies beyond may be anything."""
    q, k, v = (torch.randn(24, 2, 32) for _ in range(3))
    for x in (k, v):
        x[10:] = float("nan")
    out, lse = attention_short_op(
        q, k, v, cumulative([10, 14]), cumulative([10, 14]), 14, 14, 0.2, False, 0, True
    )
    assert out[:10].isfinite().all()
    assert lse[:, :10].isfinite().all()


def test_it_runs_where_it_applies() -> None:
    """Chosen by the sizes alone; dropout, bias and the rest take the other kernel."""
    called = []
    real = torch.ops.minilm_triton.attention_short.default

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(op is real)
            return op(*args, **(kwargs or {}))

    def short(head_dim: int, length: int, **options: object) -> bool:
        x = torch.randn(length, 2, head_dim)
        called.clear()
        cu = cumulative([length])
        with ops.backend("triton"), Seen():
            ops.attention(x, x, x, cu, cu, length, length, **{"scale": 0.3, "causal": False, **options})
        return any(called)

    assert short(32, 30)
    assert short(32, 30, causal=True, window=4)
    assert not short(24, 30)
    assert not short(32, 30, dropout_p=0.5)
    assert not short(32, 30, soft_cap=2.0)
    assert not short(32, 30, bias=torch.zeros(2, 30, 30))
    assert not short(32, 30, scale=-1.0)


def test_heuristics() -> None:
    applies = heuristics.attention_is_short
    assert applies(32, 2, 256, 256, masked=False)
    assert not applies(32, 2, 257, 257, masked=False)
    assert not applies(32, 2, 256, 256, masked=True)
    assert applies(64, 2, 128, 128, masked=True)
    assert not applies(64, 2, 129, 129, masked=False)
    assert not applies(80, 2, 16, 16, masked=False)
    for chip in CHIPS.values():
        for head_dim, itemsize, heads, sequences, length in (
            (32, 2, 12, 64, 128), (32, 2, 12, 1, 256), (64, 2, 9, 300, 100), (16, 4, 7, 5, 1),
        ):  # fmt: skip
            block = heuristics.attention_short_block(
                head_dim, itemsize, heads, sequences, length, length, chip
            )
            assert block.keys >= length
            assert heads % block.heads == 0
            assert block.queries & (block.queries - 1) == 0
            if block.heads > 1:
                assert -(-length // block.queries) * sequences * heads // block.heads >= 2 * chip.processors
    assert heuristics.attention_short_block(32, 2, 12, 64, 128, 128, CHIPS["sm_90"]).heads == 4
    assert heuristics.attention_short_block(32, 2, 12, 1, 256, 256, CHIPS["sm_90"]).heads == 1


def test_opcheck() -> None:
    q, k, v = (torch.randn(9, h, 16, requires_grad=True) for h in (2, 1, 1))
    cu = cumulative([3, 6])
    torch.library.opcheck(attention_short_op, (q, k, v, cu, cu, 6, 6, 0.25, True, 0, True))
