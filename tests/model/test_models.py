"""Models against transformers, configuration by configuration: logits, hidden states, attention maps,
files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st
from pairs import (
    arguments,
    fields,
    heads_of,
    pair,
    pooled_where_they_look,
    rows,
    their_arguments,
)
from strategies import (
    DECODERS,
    FAMILIES,
    LONGEST,
    Batch,
    Config,
    cases,
    configs,
    examples,
    is_dynamic,
    padding_id,
    seeds,
)
from torch import Tensor

from minilm.families.family import Head

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


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_may_be_hidden_in_the_middle(family: str) -> None:
    """A mask with holes, whatever ids stand there: positions go on counting columns, as in transformers."""

    @examples(8)
    @given(configs(family).filter(lambda config: not config.get("sliding_window")), seeds())
    def check(config: Config, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.randint(2, (3, 9), generator=generator)
        mask[:, 0] = 1
        batch = Batch((9, 9, 9), left=False, extra=0, seed=seed)
        if is_dynamic(config):
            mask[:, -1] = 1
        head: Head = "causal-lm" if family in DECODERS else "masked-lm"
        with pair(config, head, seed) as p, torch.no_grad():
            ours = p.model(batch.ids(config), attention_mask=mask).logits
            theirs = p.reference(batch.ids(config), attention_mask=mask).logits
        assert_close(ours[mask.bool()], theirs[mask.bool()])

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_call(family: str) -> None:
    """Nothing but ids, among them the padding id: no mask is made up, and positions are transformers' own."""

    @examples(8)
    @given(configs(family), st.integers(1, LONGEST), seeds())
    def check(config: Config, columns: int, seed: int) -> None:
        ids = torch.randint(config["vocab_size"], (2, columns), generator=torch.Generator().manual_seed(seed))
        ids[0, columns // 2] = padding_id(config)
        head: Head = "causal-lm" if family in DECODERS else "masked-lm"
        with pair(config, head, seed) as p, torch.no_grad():
            assert_close(p.model(ids).logits, p.reference(ids).logits)

    check()
