"""The Triton attention kernels in the interpreter, forward and backward, against float64 formulas."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from attention_formula import cumulative, formula
from close import assert_as_good_as_eager, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.kernels import attention, attention_shared
from minilm.kernels.attention import attention_op, twin
from minilm.kernels.attention_backward import twin as backward_twin
from minilm.kernels.attention_short import attention_short_op
from minilm.kernels.heuristics import attention_is_short

LENGTHS = [0, 1, 15, 16, 17, 33]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    q_lens = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=2).filter(any))
    kv_heads = draw(st.sampled_from([1, 2]))
    return {
        "q_lens": q_lens,
        "k_lens": [n + draw(st.sampled_from([0, 0, 1, 20])) if n else 0 for n in q_lens],
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 1, 2])),
        "head_dim": draw(st.sampled_from([16, 24, 32, 64, 80])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 5, 20])),
        "cap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "bias": draw(st.booleans()),
        "alibi": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(max_examples=12)
@given(problem=problems())
def test_forward_and_backward_err_no_more_than_twice_eager(problem: dict) -> None:  # type: ignore[type-arg]
    g = torch.Generator().manual_seed(problem["seed"])
    q_lens, k_lens, d = problem["q_lens"], problem["k_lens"], problem["head_dim"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(problem["dtype"])

    def heads(tokens: int, count: int) -> Tensor:
        return draw(tokens, 2 * count, d)[:, ::2] if problem["strided"] else draw(tokens, count, d)

    tensors = [heads(sum(q_lens), problem["heads"])]
    tensors += [heads(sum(k_lens), problem["kv_heads"]) + 0.5 for _ in range(2)]
    tensors += [draw(problem["heads"], max(q_lens) + 1, max(k_lens) + 2)] if problem["bias"] else []
    slopes = torch.rand(problem["heads"], generator=g) if problem["alibi"] else None
    upstream = draw(*tensors[0].shape)
    scale, options = d**-0.5, (problem["causal"], problem["window"], problem["cap"])

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        bias = leaves[3] if problem["bias"] else None
        if ours:
            lengths = (cumulative(q_lens), cumulative(k_lens), max(q_lens), max(k_lens))
            out, _ = attention_op(*leaves[:3], bias, slopes, *lengths, scale, *options, 0.0, 0, True)
        else:
            s = None if slopes is None else slopes.to(dtype)
            out = formula(*leaves[:3], bias, s, q_lens, k_lens, scale, *options)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]

    # dp - delta cancels where the true gradient is small (one key: exactly zero), so its rounding counts too.
    q, k, v = (t.double().norm(dim=-1).max() for t in tensors[:3])
    terms = upstream.double().norm(dim=-1).max() * v * max(k, q) * scale
    exact, eager, ours = run(torch.float64, False), run(problem["dtype"], False), run(problem["dtype"], True)
    for name, a, b, e in zip(["o", "dq", "dk", "dv", "dbias"], ours, eager, exact, strict=False):
        size = 1 + float(e.abs().max()) + (float(terms) if name != "o" else 0)
        floor = 4 * torch.finfo(problem["dtype"]).eps * size
        assert_as_good_as_eager(a, b, e, floor=floor, what=name)


@pytest.mark.parametrize("causal", [False, True])
def test_the_numpy_twin_says_the_same(causal: bool) -> None:
    q, k, v = (torch.randn(n, 1, 16) for n in (37, 50, 50))
    lengths = (cumulative([37]), cumulative([50]), 37, 50)
    ours, _ = attention_op(q, k, v, None, None, *lengths, 0.25, causal, 0, 0.0, 0.0, 0, True)
    theirs = twin(*(t[:, 0].double().numpy() for t in (q, k, v)), 0.25, causal, 16)
    np.testing.assert_allclose(ours[:, 0].numpy(), theirs, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_numpy_twin_of_the_backward_says_the_same(causal: bool) -> None:
    q, k, v, upstream = (torch.randn(n, 1, 16) for n in (37, 50, 50, 37))
    bias = torch.randn(1, 37, 50)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    lengths = (cumulative([37]), cumulative([50]), 37, 50)
    o, lse = attention_op(*leaves, None, *lengths, 0.25, causal, 0, 0.0, 0.0, 0, True)
    o.backward(upstream)
    arrays = [x.detach()[:, 0].double().numpy() for x in (q, k, v, upstream, o)]
    exact = backward_twin(
        *arrays, lse[0].double().numpy(), bias[0].detach().double().numpy(), 0.25, causal, 16
    )
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        found = leaf.grad[0] if leaf is bias else leaf.grad[:, 0]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_lse_through_the_op_interface() -> None:
    q, k, v = torch.randn(9, 4, 32), torch.randn(12, 2, 32), torch.randn(12, 2, 32)
    lengths = (cumulative([4, 5]), cumulative([7, 5]), 5, 7)
    outs = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            outs.append(ops.attention_with_lse(q, k, v, *lengths, scale=0.2, causal=True, window=3))
    torch.testing.assert_close(outs[0], outs[1], atol=2e-6, rtol=1e-5)


@settings(max_examples=12)
@given(problem=problems())
def test_the_lse_is_written_on_request_only(problem: dict) -> None:  # type: ignore[type-arg]
    """The same output bit by bit, and the log-sum-exp of the scores in float64; the short kernel's too."""
    g = torch.Generator().manual_seed(problem["seed"])
    q_lens, k_lens, d, dtype = (problem[name] for name in ("q_lens", "k_lens", "head_dim", "dtype"))
    q = torch.randn(sum(q_lens), problem["heads"], d, generator=g).to(dtype)
    k, v = (torch.randn(sum(k_lens), problem["kv_heads"], d, generator=g).to(dtype) + 0.5 for _ in range(2))
    bias = torch.randn(problem["heads"], max(q_lens), max(k_lens), generator=g) if problem["bias"] else None
    slopes = torch.rand(problem["heads"], generator=g) if problem["alibi"] else None
    lengths = (cumulative(q_lens), cumulative(k_lens), max(q_lens), max(k_lens))
    scale, kind = d**-0.5, (problem["causal"], problem["window"])
    exact = ops.reference.attention(
        q.double(), k.double(), v.double(), *lengths, scale, *(x or None for x in kind), 0.0, lse=True,
        bias=None if bias is None else bias.double(), alibi_slopes=slopes, soft_cap=problem["cap"] or None,
    )[1]  # fmt: skip
    calls = [partial(attention_op, q, k, v, bias, slopes, *lengths, scale, *kind, problem["cap"], 0.0, 0)]
    if attention_is_short(d, q.element_size(), *lengths[2:], masked=any(kind)):
        calls.append(partial(attention_short_op, q, k, v, *lengths, scale, *kind))
    plain = bias is None and slopes is None and not problem["cap"]
    for call in calls if plain else calls[:1]:
        out, lse = call(True)
        again, nothing = call(False)
        assert torch.equal(out, again)
        assert nothing.numel() == 0
        size = 1 + float(exact.nan_to_num(neginf=0).abs().max())
        assert_close(lse, exact, atol=16 * torch.finfo(torch.float32).eps * size, what="log-sum-exp")


def test_the_lse_is_written_for_gradients() -> None:
    """Through the op: none for inference, though parameters may want gradients; one for training."""
    wrote = []
    names = ("minilm_triton::attention", "minilm_triton::attention_short")

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op.name() in names:
                wrote.append(args[-1])
            return op(*args, **(kwargs or {}))

    cu = cumulative([20])
    for size in (32, 24):  # the short kernel, and the one for any length
        x = torch.randn(20, 2, size, requires_grad=True)
        for grad in (False, True):
            wrote.clear()
            with ops.backend("triton"), Seen(), torch.set_grad_enabled(grad):
                out = ops.attention(x, x, x, cu, cu, 20, 20, scale=0.3, causal=True)
            assert wrote == [grad]
            assert out.requires_grad == grad
        rest = (cu, cu, 20, 20, 0.3, True, 0)
        if size == 32:
            out, _ = attention_short_op(x, x, x, *rest, False)
        else:
            out, _ = attention_op(x, x, x, None, None, *rest, 0.0, 0.0, 0, False)
        with pytest.raises(RuntimeError, match="without the log-sum-exp has no derivative"):
            out.sum().backward()


def test_more_sequences_than_a_grid_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into launches of three, forward and backward are what they were in one."""

    def run(size: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(30, 2, size, generator=g, requires_grad=True)
        cu = cumulative([4, 0, 9, 1, 6, 2, 8])
        with ops.backend("triton"):
            out = ops.attention(x, x, x, cu, cu, 9, 9, scale=0.3, causal=False)
        out.sum().backward()
        assert x.grad is not None
        return [out.detach(), x.grad]

    whole = run(24), run(32)
    monkeypatch.setattr(attention_shared, "MOST_SEQUENCES", 3)
    for one, parts in zip(whole, (run(24), run(32)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, parts, strict=True))


def test_offsets_stay_in_32_bits() -> None:
    """Strides that a kernel cannot step by are copied away; sizes that it cannot reach are refused."""
    x = torch.empty(1 << 24, dtype=torch.float16, device="meta").as_strided((4, 3, 16), (16, 1 << 30, 1))
    assert attention.laid_out(x, 4).is_contiguous()
    near = torch.empty(4, 3, 16, device="meta")
    assert attention.laid_out(near, 4) is near
    flat = torch.empty(1 << 20, 128, 128, device="meta")
    assert attention.laid_out(flat, 1 << 10) is flat
    with pytest.raises(ValueError, match=r"\[1048576, 128, 128\] with a sequence of 131072 tokens is beyond"):
        attention.laid_out(flat, 1 << 17)


def test_scores_through_the_op_interface() -> None:
    """Bias with its gradient, ALiBi and soft-cap reach the kernel, in order."""
    q, k, v = torch.randn(9, 4, 32), torch.randn(12, 2, 32), torch.randn(12, 2, 32)
    lengths = (cumulative([4, 5]), cumulative([7, 5]), 5, 7)
    outs = []
    for backend in ("triton", "reference"):
        bias = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
        options = {"bias": bias, "alibi_slopes": torch.arange(1.0, 5.0) / 8, "soft_cap": 2.0}
        with ops.backend(backend):
            out, lse = ops.attention_with_lse(q, k, v, *lengths, scale=0.2, causal=True, **options)
            maps = ops.attention_probs(
                q, k, *lengths[:2], scale=0.2, causal=True, heads=[2], lse=lse, **options
            )
        out.sum().backward()
        outs.append([out, lse, bias.grad, *maps])
    for a, b in zip(*outs, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-5)


def test_dropout_drops_the_share_asked_for_and_its_gradient_uses_the_same_mask() -> None:
    n, p = 64, 0.3
    q, k = torch.zeros(n, 1, 16), torch.zeros(n, 1, 16)  # all probabilities are 1/n
    v = torch.randn(n, 1, 16, requires_grad=True)
    lengths = (cumulative([n]), cumulative([n]), n, n)

    def run(values: Tensor, seed: int) -> Tensor:
        return attention_op(q, k, values, None, None, *lengths, 1.0, False, 0, 0.0, p, seed, True)[0]

    mask = run(torch.eye(n)[:, None, :16].contiguous(), 5)[:, 0] * n  # what query i takes of key j < 16
    dropped = (mask == 0).float().mean().item()
    assert abs(dropped - p) < 0.06
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - p)))
    assert not torch.equal(run(v, 5), run(v, 6))
    upstream = torch.randn(n, 1, 16)
    run(v, 5).backward(upstream)
    assert v.grad is not None
    torch.testing.assert_close(v.grad[:16, 0], (mask / n).T @ upstream[:, 0], atol=1e-5, rtol=1e-5)


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    q, k, v = (torch.randn(50, 2, 32) for _ in range(3))

    def run(tensors: list[Tensor], lengths: list[int]) -> Tensor:
        cu = cumulative(lengths)
        return attention_op(*tensors, None, None, cu, cu, 30, 30, 0.2, True, 0, 0.0, 0.0, 0, False)[0]

    assert torch.equal(run([q, k, v], [20, 30])[20:], run([q[20:], k[20:], v[20:]], [30]))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    q, k, v = (torch.randn(9, h, 16, requires_grad=True) for h in (2, 1, 1))
    bias = torch.randn(2, 6, 6, requires_grad=True) if with_bias else None
    cu = cumulative([3, 6])
    torch.library.opcheck(attention_op, (q, k, v, bias, None, cu, cu, 6, 6, 0.25, True, 0, 0.0, 0.0, 0, True))
