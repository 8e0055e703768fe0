"""Vocabularies of other sizes: what transformers makes of the same calls, in memory and in files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from pairs import class_of, pair
from strategies import ENCODERS, FAMILIES, small

import minilm
from minilm.families.family import Head

CALLS: list[dict[str, Any]] = [
    {"new_num_tokens": 45, "pad_to_multiple_of": 8},
    {"new_num_tokens": 48, "pad_to_multiple_of": 8},
    {"new_num_tokens": 30, "pad_to_multiple_of": 7},
    {"pad_to_multiple_of": 64},
    {"pad_to_multiple_of": 41},
    {"new_num_tokens": 50, "mean_resizing": False},
    {"new_num_tokens": None},
    {},
]
"""Of a vocabulary of 41."""


def sizes(model: Any) -> tuple[int, ...]:
    output = model.get_output_embeddings()
    rows = model.get_input_embeddings().weight.shape[0]
    return model.config.vocab_size, rows, rows if output is None else output.weight.shape[0]


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "electra", "albert", "gpt2", "llama"])
def test_sizes_are_those_of_transformers(family: str, tie: bool, call: dict[str, Any]) -> None:
    head: Head = "masked-lm" if family in ENCODERS else "causal-lm"
    with pair(small(family, tie_word_embeddings=tie), head) as p, torch.no_grad():
        ids = torch.tensor([[5, 6, 20]])
        before, table = p.model(ids).logits, p.model.get_input_embeddings()
        found = p.model.resize_token_embeddings(**call)
        p.reference.resize_token_embeddings(**call)
        vocabulary, rows, output = sizes(p.reference)
        assert found is table is p.model.get_input_embeddings()
        after = p.model(ids)
        assert (p.model.config.vocab_size, table.weight.shape[0]) == (vocabulary, rows)
        assert table.num_embeddings == p.model.spec.vocab_size == rows == output
        assert after.logits.shape == (1, 3, output)
        kept = min(rows, 41)
        assert (after.logits[..., :kept] - before[..., :kept]).abs().max() < 1e-5
        assert p.model(torch.tensor([[rows - 1]])).logits.isfinite().all()
        with pytest.raises(ValueError, match=f"the vocabulary has {rows} entries"):
            p.model(torch.tensor([[rows]]))
        p.model.save_pretrained(p.folder / "other")
        again = type(p.model).from_pretrained(p.folder / "other")
        assert torch.equal(again(ids).logits, after.logits)
        theirs = class_of(transformers, family, head).from_pretrained(p.folder / "other").eval()
        assert sizes(theirs) == (vocabulary, rows, output)
        assert (theirs(ids).logits - after.logits).abs().max() < 1e-4
        p.model.train()
        loss = p.model(ids, labels=torch.full_like(ids, rows - 1)).loss
        assert loss.isfinite()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_new_rows_are_near_the_mean(family: str, tie: bool) -> None:
    """So that they take nothing from the old tokens; and different, so that they can be told apart."""
    head: Head = "masked-lm" if family in ENCODERS else "causal-lm"
    with pair(small(family, tie_word_embeddings=tie), head) as p, torch.no_grad():
        names = [
            n
            for n, x in p.model.named_parameters()
            if x.shape[:1] == (41,) and ("tokens" in n or "head" in n)
        ]
        old = {n: x.clone() for n, x in p.model.named_parameters() if n in names}
        p.model.resize_token_embeddings(3000)
        for name, x in p.model.named_parameters():
            if name not in names:
                continue
            new, mean, spread = x[41:], old[name].mean(0), old[name].std(0, unbiased=False)
            if name == "head.bias" and tie:
                assert (new == 0).all()
                continue
            assert (new - mean).abs().max() < 1e-3 * spread.max()
            measured = (new - mean).double().std(0)
            if x.dim() == 2:
                assert ((measured / (spread * 1e-9**0.5)) - 1).abs().max() < 0.2
                assert len({tuple(row.tolist()) for row in new}) > 2900
    with pair(small(family, tie_word_embeddings=tie), head) as p, torch.no_grad():
        p.model.resize_token_embeddings(3000, mean_resizing=False)
        new = p.model.get_input_embeddings().weight[41:]
        assert new.std() == pytest.approx(float(p.model.config.initializer_range), rel=0.1)
        assert new.mean().abs() < 0.1 * new.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_its_base_model(family: str) -> None:
    with pair(small(family), "base") as p, torch.no_grad():
        p.model.resize_token_embeddings(42, pad_to_multiple_of=16)
        assert p.model.config.vocab_size == p.model.base_model.spec.vocab_size == 48
        p.model.save_pretrained(p.folder / "other")
        again = type(p.model).from_pretrained(p.folder / "other")
        assert again.get_input_embeddings().weight.shape[0] == 48


def test_padding_row_frozen_table_and_dtype() -> None:
    config = minilm.BertConfig(
        vocab_size=41, hidden_size=12, num_attention_heads=3, num_hidden_layers=1, pad_token_id=40
    )
    model = minilm.BertModel(config).to(torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.resize_token_embeddings(20)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not model.get_input_embeddings().weight.requires_grad
    assert model(torch.tensor([[19]])).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        *({"new_num_tokens": 0}, {"new_num_tokens": -3}, {"new_num_tokens": 4.0}, {"new_num_tokens": True}),
        *({"pad_to_multiple_of": 0}, {"pad_to_multiple_of": 8.0}),
        {"new_num_tokens": 50, "pad_to_multiple_of": -8},
    ],
    ids=str,
)
def test_what_is_no_size_is_refused(call: dict[str, Any]) -> None:
    config = minilm.LlamaConfig(vocab_size=41, hidden_size=12, num_attention_heads=3, num_hidden_layers=1)
    model = minilm.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=f"{list(call)[-1]} must be a whole number of at least 1, and is"):
        model.resize_token_embeddings(**call)
    assert model.config.vocab_size == 41
    assert model.get_input_embeddings().weight.shape[0] == 41
