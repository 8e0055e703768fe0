"""What models are called with: labels out of range, ids of any dtype, what is no tensor, what is no
configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pairs import pair
from strategies import small
from torch import Tensor

import minilm


def assert_loss(actual: Tensor, expected: Tensor, *, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("label", [3, -1, -99, 2**40])
def test_label_that_is_no_class_is_refused(label: int) -> None:
    words = f"labels must be from 0 to 2, or -100 for none, and one is {label}"
    ids = torch.tensor([[5, 6]])
    with (
        pair(small("bert"), "sequence-classification", num_labels=3) as p,
        pytest.raises(ValueError, match=words),
    ):
        p.model(ids, labels=torch.tensor([label]))
    with (
        pair(small("bert"), "token-classification", num_labels=3) as p,
        pytest.raises(ValueError, match=words),
    ):
        p.model(ids, labels=torch.tensor([[1, label]]))
    for family, head in (("bert", "masked-lm"), ("gpt2", "causal-lm")):
        with pair(small(family), head) as p:
            size = p.model.spec.vocab_size
            wrong = size if label == 3 else label
            for dtype in (torch.float32, torch.bfloat16):
                with pytest.raises(ValueError, match=f"from 0 to {size - 1}, .* and one is {wrong}"):
                    p.model.to(dtype)(ids, labels=torch.tensor([[5, wrong]]))
    with (
        pair(small("bert"), "next-sentence") as p,
        pytest.raises(ValueError, match=f"0 to 1.*one is {label}"),
    ):
        p.model(ids, labels=torch.tensor([label]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([[5, 6], [7, 8]])
    for head, labels in (("sequence-classification", [1, 2]), ("token-classification", [[1, 2], [0, 1]])):
        with pair(small("bert"), head, num_labels=3) as p, torch.no_grad():
            loss = p.reference(ids, labels=torch.tensor(labels)).loss
            assert_loss(p.model(ids, labels=torch.tensor(labels).to(dtype)).loss, loss, what=head)


def test_answers_at_padding_are_ignored_and_before_the_text_refused() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    inside, nowhere = torch.tensor([2, 1]), torch.tensor([2, 2])
    with pair(small("bert"), "question-answering") as p, torch.no_grad():
        expected = p.reference(ids[:1], start_positions=inside[:1], end_positions=inside[:1]).loss
        assert_loss(
            p.model(ids, mask, start_positions=nowhere, end_positions=nowhere).loss, expected, what="loss"
        )
        for name in ("start_positions", "end_positions"):
            given_ = {"start_positions": inside, "end_positions": inside, name: torch.tensor([-1, 1])}
            with pytest.raises(ValueError, match=f"{name} must be columns, from 0 to 2, and one is -1"):
                p.model(ids, mask, **given_)


@pytest.mark.parametrize("labels", [[[1.5, 0.0, 0.0]], [[-0.5, 0.0, 1.0]], [[1.0, 0.0]]], ids=str)
def test_labels_of_several_classes_are_parts_of_one(labels: Any) -> None:
    with (
        pair(small("bert"), "sequence-classification", num_labels=3) as p,
        pytest.raises(ValueError, match=r"labels must be from 0 to 1, \[1, 3\]"),
    ):
        p.model(torch.tensor([[5, 6]]), labels=torch.tensor(labels))


def test_numbers_to_learn_are_one_for_each_row() -> None:
    ids = torch.tensor([[5, 6], [7, 8]])
    with pair(small("bert"), "sequence-classification", num_labels=1) as p, torch.no_grad():
        loss = p.reference(ids, labels=torch.tensor([1.0, 2.0])).loss
        for labels in (torch.tensor([1, 2]), torch.tensor([[1.0], [2.0]])):
            assert_loss(p.model(ids, labels=labels).loss, loss, what="loss")
        with pytest.raises(ValueError, match=r"labels must be \[2, 1\] for regression, and are \[3\]"):
            p.model(ids, labels=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "wrong", [[[5, 6]], "text", torch.tensor([[5.0, 6.0]]), torch.tensor([[True, False]])]
)
@pytest.mark.parametrize("name", ["input_ids", "labels", "token_type_ids", "position_ids"])
def test_ids_are_tensors_of_integers(name: str, wrong: Any) -> None:
    with pair(small("bert"), "masked-lm") as p:
        with pytest.raises(ValueError, match=f"{name} must be a tensor of integers, and is"):
            p.model(**{"input_ids": torch.tensor([[5, 6]]), name: wrong})
        if not isinstance(wrong, torch.Tensor):
            with pytest.raises(ValueError, match="attention_mask must be a tensor"):
                p.model(torch.tensor([[5, 6]]), wrong)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint16", "uint32", "uint64"])
def test_ids_of_any_integer_dtype(dtype: str) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    with pair(small("bert"), "masked-lm") as p, torch.no_grad():
        given_ = {"input_ids": ids, "token_type_ids": ids % 2, "position_ids": ids % 3}
        expected = p.reference(**given_).logits
        found = p.model(**{name: x.to(getattr(torch, dtype)) for name, x in given_.items()}).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ["bert-base-uncased", Path("folder"), {"model_type": "bert"}, None])
def test_a_model_is_made_of_a_configuration(config: Any) -> None:
    for cls in (minilm.AutoModel, minilm.AutoModelForCausalLM, minilm.BertForMaskedLM):
        with pytest.raises(TypeError, match=r"config must be a PretrainedConfig, and is .*from_pretrained"):
            cls(config)
    with pytest.raises(TypeError, match="and is BertConfig"):
        minilm.AutoModel(transformers.BertConfig())
