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
from hypothesis import given, settings
from hypothesis import strategies as st
from same import assert_same
from tiny_models import CORPUS, save_model

from minilm.pipelines import pipeline
from minilm.pipelines.question_answering import _spans
from minilm.sentence import Tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "question_answering"
FAMILIES = ("bert", "roberta")


@pytest.fixture(scope="module")
def answerers() -> dict[str, Any]:
    return {
        family: pipeline("question-answering", model=GOLDEN / family, device="cpu") for family in FAMILIES
    }


Candidates = dict[str, list[dict[tuple[int, int], float]]]
"""Text in lower case -> for each window that says it, its places there and their scores."""


def by_hand(
    answer: Any, question: str, context: str, logits: list[torch.Tensor] | None = None, **options: Any
) -> tuple[Candidates, list[float]]:
    """Every answer that each window proposes, and how probable each window finds it that there is none."""
    top_k, longest = options.get("top_k", 1), options.get("max_answer_len", 15)
    whole_words = options.get("align_to_words", True)
    limit = min(options.get("max_seq_len", 384), answer.tokenizer.model_max_length)
    room = (
        limit
        - len(answer.tokenizer.tokenize(question))
        - answer.tokenizer.num_special_tokens_to_add(pair=True)
    )
    stride = options.get("doc_stride", max(0, min(limit // 2, 128, room - 1)))
    windows = answer.tokenizer(
        [question], [context], truncation="only_second", max_length=limit, stride=stride,
        return_overflowing_tokens=True,
    )  # fmt: skip
    found: Candidates = {}
    nothing = []
    types = windows.get("token_type_ids") or [None] * len(windows["input_ids"])
    for number, (row, kinds) in enumerate(zip(windows.encodings, types, strict=True)):
        if logits is None:
            given = {} if kinds is None else {"token_type_ids": torch.tensor([kinds])}
            with torch.inference_mode():
                out = answer.model(input_ids=torch.tensor([row.ids]), **given)
            scores = torch.stack([out.start_logits[0], out.end_logits[0]]).double()
        else:
            scores = logits[number].T.double()
        inside = torch.tensor([s == 1 for s in row.sequence_ids])
        first_is_cls = torch.zeros_like(inside).index_fill(0, torch.tensor([0]), True)
        start, end = scores.masked_fill(~(inside | first_is_cls), -1e4).softmax(1).tolist()
        nothing.append(start[0] * end[0])
        at = inside.nonzero().flatten().tolist()
        spans = [(start[i] * end[j], i, j) for i in at for j in at if i <= j < i + longest]
        spans = sorted((s for s in spans if s[0] > 0), key=lambda s: -s[0])
        here: dict[str, dict[tuple[int, int], float]] = {}
        count = top_k * 2 + 10 if whole_words else top_k
        for number_of_span, (score, i, j) in enumerate(spans):
            if number_of_span in (count, 2 * count, 4 * count, 8 * count, 16 * count) and len(here) >= top_k:
                break
            a, b = row.offsets[i][0], row.offsets[j][1]
            if whole_words:
                a = min(o[0] for o, w, s in zip(row.offsets, row.word_ids, row.sequence_ids, strict=True)
                        if s == 1 and w == row.word_ids[i])  # fmt: skip
                b = max(o[1] for o, w, s in zip(row.offsets, row.word_ids, row.sequence_ids, strict=True)
                        if s == 1 and w == row.word_ids[j])  # fmt: skip
            if number_of_span >= count and context[a:b].lower() in here:
                continue
            places = here.setdefault(context[a:b].lower(), {})
            places[a, b] = places.get((a, b), 0.0) + score
        for text, places in here.items():
            found.setdefault(text, []).append(places)
    return found, nothing


def best_of(candidates: Candidates, context: str) -> list[dict[str, Any]]:
    """The rule: of each text the window that says it most, and there the place that is most probable."""
    answers = []
    for windows in candidates.values():
        places = max(windows, key=lambda places: sum(places.values()))
        a, b = max(places, key=lambda place: places[place])
        answers.append({"score": sum(places.values()), "start": a, "end": b, "answer": context[a:b]})
    return sorted(answers, key=lambda answer: -float(str(answer["score"])))


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(answerers: dict[str, Any], family: str) -> None:
    """What transformers recorded, where a text has one window. With several, it adds up what they say of an
    answer, which counts their overlap twice; so its scores are the sums by hand, and ours the highest."""
    cases = json.loads((GOLDEN / family / "expected.json").read_text(encoding="utf-8"))
    assert len(cases) == 84
    several = 0
    for question, context, options, expected in cases:
        path = f"{question!r} {context!r:.40} {options}"
        found = answerers[family](question=question, context=context, **options)
        if options.get("top_k", 1) > 1:  # transformers fills up with answers that cannot be, in no order
            listed = expected if isinstance(expected, list) else [expected]
            expected = [answer for answer in listed if answer["score"] > 0]
        candidates, nothing = by_hand(answerers[family], question, context, **options)
        if len(nothing) == 1:
            assert_same(found, expected, atol=1e-5, path=path)
            continue
        several += 1
        sums = {text: sum(sum(w.values()) for w in windows) for text, windows in candidates.items()}
        for answer in expected if isinstance(expected, list) else [expected]:
            recorded = sums[answer["answer"].lower()] if answer["answer"] else min(nothing)
            assert answer["score"] == pytest.approx(recorded, abs=1e-5), path
        ours = best_of(candidates, context)
        if options.get("handle_impossible_answer"):
            ours.append({"score": min(nothing), "start": 0, "end": 0, "answer": ""})
            ours.sort(key=lambda answer: -answer["score"])
        ours = ours[: options.get("top_k", 1)]
        assert_same(found if isinstance(found, list) else [found], ours, atol=1e-5, path=path)
    assert 10 < several < 74


@settings(max_examples=40)
@given(
    words=st.lists(
        st.sampled_from(["anna", "Anna", "lives", "in", "the", "Éric", "北京", "riverland", "(", "😀"]),
        min_size=1, max_size=60,
    ),
    seed=st.integers(0, 99),
    sure=st.sampled_from([0.0, 2.0, 12.0]),
    top_k=st.integers(1, 8),
    longest=st.integers(1, 6),
    stride=st.integers(0, 12),
    whole_words=st.booleans(),
    impossible=st.booleans(),
)  # fmt: skip
def test_answers_are_the_best_of_all_windows(
    words: list[str], seed: int, sure: float, top_k: int, longest: int, stride: int, whole_words: bool,
    impossible: bool,
) -> None:  # fmt: skip
    """Against an enumeration of all spans of all windows: places, scores, order and number of answers."""
    answer = _drawn_answerer()
    context = " ".join(words)
    rows: list[torch.Tensor] = []

    def head(result: Any, windows: Any) -> list[torch.Tensor]:
        made = {}
        for number in sorted(range(len(windows)), key=lambda i: (windows[i].ids, i)):
            generator = torch.Generator().manual_seed(seed + sum(windows[number].ids))
            made[number] = torch.randn(len(windows[number]), 2, generator=generator) * sure
        return [made[i] for i in range(len(windows))]

    options = {"top_k": top_k, "max_answer_len": longest, "align_to_words": whole_words}
    options |= {"max_seq_len": 30, "doc_stride": stride}
    answer.head = head
    encoded = answer.tokenizer(
        ["who ?"], [context], truncation="only_second", max_length=30, stride=stride,
        return_overflowing_tokens=True,
    )  # fmt: skip
    rows = head(None, [Tokens(ids) for ids in encoded["input_ids"]])
    candidates, nothing = by_hand(answer, "who ?", context, rows, **options)
    expected = best_of(candidates, context)
    found = answer(question="who ?", context=context, handle_impossible_answer=impossible, **options)
    found = found if isinstance(found, list) else [found]
    if impossible:
        expected.append({"score": min(nothing), "start": 0, "end": 0, "answer": ""})
        expected.sort(key=lambda a: -a["score"])
    assert all(0 <= a["score"] <= 1 for a in found)
    assert all(context[a["start"] : a["end"]] == a["answer"] for a in found)
    assert len({a["answer"].lower() for a in found}) == len(found)
    assert [a["score"] for a in found] == pytest.approx([a["score"] for a in expected[:top_k]], abs=1e-9)
    clear = [a for a in expected[:top_k] if _alone(a["score"], [e["score"] for e in expected])]
    for a in clear:
        assert a["answer"] in [f["answer"] for f in found]


def _alone(score: float, scores: list[float]) -> bool:
    return sum(abs(score - other) < 1e-9 for other in scores) == 1


def _drawn_answerer(cache: list[Any] = []) -> Any:  # noqa: B006 - hypothesis takes no module fixtures
    if not cache:
        cache.append(pipeline("question-answering", model=GOLDEN / "bert", device="cpu"))
    return cache[0]


def test_a_repeated_answer_stands_where_it_is_meant(answerers: dict[str, Any]) -> None:
    """In one window and over several; its score is a probability wherever it stands how often."""
    answer = pipeline("question-answering", model=GOLDEN / "bert", device="cpu")
    paris = answer.tokenizer.get_vocab()["paris"]
    for gap in (1, 5, 60):
        for meant in (0, 1, 2):
            context = ("the " * gap).join(["Paris ", "paris ", "PARIS "])

            def head(result: Any, windows: Any, meant: int = meant, gap: int = gap) -> list[torch.Tensor]:
                rows = []
                for window in windows:
                    logits = torch.zeros(len(window), 2)
                    seen = [i for i, token in enumerate(window.ids) if token == paris]
                    whole = len(seen) == 3
                    for number, i in enumerate(seen):
                        logits[i] = (9.0 if number == meant else 3.0) if whole else 6.0
                    rows.append(logits)
                return rows

            answer.head = head
            found = answer(question="where ?", context=context, max_seq_len=64, doc_stride=20)
            assert found["answer"].lower() == "paris"
            assert 0.3 < found["score"] <= 1
            places = [i for i in range(len(context)) if context[i : i + 5].lower() == "paris"]
            assert found["start"] in places
            if gap < 6:
                assert found["start"] == places[meant]
            all_of_them = answer(
                question="where ?", context=context, max_seq_len=64, doc_stride=20, top_k=500
            )
            assert sum(a["answer"].lower() == "paris" for a in all_of_them) == 1
            assert all(a["score"] <= 1 for a in all_of_them)


def test_as_many_answers_as_asked_for(answerers: dict[str, Any]) -> None:
    """Though the best candidates are all the same words."""
    answer = answerers["bert"]
    context = "anna " * 20 + "lives"
    texts = {context[a:b].strip().lower() for a in range(0, 101, 5) for b in range(a + 4, 106, 5)}
    found = answer(question="who?", context=context, top_k=12)
    assert len(found) == 12
    assert {a["answer"].lower() for a in found} <= texts | {context[a:] for a in range(0, 101, 5)}


def test_no_answer_without_a_first_token_for_it(tmp_path: Path) -> None:
    """The place of [CLS] is looked up: with the context first, column 0 is not all there is."""
    folder = save_model(tmp_path, "bert", "ForQuestionAnswering", positions=64)
    answer = pipeline("question-answering", model=folder, device="cpu")
    answer.tokenizer.padding_side = "left"  # the context comes first
    found = answer(question="who?", context="anna lives", handle_impossible_answer=True, top_k=20)
    assert 0 < next(a["score"] for a in found if a["answer"] == "") < 1
    answer.tokenizer.cls_token = None
    found = answer(question="who?", context="anna lives", handle_impossible_answer=True, top_k=20)
    assert next(a["score"] for a in found if a["answer"] == "") == 0


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
        narrow = answer(question="who ?", context=context, max_seq_len=20, doc_stride=3)
        assert (narrow["answer"], narrow["start"]) == ("green", found["start"])


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
    with pytest.raises(TypeError, match="question-answering has no option topp"):
        answer(question="who?", context="anna", topp=2)
