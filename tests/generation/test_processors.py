"""Rules and filters on random scores against transformers' processors of the same options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from minilm.generation.processors import rules_of
from minilm.generation.sampling import Sampling, process

ROWS, VOCABULARY, PROMPT = 5, 37, 6
ENDS = [3, 11]


def tokens(length: int, seed: int = 0) -> list[list[int]]:
    """Few different ones, so that sequences come again."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(12, (ROWS, length), generator=generator).tolist()


def scores(seed: int = 0) -> Tensor:
    """Random, some excluded, none of the ends."""
    generator = torch.Generator().manual_seed(seed)
    found = 3 * torch.randn(ROWS, VOCABULARY, generator=generator)
    return found.masked_fill((found.abs() < 0.3) & (torch.arange(VOCABULARY) > 12), -torch.inf)


def ruled(
    given: Tensor, texts: list[list[int]], new: int = 20, columns: int = PROMPT, **option: Any
) -> Tensor:
    """What the option makes of scores, in rows with a prompt of `columns` tokens each."""
    rules = rules_of(option, vocabulary=VOCABULARY, ends=ENDS, columns=columns, new=new)
    assert rules is not None
    rule = Sampling(do_sample=False, rules=rules)
    rows = [(row[:columns], row[columns:]) for row in texts]
    return process(given, [rule] * len(texts), [prompt for prompt, _ in rows], [text for _, text in rows])


BIASES = {(5,): 1.5, (4, 6): -2.0, (1, 2): 0.5, (7, 8, 2): 4.0, (30,): -1.0}
WORDS = [[9], [3], [0, 1], [2, 4], [3, 2, 11], [8, 3]]


@pytest.mark.parametrize("length", [PROMPT, 9, 14, 30])
@pytest.mark.parametrize(
    ("option", "processor"),
    [
        ({"sequence_bias": BIASES}, lambda ids: theirs.SequenceBiasLogitsProcessor(BIASES)),
        (
            {"sequence_bias": [[list(words), bias] for words, bias in BIASES.items()]},
            lambda ids: theirs.SequenceBiasLogitsProcessor(BIASES),
        ),
        ({"bad_words_ids": WORDS}, lambda ids: theirs.NoBadWordsLogitsProcessor(WORDS, ENDS)),
        (
            {"encoder_repetition_penalty": 1.7},
            lambda ids: theirs.EncoderRepetitionPenaltyLogitsProcessor(1.7, ids[:, :PROMPT]),
        ),
        (
            {"encoder_no_repeat_ngram_size": 2},
            lambda ids: theirs.EncoderNoRepeatNGramLogitsProcessor(2, ids[:, :PROMPT]),
        ),
        (
            {"encoder_no_repeat_ngram_size": 1},
            lambda ids: theirs.EncoderNoRepeatNGramLogitsProcessor(1, ids[:, :PROMPT]),
        ),
        ({"forced_eos_token_id": 5}, lambda ids: theirs.ForcedEOSTokenLogitsProcessor(PROMPT + 9, 5)),
        (
            {"forced_eos_token_id": [5, 3]},
            lambda ids: theirs.ForcedEOSTokenLogitsProcessor(PROMPT + 9, [5, 3]),
        ),
        ({"remove_invalid_values": True}, lambda ids: theirs.InfNanRemoveLogitsProcessor()),
        (
            {"exponential_decay_length_penalty": (4, 1.3)},
            lambda ids: theirs.ExponentialDecayLengthPenalty((4, 1.3), ENDS, PROMPT),
        ),
        ({"suppress_tokens": [4, 30]}, lambda ids: theirs.SuppressTokensLogitsProcessor([4, 30])),
        (
            {"begin_suppress_tokens": [4, 30]},
            lambda ids: theirs.SuppressTokensAtBeginLogitsProcessor([4, 30], PROMPT),
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_rules_are_those_of_transformers(option: dict[str, Any], processor: Any, length: int) -> None:
    changed = False
    for seed in range(5):
        texts, given = tokens(length, seed), scores(seed)
        ids = torch.tensor(texts)
        expected = processor(ids)(ids, given.clone())
        found = ruled(given, texts, new=9, **option)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        changed |= not torch.equal(found, given)
    late = {
        "forced_eos_token_id": 14,
        "exponential_decay_length_penalty": 14,
        "begin_suppress_tokens": PROMPT,
    }
    (name,) = option
    assert changed or (name in late and length != late[name]), "the option should do something"


def test_a_first_token_is_forced_after_one_token_only() -> None:
    texts, given = tokens(1), scores()
    ids = torch.tensor(texts)
    expected = theirs.ForcedBOSTokenLogitsProcessor(7)(ids, given)
    assert torch.equal(ruled(given, texts, columns=1, forced_bos_token_id=7), expected)
    longer = tokens(2)
    assert torch.equal(ruled(given, longer, columns=1, forced_bos_token_id=7), given)
    suppressed = ruled(given, longer, columns=1, forced_bos_token_id=7, begin_suppress_tokens=[4])
    assert bool((suppressed[:, 4] == -torch.inf).all()), "the first token after the forced one"


def test_a_beginning_may_be_all_there_is() -> None:
    """transformers lets a bad word through whose beginning is the whole text so far."""
    given = torch.zeros(1, VOCABULARY)
    found = ruled(given, [[4, 5]], columns=2, bad_words_ids=[[4, 5, 6], [1, 4, 5, 7]])
    assert (found == -torch.inf).nonzero().tolist() == [[0, 6]]


def test_an_excluded_end_is_not_preferred() -> None:
    """transformers makes it NaN."""
    given = torch.zeros(ROWS, VOCABULARY)
    given[:, 3] = -torch.inf
    given[:, 11] = -2.0
    found = ruled(given, tokens(PROMPT + 7), exponential_decay_length_penalty=(4, 1.5))
    assert bool((found[:, 3] == -torch.inf).all())
    torch.testing.assert_close(found[:, 11], torch.full((ROWS,), -2 + 2 * (1.5**3 - 1)))


def test_what_cannot_be_a_number_is_replaced() -> None:
    given = torch.tensor([[float("nan"), torch.inf, -torch.inf, 2.0]])
    rules = rules_of({"remove_invalid_values": True}, vocabulary=4, ends=[], columns=1, new=3)
    found = process(given, [Sampling(do_sample=False, rules=rules)], [[1]], [[]])
    limits = torch.finfo(torch.float32)
    assert found.tolist() == [[0.0, limits.max, limits.min, 2.0]]


def test_rows_with_and_without_rules_share_a_batch() -> None:
    texts, given = tokens(9), scores()
    rules = rules_of({"suppress_tokens": [4]}, vocabulary=VOCABULARY, ends=ENDS, columns=PROMPT, new=9)
    mixed = [Sampling(do_sample=False, rules=rules if row % 2 else None) for row in range(ROWS)]
    found = process(given, mixed, texts, [[]] * ROWS)
    expected = given.clone()
    expected[1::2, 4] = -torch.inf
    assert torch.equal(found, expected)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize(
    ("option", "processor"),
    [
        ({"typical_p": 0.4}, lambda keep: theirs.TypicalLogitsWarper(0.4, min_tokens_to_keep=keep)),
        ({"typical_p": 0.95}, lambda keep: theirs.TypicalLogitsWarper(0.95, min_tokens_to_keep=keep)),
        ({"epsilon_cutoff": 0.05}, lambda keep: theirs.EpsilonLogitsWarper(0.05, min_tokens_to_keep=keep)),
        ({"epsilon_cutoff": 0.9}, lambda keep: theirs.EpsilonLogitsWarper(0.9, min_tokens_to_keep=keep)),
        ({"eta_cutoff": 0.1}, lambda keep: theirs.EtaLogitsWarper(0.1, min_tokens_to_keep=keep)),
        ({"eta_cutoff": 0.0009}, lambda keep: theirs.EtaLogitsWarper(0.0009, min_tokens_to_keep=keep)),
        ({"top_h": 0.3}, lambda keep: theirs.TopHLogitsWarper(0.3)),
        ({"top_h": 0.9}, lambda keep: theirs.TopHLogitsWarper(0.9)),
        ({"top_k": 2}, lambda keep: theirs.TopKLogitsWarper(2, min_tokens_to_keep=keep)),
        ({"top_p": 0.3}, lambda keep: theirs.TopPLogitsWarper(0.3, min_tokens_to_keep=keep)),
        ({"min_p": 0.9}, lambda keep: theirs.MinPLogitsWarper(0.9, min_tokens_to_keep=keep)),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_filters_are_those_of_transformers(option: dict[str, Any], processor: Any, keep: int) -> None:
    empty: list[list[int]] = [[]] * ROWS
    for seed in range(8):
        given = scores(seed)
        found = process(given, [Sampling(keep=keep, **option)] * ROWS, empty, empty)
        expected = processor(keep)(torch.zeros(ROWS, 1, dtype=torch.int64), given.clone())
        assert torch.equal(found, expected)
        assert not torch.equal(found, given)
        mixed = [Sampling(keep=keep, **option) if row % 2 else Sampling() for row in range(ROWS)]
        found = process(given, mixed, empty, empty)
        assert torch.equal(found[1::2], expected[1::2])
        assert torch.equal(found[::2], given[::2])
        greedy = process(given, [Sampling(do_sample=False, keep=keep, **option)] * ROWS, empty, empty)
        assert torch.equal(greedy, given), "filters are for sampling"


def test_more_than_a_hundred_tokens() -> None:
    """Top-H looks at the best hundred."""
    given = torch.randn(3, 150, generator=torch.Generator().manual_seed(0)) / 9
    found = process(given, [Sampling(top_h=0.9)] * 3, [[]] * 3, [[]] * 3)
    expected = theirs.TopHLogitsWarper(0.9)(torch.zeros(3, 1), given)
    assert torch.equal(found, expected)
    found = process(given, [Sampling(top_h=1.0)] * 3, [[]] * 3, [[]] * 3)
    assert (found > -torch.inf).sum(1).tolist() == [100] * 3


def test_scores_are_log_probabilities_again_at_the_end() -> None:
    given, empty = scores(), [[]] * ROWS
    for do_sample in (False, True):
        rule = Sampling(do_sample=do_sample, top_k=4, renormalize=True)
        found = process(given, [rule, *[Sampling(do_sample=False)] * (ROWS - 1)], empty, empty)
        kept = theirs.TopKLogitsWarper(4)(None, given[:1]) if do_sample else given[:1]
        torch.testing.assert_close(found[:1], kept.log_softmax(-1))
        assert torch.equal(found[1:], given[1:])
