"""`generate` against transformers' `generate`, row against batch, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_decoders import BOS, EOS, FAMILIES, PAD, VOCABULARY, WINDOW, batch, decoder, prompts

from minilm.cache import KVCache

ALONE = {"eos_token_id": None, "pad_token_id": PAD}
ENDS = [EOS, *range(40, 80)]
"""Many end tokens, so that one comes soon."""


def new_tokens(model: Any, rows: list[list[int]], *, left: bool = True, **options: Any) -> list[list[int]]:
    """What `model` writes after each row, padding removed."""
    call = batch(rows, left=left)
    out = model.generate(**call, pad_token_id=PAD, **options)
    width = call["input_ids"].shape[1]
    assert torch.equal(out[:, :width], call["input_ids"].repeat_interleave(len(out) // len(rows), 0))
    return [row[row != PAD].tolist() for row in out[:, width:]]


# Greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers_and_each_row_is_what_it_is_alone(family: str) -> None:
    d = decoder(family)
    rows = prompts([17, 1, 30, 8])
    call = batch(rows)
    ours = d.ours.generate(**call, max_new_tokens=64, **ALONE)
    assert torch.equal(ours, d.theirs.generate(**call, max_new_tokens=64, **ALONE))
    assert len(set(ours[:, 30:].flatten().tolist())) > 40, "the texts should not be loops"
    for row, text in zip(rows, ours, strict=True):
        alone = d.ours.generate(torch.tensor([row]), max_new_tokens=64, **ALONE)
        assert torch.equal(alone[0, len(row) :], text[30:])
    right = batch(rows, left=False)
    assert torch.equal(d.ours.generate(**right, max_new_tokens=64, **ALONE)[:, 30:], ours[:, 30:])


@pytest.mark.parametrize(
    "way",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12, "eos_token_id": ENDS},
        {"min_length": 20, "eos_token_id": ENDS},
        {"prefill_chunk_size": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_greedy_with_penalties_is_that_of_transformers(way: dict[str, Any]) -> None:
    d = decoder("llama")
    call = batch(prompts([13, 13], seed=2))
    options = {"max_new_tokens": 40, **ALONE, **way}
    ours = d.ours.generate(**call, **options)
    assert torch.equal(ours, d.theirs.generate(**call, **options))
    assert not torch.equal(ours, d.ours.generate(**call, max_new_tokens=40, **ALONE))


def test_token_types_are_refused_where_they_mean_something() -> None:
    call = batch(prompts([4]))
    types = torch.ones_like(call["input_ids"])
    expected = decoder("llama").ours.generate(**call, max_new_tokens=3)
    assert torch.equal(
        decoder("llama").ours.generate(**call, token_type_ids=types, max_new_tokens=3), expected
    )
    with pytest.raises(ValueError, match="token_type_ids"):
        decoder("gpt2").ours.generate(**call, token_type_ids=types, max_new_tokens=3)


def test_time_is_limited() -> None:
    out = decoder("llama").ours.generate(
        torch.tensor([[5]]), max_new_tokens=100, max_time=0.0, eos_token_id=None
    )
    assert out.shape == (1, 2)


def test_ends_and_padding_are_laid_out_as_by_transformers() -> None:
    d = decoder("llama")
    call = batch(prompts([5, 9, 2, 7], seed=4))
    free = d.ours.generate(**call, max_new_tokens=20, **ALONE)
    ends = [int(free[0, 9 + 3]), int(free[2, 9 + 11])]  # tokens that do come
    for eos in (ends, ends[0], torch.tensor(ends)):
        for pad in (PAD, None):
            options = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": pad}
            ours, theirs = d.ours.generate(**call, **options), d.theirs.generate(**call, **options)
            assert torch.equal(ours, theirs)
    assert int((ours[0] == ends[0]).sum()) > 1, "without a padding token the end token pads"
    all_at_once = d.ours.generate(**call, max_new_tokens=20, eos_token_id=free[:, 9].tolist())
    assert all_at_once.shape == (4, 10), "no columns beyond the longest text"


# Sampling

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 3, "top_k": 7},
    {"top_k": 0},
    {"top_k": None, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "temperature": 0.1},
    {"min_new_tokens": 15},
    {"min_length": 25},
    {
        "temperature": 1.4,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "num_return_sequences": 3,
    },
]


def their_temperature(way: dict[str, Any]) -> dict[str, Any]:
    """transformers insists on a float."""
    return {k: float(v) if k == "temperature" else v for k, v in way.items()}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_samples_are_those_of_transformers_after_the_same_manual_seed(way: dict[str, Any]) -> None:
    d = decoder("qwen2")
    call = batch(prompts([12, 12, 12], seed=7))  # of one length: transformers penalises padding tokens too
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": ENDS, **way}
    torch.manual_seed(11)
    theirs = d.theirs.generate(**call, **their_temperature(options), pad_token_id=PAD)
    torch.manual_seed(11)
    ours = d.ours.generate(**call, **options, pad_token_id=PAD)
    assert torch.equal(ours, theirs)
    again = d.ours.generate(**call, **options, pad_token_id=PAD)
    assert ours.shape != again.shape or not torch.equal(ours, again), "the generator goes on"


def test_the_samples_above_end_at_different_lengths() -> None:
    torch.manual_seed(11)
    rows = prompts([12] * 3, seed=7)
    texts = new_tokens(decoder("qwen2").ours, rows, do_sample=True, max_new_tokens=40, eos_token_id=ENDS)
    assert len({len(text) for text in texts}) > 1, "so that draws for rows that have ended are tested"


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_padded_prompts_are_those_of_transformers(family: str) -> None:
    d = decoder(family)
    call = batch(prompts([4, 19, 11]))
    for generator_given in (False, True):
        torch.manual_seed(2)
        theirs = d.theirs.generate(
            **call, do_sample=True, max_new_tokens=30, top_k=20, num_return_sequences=2
        )
        torch.manual_seed(2 if not generator_given else 3)
        generator = torch.Generator().manual_seed(2) if generator_given else None
        ours = d.ours.generate(
            **call, do_sample=True, max_new_tokens=30, top_k=20, num_return_sequences=2, generator=generator
        )
        assert torch.equal(ours, theirs)


def test_with_a_seed_each_row_gets_what_it_gets_alone() -> None:
    d = decoder("llama")
    rows = prompts([3, 14, 8, 8], seed=5)
    options: dict[str, Any] = {
        "do_sample": True,
        "max_new_tokens": 24,
        "temperature": 2.5,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "eos_token_id": [EOS, 40, 41, 42],
        "num_return_sequences": 2,
        "seed": 77,
    }
    together = new_tokens(d.ours, rows, **options)
    torch.manual_seed(1)
    for i, row in enumerate(rows):
        assert new_tokens(d.ours, [row], **options) == together[2 * i : 2 * i + 2]
        assert (
            new_tokens(d.ours, [row], **{**options, "num_return_sequences": 1}) == together[2 * i : 2 * i + 1]
        )
    assert new_tokens(d.ours, rows[::-1], left=False, **options)[::-1][1::2] == together[0::2]
    assert all(a != b for a, b in zip(together[0::2], together[1::2], strict=True)), (
        "samples of a prompt differ"
    )
    assert new_tokens(d.ours, rows, **{**options, "seed": 78}) != together


def test_a_seed_leaves_the_global_generator_alone() -> None:
    d = decoder("llama")
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    d.ours.generate(torch.tensor([[5, 6]]), do_sample=True, seed=1, max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)


# Lengths


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths_are_those_of_transformers() -> None:
    d = decoder("gpt2")
    call = batch(prompts([6, 13]))
    for options in ({}, {"max_length": 25}, {"max_new_tokens": 5}, {"max_new_tokens": 5, "max_length": 99}):
        ours = d.ours.generate(**call, **ALONE, **options)
        assert torch.equal(ours, d.theirs.generate(**call, **ALONE, **options))
    assert d.ours.generate(**call, **ALONE).shape[1] == 13 + 20


def test_without_a_prompt_it_begins_with_bos() -> None:
    d = decoder("llama")
    ours = d.ours.generate(max_new_tokens=9, eos_token_id=None)
    assert torch.equal(ours, d.ours.generate(torch.tensor([[BOS]]), max_new_tokens=9, eos_token_id=None))


def test_the_mask_is_inferred_as_by_transformers() -> None:
    d = decoder("llama")
    ids = batch(prompts([4, 9]))["input_ids"]
    for special in ({"eos_token_id": EOS, "pad_token_id": PAD}, {"eos_token_id": PAD, "pad_token_id": PAD}):
        ours = d.ours.generate(ids, max_new_tokens=12, **special)
        assert torch.equal(ours, d.theirs.generate(ids, max_new_tokens=12, **special))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_more_than_the_window_is_an_error_that_states_both_lengths(family: str) -> None:
    d = decoder(family)
    prompt = torch.tensor(prompts([WINDOW - 10]))
    assert d.ours.generate(prompt, max_new_tokens=10, **ALONE).shape[1] == WINDOW
    with pytest.raises(ValueError, match=f"{WINDOW - 10} tokens.*11.*{WINDOW + 1}.*window is {WINDOW}"):
        d.ours.generate(prompt, max_new_tokens=11, **ALONE)
    with pytest.raises(ValueError, match=f"window is {WINDOW}"):
        d.ours.generate(prompt, max_length=WINDOW + 1, **ALONE)
    assert d.ours.generate(prompt, **ALONE).shape[1] == WINDOW, "the default is cut to the window"
    with pytest.raises(ValueError, match=f"window is {WINDOW}"):
        d.ours.generate(torch.tensor(prompts([WINDOW])), **ALONE)


def test_a_rope_that_adapts_itself_has_no_window() -> None:
    scaling = (("rope_type", "dynamic"), ("factor", 2.0), ("rope_theta", 10000.0))
    d = decoder("llama", max_position_embeddings=24, rope_parameters=_Dict(scaling))
    prompt = torch.tensor(prompts([20]))
    ours = d.ours.generate(prompt, max_new_tokens=30, **ALONE)
    assert ours.shape[1] == 50


class _Dict(dict[str, Any]):
    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


# Stop strings


@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_where_they_do_in_transformers(seed: int) -> None:
    d = decoder("qwen3")
    rows = prompts([9, 6, 3], seed=seed)
    free = new_tokens(d.ours, rows, max_new_tokens=60, eos_token_id=None)
    stop = [_clean(d.tokenizer.decode(free[0]), 3), _clean(d.tokenizer.decode(free[1]), 2)]
    options: dict[str, Any] = {
        "max_new_tokens": 60,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "stop_strings": stop,
    }
    theirs = d.theirs.generate(**batch(rows), **options, tokenizer=d.their_tokenizer)
    ours = d.ours.generate(**batch(rows), **options, tokenizer=d.tokenizer)
    assert torch.equal(ours, theirs)
    assert bool((ours[:2, 9:] == PAD).any(1).all()) or ours.shape[1] < 69, "two rows were stopped"


def _clean(text: str, length: int) -> str:
    """Some characters of the text, not broken ones (random tokens make many) and not the first."""
    found = re.search(rf"(?<=.{{5}})[ -~]{{{length}}}", text, re.DOTALL)
    assert found is not None, text
    return found[0]


def test_a_stop_string_may_begin_in_the_prompt() -> None:
    d = decoder("qwen3")
    for seed in range(99):
        row = prompts([6], seed=seed)[0]
        first = new_tokens(d.ours, [row], max_new_tokens=1, eos_token_id=None)[0]
        string = d.tokenizer.decode(row)[-1:] + d.tokenizer.decode(first)[:1]
        if string.isascii():
            break
    options = {"max_new_tokens": 8, "eos_token_id": None, "stop_strings": string}
    theirs = d.theirs.generate(**batch([row]), **options, tokenizer=d.their_tokenizer)
    ours = d.ours.generate(**batch([row]), **options, tokenizer=d.tokenizer)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 7


# Results


def test_scores_logits_and_cache() -> None:
    d = decoder("llama")
    call = batch(prompts([5, 9], seed=3))
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "pad_token_id": PAD,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.5,
    }
    call = batch(prompts([9, 9], seed=3))
    ours, theirs = d.ours.generate(**call, **options), d.theirs.generate(**call, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for mine, reference in ((ours.scores, theirs.scores), (ours.logits, theirs.logits)):
        assert len(mine) == 12
        torch.testing.assert_close(torch.stack(mine), torch.stack(reference), atol=1e-4, rtol=1e-4)
    assert isinstance(ours.past_key_values, KVCache)
    assert ours.past_key_values.get_seq_length() == 9 + 11
    assert d.ours.generate(**call, **{**options, "use_cache": False}).past_key_values is None
    weight = torch.ones(VOCABULARY, requires_grad=True)
    (ours.scores[0] * weight).sum().backward()  # no inference tensors come out
    assert weight.grad is not None


@pytest.mark.parametrize("copies", [1, 2])
def test_a_conversation_goes_on_from_the_cache(copies: int) -> None:
    d = decoder("mistral")
    options: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "do_sample": True, "seed": 3}
    first = d.ours.generate(
        **batch(prompts([8, 8])), **options, return_dict_in_generate=True, num_return_sequences=copies
    )
    longer = torch.cat((first.sequences, torch.tensor(prompts([5] * 2 * copies, seed=9))), 1)
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = d.ours.run_packed
        patch.setattr(
            d.ours, "run_packed", lambda ids, *a, **k: read.append(len(ids)) or original(ids, *a, **k)
        )
        continued = d.ours.generate(longer, past_key_values=first.past_key_values, **options)
    assert read[0] == 6 * 2 * copies, "the last token, which the cache did not have yet, and the new ones"
    assert torch.equal(continued, d.ours.generate(longer, **options))
    with pytest.raises(ValueError, match="must start with the cached tokens"):
        d.ours.generate(longer[:, :9], past_key_values=first.past_key_values, **options)


def test_models_train_after_generating() -> None:
    d = decoder("gpt2")
    d.ours.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4)
    d.ours(torch.tensor([[7, 8, 9]]), labels=torch.tensor([[7, 8, 9]])).loss.backward()
    assert all(p.grad is not None for p in d.ours.parameters())
    d.ours.zero_grad()
