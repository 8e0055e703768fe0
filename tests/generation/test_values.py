"""Token ids and counts of any kind: taken, ignored with a warning, or named, by `generate` and by `LLM`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import EOS, VOCABULARY, decoder, prompts

from minilm import LLM, GenerationConfig, SamplingParams
from minilm.generation import values
from minilm.generation.values import in_vocabulary, token_ids, whole

MISSING = st.one_of(
    st.integers(-(2**70), -1), st.integers(VOCABULARY, 2**70), st.sampled_from([-1, VOCABULARY, 2**63])
)


def llm() -> LLM:
    d = decoder("llama")
    return LLM(d.ours, tokenizer=d.tokenizer)


@examples(20)
@given(st.lists(MISSING, min_size=1, max_size=3), st.lists(st.integers(5, VOCABULARY - 1), max_size=2))
def test_ids_that_the_vocabulary_does_not_have_change_nothing(missing: list[int], there: list[int]) -> None:
    model, rows = decoder("llama").ours, prompts([4, 6])
    both = missing + there
    way: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 3, "output_scores": True}
    way["return_dict_in_generate"] = True
    for row in rows:
        ids = torch.tensor([row])
        expected = model.generate(ids, eos_token_id=there or None, pad_token_id=0, **way)
        for given_ in (both, tuple(both), both if max(map(abs, both)) >= 2**63 else np.array(both)):
            found = model.generate(ids, eos_token_id=given_, pad_token_id=0, **way)
            assert torch.equal(found.sequences, expected.sequences)
            assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
        config = GenerationConfig(eos_token_id=both, pad_token_id=0, **way)
        assert torch.equal(model.generate(ids, config).sequences, expected.sequences)
    engine = llm()
    params = {"temperature": 0, "max_tokens": 6, "min_tokens": 3, "ignore_eos": True}
    for penalty in (0, 1e-6):
        plain, stopped = (
            engine.generate(
                rows,
                SamplingParams(**params, presence_penalty=penalty, stop_token_ids=ids),
                use_tqdm=False,
            )
            for ids in (there, both)
        )
        assert [o.outputs for o in plain] == [o.outputs for o in stopped]


def test_what_is_ignored_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    values._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            llm().generate("a", SamplingParams(stop_token_ids=[-7, 9]), use_tqdm=False)
            assert in_vocabulary("eos_token_id", [4, 400], 300) == [4]
    assert caplog.messages == [
        f"stop_token_ids -7 is ignored: the vocabulary has 0 to {VOCABULARY - 1}",
        "eos_token_id 400 is ignored: the vocabulary has 0 to 299",
    ]


@pytest.mark.parametrize("pad", [-1, -100, VOCABULARY, 2**80])
def test_padding_that_is_no_token_is_that_of_the_end(pad: int) -> None:
    d = decoder("llama")
    ids = torch.tensor(prompts([4, 4]))
    free = d.ours.generate(ids, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    end = int(free[0, 6])
    found = d.ours.generate(ids, max_new_tokens=8, eos_token_id=[-1, end], pad_token_id=pad)
    assert torch.equal(found, d.ours.generate(ids, max_new_tokens=8, eos_token_id=end, pad_token_id=end))
    assert int(found.min()) >= 0


def test_checkpoints_whose_ids_are_out_of_range_are_read() -> None:
    """Old configurations say -1 for none."""
    d = decoder("llama")
    stored = d.ours.generation_config
    d.ours.generation_config = GenerationConfig(eos_token_id=-1, pad_token_id=-1)
    try:
        assert d.ours.generate(torch.tensor([[5, 6]]), max_new_tokens=9).shape == (1, 11)
        model = llm()
        assert model.generate("a", use_tqdm=False)[0].finished
        assert model._job("x", [5], SamplingParams()).request.ends == {EOS}  # the tokenizer's
    finally:
        d.ours.generation_config = stored


FORMS: list[Any] = [
    [7, 9],
    (7, 9),
    np.array([7, 9]),
    np.array([7, 9], np.uint8),
    [np.int16(7), np.int64(9)],
    [torch.tensor(7), 9],
    *(torch.tensor([7, 9], dtype=t) for t in (torch.int64, torch.int32, torch.int16, torch.uint8)),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ids_come_in_any_form(form: Any) -> None:
    assert token_ids("ids", form) == [7, 9]
    assert all(type(token) is int for token in token_ids("ids", form))
    assert SamplingParams(stop_token_ids=form).stop_token_ids == [7, 9]
    model = llm()
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = model.generate([[7, 9]], params, use_tqdm=False)[0]
    for prompt in (form, {"prompt_token_ids": form}, [form]):
        (found,) = model.generate(prompt, params, use_tqdm=False)
        assert (found.prompt_token_ids, found.outputs) == ([7, 9], expected.outputs)


@pytest.mark.parametrize("form", [True, [True], [7, False], 2.0, [2.0], "7", ["7"], [[7]], {7: 1}, object()])
def test_what_is_no_id_is_named(form: Any) -> None:
    with pytest.raises(ValueError, match="eos_token_id must be token ids, and is"):
        decoder("llama").ours.generate(torch.tensor([[5, 6]]), eos_token_id=form)
    with pytest.raises(ValueError, match="stop_token_ids must be token ids, and is"):
        SamplingParams(stop_token_ids=form)
    if not isinstance(form, str):
        with pytest.raises((ValueError, TypeError)):
            llm().generate({"prompt_token_ids": form}, use_tqdm=False)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
def test_prompts_of_any_integer_dtype(dtype: str) -> None:
    model, ids = decoder("llama").ours, torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=12)
    assert int(expected.max()) > 127, "a result in the prompt's dtype would not hold"
    found = model.generate(ids.to(getattr(torch, dtype)), max_new_tokens=12)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


COUNTS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length", "num_return_sequences")


@pytest.mark.parametrize("value", [True, 2.0, -1, "3", float("nan"), [3]], ids=str)
@pytest.mark.parametrize("name", [*COUNTS, "top_k", "no_repeat_ngram_size", "prefill_chunk_size"])
def test_counts_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number from"):
        decoder("llama").ours.generate(torch.tensor([[5, 6]]), do_sample=True, **{name: value})


@pytest.mark.parametrize("value", [True, 2.0, -2, "3", 10**9, 2**70], ids=str)
def test_so_many_texts_are_refused_before_they_take_memory(value: Any) -> None:
    words = "must be a whole number from 1 to 16384, and is"
    with pytest.raises(ValueError, match=f"n {words}"):
        SamplingParams(n=value)
    with pytest.raises(ValueError, match=f"num_return_sequences {words}"):
        decoder("llama").ours.generate(torch.tensor([[5]]), do_sample=True, num_return_sequences=value)


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens", "top_k", "logprobs"])
@pytest.mark.parametrize("value", [True, 2.0, -2, "3"], ids=str)
def test_counts_of_the_llm(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number from"):
        SamplingParams(**{name: value})


def test_large_counts_ask_for_all_there_is() -> None:
    huge = 2**70
    params = SamplingParams(top_k=huge, logprobs=huge, max_tokens=huge, seed=huge, temperature=0.8)
    other = SamplingParams(top_k=3, seed=1, max_tokens=3)
    first, _ = llm().generate(["a", "b"], [params, other], use_tqdm=False)
    assert len(first.outputs[0].logprobs or ()) == len(first.outputs[0].token_ids)
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="seed must be a whole number of 64 bits"):
        LLM(decoder("llama").ours, tokenizer=decoder("llama").tokenizer, seed=huge)


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(n=np.int64(2), max_tokens=np.int32(3), temperature=np.float32(0.5), top_p=1)
    assert (params.n, params.max_tokens) == (2, 3)
    assert whole("n", np.uint8(4), 1) == 4
    for bad in (True, "1", None, float("inf")):
        with pytest.raises(ValueError, match="temperature must be a number"):
            SamplingParams(temperature=bad)


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], 5, [5], [None]], ids=str)
def test_stop_texts_are_texts(stop: Any) -> None:
    with pytest.raises(ValueError, match="stop must be non-empty texts"):
        SamplingParams(stop=stop)
    d = decoder("llama")
    with pytest.raises(ValueError, match="stop_strings must be non-empty texts"):
        d.ours.generate(torch.tensor([[5]]), stop_strings=stop, tokenizer=d.tokenizer)


@pytest.mark.parametrize("mask", [[[1, 1]], np.ones((1, 2)), "11"], ids=str)
def test_a_mask_is_a_tensor(mask: Any) -> None:
    with pytest.raises(ValueError, match="attention_mask must be"):
        decoder("llama").ours.generate(torch.tensor([[5, 6]]), attention_mask=mask)


def test_ids_of_arrays_are_saved(tmp_path: Any) -> None:
    GenerationConfig(eos_token_id=np.array([3, 4]), pad_token_id=torch.tensor(2)).save_pretrained(tmp_path)
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.pad_token_id) == ([3, 4], 2)


@pytest.mark.parametrize("bos", [-1, VOCABULARY, 2**80, True, 1.0, "a"])
def test_what_a_text_begins_with_is_a_token(bos: Any) -> None:
    with pytest.raises(ValueError, match=f"bos_token_id must be a whole number from 0 to {VOCABULARY - 1}"):
        decoder("llama").ours.generate(bos_token_id=bos, max_new_tokens=2)


@pytest.mark.parametrize(
    "prompts_", [None, 5, [True], [1.5], object(), [None]], ids=lambda value: type(value).__name__
)
def test_what_is_no_prompt_is_named(prompts_: Any) -> None:
    with pytest.raises(ValueError, match="a prompt must be a text, token ids, or a dict"):
        llm().generate(prompts_, use_tqdm=False)
