"""Bias + activation and gated activation in Triton's interpreter: against float64, their NumPy twin, and
PyTorch's rules for ops."""

from __future__ import annotations

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
from minilm.config import ACTIVATIONS
from minilm.kernels import activation
from minilm.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS = (1, 2, 31, 127, 511, 512, 513, 577)
"""Around the widest tile, and primes; rows of a tile are 2048 / columns."""
ROWS = (1, 3, 4, 5, 37)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def strided(x: Tensor, how: str) -> Tensor:
    """The values of `x` in other places: every second row, every second column, or transposed."""
    if how == "rows":
        return torch.stack([x, x + 1], dim=-2).flatten(-3, -2)[..., ::2, :]
    if how == "columns":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    return x.mT.contiguous().mT if how == "transposed" else x


STRIDES = st.sampled_from(["no", "rows", "columns", "transposed"])


@examples(40)
@given(
    st.sampled_from(ACTIVATIONS), st.sampled_from(ROWS), st.sampled_from(COLUMNS), st.sampled_from(DTYPES),
    st.booleans(), STRIDES, st.sampled_from([0.3, 2.0, 8.0]), seeds(),
)  # fmt: skip
def test_bias_activation(
    name: str, rows: int, columns: int, dtype: torch.dtype, bias: bool, how: str, scale: float, seed: int
) -> None:
    """What `linear` does after its product, forward and backward. Around 1, where functions are curved, and
    far out, where they must not overflow."""
    x = strided((draw(seed, rows, columns, scale=scale) + 0.5).to(dtype), how)
    b = (draw(seed + 1, columns) - 0.3).to(dtype) if bias else None
    dy = draw(seed + 2, rows, columns).to(dtype)

    def run(wide: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, b) if t is not None]
        if ours:
            y = activation.bias_activation(leaves[0], leaves[1] if bias else None, activation.KINDS[name])
        else:
            y = reference.ACTIVATIONS[name](leaves[0] + leaves[1] if bias else leaves[0])
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))]

    exact, eager, ours = run(torch.float64, False), run(dtype, False), run(dtype, True)
    kinks = ours  # where the rounded sum falls on the other side of a kink, the slope is another
    if name in ("relu", "relu2", "relu6", "leaky_relu", "hardswish", "gelu_10") and bias:
        kinks = [t for t, what in zip(ours, ("y", "dx", "db"), strict=True) if what == "y"]
    for what, a, b_, e in zip(("y", "dx", "db"), kinks, eager, exact, strict=False):
        floor = torch.finfo(dtype).eps * max(1.0, float(e.abs().max()))
        assert_as_good_as_eager(a, b_, e, floor=floor, what=f"{name}, {what}")


@examples(30)
@given(
    st.sampled_from(ACTIVATIONS), st.sampled_from(ROWS), st.sampled_from(COLUMNS), st.sampled_from(DTYPES),
    STRIDES, seeds(),
)  # fmt: skip
def test_gated(name: str, rows: int, features: int, dtype: torch.dtype, how: str, seed: int) -> None:
    x = strided((draw(seed, rows, 2 * features, scale=2.0) + 0.5).to(dtype), how)
    dy = draw(seed + 1, rows, features).to(dtype)

    def run(wide: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.detach().to(wide).requires_grad_()
        with ops.backend(backend):
            y = ops.gated(leaf, name)
        return y.detach(), torch.autograd.grad(y, leaf, dy.to(wide))[0]

    exact, eager = run(torch.float64, "reference"), run(dtype, "reference")
    for what, a, b, e in zip(("y", "dx"), run(dtype, "triton"), eager, exact, strict=True):
        assert_as_good_as_eager(a, b, e, what=f"{name}, {what}")


@examples(15)
@given(
    st.sampled_from([None, *ACTIVATIONS]), st.sampled_from([(), (1,), (5,), (2, 3)]), st.integers(1, 40),
    st.integers(1, 70), st.booleans(), st.sampled_from(DTYPES), seeds(),
)  # fmt: skip
def test_linear(
    name: str | None, lead: tuple[int, ...], inner: int, outer: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """Through the op interface, any leading dimensions. Eager rounds once more, so it errs more, not less."""
    x, w = draw(seed, *lead, inner).to(dtype), draw(seed + 1, outer, inner, scale=inner**-0.5).to(dtype)
    b = draw(seed + 2, outer).to(dtype) if bias else None
    with ops.backend("reference"):
        exact = ops.linear(x.double(), w.double(), None if b is None else b.double(), name)
        eager = ops.linear(x, w, b, name)
    with ops.backend("triton"):
        ours = ops.linear(x, w, b, name)
    floor = 2 * torch.finfo(dtype).eps * max(1.0, float(exact.abs().max()))
    assert_as_good_as_eager(ours, eager, exact, floor=floor, what=str(name))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "tanh"])
def test_gradients_of_linear(name: str) -> None:
    """The whole chain in float32 against float64: gradients of x, weight and bias."""
    tensors = draw(0, 7, 20) + 0.3, draw(1, 33, 20, scale=0.3), draw(2, 33)
    dy = draw(3, 7, 33)
    grads = []
    for backend, dtype in (
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("triton", torch.float32),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with ops.backend(backend):
            grads.append(torch.autograd.grad(ops.linear(*leaves, name), leaves, dy.to(dtype)))
    for e, eager, ours in zip(*grads, strict=True):
        assert_as_good_as_eager(ours, eager, e, floor=4e-7 * float(e.abs().max()))


@pytest.mark.parametrize("kind", sorted(set(activation.KINDS.values())))
def test_the_numpy_twin_says_the_same(kind: str) -> None:
    x = torch.linspace(-12, 12, 397).double()
    leaf = x.float().requires_grad_()
    y = activation.bias_activation(leaf[None], None, kind)[0]
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    expected, expected_slope = activation.twin(x.numpy(), kind)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=2e-6, rtol=1e-6)
    np.testing.assert_allclose(slope.numpy(), expected_slope, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_against_differences(name: str) -> None:
    """Of the float64 twin, so that no formula is compared with itself: away from kinks."""
    kind, h = activation.KINDS[name], 1e-6
    x = torch.tensor([-7.3, -2.9, -1.1, -0.3, -0.011, 0.013, 0.4, 1.7, 2.8, 5.7, 6.4, 9.9, 11.0]).double()
    leaf = x.float().requires_grad_()
    (slope,) = torch.autograd.grad(activation.bias_activation(leaf[None], None, kind).sum(), leaf)
    at = leaf.detach().double().numpy()
    differences = (activation.twin(at + h, kind)[0] - activation.twin(at - h, kind)[0]) / (2 * h)
    np.testing.assert_allclose(slope.numpy(), differences, atol=5e-6, rtol=1e-5)


def test_every_activation_has_a_kernel() -> None:
    assert set(activation.KINDS) == set(ACTIVATIONS) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ends_of_the_line(name: str) -> None:
    """Far out nothing overflows, and NaN stays NaN; of zero PyTorch's derivative."""
    kind = activation.KINDS[name]
    x = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4, float("nan")])
    found, expected = [], []
    for f, out in (
        (lambda v: activation.bias_activation(v[None], None, kind)[0], found),
        (reference.ACTIVATIONS[name], expected),
    ):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        out += [y.detach(), torch.autograd.grad(y[:-1].sum(), leaf)[0][:-1]]
    assert found[0][-1].isnan()
    assert_close(found[0][:-1], expected[0][:-1], atol=1e-6)
    assert_close(found[1], expected[1], atol=1e-6)


def test_a_small_tanh_is_exact_relatively() -> None:
    """1 - e^-2x would cancel."""
    x = torch.tensor([1e-12, 3e-6, -2e-4, 0.05, 0.2499, -0.2501, 0.7])
    y = activation.bias_activation(x[None], None, "tanh")[0]
    assert float((y.double() / x.double().tanh() - 1).abs().max()) < 5e-7


def test_nothing_in_nothing_out() -> None:
    b = torch.ones(5, requires_grad=True)
    with ops.backend("triton"):
        y = ops.linear(torch.zeros(0, 3), torch.ones(5, 3), b, "gelu")
        assert ops.gated(torch.zeros(2, 0), "silu").shape == (2, 0)
        assert ops.gated(torch.zeros(0, 4), "silu").shape == (0, 2)
    y.sum().backward()
    assert y.shape == (0, 5)
    assert b.grad is not None
    assert not b.grad.any()


def test_the_gradient_of_the_bias_is_the_same_every_time() -> None:
    """And does not depend on the order in which programs end."""
    x, b, dy = draw(0, 500, 40), draw(1, 40), draw(2, 500, 40)
    found = {tuple(activation.bias_activation_backward(dy, x, b, "gelu")[1].tolist()) for _ in range(2)}
    assert len(found) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    x, b = draw(0, 3, 7).requires_grad_(), draw(1, 7).requires_grad_() if bias else None
    torch.library.opcheck(activation.bias_activation, (x, b, "silu"))
    torch.library.opcheck(activation.gated_op, (draw(2, 3, 8).requires_grad_(), "gelu_tanh"))
    b = None if b is None else b.detach()
    torch.library.opcheck(activation.bias_activation_backward, (draw(3, 3, 7), x.detach(), b, "silu"))
    torch.library.opcheck(activation.gated_backward, (draw(3, 3, 4), draw(2, 3, 8), "gelu_tanh"))


@pytest.mark.slow
def test_an_mlp_compiles_as_one_graph() -> None:
    up, bias, down = draw(0, 12, 6).requires_grad_(), draw(1, 12), draw(2, 6, 6)

    def mlp(x: Tensor) -> Tensor:
        return ops.linear(ops.gated(ops.linear(x, up, bias, "gelu"), "silu"), down)

    x = draw(3, 5, 6)
    with ops.backend("triton"):
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), mlp(x), atol=1e-6)
        found, expected = (torch.autograd.grad(f(x).square().sum(), up)[0] for f in (compiled, mlp))
    assert_close(found, expected, atol=1e-5)


def test_tiles_cover_the_columns_without_waste() -> None:
    from minilm.kernels.devices import CHIPS, INTERPRETER
    from minilm.kernels.heuristics import column_sum_block, pointwise_block, sharing_programs

    for columns in range(1, 6000, 7):
        block = pointwise_block(columns, INTERPRETER)
        assert block.rows * block.columns == 2048
        assert -(-columns // block.columns) * block.columns < columns + max(columns, 512)
        assert 32 * block.num_warps <= 2048 // 8
    assert pointwise_block(1536, INTERPRETER).columns == 512
    h100 = CHIPS["sm_90"]
    assert column_sum_block(1536, h100).programs == 8
    assert sharing_programs(5, 8, 3, h100) == 5
    assert sharing_programs(10**6, 8, 3, h100) == 352
    assert sharing_programs(10**6, 8, 10**4, h100) == 1
