"""torch.compile: a model, with its gradients, is one graph for all sizes and masks, and computes the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from close import assert_close
from packed_sequences import Sequences, ends
from pairs import model_of
from strategies import DECODERS, FAMILIES, small
from torch import Tensor
from torch._dynamo.utils import counters

from minilm import ops
from minilm.cache import KVCache
from minilm.model.batch import Packed, pack


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
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
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deberta-v2"])
def test_body_is_one_graph(family: str) -> None:
    """But that of DeBERTa, whose bias depends on the lengths; a whole model is one (`Padded`)."""
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


def batch(rows: int, columns: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Random ids, and a mask of rows of random lengths."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    ids = torch.randint(3, 41, (rows, columns), generator=generator)
    return ids, mask.flip(1) if left else mask


def graphs() -> int:
    """How many were made since the last reset."""
    return int(counters["stats"]["unique_graphs"])


SHAPES = ((2, 7, False), (3, 9, True), (5, 11, False), (4, 6, True))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_all_sizes(family: str) -> None:
    """With padding of either side and without, no graph breaks, and the second size makes the last graph."""
    model = model_of(small(family), 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for rows, columns, left in SHAPES:
            ids, mask = batch(rows, columns, left)
            assert_close(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-5)
        assert graphs() == 2
        ids = batch(2, 7)[0]
        assert_close(compiled(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "phi3"])
def test_dynamic_sizes_are_one_graph(family: str) -> None:
    model = model_of(small(family), 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, columns, left in SHAPES:
            ids, mask = batch(rows, columns, left)
            assert_close(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-5)
    assert graphs() == 1


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
)
def test_a_compiled_decoder_continues_its_cache(family: str) -> None:
    model = model_of(small(family), 0)
    compiled = torch.compile(model, backend="eager")
    ids, mask = batch(3, 9, left=True)
    mask[1, 5] = 0
    with torch.no_grad():
        found, expected = (run(ids, mask, use_cache=True) for run in (compiled, model))
        mine, theirs = found.past_key_values, expected.past_key_values
        assert isinstance(mine, KVCache)
        assert mine.lengths == theirs.lengths
        for row in mine.rows:
            assert mine.layout(row).columns.tolist() == theirs.layout(row).columns.tolist()
        for layer in range(model.spec.num_layers):
            for row, other in zip(mine.rows, theirs.rows, strict=True):
                assert_close(mine.keys(layer, row), theirs.keys(layer, other), atol=1e-5)
        for step in range(4):
            tokens = torch.tensor([[4 + step], [5], [6]])
            found = compiled(tokens, past_key_values=mine, use_cache=True)
            expected = model(tokens, past_key_values=theirs, use_cache=True)
            assert_close(found.logits, expected.logits, atol=1e-5)
            assert found.past_key_values is mine
        assert graphs() == 1, "steps are not compiled"
        long = torch.cat((mask, torch.ones(3, 6, dtype=torch.long)), 1)
        tokens = torch.tensor([[7, 8], [9, 4], [5, 6]])
        calls = [{"past_key_values": cache, "attention_mask": long} for cache in (mine, theirs)]
        found, expected = (run(tokens, **call) for run, call in zip((compiled, model), calls, strict=True))
        assert_close(found.logits, expected.logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile", "forward", "compile"])
def test_generate_of_a_compiled_model(way: str) -> None:
    """`generate` makes its steps itself, and the model stays what it is: copied, saved, loaded."""
    model, plain = model_of(small("qwen3"), 0), model_of(small("qwen3"), 0)
    compiled = model
    if way == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif way == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    ids, mask = batch(3, 9, left=True)
    with torch.no_grad():
        assert_close(compiled(ids, mask).logits, plain(ids, mask).logits, atol=1e-5)
    assert graphs() == 1
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
    assert torch.equal(compiled.generate(ids, **options), plain.generate(ids, **options))
    if way == "compile":
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                assert torch.equal(again(ids, mask).logits, plain(ids, mask).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "gpt2", "mistral", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step(family: str, checkpointing: bool) -> None:
    model = model_of(small(family), 0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing)
    for rows, columns, left in SHAPES[:3]:
        ids, mask = batch(rows, columns, left)
        found = []
        for run in (compiled, model):
            model.zero_grad()
            loss = run(ids, mask, labels=ids).loss
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        for one, other in zip(*found, strict=True):
            assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())))
    assert graphs() == 2


@pytest.mark.slow
def test_maps_and_hidden_states_of_a_compiled_model() -> None:
    model = model_of(small("mistral", sliding_window=3), 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = batch(3, 9, left=True)
    options = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        found, expected = (run(ids, mask, **options) for run in (compiled, model))
    for name in ("attentions", "hidden_states"):
        for one, other in zip(found[name], expected[name], strict=True):
            assert_close(one, other, atol=1e-5, what=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_inductor(family: str) -> None:
    model = model_of(small(family), 0)
    compiled = torch.compile(model)
    with torch.no_grad():
        for rows, columns, left in SHAPES[:3]:
            ids, mask = batch(rows, columns, left)
            found, expected = compiled(ids, mask), model(ids, mask)
            assert_close(found.logits, expected.logits, atol=1e-5 * float(expected.logits.abs().max()))


@pytest.mark.slow
def test_hooks_that_break_the_graph() -> None:
    """What runs between the parts keeps the padding too."""
    model = model_of(small("bert"), 0)
    seen: list[float] = []
    model.body.layers[0].register_forward_hook(lambda m, i, out: seen.append(float(out[0].sum())))
    compiled = torch.compile(model, backend="eager")
    ids, mask = batch(3, 9)
    with torch.no_grad():
        assert_close(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-5)
    assert len(seen) == 2


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
