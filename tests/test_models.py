"""Models against transformers, configuration by configuration: logits, hidden states, attention maps,
files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close
from hypothesis import given
from pairs import (
    arguments,
    fields,
    heads_of,
    pair,
    pooled_where_they_look,
    rows,
    their_arguments,
)
from strategies import FAMILIES, Batch, Config, cases, examples, seeds
from torch import Tensor

from minilm.archs.family import Head

EVERY_HEAD = [(family, head) for family in FAMILIES for head in heads_of(family)]
PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits", "prediction_logits")


def per_token(head: Head, name: str) -> bool:
    """Whether a field has a column for each token, and not one value for the row."""
    return name in PER_TOKEN or (
        name == "logits" and head in ("masked-lm", "token-classification", "causal-lm")
    )


def assert_same(head: Head, batch: Batch, ours: Any, theirs: Any, their_batch: Batch) -> None:
    """All results of a head agree, and minilm's are zero at padding."""
    assert fields(head, ours) == fields(head, theirs)
    for name in fields(head, theirs):
        a, b = ours[name], theirs[name]
        if per_token(head, name):
            if head != "question-answering":
                assert not a[batch.mask() == 0].any(), f"{name} is not zero at padding"
            a, b = rows(batch, a), rows(their_batch, b)
        assert_close(a, b, what=name)
    surplus = set(theirs.keys()) ^ set(ours.keys())
    assert surplus <= {"cross_attentions"}, f"fields that only one of the two has: {surplus}"
    if theirs.get("hidden_states") is not None:
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for layer, (a, b) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
            assert_close(rows(batch, a), rows(their_batch, b), what=f"hidden_states[{layer}]")
    if theirs.get("attentions") is not None:
        assert len(ours.attentions) == len(theirs.attentions)
        for layer, (a, b) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
            assert_close(maps(batch, a), maps(their_batch, b), what=f"attentions[{layer}]")


def maps(batch: Batch, x: Tensor) -> Tensor:
    """Attention maps [B, H, S, S] with padding moved to the end, zero for queries at padding."""
    mask = batch.mask()
    order = (1 - mask).argsort(dim=1, stable=True)
    index = order[:, None, :, None].expand_as(x), order[:, None, None, :].expand_as(x)
    x = x.gather(2, index[0]).gather(3, index[1])
    return x * mask.sort(dim=1, descending=True).values[:, None, :, None]


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_model_is_transformers(family: str, head: Head) -> None:
    @examples(25 if head in ("base", "causal-lm", "masked-lm") else 12)
    @given(cases(family), seeds())
    def check(case: tuple[Config, Batch], seed: int) -> None:
        config, batch = case
        their_batch = pooled_where_they_look(config, head, batch)
        show = {"output_hidden_states": True, "output_attentions": True} if seed % 2 else {}
        with pair(config, head, seed) as p, torch.no_grad():
            ours = p.model(**arguments(config, batch), **show)
            theirs = p.reference(**their_arguments(config, their_batch), **show)
        assert_same(head, batch, ours, theirs, their_batch)

    check()
