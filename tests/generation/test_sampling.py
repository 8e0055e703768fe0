"""Logits processing against transformers' processors; statistics and reproducibility of what is drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from minilm.generation import sampling
from minilm.generation.sampling import Sampling, draw, draw_rows, process, uniform

VOCABULARY = 23


@st.composite
def logits(draw: Any, rows: int | None = None) -> Tensor:
    """[B, V] float32: smooth ones, ones with many ties, ones with tokens that are ruled out already."""
    rows = draw(st.integers(1, 4)) if rows is None else rows
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(rows, VOCABULARY, generator=generator) * draw(st.sampled_from([0.1, 1.0, 8.0]))
    if draw(st.booleans()):
        x = x.round()
    if draw(st.booleans()):
        out = torch.rand(rows, VOCABULARY, generator=generator) < 0.4
        out[:, draw(st.integers(0, VOCABULARY - 1))] = False
        x = x.masked_fill(out, -math.inf)
    return x


def histories(rows: int) -> st.SearchStrategy[list[list[int]]]:
    """Tokens of each row, from few different ones so that they repeat."""
    return st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=rows, max_size=rows)


temperatures = st.floats(0.05, 5)
ks = st.integers(1, VOCABULARY + 5)
ps = st.floats(0.01, 0.99)
penalties = st.floats(0.3, 3)


def alone(processor: hf.LogitsProcessor, x: Tensor, tokens: list[list[int]]) -> Tensor:
    """What transformers' processor makes of each row by itself."""
    return torch.cat([processor(torch.tensor([t]), r[None]) for t, r in zip(tokens, x, strict=True)])


@given(st.data())
def test_each_filter_is_that_of_transformers(data: st.DataObject) -> None:
    x = data.draw(logits())
    none = torch.zeros(len(x), 0, dtype=torch.int64)
    k, p, min_p = data.draw(ks), data.draw(ps), data.draw(st.floats(0, 1))
    assert torch.equal(sampling.keep_top_k(x, k), hf.TopKLogitsWarper(k)(none, x))
    assert torch.equal(sampling.keep_top_p(x, p), hf.TopPLogitsWarper(p)(none, x))
    assert torch.equal(sampling.keep_min_p(x, min_p), hf.MinPLogitsWarper(min_p)(none, x))


@given(st.data())
def test_each_penalty_is_that_of_transformers(data: st.DataObject) -> None:
    x = data.draw(logits())
    tokens = data.draw(histories(len(x)))
    penalty, size = data.draw(penalties), data.draw(st.integers(1, 4))
    rules = [Sampling(repetition_penalty=penalty)] * len(x)
    empty: list[list[int]] = [[] for _ in tokens]
    assert torch.equal(
        process(x, rules, tokens, empty), alone(hf.RepetitionPenaltyLogitsProcessor(penalty), x, tokens)
    )
    rules = [Sampling(no_repeat_ngram_size=size)] * len(x)
    expected = alone(hf.NoRepeatNGramLogitsProcessor(size), x, tokens)
    assert torch.equal(process(x, rules, tokens, empty), expected)
    # Where the prompt ends does not matter to either.
    split = [data.draw(st.integers(0, len(t))) for t in tokens]
    prompts = [t[:at] for t, at in zip(tokens, split, strict=True)]
    texts = [t[at:] for t, at in zip(tokens, split, strict=True)]
    assert torch.equal(process(x, rules, prompts, texts), expected)


@given(st.data())
def test_ends_are_ruled_out_until_there_is_enough(data: st.DataObject) -> None:
    x = data.draw(logits())
    texts = data.draw(histories(len(x)))
    least, ends = (
        data.draw(st.integers(0, 13)),
        data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=3)),
    )
    rules = [Sampling(min_new_tokens=least, ends=frozenset(ends))] * len(x)
    processor = hf.MinNewTokensLengthLogitsProcessor(
        0, least, sorted(ends) or torch.tensor([], dtype=torch.int64)
    )
    assert torch.equal(process(x, rules, texts, texts), alone(processor, x, texts))


@given(st.data())
def test_presence_and_frequency_are_subtracted_from_tokens_of_the_text_only(data: st.DataObject) -> None:
    x = data.draw(logits())
    prompts, texts = data.draw(histories(len(x))), data.draw(histories(len(x)))
    presence, frequency = data.draw(st.floats(-2, 2)), data.draw(st.floats(-2, 2))
    rules = [Sampling(presence_penalty=presence, frequency_penalty=frequency)] * len(x)
    expected = x.double()
    for row, text in zip(expected, texts, strict=True):
        for token in set(text):
            row[token] -= frequency * text.count(token) + presence
    torch.testing.assert_close(process(x, rules, prompts, texts).double(), expected, rtol=1e-5, atol=1e-5)


def drawn_rule(data: st.DataObject) -> Sampling:
    optional = {
        "temperature": temperatures,
        "top_k": ks,
        "top_p": ps,
        "min_p": st.floats(0, 1),
        "repetition_penalty": penalties,
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "no_repeat_ngram_size": st.integers(1, 4),
        "min_new_tokens": st.integers(0, 10),
    }
    chosen = {name: data.draw(values) for name, values in optional.items() if data.draw(st.booleans())}
    return Sampling(do_sample=data.draw(st.booleans()), ends=frozenset({1, 7}), **chosen)


@given(st.data())
def test_the_order_is_that_of_transformers(data: st.DataObject) -> None:
    x = data.draw(logits())
    prompts, texts = data.draw(histories(len(x))), data.draw(histories(len(x)))
    rule = Sampling(
        temperature=data.draw(temperatures),
        top_k=data.draw(ks),
        top_p=data.draw(ps),
        min_p=data.draw(st.floats(0, 1)),
        repetition_penalty=data.draw(penalties),
        no_repeat_ngram_size=data.draw(st.integers(1, 4)),
        min_new_tokens=data.draw(st.integers(1, 10)),
        ends=frozenset({1, 7}),
    )
    both = [p + t for p, t in zip(prompts, texts, strict=True)]
    for row in range(len(x)):
        least = hf.MinNewTokensLengthLogitsProcessor(len(prompts[row]), rule.min_new_tokens, [1, 7])
        expected = hf.LogitsProcessorList(
            [
                hf.RepetitionPenaltyLogitsProcessor(rule.repetition_penalty),
                hf.NoRepeatNGramLogitsProcessor(rule.no_repeat_ngram_size),
                least,
                hf.TemperatureLogitsWarper(rule.temperature),
                hf.TopKLogitsWarper(rule.top_k),
                hf.TopPLogitsWarper(rule.top_p),
                hf.MinPLogitsWarper(rule.min_p),
            ]
        )(torch.tensor([both[row]]), x[row : row + 1])
        assert torch.equal(
            process(x[row : row + 1], [rule], prompts[row : row + 1], texts[row : row + 1]), expected
        )


@given(st.data())
def test_rows_with_rules_of_their_own_get_what_they_get_alone(data: st.DataObject) -> None:
    x = data.draw(logits(rows=4))
    prompts, texts = data.draw(histories(4)), data.draw(histories(4))
    rules = [drawn_rule(data) for _ in range(4)]
    together = process(x, rules, prompts, texts)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.equal(together[one], process(x[one], rules[one], prompts[one], texts[one])), rules[row]


def test_logits_are_not_changed_in_place() -> None:
    x = torch.randn(2, VOCABULARY)
    before = x.clone()
    rule = Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.2,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=1,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        ends=frozenset({3}),
    )
    changed = process(x, [rule, rule], [[1, 2], [3]], [[1], [2, 2]])
    assert torch.equal(x, before)
    assert not torch.equal(changed, before)
    assert process(x, [Sampling(), Sampling()], [[1], [1]], [[], []]) is x


@given(st.data())
def test_greedy_rows_ignore_the_filters(data: st.DataObject) -> None:
    x = data.draw(logits(rows=2))
    rules = [Sampling(do_sample=False, temperature=3.0, top_k=2, top_p=0.1, min_p=0.9), Sampling(top_k=2)]
    assert torch.equal(process(x, rules, [[1], [1]], [[], []])[0], x[0])


# What is drawn


def test_drawn_rows_are_those_of_multinomial_also_when_some_have_left() -> None:
    x = torch.randn(7, 1001)
    torch.manual_seed(5)
    expected = [torch.multinomial(x.softmax(-1), 1).squeeze(1) for _ in range(3)]
    torch.manual_seed(5)
    assert torch.equal(draw_rows(x, range(7), 7, None), expected[0])
    assert torch.equal(draw_rows(x[[6, 2]], [6, 2], 7, None), expected[1][[6, 2]])
    assert torch.equal(draw_rows(x[1:4], [1, 2, 3], 7, None), expected[2][1:4])
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(draw_rows(x, range(7), 7, generator), expected[0])


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    x = torch.randn(5, 300)
    keys = [(9, 0, 4), (9, 1, 4), (-3, 0, 0), (2**70, 0, 0), (9, 0, 5)]
    together = draw(x, keys)
    for row in range(5):
        assert draw(x[row : row + 1], keys[row : row + 1]) == together[row]
    order = [3, 0, 4]
    assert torch.equal(draw(x[order], [keys[i] for i in order]), together[order])


@pytest.mark.parametrize("way", ["seed", "generator"])
def test_draws_have_the_probabilities(way: str) -> None:
    p = torch.tensor([0.5, 0.0, 0.25, 0.15, 0.0, 0.1])
    count = 20000
    x = p.log().expand(count, -1)
    if way == "seed":
        tokens = draw(x, [(1, 0, step) for step in range(count)])
    else:
        tokens = draw_rows(x, range(count), count, torch.Generator().manual_seed(0))
    found = tokens.bincount(minlength=6) / count
    assert found[1] == found[4] == 0
    chi = (count * (found - p)[p > 0] ** 2 / p[p > 0]).sum()
    assert chi < 16.3, "beyond the 99.9 % quantile of chi-square with 3 degrees of freedom"


def test_numbers_are_uniform_and_unrelated() -> None:
    keys = [(s, i, t) for s in range(20) for i in range(10) for t in range(50)]
    numbers = torch.tensor([uniform(*key) for key in keys], dtype=torch.float64)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert len(set(numbers.tolist())) > 0.9999 * len(keys)
    cells = (numbers * 50).long().bincount(minlength=50)
    assert ((cells - 200.0) ** 2 / 200).sum() < 95  # chi-square, 49 degrees of freedom, 99.99 %
    for lag in (1, 50, 500):  # the next step, the next sample, the next seed
        a, b = numbers[:-lag] - 0.5, numbers[lag:] - 0.5
        assert abs(float((a * b).mean() * 12)) < 0.04


def test_the_extremes_of_a_draw_have_a_probability() -> None:
    x = torch.full((1, 9), -math.inf)
    x[0, [2, 5]] = 0.0
    for at in (1e-12, 0.4999, 0.5001, 1 - 2.0**-33):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "uniform", lambda *key, at=at: at)
            assert draw(x, [(0, 0, 0)]) == (2 if at < 0.5 else 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_draw_from_what_is_not_a_distribution(bad: float) -> None:
    x = torch.zeros(2, 5)
    x[1, 3] = bad
    with pytest.raises(ValueError, match="NaN"):
        draw(x, [(0, 0, 0)] * 2)
    with pytest.raises(ValueError, match="NaN"):
        draw_rows(x, range(2), 2, None)
    with pytest.raises(ValueError, match="every token is excluded"):
        draw(torch.full((1, 4), -math.inf), [(0, 0, 0)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("no_repeat_ngram_size", -2),
        ("min_new_tokens", 1.0),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*, and is {value}"):
        Sampling(**{name: value})
