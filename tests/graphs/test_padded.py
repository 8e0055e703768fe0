"""In a graph, which keeps padding, a model computes the same as outside of one, where padding is removed.
`in_graph` is patched, so that no graph has to be made; graphs are tested in test_export and test_compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from close import assert_agree, assert_close
from hypothesis import given
from hypothesis import strategies as st
from pairs import arguments, class_of, fields, heads_of, model_of, randomise
from strategies import DECODERS, FAMILIES, cases, examples, seeds, small
from torch import Tensor

import minilm
from minilm.graphs import Padded


@contextmanager
def graph() -> Iterator[None]:
    """As if torch.jit.trace was at work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C, "_is_tracing", lambda: True)
        yield


def with_holes(mask: Tensor, seed: int) -> Tensor:
    """The mask with some of its ones gone; a row may lose all of them."""
    kept = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    return mask * kept


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@examples(6)
def test_every_head(family: str, data: st.DataObject) -> None:
    config, batch = data.draw(cases(family))
    head = data.draw(st.sampled_from(heads_of(family)))
    model = class_of(minilm, family, head).from_config(minilm.PretrainedConfig.from_dict(config)).eval()
    randomise(model, data.draw(seeds()))
    call: dict[str, Any] = arguments(config, batch)
    pools = head in ("base", "next-sentence", "pre-training", "sequence-classification")
    if not pools and data.draw(st.booleans()):
        call["attention_mask"] = with_holes(call["attention_mask"], batch.seed)
    if data.draw(st.booleans()):
        del call["attention_mask"]
    shown = data.draw(st.booleans())
    call |= {"use_cache": False, "output_hidden_states": shown, "output_attentions": shown}
    with torch.no_grad():
        expected = model(**call)
        with graph():
            found = model(**call, return_dict=True)
    assert list(found) == list(expected)
    for name in fields(head, expected):
        assert_agree(
            found[name], expected[name], model, lambda m, name=name: m(**in_dtype(m, call))[name], what=name
        )
    for name in ("hidden_states", "attentions") if shown else ():
        for one, other in zip(found[name], expected[name], strict=True):
            assert_close(one, other, atol=1e-3 * max(1.0, float(other.abs().max())), what=name)


def in_dtype(model: Any, call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(model.dtype) if k == "inputs_embeds" else v for k, v in call.items()}


@pytest.mark.parametrize("family", ["bert", "llama", "mistral"])
@pytest.mark.parametrize("left", [False, True])
def test_losses_and_gradients(family: str, left: bool) -> None:
    """Labels at padding count nowhere, and with padding between tokens the next token is the next one."""
    model = model_of(small(family), 0).train()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
    mask = mask.flip(1) if left else mask
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for context in (graph, _nothing):
        model.zero_grad()
        torch.manual_seed(0)
        with context():
            loss = model.eval()(ids, mask, labels=ids, use_cache=False, return_dict=True).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_what_stands_at_padding_reaches_nothing() -> None:
    """Not even what is not a number, and positions that no table has."""
    model = model_of(small("bert"), 0)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    vectors = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    places = torch.tensor([[0, 1, 2, 9999], [-5, 9999, 0, 1], [9999, 9999, 9999, 9999]])
    with torch.no_grad():
        expected = model(attention_mask=mask, inputs_embeds=vectors, position_ids=places).logits
        broken = vectors.masked_fill(mask[..., None] == 0, torch.nan)
        with graph():
            call = {"attention_mask": mask, "inputs_embeds": broken, "position_ids": places}
            found = model(**call, return_dict=True).logits
    assert_close(found, expected, atol=1e-5)
    assert not found[2].any()


@pytest.mark.parametrize("kept", [1, 3, 9])
@pytest.mark.parametrize("left", [False, True])
def test_logits_to_keep(kept: int, left: bool) -> None:
    model = model_of(small("llama"), 0)
    mask = (torch.arange(5) < torch.tensor([[5], [2], [4]])).long()
    mask = mask.flip(1) if left else mask
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids, mask, logits_to_keep=kept).logits
        with graph():
            found = model(ids, mask, logits_to_keep=kept, return_dict=True).logits
    assert_close(found, expected, atol=1e-5)


def test_dynamic_rope_beyond_its_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 50.0}
    config = small("llama", rope_parameters=scaling, max_position_embeddings=4)
    model = model_of(config, 0)
    mask = (torch.arange(9) < torch.tensor([[9], [3], [6]])).long()
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(ids, mask).logits
        with graph():
            assert_close(model(ids, mask, return_dict=True).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_an_exported_model_has_no_cache(family: str) -> None:
    model = model_of(small(family), 0)
    ids = torch.tensor([[4, 5, 6]])
    cache = model(ids, use_cache=True).past_key_values
    with graph(), torch.no_grad():
        assert isinstance(model(ids), tuple)
        for options in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match="an exported model has no KV cache: leave out"):
                model(ids, **options)


def test_places() -> None:
    real = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    padded = Padded(3, 4, real, torch.device("cpu"))
    assert padded.first().tolist() == [1, 4, 8]
    assert padded.last().tolist() == [2, 7, 8]
    there = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert padded.last_where(there).tolist() == [1, 4, 8]
    assert padded.positions.tolist() == [0, 0, 1, 0, 0, 0, 2, 3, 0, 0, 0, 0]
    labels = torch.arange(12).view(3, 4)
    assert padded.targets(labels, False).tolist() == [-100, 1, 2, -100, 4, -100, 6, 7, *[-100] * 4]
    assert padded.targets(labels, True).tolist() == [-100, 2, -100, -100, 6, -100, 7, -100, *[-100] * 4]
    whole = Padded(2, 3, None, torch.device("cpu"))
    assert whole.last().tolist() == [2, 5]
    assert whole.targets(torch.arange(6).view(2, 3), True).tolist() == [1, 2, -100, 4, 5, -100]
