"""The decoding loop: who runs when, that texts do not change each other, that all pages come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import EOS, VOCABULARY, decoder, prompts

from minilm.cache import KVCache
from minilm.config import ModelConfig, RopeConfig
from minilm.generation.engine import LEAST_ROOM, Engine, Request, best_logprobs, context_window
from minilm.generation.sampling import Sampling


def request(prompt: list[int], new: int = 12, n: int = 1, **options: Any) -> Request:
    """Sampled with a seed, so that a wrong step shows."""
    ends = options.pop("ends", frozenset({EOS, *range(40, 60)}))
    sampling = Sampling(seed=sum(prompt), temperature=2.0, repetition_penalty=1.1, ends=ends, **options)
    return Request(list(prompt), sampling, new, ends, n)


def texts(requests: list[Request]) -> list[list[list[int]]]:
    """The tokens of each sample of each request."""
    return [[sample.tokens for sample in r.samples] for r in requests]


def expected(family: str, requests: list[Request]) -> list[list[list[int]]]:
    """What each request gets in an engine of its own."""
    found = []
    for r in requests:
        alone = Request(r.prompt, r.sampling, r.max_new_tokens, r.ends, r.n)
        engine = Engine(decoder(family).ours)
        engine.add(alone)
        engine.run()
        found += texts([alone])
    return found


def assert_empty(engine: Engine) -> None:
    """All rows are gone, all pages free, each once."""
    cache = engine.cache
    assert not engine.busy
    assert cache.rows == []
    assert sorted(cache._free) == list(range(cache._pages))


@examples(10)
@given(st.data())
def test_no_schedule_changes_a_text(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["gpt2", "mistral", "qwen3"]))
    count = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    requests = [
        request(prompt, data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3)))
        for prompt in prompts(lengths, seed=data.draw(st.integers(0, 99)))
    ]
    engine = Engine(
        decoder(family).ours,
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_num_batched_tokens=data.draw(st.sampled_from([3, 17, 8192])),
        together=data.draw(st.booleans()),
    )
    greedy = Sampling(do_sample=False, ends=frozenset({EOS}))
    for r in requests:
        r.at_once = data.draw(st.booleans())
        if data.draw(st.booleans()):
            r.sampling = greedy
    later = [r for r in requests if data.draw(st.booleans())]
    for r in requests:
        if r not in later:
            engine.add(r)
    for r in later:
        engine.step()
        engine.add(r)
    engine.run()
    assert texts(requests) == expected(family, requests)
    assert all(r.finished for r in requests)
    assert_empty(engine)


def test_only_so_many_texts_grow_at_a_time_and_the_next_begins_when_one_ends() -> None:
    requests = [
        request(prompt, new, ends=frozenset())
        for prompt, new in zip(prompts([5] * 5), [3, 9, 2, 4, 4], strict=True)
    ]
    engine = Engine(decoder("llama").ours, max_num_seqs=2)
    for r in requests:
        engine.add(r)
    grown = []
    while engine.busy:
        grown.append([requests.index(sample.request) for sample in engine.step()])
        assert len(engine.running) <= 2
    assert grown[:4] == [[0, 1], [0, 1], [0, 1], [1, 2]]
    assert grown[4] == [1, 2]
    assert grown[5] == [1, 3]
    assert texts(requests) == expected("llama", requests)
    assert_empty(engine)


def test_each_prompt_is_read_once_and_in_chunks_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama").ours
    read: list[tuple[int, list[int]]] = []
    stepping = False
    run_packed, step = model.run_packed, model.step

    def read_prompts(tokens: Any, packed: Any, **options: Any) -> Any:
        if not stepping:  # a step of decoding goes through the modules
            read.append((len(tokens), packed.lengths))
        return run_packed(tokens, packed, **options)

    def read_newest(tokens: Any, rows: Any, cache: Any) -> Any:
        nonlocal stepping
        read.append((len(tokens), [1] * len(rows)))
        stepping = True
        try:
            return step(tokens, rows, cache)
        finally:
            stepping = False

    monkeypatch.setattr(model, "run_packed", read_prompts)
    monkeypatch.setattr(model, "step", read_newest)
    engine = Engine(model, max_num_batched_tokens=10)
    requests = [
        request(prompt, 3, n, ends=frozenset())
        for prompt, n in zip(prompts([4, 23, 5]), [1, 3, 2], strict=True)
    ]
    for r in requests:
        engine.add(r)
    engine.run()
    assert [lengths for _, lengths in read[:5]] == [[4, 6], [10], [1], [7, 3], [1]]
    assert sum(size for size, _ in read) == 4 + 23 + 5 + 6 * 2, (
        "each prompt once, and of each text all but its last token"
    )
    assert all(size <= 10 for size, _ in read)
    monkeypatch.undo()
    assert texts(requests) == expected("llama", requests)
    assert_empty(engine)


def test_more_samples_than_seats_run_alone() -> None:
    engine = Engine(decoder("llama").ours, max_num_seqs=2)
    requests = [request(prompt, 5, n) for prompt, n in zip(prompts([3, 4, 5]), [1, 5, 1], strict=True)]
    for r in requests:
        engine.add(r)
    engine.run()
    assert texts(requests) == expected("llama", requests)


@pytest.mark.parametrize("steps", range(5))
def test_a_request_that_is_given_up_leaves_nothing_behind(steps: int) -> None:
    engine = Engine(decoder("llama").ours, max_num_batched_tokens=8)
    first, second, third = (request(prompt, 9, 2, ends=frozenset()) for prompt in prompts([5, 20, 4]))
    for r in (first, second, third):
        engine.add(r)
    for _ in range(steps):
        engine.step()
    engine.abort(second)
    engine.abort(second)
    engine.run()
    assert texts([first, third]) == expected("llama", [first, third])
    assert not second.finished
    assert_empty(engine)
    engine.add(request([5, 6]))
    engine.clear()
    assert_empty(engine)


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    rows = prompts([7, 7, 7, 7])
    requests = [request(row, do_sample=i % 2 == 0, ends=frozenset()) for i, row in enumerate(rows)]
    requests[3] = Request(rows[3], Sampling(do_sample=False), 12)
    engine = Engine(decoder("qwen2").ours)
    for r in requests:
        engine.add(r)
    engine.run()
    assert texts(requests) == expected("qwen2", requests)


def test_a_text_ends_by_token_by_string_or_by_length() -> None:
    (prompt,) = prompts([6])
    free = request(prompt, 10, ends=frozenset())
    by_token = request(prompt, 10, ends=frozenset())
    by_string = request(prompt, 10, ends=frozenset())
    engine = Engine(decoder("llama").ours)
    for r in (free, by_token, by_string):
        engine.add(r)
    engine.step()
    by_token.ends = frozenset({by_token.samples[0].tokens[0], EOS})
    seen: list[int] = []

    def watch(token: int) -> str | None:
        seen.append(token)
        return "stop!" if len(seen) == 4 else None

    by_string.samples[0].watch = watch
    engine.run()
    (long,), (string,) = free.samples, by_string.samples
    assert (long.finish_reason, long.stop_reason, len(long.tokens)) == ("length", None, 10)
    assert (string.finish_reason, string.stop_reason) == ("stop", "stop!")
    assert seen == string.tokens[1:] == long.tokens[1:5]
    (token,) = by_token.samples
    again = long.tokens.index(long.tokens[0], 1) if long.tokens[0] in long.tokens[1:] else 9
    assert token.tokens == long.tokens[: again + 1]


def test_texts_find_their_pages_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing copies the cache: it happens when prompts are read, and later only for long texts."""
    sizes: list[int] = []
    grow = KVCache._grow

    def counted(cache: KVCache, pages: int) -> None:
        sizes.append(pages)
        grow(cache, pages)

    monkeypatch.setattr(KVCache, "_grow", counted)
    engine = Engine(decoder("llama").ours)
    few = [request(p, LEAST_ROOM, n, ends=frozenset()) for p, n in zip(prompts([32, 5]), (2, 1), strict=True)]
    for r in few:
        engine.add(r)
    engine.step()
    assert sizes == [2 * 3 + 3], "32 + 64 and 5 + 64 tokens, in pages of 32"
    engine.run()
    assert len(sizes) == 1
    assert_empty(engine)
    engine.add(request(prompts([100])[0], 60, ends=frozenset()))
    engine.run()
    assert len(sizes) == 1, "the pages of those that ended are enough"


def test_without_a_seed_the_global_generator_decides() -> None:
    def run() -> list[list[list[int]]]:
        r = Request(prompts([5])[0], Sampling(), 8)
        engine = Engine(decoder("llama").ours)
        engine.add(r)
        engine.run()
        return texts([r])

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert run() == first != second


def test_an_empty_prompt_and_limits_of_none_are_errors() -> None:
    model = decoder("llama").ours
    with pytest.raises(ValueError, match="prompt is empty"):
        Engine(model).add(Request([], Sampling(), 3))
    with pytest.raises(ValueError, match="max_num_seqs must be a whole number from 1, and is 0"):
        Engine(model, max_num_seqs=0)


def test_logprobs_are_those_of_the_model_with_ranks() -> None:
    x = torch.randn(VOCABULARY)
    order = x.argsort(descending=True).tolist()
    logs = x.double().log_softmax(-1)
    found = best_logprobs(x, 3, order[20])
    assert set(found) == {*order[:3], order[20]}
    for token, (value, rank) in found.items():
        assert value == pytest.approx(float(logs[token]), abs=1e-5)
        assert order[rank - 1] == token
    assert list(best_logprobs(x, 0, order[0]).items()) == [
        (order[0], (pytest.approx(float(logs.max()), abs=1e-5), 1))
    ]


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        (None, 100),
        (RopeConfig(), 100),
        (RopeConfig(type="llama3", factor=8.0), 100),
        (RopeConfig(type="linear", factor=2.0), 200),
        (RopeConfig(type="yarn", factor=4.0, original_max_positions=50), 200),
        (RopeConfig(type="yarn", factor=4.0, original_max_positions=20), 100),
        (RopeConfig(type="dynamic", factor=2.0), None),
    ],
    ids=str,
)
def test_the_window(rope: RopeConfig | None, window: int | None) -> None:
    config = ModelConfig(
        vocab_size=9,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_positions=100,
        causal=True,
        pre_norm=True,
        norm="rms_norm",
        norm_eps=1e-6,
        activation="silu",
        positions="learned" if rope is None else "rope",
        rope=rope,
    )
    assert context_window(config) == window


def test_what_is_given_up_within_a_step_leaves_at_its_end() -> None:
    """As when a dropped stream is collected while the engine works."""
    given_up, kept = request([70, 71, 72]), request([80, 81])
    wanted = expected("gpt2", [kept])

    def recorder(*_: Any) -> None:
        if len(kept.samples[0].tokens) == 3:
            engine.abort(given_up)

    engine = Engine(decoder("gpt2").ours, recorder=recorder)
    for r in (given_up, kept):
        r.ends = r.ends - {*range(40, 60)}
        engine.add(r)
    engine.run()
    assert len(given_up.samples[0].tokens) <= 4
    assert texts([kept])[0][0][:3] == wanted[0][0][:3]
    assert_empty(engine)
