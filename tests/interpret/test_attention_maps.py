"""Attention maps out of the fast path: those of the reference path and of transformers, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_agree, assert_close, in_dtype_of
from hypothesis import given
from hypothesis import strategies as st
from pairs import arguments, heads_of, model_of, pair, their_arguments
from strategies import FAMILIES, Batch, Config, cases, examples, seeds, small
from torch import Tensor

import minilm
from minilm import ops
from minilm.ops.backends import native

SAME = 1e-5
BATCH = Batch((7, 1, 4), left=True, extra=1, seed=3)


def own(batch: Batch, maps: Tensor, row: int) -> Tensor:
    """A sequence's part of padded maps [B, H, S, S]."""
    at = batch.mask()[row].nonzero().squeeze(1)
    return maps[row][:, at][:, :, at]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_maps_of_transformers(family: str) -> None:
    """Any configuration, padding on either side, given positions, types or vectors; heads and rows at
    random."""

    @examples(12)
    @given(cases(family).filter(lambda case: layers_of(case[0]) > 0), seeds(), st.data())
    def check(case: tuple[Config, Batch], seed: int, data: st.DataObject) -> None:
        config, batch = case
        with pair(config, heads_of(family)[-1], seed) as p, torch.no_grad():
            theirs = p.reference(**their_arguments(config, batch), output_attentions=True).attentions
            layer = data.draw(st.integers(-len(theirs), len(theirs) - 1))
            heads, shortest = theirs[0].shape[1], min(batch.lengths)
            head = data.draw(st.lists(st.integers(-heads, heads - 1), min_size=1, max_size=3))
            rows = data.draw(st.lists(st.integers(-shortest, shortest - 1), max_size=3))
            found = minilm.attention_probs(
                p.model, **arguments(config, batch), layer=layer, head=head, rows=rows
            )
            for row, one in enumerate(found):

                def again(model: Any, row: int = row) -> Tensor:
                    call = in_dtype_of(model, their_arguments(config, batch))
                    maps = model(**call, output_attentions=True).attentions
                    return own(batch, maps[layer], row)[head][:, rows]

                assert_agree(one, again(p.reference), p.reference, again, atol=SAME, what=f"sequence {row}")

    check()


def layers_of(config: Config) -> int:
    names = ("num_hidden_layers", "n_layers", "n_layer")
    return next(int(config[name]) for name in names if name in config)


@pytest.mark.parametrize("family", ["bert", "gpt2", "mistral", "qwen3"])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_the_maps_of_the_reference_path(family: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    config = small(family, **({"sliding_window": 3} if family == "mistral" else {}))
    model = model_of(config, 0)
    with torch.no_grad(), ops.backend("reference"):
        full = model(**arguments(config, BATCH), output_attentions=True).attentions
    names = ("triton", "reference") if backend == "triton" else (backend,)
    for layer in range(2):
        ops.explain(reset=True)
        with ops.backend(*names):
            found = minilm.attention_probs(model, **arguments(config, BATCH), layer=layer)
        ran = ops.explain()
        for row, one in enumerate(found):
            assert_close(one, own(BATCH, full[layer], row), atol=SAME)
        if backend == "auto" and native.unavailable is None:
            assert ran.backends("blocks") == {"native"}, "not on the fast path"
        if backend == "triton":
            wrote = [d.traits.lse for d in ran.decisions if d.op == "attention" and d.calls]
            assert wrote.count(True) == 1, "the log-sum-exp is the asked layer's alone"
            assert ran.backends("attention") == {"triton"}


def test_numbers_lists_and_slices() -> None:
    """As in indexing: a number drops its axis."""
    config = small("llama")
    model, call = model_of(config, 1), arguments(small("llama"), BATCH)
    whole = minilm.attention_probs(model, **call, layer=-1)
    assert [list(m.shape) for m in whole] == [[3, 7, 7], [3, 1, 1], [3, 4, 4]]
    for head in (2, -1, [0, 2], slice(1, None), [1]):
        for rows in (-1, 0, [0, -1], slice(-2, None), []):
            found = minilm.attention_probs(model, **call, layer=1, head=head, rows=rows)
            for one, full in zip(found, whole, strict=True):
                expected = full[head][rows] if isinstance(head, int) else full[head][:, rows]
                assert_close(one, expected, atol=1e-6)


def test_no_gradient_and_no_trace_of_the_call() -> None:
    model = model_of(small("bert"), 0)
    ids = torch.randint(4, 41, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
    (first, _) = minilm.attention_probs(model, ids, layer=0)
    assert not first.requires_grad
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_few_rows_hold_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores that are computed are those of the rows asked about."""
    largest = 0
    real = ops.reference.scores

    def seen(*args: Any, **options: Any) -> Tensor:
        nonlocal largest
        found: Tensor = real(*args, **options)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(ops.reference, "scores", seen)
    model = model_of(small("llama", max_position_embeddings=300), 0)
    ids = torch.randint(4, 41, (1, 300), generator=torch.Generator().manual_seed(0))
    if native.unavailable is not None:
        pytest.skip(native.unavailable)
    (found,) = minilm.attention_probs(model, ids, layer=1, head=0, rows=[-1, 5])
    assert list(found.shape) == [2, 300]
    assert largest == 600
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer 2 is out of range: the model has 2 layers"),
        ({"layer": -3}, "layer -3 is out of range"),
        ({"layer": 0, "head": 3}, "head 3 is out of range: each layer has 3 heads"),
        ({"layer": 0, "head": [0, -4]}, "head -4 is out of range"),
        ({"layer": 0, "rows": 4}, "rows 4 is out of range: sequence 1 has 1 tokens"),
        ({"layer": 0, "rows": [0, -2]}, "rows -2 is out of range: sequence 1 has 1 tokens"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    model, call = model_of(small("bert"), 0), arguments(small("bert"), BATCH)
    with pytest.raises(IndexError, match=f"attention_probs: {message}"):
        minilm.attention_probs(model, **call, **options)


def test_batches_are_checked_as_ever() -> None:
    model = model_of(small("bert"), 0)
    with pytest.raises(ValueError, match="input_ids holds 41"):
        minilm.attention_probs(model, torch.tensor([[41]]), layer=0)
