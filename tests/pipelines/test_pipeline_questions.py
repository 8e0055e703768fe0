"""question-answering against what transformers 4 answered (golden files), and against the rule itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from same import assert_same
from tiny_models import CORPUS, save_model

from minilm.pipelines import pipeline
from minilm.pipelines.question_answering import _spans

GOLDEN = Path(__file__).parents[1] / "golden" / "question_answering"
FAMILIES = ("bert", "roberta")


@pytest.fixture(scope="module")
def answerers() -> dict[str, Any]:
    return {
        family: pipeline("question-answering", model=GOLDEN / family, device="cpu") for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(answerers: dict[str, Any], family: str) -> None:
    cases = json.loads((GOLDEN / family / "expected.json").read_text(encoding="utf-8"))
    assert len(cases) == 84
    for question, context, options, expected in cases:
        found = answerers[family](question=question, context=context, **options)
        if options.get("top_k", 1) > 1:  # transformers fills up with answers that cannot be, in no order
            listed = expected if isinstance(expected, list) else [expected]
            expected = [answer for answer in listed if answer["score"] > 0]
        assert_same(found, expected, atol=1e-5, path=f"{question!r} {context!r:.40} {options}")


def test_golden_logits_are_those_of_transformers_now(answerers: dict[str, Any]) -> None:
    """The files hold a model that answers differently for different texts."""
    for family in FAMILIES:
        ours = answerers[family]
        theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(GOLDEN / family)
        batch = ours.tokenizer("Who lives in Paris?", CORPUS[0], return_tensors="pt")
        with torch.inference_mode():
            found, expected = ours.model(**batch), theirs(**batch)
        torch.testing.assert_close(found.start_logits, expected.start_logits, atol=1e-4, rtol=0)
        assert expected.start_logits.std() > 0.3


@given(
    n=st.integers(1, 9),
    count=st.integers(1, 12),
    longest=st.integers(1, 9),
    seed=st.integers(0, 1000),
    zeros=st.booleans(),
)
def test_spans_are_the_best_of_all(n: int, count: int, longest: int, seed: int, zeros: bool) -> None:
    start, end = np.random.default_rng(seed).random((2, n))
    if zeros:
        start[::2] = 0.0
    every = [
        (i, j, start[i] * end[j])
        for i in range(n)
        for j in range(i, min(n, i + longest))
        if start[i] * end[j] > 0
    ]
    expected = sorted(every, key=lambda span: -span[2])[:count]
    found = _spans(start, end, count, longest)
    assert found == [(i, j, pytest.approx(score)) for i, j, score in expected]


# The ways to call it


def test_calls(answerers: dict[str, Any]) -> None:
    answer = answerers["bert"]
    question, context = "Who lives in Paris?", CORPUS[0]
    expected = answer(question=question, context=context)
    assert expected["answer"] == context[expected["start"] : expected["end"]]
    example = {"question": question, "context": context}
    for found in (
        answer(question, context),
        answer(example),
        answer([example]),
        answer(question=[question], context=[context]),
    ):
        assert_same(found, expected, atol=1e-6)
    several = answer(question=[question, "Where was Anna?"], context=context)
    assert_same(several[0], expected, atol=1e-6)
    assert len(several) == 2
    assert_same(answer(example, example), [expected, expected], atol=1e-6)
    assert_same(answer([example, example], batch_size=1), [expected, expected], atol=1e-6)
    streamed = answer(item for item in (example, example))
    assert isinstance(streamed, Iterator)
    assert_same(list(streamed), [expected, expected], atol=1e-6)


def test_batches_do_not_matter(answerers: dict[str, Any]) -> None:
    answer = answerers["roberta"]
    examples = [
        {"question": q, "context": c}
        for q in ("Who?", "Where was Anna?")
        for c in (*CORPUS, " ".join(CORPUS * 3))
    ]
    expected = [answer(example, top_k=3) for example in examples]
    for batch_size in (1, 3, 32):
        assert_same(answer(examples, top_k=3, batch_size=batch_size), expected, atol=1e-6)


def test_answers_in_every_window_are_found(tmp_path: Path) -> None:
    """Wherever the one word is that the model wants, it is the answer, with its place."""
    folder = save_model(tmp_path, "bert", "ForQuestionAnswering", positions=64)
    answer = pipeline("question-answering", model=folder, device="cpu")
    model, tokenizer = answer.model, answer.tokenizer
    with torch.no_grad():  # a model that points at the word "green", whatever is around it
        for name, parameter in model.named_parameters():
            if "norm" not in name and "tokens" not in name:
                parameter.zero_()
        wanted = torch.nn.functional.normalize(
            model.body.embeddings.tokens.weight[tokenizer.vocab["green"]], dim=0
        )
        model.head.out.weight.copy_(30 * wanted.expand(2, -1))
    filler = "the old city of france . " * 40
    for place in (0, 7, 40, 41, 60, 200):
        words = filler.split()
        words[place] = "green"
        context = " ".join(words)
        found = answer(question="who ?", context=context)
        assert found["answer"] == "green"
        assert context[found["start"] : found["end"]] == "green"
        assert found["start"] == len(" ".join(words[:place])) + (place > 0)
        # Probabilities of words that windows have in common are summed, so that others may come before.
        several = answer(question="who ?", context=context, max_seq_len=20, doc_stride=3, top_k=9)
        assert found["start"] in [other["start"] for other in several if other["answer"] == "green"]


def test_no_answer_is_as_probable_as_in_the_window_that_says_it_least(answerers: dict[str, Any]) -> None:
    answer = answerers["roberta"]
    question, context = "Where was Anna?", " ".join(CORPUS)
    windows = answer.tokenizer(
        [question],
        [context],
        truncation="only_second",
        max_length=50,
        stride=10,
        return_overflowing_tokens=True,
    )
    nothing = []
    for row in windows.encodings:
        out = answer.model(input_ids=torch.tensor([row.ids]))
        allowed = torch.tensor([s == 1 or i == 0 for i, s in enumerate(row.sequence_ids)])
        start, end = (
            x[0].masked_fill(~allowed, -1e4).softmax(0)[0].item() for x in (out.start_logits, out.end_logits)
        )
        nothing.append(start * end)
    assert len(set(nothing)) > 2
    found = answer(
        question=question,
        context=context,
        max_seq_len=50,
        doc_stride=10,
        handle_impossible_answer=True,
        top_k=10_000,
    )
    assert [a["score"] for a in found if a["answer"] == ""] == [pytest.approx(min(nothing), abs=1e-9)]
    assert min(nothing) < 0.5 * nothing[-1]


def test_a_long_question_can_be_cut(answerers: dict[str, Any]) -> None:
    answer = answerers["bert"]
    context = CORPUS[0]
    found = answer(question="who lives in the old city of france", context=context, max_question_len=3)
    assert_same(found, answer(question="who lives in", context=context), atol=1e-6)
    assert answer(question="who lives in the old city of france", context=context)["score"] != pytest.approx(
        found["score"]
    )


def test_a_context_without_tokens_has_no_answer(answerers: dict[str, Any]) -> None:
    found = answerers["bert"](question="who?", context="\u200b")
    assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)


def test_bad_input(answerers: dict[str, Any]) -> None:
    answer = answerers["bert"]
    with pytest.raises(TypeError, match="takes question= and context="):
        answer(question="who?")
    with pytest.raises(TypeError, match="takes question= and context="):
        answer("who?")
    with pytest.raises(TypeError, match="either examples or question="):
        answer({"question": "a", "context": "b"}, question="a")
    with pytest.raises(ValueError, match="the context is empty"):
        answer(question="who?", context="")
    with pytest.raises(ValueError, match="the question is empty"):
        answer({"question": "", "context": "b"})
    with pytest.raises(TypeError, match="takes texts, and got int"):
        answer({"question": 3, "context": "b"})
    with pytest.raises(ValueError, match=r'expected \{"question": ..., "context": ...\}, got '):
        answer([{"question": "a"}, {"question": "a"}])
    with pytest.raises(ValueError, match="there are 2 questions and 1 contexts"):
        answer(question=["a", "b"], context=["c"])
    for name in ("top_k", "max_answer_len", "max_seq_len", "max_question_len"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, and is 0"):
            answer(question="who?", context="anna", **{name: 0})
    with pytest.raises(ValueError, match=r"windows of 10 tokens with a question of 7 have room for 0 tokens"):
        answer(question="where is the old city of france", context="anna", max_seq_len=10)
    with pytest.raises(ValueError, match="too few for a doc_stride of 95"):
        answer(question="who?", context="anna", doc_stride=95)
    with pytest.raises(TypeError, match="question-answering has no option topk"):
        answer(question="who?", context="anna", topk=2)
