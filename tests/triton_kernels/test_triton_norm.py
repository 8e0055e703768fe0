"""The Triton normalisation kernels in the interpreter: against float64, their NumPy twin, and PyTorch's rules
for ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from close import assert_as_good_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from minilm import ops
from minilm.ops import reference

COLUMNS = [1, 2, 3, 31, 32, 33, 127, 384, 385, 576, 768, 1000]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm"]


def arguments(kind: str, rows: int, columns: int, dtype: torch.dtype, mean: float, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    x = (draw(rows, columns) * 2 + mean).to(dtype)
    residual = [draw(rows, columns).to(dtype)] if kind.startswith("add") else []
    weight = (1 + 0.3 * draw(columns)).to(dtype)
    bias = [draw(columns).to(dtype)] if "layer" in kind else []
    return [x, *residual, weight, *bias]


def run(function: object, tensors: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of all tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, 1e-5)  # type: ignore[operator]
    outs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outs, [u.to(o.dtype) for u, o in zip(upstream, outs, strict=False)])
    return [o.detach() for o in outs] + [leaf.grad for leaf in leaves]  # type: ignore[misc]


@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([1, 2, 5, 130]),
    columns=st.sampled_from(COLUMNS),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 3.0, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_forward_and_backward_err_no_more_than_twice_eager(
    kind: str, rows: int, columns: int, dtype: torch.dtype, mean: float, seed: int
) -> None:
    tensors = arguments(kind, rows, columns, dtype, mean, seed)
    upstream = [torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + i)) for i in (1, 2)]
    upstream = [u.to(dtype) for u in upstream]
    exact = run(getattr(reference, kind), [t.double() for t in tensors], upstream)
    eager = run(getattr(reference, kind), tensors, upstream)
    with ops.backend("triton"):
        ours = run(getattr(ops, kind), tensors, upstream)
    for name, a, b, e in zip(["y", "sum", *"abcd"], ours, eager, exact, strict=False):
        floor = 4 * torch.finfo(dtype).eps * (1 + float(e.abs().max()))
        assert_as_good_as_eager(a, b, e, floor=floor, what=name)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_the_numpy_twin_says_the_same(rms: bool, residual: bool) -> None:
    from minilm.kernels.norm import norm, twin

    x, r, w, b = (torch.randn(s) for s in ((5, 384), (5, 384), (384,), (384,)))
    y, total = twin(
        x.double().numpy(), r.double().numpy() if residual else None, w.double().numpy(),
        None if rms else b.double().numpy(), 1e-5, rms,
    )  # fmt: skip
    ours, our_total, _, _ = norm(x, r if residual else None, w, None if rms else b, 1e-5, rms)
    np.testing.assert_allclose(ours.numpy(), y, atol=2e-6)
    if residual:
        np.testing.assert_allclose(our_total.numpy(), total, atol=1e-6)


def test_strided_rows_and_leading_dimensions() -> None:
    wide = torch.randn(4, 6, 200)
    x, w, b = wide[..., 20:120], torch.randn(100), torch.randn(100)
    with ops.backend("triton"):
        ours = ops.layer_norm(x, w, b, 1e-5)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, reference.layer_norm(x.contiguous(), w, b, 1e-5), atol=2e-6, rtol=0)


def test_no_rows() -> None:
    w = torch.randn(8, requires_grad=True)
    with ops.backend("triton"):
        y = ops.rms_norm(torch.zeros(0, 8), w, 1e-5)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert w.grad is not None
    assert not w.grad.any()


def test_a_sum_that_is_not_used_gets_no_gradient() -> None:
    x, r, w = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9), torch.randn(9)
    with ops.backend("triton"):
        ops.add_rms_norm(x, r, w, 1e-5)[1].sum().backward()  # only the sum is used
    torch.testing.assert_close(x.grad, torch.ones(3, 9))


@pytest.mark.parametrize("rms", [False, True])
def test_opcheck(rms: bool) -> None:
    from minilm.kernels.norm import norm, norm_backward

    x, r = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    w, b = torch.randn(7, requires_grad=True), None if rms else torch.randn(7, requires_grad=True)
    torch.library.opcheck(norm, (x, r, w, b, 1e-5, rms))
    statistics = torch.randn(3), torch.rand(3)
    torch.library.opcheck(norm_backward, (x.detach(), None, r, w.detach(), *statistics, not rms, rms))


def test_two_tiles_cover_and_waste_little() -> None:
    from minilm.kernels.devices import CHIPS
    from minilm.kernels.heuristics import norm_block, two_tiles

    for columns in range(1, 5000):
        first, second = two_tiles(columns)
        assert first <= columns <= first + second
        assert first + second < 2 * columns
        block = norm_block(columns, 10_000, CHIPS["sm_90"])
        assert block.rows & (block.rows - 1) == 0
        assert block.num_warps & (block.num_warps - 1) == 0
    assert two_tiles(384) == (256, 128)
    assert two_tiles(768) == (512, 256)
    assert two_tiles(512) == (512, 0)
