"""Beam search: by enumeration, by a plain search in float64, and against transformers' on drawn cases."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tiny_decoders import EOS, PAD, batch, decoder, prompts
from torch import Tensor
from transformers.generation.logits_process import EncoderRepetitionPenaltyLogitsProcessor

from minilm import LLM
from minilm.files import resolve
from minilm.files.gguf import GGUFCheckpoint
from minilm.generation.beams import BeamOptions, beam_search
from minilm.generation.rows import BeamRows
from minilm.generation.sampling import exponential

FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
MANY_ENDS = [EOS, *range(40, 80)]


# The search alone, on a table


class Table:
    """A model whose logits depend on the last token and the place: [places, V, V]."""

    def __init__(self, vocabulary: int, places: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = 2 * torch.randn(places, vocabulary, vocabulary, generator=generator)
        self.place, self.rows = 0, 0

    def start(self, texts: int) -> Tensor:
        self.place, self.rows = 0, texts
        return self.table[0, :texts]

    def __call__(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        assert all(0 <= parent < self.rows for parent in parents)
        self.place, self.rows = self.place + 1, len(tokens)
        return self.table[self.place, tokens]


def every_text(table: Tensor, first: int, length: int, ends: set[int]) -> dict[tuple[int, ...], float]:
    """All texts that end within `length` tokens, or there, with their log-probabilities."""
    logs, found = table.double().log_softmax(-1), {}
    for tokens in itertools.product(range(table.shape[1]), repeat=length):
        end = next((place + 1 for place, token in enumerate(tokens) if token in ends), length)
        text = tokens[:end]
        steps = enumerate(itertools.pairwise((first, *text)))
        found[text] = sum(float(logs[place, a, b]) for place, (a, b) in steps)
    return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7, -0.4])
def test_with_enough_beams_it_finds_the_best_of_all_texts(penalty: float) -> None:
    """Also with a vocabulary that is far smaller than the number of beams."""
    model, length, ends = Table(3, 4), 4, {1}
    options = BeamOptions(81, length, frozenset(ends), penalty, "never")
    found = beam_search(model.start(2), model, options)
    for first, hypotheses in enumerate(found):
        every = every_text(model.table, first, length, ends)
        best = sorted(((score / len(text) ** penalty, text) for text, score in every.items()), reverse=True)
        assert [hypothesis.tokens for hypothesis in hypotheses[:9]] == [text for _, text in best[:9]]
        for hypothesis, (score, _) in zip(hypotheses, best, strict=False):
            assert hypothesis.score == pytest.approx(score, abs=1e-4)


def test_candidates_are_drawn_without_replacement() -> None:
    """Two beams of one token, 20,000 times at once: the pairs come as often as the formula says."""
    texts = 20_000
    logits = torch.tensor([[0.5, -1.0, 1.2, 0.0]])
    generator = torch.Generator().manual_seed(3)

    def noise(chosen: Sequence[int], step: int, n: int) -> Tensor:
        assert step == 1
        return torch.empty(len(chosen), n).exponential_(generator=generator)

    def step(tokens: Tensor, parents: Sequence[int]) -> Tensor:
        raise AssertionError("one token has no second step")

    options = BeamOptions(2, 1, do_sample=True)
    found = beam_search(logits.expand(texts, 4), step, options, noise=noise)
    counts = Counter(frozenset(hypothesis.tokens[0] for hypothesis in pair) for pair in found)
    p = logits[0].double().softmax(-1).tolist()
    for a, b in itertools.combinations(range(4), 2):
        share = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        error = math.sqrt(share * (1 - share) / texts)
        assert abs(counts[frozenset((a, b))] / texts - share) < 5 * error
    assert all(pair[0].score >= pair[1].score for pair in found)


def test_noise_by_seed() -> None:
    drawn = exponential(50_000, 7, 0, 2)
    assert drawn.dtype == torch.float32
    assert bool((drawn > 0).all())
    for x in (0.1, 0.7, 2.0):
        share = math.exp(-x)
        assert abs(float((drawn > x).double().mean()) - share) < 5 * math.sqrt(share / 50_000)
    assert torch.equal(exponential(9, 7, 0, 2), drawn[:9])
    assert not torch.equal(exponential(9, 7, 0, 3), drawn[:9])
    assert not torch.equal(exponential(9, 8, 0, 2), drawn[:9])
    expected = [2.0429506, 2.9973325]  # splitmix64 in Python's integers
    torch.testing.assert_close(exponential(2, 0, 0, 0), torch.tensor(expected))


def test_nan_is_an_error() -> None:
    model = Table(4, 1)
    with pytest.raises(ValueError, match="NaN among the scores"):
        beam_search(
            model.start(2).clone().index_fill_(0, torch.tensor(1), math.nan), model, BeamOptions(2, 3)
        )


# Against a plain search in float64, and transformers


@functools.cache
def in_float64(family: str) -> Any:
    return copy.deepcopy(decoder(family).theirs).double()


def plain_search(
    family: str, prompt: list[int], beams: int, new: int, ends: set[int], penalty: float, early: Any
) -> tuple[list[tuple[float, list[int]]], float]:
    """The finished texts with their scores, best first, in float64 and without a cache; and the smallest
    difference between two scores that were compared."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    gap = math.inf
    for length in range(1, new + 1):
        with torch.no_grad():
            logits = in_float64(family)(torch.tensor([prompt + text for _, text in live])).logits[:, -1]
        logs = logits.log_softmax(-1)
        candidates = sorted(
            (
                (score + value, [*text, token])
                for (score, text), row in zip(live, logs.tolist(), strict=True)
                for token, value in enumerate(row)
            ),
            reverse=True,
        )[: (2 + len(ends)) * beams]
        gap = min([gap, *(a[0] - b[0] for a, b in itertools.pairwise(candidates[: 2 * beams + 1]))])
        ended = [length == new or text[-1] in ends for _, text in candidates]
        if not (early is True and len(done) == beams):
            done += [
                (score / length**penalty, text)
                for (score, text), end in zip(candidates[:beams], ended, strict=False)
                if end
            ]
        done.sort(reverse=True)
        gap = min([gap, *(a[0] - b[0] for a, b in itertools.pairwise(done))])
        del done[beams:]
        live = [one for one, end in zip(candidates, ended, strict=True) if not end][:beams]
        if not live or (early is True and len(done) == beams):
            break
        if len(done) == beams:
            longest = new if early == "never" and penalty > 0 else length
            reach = live[0][0] / longest**penalty
            gap = min(gap, abs(reach - done[-1][0]))
            if reach <= done[-1][0]:
                break
    return done, gap


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_the_plain_search(family: str, early: Any) -> None:
    d = decoder(family)
    for seed, (beams, penalty, ends) in enumerate([(3, 1.0, MANY_ENDS), (2, 2.0, MANY_ENDS), (4, -0.5, [])]):
        rows = prompts([9, 5], seed=seed)
        options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": penalty, **FULL}
        found = d.ours.generate(
            **batch(rows),
            **options,
            early_stopping=early,
            max_new_tokens=8,
            eos_token_id=ends or None,
            pad_token_id=PAD,
        )
        for text, row in enumerate(rows):
            expected, gap = plain_search(family, row, beams, 8, set(ends), penalty, early)
            assert gap > 1e-5, "draw other prompts: these have a tie"
            for place, (score, tokens) in enumerate(expected):
                at = text * beams + place
                assert found.sequences[at, 9 : 9 + len(tokens)].tolist() == tokens
                assert float(found.sequences_scores[at]) == pytest.approx(score, rel=1e-5, abs=1e-4)


def drawn_case(seed: int) -> tuple[str, list[list[int]], dict[str, Any]]:
    """A family, prompts, and options. Prompts of several lengths have no options that count padding in
    transformers."""
    draw = random.Random(seed)
    beams = draw.choice([2, 3, 4, 7])
    rows = prompts([draw.randint(1, 14) for _ in range(draw.randint(1, 4))], seed=seed)
    options: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        "max_new_tokens": draw.choice([1, 2, 9, 17]),
        "early_stopping": draw.choice([False, True, "never"]),
        "length_penalty": draw.choice([1.0, 0.0, -0.5, 2.0, 1.3]),
        "eos_token_id": draw.choice([None, EOS, MANY_ENDS, [7, 19, 88, 95]]),
        "pad_token_id": PAD,
    }
    rest = {
        "bad_words_ids": [[45], [101, 6], [200, 201]],
        "sequence_bias": {(50,): 2.5, (45,): 3.0, (8, 9): -4.0},
        "suppress_tokens": [66, 67],
        "renormalize_logits": True,
    }
    if options["max_new_tokens"] > 4:
        rest |= {"min_new_tokens": 4, "forced_eos_token_id": 45}
        if options["eos_token_id"]:
            rest["exponential_decay_length_penalty"] = (2, 1.2)
    if len(set(map(len, rows))) == 1:
        rest |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2}
    options |= {name: value for name, value in rest.items() if draw.random() < 0.2}
    excluding = {
        "min_new_tokens",
        "forced_eos_token_id",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
    }
    if excluding & options.keys():  # an end token that is excluded before becomes NaN in transformers
        options.pop("exponential_decay_length_penalty", None)
    if draw.random() < 0.3:
        options |= {"do_sample": True, "top_k": 0, "temperature": draw.choice([1.0, 2.0])}
    return draw.choice(["gpt2", "llama"]), rows, options


def compare(seed: int) -> None:
    """All fields of the result. Different tokens are allowed only where float64 has a tie."""
    family, rows, options = drawn_case(seed)
    d = decoder(family)
    torch.manual_seed(seed)
    expected = d.theirs.generate(**batch(rows), **options, **FULL)
    torch.manual_seed(seed)
    found = d.ours.generate(**batch(rows), **options, **FULL)
    if not torch.equal(found.sequences, expected.sequences):
        simple = {"num_beams", "max_new_tokens", "eos_token_id", "length_penalty", "early_stopping"}
        assert options.keys() <= simple | {"pad_token_id", "num_return_sequences"}, (seed, options)
        ends = options["eos_token_id"] or []
        arguments = (options["num_beams"], options["max_new_tokens"], {ends} if ends == EOS else set(ends))
        gaps = [
            plain_search(family, row, *arguments, options["length_penalty"], options["early_stopping"])[1]
            for row in rows
        ]
        assert min(gaps) < 1e-5, (seed, options)
        return
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    assert found.beam_indices.dtype == expected.beam_indices.dtype
    assert len(found.scores) == len(found.logits) == len(expected.scores)
    for ours, theirs in zip(
        (*found.scores, *found.logits), (*expected.scores, *expected.logits), strict=True
    ):
        live = (ours != 0).any(1)
        assert bool(live.any())
        torch.testing.assert_close(ours[live], theirs[live], atol=1e-3, rtol=1e-4)


def test_beams_are_those_of_transformers() -> None:
    for seed in range(30):
        compare(seed)


@pytest.mark.slow
def test_beams_are_those_of_transformers_in_many_cases() -> None:
    for seed in range(1000, 1500):
        compare(seed)


@pytest.mark.parametrize(
    "way",
    [{"top_k": 1}, {"top_k": 0, "top_p": 0.0}, {"min_p": 1.0}, {"typical_p": 1e-9}],
    ids=str,
)
def test_filters_keep_a_token_beside_the_ends(way: dict[str, Any]) -> None:
    d = decoder("gpt2")
    options = {
        "num_beams": 3,
        "max_new_tokens": 5,
        "do_sample": True,
        "eos_token_id": [7, 8],
        "pad_token_id": PAD,
    }
    call = batch(prompts([6, 6]))
    results = []
    for model in (d.theirs, d.ours):
        torch.manual_seed(0)
        results.append(model.generate(**call, **options, **way, **FULL))
    expected, found = results
    assert torch.equal(found.sequences, expected.sequences)
    assert (found.scores[0] > -math.inf).sum(1).tolist() == [3] * 6


def test_a_row_does_not_depend_on_the_others() -> None:
    """Nor on the side of the padding, on chunks, or, with a seed, on what else is sampled."""
    d = decoder("llama")
    rows = prompts([12, 3, 7])
    for options in ({"length_penalty": 1.4}, {"do_sample": True, "seed": 5, "temperature": 1.8}):
        options |= {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": MANY_ENDS, "pad_token_id": PAD}
        together = d.ours.generate(**batch(rows), **options)[:, 12:]
        right = d.ours.generate(**batch(rows, left=False), **options, prefill_chunk_size=2)[:, 12:]
        assert torch.equal(together, right)
        for row, text in zip(rows, together, strict=True):
            alone = d.ours.generate(torch.tensor([row]), **options)[0, len(row) :]
            assert alone.tolist() == text[: len(alone)].tolist()
            assert set(text[len(alone) :].tolist()) <= {PAD}
    other = d.ours.generate(**batch(rows), **{**options, "seed": 6})[:, 12:]
    assert not torch.equal(other, together)


# Functions of the caller


def test_functions_are_called_as_by_transformers() -> None:
    d = decoder("gpt2")
    call, beams = batch(prompts([6, 6])), 3
    seen: dict[int, list[list[int]]] = {}

    def prefer(ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.shape[0] == scores.shape[0] == 2 * beams
        bonus = ids.sum(1, keepdim=True) % 7 / 7.0
        return scores + bonus * (torch.arange(scores.shape[1]) % 5 == 2)

    def third(ids: Tensor, scores: Any) -> Tensor:
        return (ids[:, -1] % 5 == 2) & (ids.shape[1] > 9)

    def allowed(text: int, ids: Tensor) -> list[int]:
        seen.setdefault(text, []).append(ids.tolist())
        return [token for token in range(3, 300) if (token + text) % 3]

    options = {"num_beams": beams, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD, **FULL}
    for functions in (
        {"logits_processor": [prefer]},
        {"stopping_criteria": [third]},
        {"prefix_allowed_tokens_fn": allowed},
        {"logits_processor": [prefer], "stopping_criteria": [third], "prefix_allowed_tokens_fn": allowed},
    ):
        expected = d.theirs.generate(**call, **options, **functions)
        seen.clear()
        found = d.ours.generate(**call, **options, **functions)
        # Without an end token, transformers fills with -1 even if there is a padding token.
        assert torch.equal(found.sequences, expected.sequences.masked_fill(expected.sequences == -1, PAD))
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
        assert set(seen) == ({0, 1} if "prefix_allowed_tokens_fn" in functions else set())
        assert all(ids[:6] == call["input_ids"][text].tolist() for text in seen for ids in seen[text])


def test_stop_strings_end_beams() -> None:
    d = decoder("llama")
    call = batch(prompts([6, 9], seed=4))
    options = {"num_beams": 3, "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": PAD}
    stop = ["e", "th", "o"]
    expected = d.theirs.generate(**call, **options, stop_strings=stop, tokenizer=d.their_tokenizer)
    found = d.ours.generate(**call, **options, stop_strings=stop, tokenizer=d.tokenizer)
    assert torch.equal(found, expected)
    assert not torch.equal(found, d.ours.generate(**call, **options))


def test_after_its_time_it_ends_with_the_next_token() -> None:
    d = decoder("llama")
    out = d.ours.generate(torch.tensor([[5, 6]]), num_beams=3, max_new_tokens=9, max_time=0.0)
    assert out.shape == (1, 3)


# Where transformers is not followed


def test_the_penalty_of_the_source_reaches_all_beams() -> None:
    """transformers' processor reaches the first rows of the batch only; with the rows repeated, all."""
    d = decoder("llama")
    call = batch(prompts([8, 8]))
    options = {"num_beams": 3, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": PAD}
    whole = EncoderRepetitionPenaltyLogitsProcessor(3.0, call["input_ids"].repeat_interleave(3, 0))
    expected = d.theirs.generate(**call, **options, logits_processor=[whole])
    found = d.ours.generate(**call, **options, encoder_repetition_penalty=3.0)
    assert torch.equal(found, expected)
    assert not torch.equal(found, d.ours.generate(**call, **options))


def test_padding_is_the_padding_token_even_if_it_is_0() -> None:
    """transformers fills with the first end token then."""
    d = decoder("llama")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "eos_token_id": MANY_ENDS}
    rows = d.ours.generate(torch.tensor(prompts([5])), **options, pad_token_id=0)[:, 5:].tolist()
    lengths = [next((n + 1 for n, t in enumerate(row) if t in MANY_ENDS), len(row)) for row in rows]
    assert len(set(lengths)) > 1
    assert all(set(row[length:]) <= {0} for row, length in zip(rows, lengths, strict=True))


def test_fewer_texts_than_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """transformers returns the only text more than once, or its beginning."""
    d = decoder("llama")
    path = [9, 30, EOS]
    with caplog.at_level(logging.WARNING):
        found = d.ours.generate(
            torch.tensor([[5, 6]]),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=6,
            pad_token_id=PAD,
            prefix_allowed_tokens_fn=lambda text, ids: [path[min(2, len(ids) - 2)]],
            **FULL,
        )
    assert found.sequences[:, 2:].tolist() == [path, [PAD] * 3, [PAD] * 3]
    assert found.sequences_scores[1:].tolist() == [-math.inf] * 2
    assert found.beam_indices.tolist() == [[0, 0, 0], [-1] * 3, [-1] * 3]
    assert "found 1 texts for prompt 0, and num_return_sequences=3" in caplog.text


def test_options_of_beams_without_beams_are_named(caplog: pytest.LogCaptureFixture) -> None:
    d = decoder("llama")
    with caplog.at_level(logging.WARNING):
        d.ours.generate(torch.tensor([[5, 6]]), max_new_tokens=2, length_penalty=2.0, early_stopping=False)
    assert "length_penalty=2.0 has no effect: it needs num_beams above 1" in caplog.text
    assert "early_stopping" not in caplog.text


# The cache


def test_beams_share_the_pages_of_their_prompt() -> None:
    """A prompt is read once; beams hold its full pages together; all pages are given back, after an error
    too."""
    d = decoder("llama")
    cache = d.ours.new_cache()
    rows = BeamRows(d.ours, cache)
    (prompt,) = prompts([100])
    most, calls = 0, 0

    def step(tokens: Tensor, parents: Sequence[int]) -> Tensor:
        nonlocal most, calls
        logits = rows(tokens, parents)
        most, calls = max(most, cache.used_pages), calls + 1
        if calls == 6:
            raise KeyboardInterrupt
        return logits

    logits = rows.read([prompt], 30)
    assert cache.used_pages == 4
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        beam_search(logits, step, BeamOptions(5, 20))
    assert most <= 3 + 5, "three full pages together, and one for each beam"
    rows.free()
    assert cache.used_pages == 0
    assert cache.rows == []


def test_the_checkpoint_may_ask_for_beams() -> None:
    d = decoder("gpt2")
    prompt = torch.tensor(prompts([5]))
    model = copy.copy(d.ours)
    expected = d.ours.generate(prompt, num_beams=3, length_penalty=0.5, max_new_tokens=9)
    model.generation_config = type(d.ours.generation_config)(
        num_beams=3, length_penalty=0.5, early_stopping=False, max_new_tokens=9, eos_token_id=EOS
    )
    assert torch.equal(model.generate(prompt), expected)
    assert not torch.equal(model.generate(prompt, num_beams=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """The search itself is in float32: its score is that of the text, read at once."""
    d = decoder("llama")
    model = copy.deepcopy(d.ours).to(dtype)
    found = model.generate(
        torch.tensor(prompts([5])),
        num_beams=3,
        max_new_tokens=6,
        length_penalty=0.0,
        eos_token_id=None,
        **FULL,
    )
    with torch.no_grad():
        logs = model(found.sequences).logits[0, 4:-1].float().log_softmax(-1)
    total = logs.gather(1, found.sequences[0, 5:, None]).sum()
    assert float(found.sequences_scores[0]) == pytest.approx(float(total), rel=0.02, abs=0.1)


@pytest.mark.slow
def test_the_real_model_finds_what_transformers_finds_with_its_weights() -> None:
    model = LLM("SmolLM2-135M-Instruct")
    with GGUFCheckpoint(resolve("SmolLM2-135M-Instruct")) as checkpoint:
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.hf_config())).eval()
        for name, parameter in reference.named_parameters():
            checkpoint.read_into(name, parameter.data)
    texts = ["The three largest cities of France are", "Once upon a time, in a land far away, there was a"]
    call = batch([model.tokenizer(text)["input_ids"] for text in texts])
    options = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20, "pad_token_id": 2, **FULL}
    found = model.model.generate(**call, **options, eos_token_id=[2, 30], do_sample=False)
    expected = reference.generate(**call, **options, eos_token_id=[2, 30], do_sample=False)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.beam_indices, expected.beam_indices)
