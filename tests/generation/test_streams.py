"""Streams of one `LLM`: all of their pieces, whoever makes the steps, and what an error in a step leaves."""

from __future__ import annotations

from contextlib import suppress
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import decoder

import minilm
from minilm import LLM, SamplingParams
from minilm.cache import KVCache
from minilm.generation.engine import Sample
from minilm.generation.stopping import GrowingText

TEXTS = ["The cat", "once upon a time", "In the year 1984", "User: what is this?", "北京"]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def llm(family: str = "llama", **options: Any) -> LLM:
    d = decoder(family)
    return LLM(d.ours, tokenizer=d.tokenizer, **options)


def generated(model: LLM, prompts: Any, params: Any = GREEDY) -> list[minilm.RequestOutput]:
    """`generate`, after which the engine must be empty."""
    outputs = model.generate(prompts, params, use_tqdm=False)
    cache = model._engine.cache
    assert cache.rows == []
    assert len(cache._free) == cache._pages
    return outputs


# Streams that others take along


@pytest.mark.parametrize("way", ["generate", "chat", "stream", "many", "dropped", "closed"])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_stream_gives_every_piece_whoever_steps(way: str, taken: int) -> None:
    model = llm("qwen3")
    (whole,) = generated(model, TEXTS[1], GREEDY)[0].outputs
    stream = model.stream(TEXTS[1], GREEDY)
    pieces = [next(stream) for _ in range(taken)]
    if way == "generate":
        model.generate(TEXTS, GREEDY, use_tqdm=False)
    elif way == "chat":
        model.chat([{"role": "user", "content": "what is this?"}], GREEDY, use_tqdm=False)
    elif way == "stream":
        assert "".join(model.stream(TEXTS[1], GREEDY)) == whole.text
    elif way == "many":
        model.generate(TEXTS[1], SamplingParams(n=3, seed=1, max_tokens=60, ignore_eos=True), use_tqdm=False)
    else:
        other = model.stream(TEXTS[0], GREEDY)
        for _ in range(4):
            next(other)
        if way == "closed":
            other.close()
            assert list(other) == []
        del other
    pieces += stream
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert stream.output.outputs == [whole]
    assert list(stream) == []
    generated(model, TEXTS[0], GREEDY)


@examples(12)
@given(st.data())
def test_streams_in_any_order_give_their_texts(data: st.DataObject) -> None:
    model = llm("llama", max_num_seqs=data.draw(st.integers(1, 4)))
    params = SamplingParams(temperature=1.5, seed=data.draw(st.integers(0, 99)), max_tokens=12, stop=["a"])
    wanted = [generated(model, text, params)[0].outputs[0].text for text in TEXTS]
    streams = [model.stream(text, params) for text in TEXTS]
    found = [""] * len(TEXTS)
    for place in data.draw(st.lists(st.integers(0, len(TEXTS) - 1), max_size=40)):
        found[place] += next(streams[place], "")
    for place in data.draw(st.permutations(range(len(TEXTS)))):
        found[place] += "".join(streams[place])
    assert found == wanted
    generated(model, [])


def test_threads_read_streams_that_others_step() -> None:
    model = llm(max_num_seqs=3)
    wanted = [generated(model, text, GREEDY)[0].outputs[0].text for text in TEXTS]
    found: dict[int, Any] = {}

    def read(i: int) -> None:
        found[i] = ["".join(model.stream(TEXTS[i], GREEDY)) for _ in range(4)]

    def disturb() -> None:
        for number in range(8):
            stream = model.stream(TEXTS[number % len(TEXTS)], GREEDY)
            next(stream)
            if number % 2:
                model.generate(TEXTS[0], GREEDY, use_tqdm=False)

    threads = [Thread(target=read, args=(i,)) for i in range(len(TEXTS))]
    threads += [Thread(target=disturb) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [text] * 4 for i, text in enumerate(wanted)}
    generated(model, TEXTS, GREEDY)  # what was dropped while a step was made has left


def test_two_threads_share_the_pieces_of_one_stream() -> None:
    model = llm()
    (whole,) = generated(model, TEXTS[1], GREEDY)[0].outputs
    stream, found = model.stream(TEXTS[1], GREEDY), list[str]()
    threads = [Thread(target=lambda: found.extend(stream)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("".join(found)) == sorted(whole.text)


def test_a_stream_dropped_while_another_thread_steps_waits_for_nobody() -> None:
    model = llm()
    stream = model.stream(TEXTS[0], GREEDY)
    next(stream)
    held, let_go = Event(), Event()

    def hold() -> None:
        with model._lock:
            held.set()
            let_go.wait(60)

    thread = Thread(target=hold)
    thread.start()
    held.wait(60)
    del stream  # would hang here
    let_go.set()
    thread.join()
    generated(model, TEXTS[1], GREEDY)


# Errors in a step


class Failure(BaseException):
    """As KeyboardInterrupt: none of those that are usually caught."""


@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("place", ["run_packed", "step", "logits", "fork", "take", "push"])
def test_an_error_in_one_call_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch, place: str, after: int
) -> None:
    model = llm(max_num_seqs=5, max_num_batched_tokens=6)
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=14, ignore_eos=True, logprobs=1)
    several = SamplingParams(n=2, seed=1, max_tokens=6)
    wanted = generated(model, TEXTS[:3], params)
    first, second, third = (model.stream(text, params) for text in TEXTS[:3])
    found = [next(first), next(second), ""]
    calls = 0
    owner: Any = {"fork": KVCache, "take": Sample, "push": GrowingText}.get(place, model.model)
    usual = getattr(owner, place)

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise Failure
        return usual(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, fail)
        with suppress(Failure):
            model.generate(TEXTS[3:], several, use_tqdm=False)
    given_up = 0
    for number, stream in enumerate((first, second, third)):
        if stream._job.request.given_up and not stream.output.finished:
            given_up += 1
            with pytest.raises(RuntimeError, match="dropped after an error in another call"):
                list(stream)
        else:
            assert found[number] + "".join(stream) == wanted[number].outputs[0].text
            assert stream.output.outputs == wanted[number].outputs
    # Only an error while a text looks at its own token takes that text with it.
    assert given_up <= (place == "push")
    assert generated(model, TEXTS[:3], params)[1].outputs == wanted[1].outputs


def test_an_error_that_stays_is_everybodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm()
    stream = model.stream(TEXTS[0], GREEDY)
    next(stream)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **options: Any) -> None:
            raise Failure

        for name in ("run_packed", "step", "steps"):
            patch.setattr(model.model, name, fail)
        for prompts_ in (TEXTS, TEXTS[0]):
            with pytest.raises(Failure):
                model.generate(prompts_, GREEDY, use_tqdm=False)
        with pytest.raises(Failure):
            next(stream)
    assert list(stream) == []
    assert not model._engine.busy
    generated(model, TEXTS, GREEDY)


def test_no_step_within_a_step() -> None:
    model = llm()
    stream = model.stream(TEXTS[0], GREEDY)
    next(stream)

    def call_back(*_: Any) -> None:
        model.generate(TEXTS[1], GREEDY, use_tqdm=False)

    handle = model.model.head.register_forward_hook(call_back)
    try:
        with pytest.raises(RuntimeError, match="during a step"):
            model.generate(TEXTS[2], GREEDY, use_tqdm=False)
    finally:
        handle.remove()
    assert next(stream)
    stream.close()
    generated(model, TEXTS, GREEDY)
