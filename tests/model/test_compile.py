"""torch.compile: the body is one graph, with its gradients, and the compiled model computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from close import assert_close
from packed_sequences import Sequences, ends
from pairs import model_of
from strategies import FAMILIES, small
from torch import Tensor

from minilm import ops
from minilm.model.batch import Packed, pack


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(family: str) -> tuple[Any, Tensor, Packed]:
    """A model and three packed sequences."""
    model = model_of(small(family), 0)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [1]])).long()
    ids = torch.randint(1, 41, (3, 8), generator=torch.Generator().manual_seed(0))
    packed = pack(3, 8, mask, model.device)
    return model, packed.pack(ids), packed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_body_is_one_graph(family: str) -> None:
    model, tokens, packed = problem(family)
    compiled = torch.compile(model.run_packed, fullgraph=True, backend="eager")
    with torch.no_grad():
        with ops.backend(blocks="reference", embed="reference"):  # the modules, which the graph is of
            expected = model.run_packed(tokens, packed)
        assert_close(compiled(tokens, packed), expected, atol=1e-6)
        with ops.backend("reference"):
            assert_close(compiled(tokens, packed), expected, atol=1e-5, what="on the reference")


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_gradients_of_the_graph(family: str) -> None:
    model, tokens, packed = problem(family)
    compiled = torch.compile(model.run_packed, fullgraph=True, backend="aot_eager")
    weights = list(model.body.parameters())
    direction = torch.randn(len(tokens), 12, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((run(tokens, packed) * direction).sum(), weights, allow_unused=True)
        for run in (compiled, model.run_packed)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("family", [pytest.param("roberta", marks=pytest.mark.slow), "llama"])
def test_compiled_model_computes_the_same(family: str) -> None:
    """With padding the border looks at the mask, which breaks the graph there, and only there."""
    model = model_of(small(family), 0)
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(1, 41, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [1]])).long()
    with torch.no_grad(), ops.backend(blocks="reference", linear="reference"):  # what can be traced
        for call in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            assert_close(compiled(**call, use_cache=False).logits, model(**call).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("window", [None, 2])
def test_opcheck(name: str, window: int | None) -> None:
    case = Sequences((2, 3), (2, 4), 2, 2, 4, True, window, 0)
    q, k, v = (x.requires_grad_() for x in case.tensors(torch.float64))
    arguments = (q, k, v, ends(case.queries), ends(case.keys), 3, 4, 0.7, True, window)
    for bias in (None, torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)):
        options = (bias, *((None, None) if name == "torch" else (torch.rand(4), 2.0)))
        lse = name == "reference" and bias is not None
        torch.library.opcheck(torch.ops.minilm.eager_attention.default, (*arguments, *options, lse, name))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_derivative_of_the_reference(causal: bool, window: int | None, cap: float | None) -> None:
    """Against autograd; the derivative is written down, for torch.compile."""
    case = Sequences((2, 0, 3), (5, 1, 3), 2, 3, 4, causal, window, 0)
    inputs = [x.requires_grad_() for x in case.tensors(torch.float64)]
    inputs.append(torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True))
    slopes = torch.rand(6, dtype=torch.float64)
    with ops.backend("reference"):
        out = case.call(
            *inputs[:3], partial(ops.attention, bias=inputs[3], alibi_slopes=slopes, soft_cap=cap)
        )
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(out, inputs, grad)
    found = ops.reference.attention_backward(
        grad, *inputs[:3], ends(case.queries), ends(case.keys), 0.7, causal, window, inputs[3], slopes, cap
    )
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert_close(a, b, atol=1e-12)
