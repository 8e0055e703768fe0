"""Texts that have ended and prompts that begin like them: the same tokens as when each prompt is read whole,
fewer tokens read, and no page lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import EOS, VOCABULARY, WINDOW, decoder, prompts

import minilm
from minilm import LLM, SamplingParams
from minilm.cache import KVCache
from minilm.generation.engine import Engine, Request
from minilm.generation.prefixes import Prefixes, common
from minilm.generation.sampling import Sampling


def request(prompt: list[int], new: int = 8, n: int = 1) -> Request:
    """Sampled with a seed, so that a wrong key or value shows."""
    return Request(list(prompt), Sampling(seed=sum(prompt), temperature=2.0), new, frozenset({EOS}), n)


def alone(family: str, r: Request) -> list[list[int]]:
    """Its texts in an engine of its own, without kept texts."""
    again = Request(r.prompt, r.sampling, r.max_new_tokens, r.ends, r.n)
    engine = Engine(decoder(family).ours)
    engine.add(again)
    engine.run()
    return [sample.tokens for sample in again.samples]


def assert_nothing_is_lost(engine: Engine) -> None:
    """When the kept texts go, all rows are gone and all pages free, each once."""
    assert engine.prefixes is not None
    assert len(engine.cache.rows) == len(engine.prefixes._texts)
    engine.prefixes.clear()
    assert engine.cache.rows == []
    assert sorted(engine.cache._free) == list(range(engine.cache._pages))
    assert not engine.cache._shared


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_what_two_texts_have_in_common(first: list[int], second: list[int]) -> None:
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    assert common(first, second) == count


@examples(10)
@given(st.data())
def test_a_kept_text_changes_no_other(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["gpt2", "mistral", "qwen3"]))
    most = data.draw(st.sampled_from([1, 40, 10**6]))
    chunk = data.draw(st.sampled_from([3, 17, 8192]))
    engine = Engine(decoder(family).ours, keep_prefixes=most, max_num_batched_tokens=chunk)
    known = [prompts([40], seed=data.draw(st.integers(0, 9)))[0]]
    for _ in range(data.draw(st.integers(2, 4))):
        batch = []
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.sampled_from(known))
            kept = data.draw(st.integers(1, len(start)))
            (rest,) = prompts([data.draw(st.integers(1, 12))], seed=data.draw(st.integers(0, 9)))
            batch.append(request((start[:kept] + rest)[:100], n=data.draw(st.integers(1, 2))))
        for r in batch:
            engine.add(r)
        engine.run()
        for r in batch:
            assert [sample.tokens for sample in r.samples] == alone(family, r)
            assert 0 <= r.reused < len(r.prompt)
            known.append(r.prompt + r.samples[0].tokens)
        assert engine.prefixes is not None
        assert sum(map(len, engine.prefixes._texts.values())) <= most
    assert_nothing_is_lost(engine)


def test_a_conversation_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama").ours
    read: list[int] = []
    run_packed = model.run_packed

    def counted(tokens: Any, packed: Any, **options: Any) -> Any:
        read.append(len(tokens))
        return run_packed(tokens, packed, **options)

    engine = Engine(model, keep_prefixes=WINDOW)
    (text,) = prompts([30])
    for turn, question in enumerate(prompts([7, 11, 5], seed=3)):
        text = text + question
        r = request(text)
        with monkeypatch.context() as patch:
            patch.setattr(model, "run_packed", counted)
            engine.add(r)
            engine.step()  # reads the prompt
        engine.run()
        assert r.samples[0].tokens == alone("llama", r)[0]
        written = len(r.samples[0].tokens) - 1  # the last token was not fed
        assert read.pop() == (len(text) if turn == 0 else len(question) + 1), "and that last token"
        assert not read
        assert r.reused == (0 if turn == 0 else len(text) - len(question) - 1)
        text = text + r.samples[0].tokens
        assert engine.prefixes is not None
        assert list(map(len, engine.prefixes._texts.values())) == [len(r.prompt) + written], (
            "a text that another continues is not kept beside it"
        )
    assert_nothing_is_lost(engine)


def test_the_longest_beginning_is_taken_and_the_last_token_read_again() -> None:
    engine = Engine(decoder("llama").ours, keep_prefixes=1000)
    (first,) = prompts([50], seed=1)
    for prompt in (first[:20] + prompts([9], seed=2)[0], first, first[:35] + prompts([4], seed=3)[0]):
        engine.add(request(prompt))
        engine.run()
    for prompt, reused in (
        (first[:36], 35),
        (first[:45], 44),
        (first[:1], 0),
        ([VOCABULARY - 1, *first[1:]], 0),
        ([*first[:12], VOCABULARY - 1], 12),
    ):
        r = request(prompt)
        engine.add(r)
        engine.run()
        assert r.reused == reused
        assert r.samples[0].tokens == alone("llama", r)[0]
    assert_nothing_is_lost(engine)


def test_the_text_used_least_recently_goes_first() -> None:
    cache = KVCache(decoder("llama").ours.spec, dtype=torch.float32, device="cpu", page_size=4)
    kept = Prefixes(cache, 25)

    def ended(text: list[int]) -> None:
        row, _ = kept.begin(text)
        cache.extend([row], [len(text) - cache.lengths[row]])
        kept.keep(row, text)

    ended([1] * 10)
    ended([2] * 10)
    row, reused = kept.begin([1] * 5)
    assert reused == 4
    cache.free_row(row)
    ended([3] * 5)
    assert sorted(text[0] for text in kept._texts.values()) == [1, 2, 3]
    ended([4] * 5)
    assert sorted(text[0] for text in kept._texts.values()) == [1, 3, 4]
    ended([5] * 26)
    assert not kept._texts, "more than is ever kept"
    assert cache.used_pages == 0


def test_an_error_while_a_continued_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama").ours
    engine = Engine(model, keep_prefixes=1000)
    (text,) = prompts([30])
    engine.add(request(text))
    engine.run()
    r = request([*text, 5, 6, 7])
    engine.add(r)

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model, "run_packed", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.run()
    assert r.samples[0].tokens == alone("llama", r)[0]
    gone = request([*text, 8])
    engine.add(gone)
    engine.abort(gone)
    engine.add(gone := request([*text, 9], 20))
    engine.step()
    engine.abort(gone)
    assert_nothing_is_lost(engine)


def test_the_llm_keeps_texts_if_asked() -> None:
    d = decoder("qwen3")
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=2)
    plain, keeping = (
        LLM(d.ours, tokenizer=d.tokenizer, enable_prefix_caching=keep) for keep in (False, True)
    )
    messages = [{"role": "user", "content": "What is this? The cat sat on the mat."}]
    for turn in range(3):
        (expected,), (found,) = plain.chat(messages, params, False), keeping.chat(messages, params, False)
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        for ours, theirs in zip(found.outputs[0].logprobs, expected.outputs[0].logprobs, strict=True):
            assert ours.keys() == theirs.keys()
            for token in ours:
                assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
        assert expected.num_cached_tokens == 0
        assert (found.num_cached_tokens > 0) == (turn > 0)
        messages += [
            {"role": "assistant", "content": found.outputs[0].text},
            {"role": "user", "content": f"And the dog, {turn}?"},
        ]
    assert keeping.reset_prefix_cache() is plain.reset_prefix_cache() is True
    assert keeping.chat(messages, params, False)[0].num_cached_tokens == 0
    assert keeping.chat(messages, params, False)[0].num_cached_tokens > 0


def test_dynamic_rope_refuses() -> None:
    d = decoder("llama")
    config = minilm.PretrainedConfig.from_dict(
        {**d.ours.config.to_dict(), "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    )
    model = minilm.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="keys of a model with dynamic rope depend on the length"):
        LLM(model, tokenizer=d.tokenizer, enable_prefix_caching=True)
    LLM(model, tokenizer=d.tokenizer, enable_prefix_caching=False)
