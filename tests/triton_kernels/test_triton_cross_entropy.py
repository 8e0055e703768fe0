"""Cross-entropy, and the last linear layer with it, in Triton's interpreter: against float64, their NumPy
twins, and PyTorch's rules for ops; and what the chunked form holds in memory."""

from __future__ import annotations

import math
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
from minilm.kernels import cross_entropy as kernel
from minilm.kernels import linear_cross_entropy as chunked
from minilm.kernels.devices import INTERPRETER
from minilm.kernels.heuristics import loss_chunk, vocabulary_block
from minilm.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VOCABULARIES = (1, 2, 15, 16, 17, 211, 4095, 4096, 4097, 9001)
"""Around the block of 4096 columns, and beyond two of them."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_for(T: int, V: int, ignored: float, ignore_index: int, seed: int) -> Tensor:
    """A share `ignored` of them do not count."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (T,), generator=g)
    return torch.where(torch.rand(T, generator=g) < ignored, ignore_index, labels)


def loss_and_gradients(backend: str, op: str, tensors: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    with ops.backend(backend):
        loss = getattr(ops, op)(*leaves, *rest)
    return [loss.detach(), *torch.autograd.grad(loss * 3, leaves)]


def judge(op: str, tensors: list[Tensor], *rest: Any) -> None:
    """Loss and gradients, by the factor-2 rule; NaN where no label counts, and gradients of zero."""
    exact = loss_and_gradients("reference", op, [t.double() for t in tensors], *rest)
    eager = loss_and_gradients("reference", op, tensors, *rest)
    ours = loss_and_gradients("triton", op, tensors, *rest)
    names = ("loss", "gradient", "gradient of the weight")
    for name, a, b, e in zip(names, ours, eager, exact, strict=False):
        if name == "loss" and e.isnan():
            assert a.isnan()
            continue
        # Probabilities are numbers near one, however small what is left of them.
        unit = 4 * torch.finfo(torch.float32).eps * max([1.0, *(float(t.abs().max()) for t in tensors[1:])])
        floor = torch.finfo(a.dtype).eps * (float(e.abs().max()) if e.numel() else 0.0) + unit
        # Casts to bfloat16 are cut in the interpreter instead of rounded: twice the error, of one sign.
        factor = 4.0 if tensors[0].dtype == torch.bfloat16 else 2.0
        assert_as_good_as_eager(a, b, e, floor=floor, factor=factor, what=name)


@examples(40)
@given(
    st.sampled_from([1, 2, 5, 13]), st.sampled_from(VOCABULARIES), st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([-100, -1, 0]),
    st.sampled_from([(1.0, 0.0), (20.0, 0.0), (1.0, 300.0), (100.0, 1e4)]), st.booleans(), seeds(),
)  # fmt: skip
def test_cross_entropy(
    T: int, V: int, dtype: torch.dtype, ignored: float, ignore_index: int, spread: tuple[float, float],
    strided: bool, seed: int,
) -> None:  # fmt: skip
    """Vocabularies up to three blocks; logits up to 1e4, where float16 has steps of 8 and float32 of 1e-3."""
    logits = draw(seed, T, V) * spread[0] + spread[1]
    if strided:
        logits = torch.stack([logits, -logits], dim=1).flatten(0, 1)[::2]
    judge("cross_entropy", [logits.to(dtype)], labels_for(T, V, ignored, ignore_index, seed), ignore_index)


@examples(12)
@given(
    st.sampled_from([1, 16, 33, 70]), st.sampled_from([2, 17, 211, 4097]), st.sampled_from([1, 16, 24]),
    st.sampled_from(DTYPES), st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), seeds(),
)  # fmt: skip
def test_linear_cross_entropy(
    T: int, V: int, C: int, dtype: torch.dtype, ignored: float, strided: bool, seed: int
) -> None:
    """Up to five chunks of 16 rows."""
    hidden, weight = draw(seed, T, C) + 0.5, draw(seed + 1, V, C) * C**-0.5
    if strided:
        hidden, weight = hidden.repeat(1, 2)[:, :C], weight.mT.contiguous().mT
    judge("linear_cross_entropy", [hidden.to(dtype), weight.to(dtype)], labels_for(T, V, ignored, -100, seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_minus_infinity(dtype: torch.dtype) -> None:
    """Tokens that are ruled out: a whole first block of them, too."""
    logits = draw(0, 3, 5000).to(dtype)
    logits[0, :4500], logits[1, ::2], logits[2, 1:] = -math.inf, -math.inf, -math.inf
    judge("cross_entropy", [logits], torch.tensor([4999, 4321, 0]))


def test_numbers_that_are_none_stay_visible() -> None:
    """A row with NaN, infinity or nothing but -inf, or a label that is no column: NaN, and only there."""
    logits = draw(0, 5, 40)
    logits[0, 3], logits[1, 4], logits[2] = math.nan, math.inf, -math.inf
    labels = torch.tensor([1, 2, 3, 40, 5])
    losses, top, logsum = kernel.row_losses(logits, labels, -100)
    assert losses.isnan().tolist() == [True, True, True, True, False]
    gradient = kernel.cross_entropy_backward(logits, labels, top, logsum, torch.ones(()), -100)
    assert gradient.isnan().any(1).tolist() == [True, True, True, True, False]
    for label in (-1, -(2**40), 2**40):
        assert kernel.row_losses(logits[4:], torch.tensor([label]), -100)[0].isnan().all()
        with ops.backend("triton"), pytest.raises(ValueError, match="label"):
            ops.cross_entropy(logits[4:], torch.tensor([label]), -100)


def test_the_numpy_twins_say_the_same() -> None:
    hidden, weight = draw(0, 37, 24) + 0.5, draw(1, 501, 24)
    labels = labels_for(37, 501, 0.3, -100, 2)
    logits = hidden @ weight.T
    loss, gradient = kernel.twin(logits.double().numpy(), labels.numpy(), -100, 64)
    ours = loss_and_gradients("triton", "cross_entropy", [logits], labels)
    np.testing.assert_allclose(ours[0].numpy(), loss, rtol=1e-6)
    np.testing.assert_allclose(ours[1].numpy() / 3, gradient, atol=1e-7)
    loss, dh, dw = chunked.twin(*(t.double().numpy() for t in (hidden, weight)), labels.numpy(), -100, 16)
    ours = loss_and_gradients("triton", "linear_cross_entropy", [hidden, weight], labels)
    np.testing.assert_allclose(ours[0].numpy(), loss, rtol=1e-6)
    np.testing.assert_allclose(ours[1].numpy() / 3, dh, atol=1e-6)
    np.testing.assert_allclose(ours[2].numpy() / 3, dw, atol=1e-6)


def test_gradient_against_differences() -> None:
    """Of the float64 reference, direction by direction."""
    logits, labels = draw(0, 4, 33).double(), torch.tensor([3, -100, 32, 0])
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, labels), logits.requires_grad_())
    direction, h = draw(1, 4, 33).double(), 1e-6
    ahead, behind = (reference.cross_entropy(logits + s * h * direction, labels, -100) for s in (1, -1))
    ours = loss_and_gradients("triton", "cross_entropy", [logits.detach().float()], labels)[1] / 3
    assert_close((ours.double() * direction).sum(), ((ahead - behind) / (2 * h)).detach(), atol=1e-6)


def test_the_logits_of_the_caller_are_not_written() -> None:
    logits, labels = draw(0, 5, 60), labels_for(5, 60, 0.3, -100, 0)
    before = logits.clone()
    for _ in range(2):  # nor is anything kept that the first backward would have spoilt
        found = loss_and_gradients("triton", "cross_entropy", [logits], labels)
        assert torch.equal(logits, before)
    leaf = logits.clone().requires_grad_()
    with ops.backend("triton"):
        loss = ops.cross_entropy(leaf, labels)
    first, second = (torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert torch.equal(first, found[1])


def test_gradients_that_nobody_needs_are_not_made() -> None:
    hidden, weight, labels = draw(0, 20, 8), draw(1, 50, 8), labels_for(20, 50, 0.0, -100, 0)
    with ops.backend("triton"):
        loss = ops.linear_cross_entropy(hidden, weight.requires_grad_(), labels)
        (alone,) = torch.autograd.grad(loss, weight)
        both = torch.autograd.grad(ops.linear_cross_entropy(hidden.requires_grad_(), weight, labels), weight)
        with torch.no_grad():
            assert not ops.linear_cross_entropy(hidden, weight, labels).requires_grad
    assert torch.equal(alone, both[0])
    empty = chunked.linear_cross_entropy_op(hidden, weight, labels, -100, 16, False, False)
    assert [t.numel() for t in empty[2:]] == [0, 0]


def largest_allocation(call: Any) -> int:
    """Bytes of the largest piece of memory that PyTorch asks for during `call`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = run.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_are_never_held(dtype: torch.dtype) -> None:
    """Nothing half as large as [T, V] is made, forward or backward, where the reference makes more than one.
    (The largest is the weight's gradient, or what the library needs for its product.)"""
    T, V, C = 320, 500, 16
    tensors, labels = [draw(0, T, C).to(dtype), draw(1, V, C).to(dtype)], labels_for(T, V, 0.1, -100, 0)
    whole = T * V * dtype.itemsize

    def run(backend: str) -> int:
        return largest_allocation(
            lambda: loss_and_gradients(backend, "linear_cross_entropy", tensors, labels)
        )

    assert run("reference") >= whole
    assert run("triton") < whole / 2


def test_small_probabilities_survive_float16() -> None:
    """Probability / tokens is below what float16 can hold, unless it is divided after the product only."""
    tokens, p = 640, 1 / (math.exp(11) + 31)
    assert torch.tensor(p / tokens).half() == 0
    hidden, weight = torch.full((tokens, 16), 2.0).half(), torch.zeros(32, 16).half()
    weight[0] = 11 / 32  # logits of 11, and of 0 for the 31 others
    labels = torch.zeros(tokens).long()
    gradient = loss_and_gradients("triton", "linear_cross_entropy", [hidden, weight], labels)[2].float()
    expected = torch.full((32, 16), 3 * 2 * p)
    expected[0] *= -31
    torch.testing.assert_close(gradient, expected, rtol=0.01, atol=0)


def test_autocast_casts_both_matrices() -> None:
    hidden, weight, labels = draw(0, 20, 8), draw(1, 50, 8), labels_for(20, 50, 0.0, -100, 0)
    exact = loss_and_gradients(
        "reference", "linear_cross_entropy", [hidden.double(), weight.double()], labels
    )
    with torch.autocast("cpu", torch.bfloat16):
        eager = loss_and_gradients("reference", "linear_cross_entropy", [hidden, weight], labels)
        ours = loss_and_gradients("triton", "linear_cross_entropy", [hidden, weight], labels)
    for a, b, e in zip(ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_as_good_as_eager(a, b, e, floor=2**-8 * max(1.0, float(e.abs().max())))
    assert not torch.equal(
        ours[1], loss_and_gradients("triton", "linear_cross_entropy", [hidden, weight], labels)[1]
    )


def test_no_rows() -> None:
    hidden, weight = torch.zeros(0, 4), draw(0, 7, 4)
    ours = loss_and_gradients("triton", "linear_cross_entropy", [hidden, weight], torch.zeros(0).long())
    assert ours[0].isnan()
    assert not ours[2].any()
    ours = loss_and_gradients("triton", "cross_entropy", [torch.zeros(0, 4)], torch.zeros(0).long())
    assert ours[0].isnan()


def test_opcheck() -> None:
    logits, labels = draw(0, 3, 7).requires_grad_(), torch.tensor([1, -100, 6])
    torch.library.opcheck(kernel.cross_entropy_op, (logits, labels, -100))
    statistics = [x.detach() for x in kernel.row_losses(logits.detach(), labels, -100)[1:]]
    arguments = (logits.detach(), labels, *statistics, torch.tensor(0.5), -100)
    torch.library.opcheck(kernel.cross_entropy_backward, arguments)
    hidden, weight = draw(1, 3, 4).requires_grad_(), draw(2, 7, 4).requires_grad_()
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(chunked.linear_cross_entropy_op, (hidden, weight, labels, -100, 2, *needs))


def test_the_losses_compile_as_one_graph() -> None:
    hidden, weight, labels = draw(0, 20, 8).requires_grad_(), draw(1, 50, 8), labels_for(20, 50, 0.2, -100, 0)

    def losses(h: Tensor) -> Tensor:
        return ops.cross_entropy(h @ weight.T, labels) + 2 * ops.linear_cross_entropy(h, weight, labels)

    with ops.backend("triton"):
        compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
        assert_close(compiled(hidden), losses(hidden), atol=1e-6)
        found, expected = (torch.autograd.grad(f(hidden), hidden)[0] for f in (compiled, losses))
    assert_close(found, expected, atol=1e-7)


REFUSED: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {
    "another channel": (((3, 4), (7, 5), (3,)), r"hidden .*\[3, 4\] and \[7, 5\]"),
    "not packed": (((1, 3, 4), (7, 4), (3,)), r"hidden .*\[1, 3, 4\]"),
    "labels of other tokens": (((3, 4), (7, 4), (2,)), r"labels must be \[3\], and are \[2\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_do_not_fit(name: str) -> None:
    (hidden, weight, labels), message = REFUSED[name]
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        ops.linear_cross_entropy(torch.ones(hidden), torch.ones(weight), torch.ones(labels).long())


def test_blocks_and_chunks() -> None:
    for V in (1, 2, 1000, 4096, 30522, 128256):
        block = vocabulary_block(V, INTERPRETER)
        assert block.columns == 4096 or V <= block.columns < max(2 * V, 32)
        assert 32 * block.num_warps <= block.columns or block.columns < 32
        for T, C in ((1, 64), (100, 384), (8192, 384), (8192, 4096)):
            (rows,) = loss_chunk(T, V, C, 2, INTERPRETER)
            assert 1 <= rows <= T
            assert rows <= 16 or rows * V <= min(V * C, 2**26)
            assert rows == T or rows % 16 == 0
    assert loss_chunk(8192, 30522, 384, 2, INTERPRETER).rows == 384
    assert loss_chunk(8192, 128256, 4096, 2, INTERPRETER).rows == 512
    assert loss_chunk(8192, 128256, 4096, 4, INTERPRETER).rows == 256
