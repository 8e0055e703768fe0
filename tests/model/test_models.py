"""Models against transformers, configuration by configuration: logits, hidden states, attention maps,
files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_agree, in_dtype_of
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
    GEMMAS,
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
        name == "logits" and head in ("masked-lm", "pre-training", "token-classification", "causal-lm")
    )


def assert_same(
    head: Head, batch: Batch, ours: Any, reference: Any, run: Callable[[Any], Any], their_batch: Batch
) -> None:
    """All results of a head agree with `run(reference)`, and minilm's are zero at padding."""
    theirs = run(reference)
    assert fields(head, ours) == fields(head, theirs)
    for name in fields(head, theirs):
        a, pick = ours[name], lambda output, name=name: output[name]
        if per_token(head, name):
            if head != "question-answering":
                assert not a[batch.mask() == 0].any(), f"{name} is not zero at padding"
            a, pick = rows(batch, a), lambda output, name=name: rows(their_batch, output[name])
        assert_agree(a, pick(theirs), reference, lambda model, pick=pick: pick(run(model)), what=name)
    surplus = set(theirs.keys()) ^ set(ours.keys())
    assert surplus <= {"cross_attentions"}, f"fields that only one of the two has: {surplus}"
    for name, part in (("hidden_states", rows), ("attentions", maps)):
        if theirs.get(name) is None:
            continue
        assert len(ours[name]) == len(theirs[name])
        for layer, a in enumerate(ours[name]):

            def again(
                model: Any, name: str = name, part: Callable[..., Tensor] = part, layer: int = layer
            ) -> Tensor:
                return part(their_batch, run(model)[name][layer])

            b = part(their_batch, theirs[name][layer])
            assert_agree(part(batch, a), b, reference, again, what=f"{name}[{layer}]")


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
            call = their_arguments(config, their_batch)
            ours = p.model(**arguments(config, batch), **show)
            assert_same(
                head, batch, ours, p.reference, lambda m: m(**in_dtype_of(m, call), **show), their_batch
            )

    check()


WIDE = 64


def unlimited(config: Config) -> Config:
    """Windows count tokens here and columns in transformers: those that cannot be left out see all."""
    windows = {
        **{key: {"sliding_window": WIDE} for key in GEMMAS[1:]},
        "modernbert": {"local_attention": 2 * WIDE},
    }
    return {**config, **windows.get(config["model_type"], {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_may_be_hidden_in_the_middle(family: str) -> None:
    """A mask with holes, whatever ids stand there: positions go on counting columns, as in transformers."""

    @examples(8)
    @given(configs(family).map(unlimited).filter(lambda c: c.get("sliding_window") in (None, WIDE)), seeds())
    def check(config: Config, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.randint(2, (3, 9), generator=generator)
        mask[:, 0] = 1
        batch = Batch((9, 9, 9), left=False, extra=0, seed=seed)
        if is_dynamic(config):
            mask[:, -1] = 1
        head: Head = "causal-lm" if family in DECODERS else "masked-lm"
        with pair(config, head, seed) as p, torch.no_grad():

            def seen(model: Any) -> Tensor:
                return model(batch.ids(config), attention_mask=mask).logits[mask.bool()]

            assert_agree(seen(p.model), seen(p.reference), p.reference, seen)

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
            assert_agree(p.model(ids).logits, p.reference(ids).logits, p.reference, lambda m: m(ids).logits)

    check()
