"""Streamers against those of transformers, and text that grows token by token."""

from __future__ import annotations

from functools import cache
from queue import Empty
from threading import Thread
from typing import Any

import pytest
import tokenizer_folders as folders
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples
from tiny_decoders import CORPUS, VOCABULARY, decoder, prompts

from minilm import AutoTokenizer
from minilm.generation.stopping import GrowingText
from minilm.generation.streamers import TextIteratorStreamer, TextStreamer


def tokenizers() -> tuple[Any, Any]:
    d = decoder("llama")
    return d.tokenizer, d.their_tokenizer


@cache
def folder_tokenizer(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(getattr(folders, kind)())


texts = st.one_of(st.sampled_from(CORPUS), st.text(max_size=30), st.text("ab \n京,", max_size=30))
tokens = st.one_of(
    texts.map(lambda text: tokenizers()[0](text)["input_ids"]),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=20),
)


@given(tokens, st.booleans(), st.booleans(), st.integers(1, 5))
def test_the_pieces_are_those_of_transformers(
    ids: list[int], skip_prompt: bool, skip_special_tokens: bool, prompt: int
) -> None:
    ours, theirs = tokenizers()
    found: list[list[tuple[str, bool]]] = []
    for library, tokenizer in ((TextStreamer, ours), (transformers.TextStreamer, theirs)):
        pieces: list[tuple[str, bool]] = []

        class Streamer(library):  # type: ignore[misc, valid-type]
            def on_finalized_text(self, text: str, stream_end: bool = False, pieces: Any = pieces) -> None:
                pieces.append((text, stream_end))

        streamer = Streamer(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens)
        for _ in range(2):  # a streamer can be used again
            streamer.put(torch.tensor([ids[:prompt]], dtype=torch.int64))
            for token in ids[prompt:]:
                streamer.put(torch.tensor([token]))
            streamer.end()
        found.append(pieces)
    if skip_prompt and theirs.decode(ids[:prompt], skip_special_tokens=skip_special_tokens).endswith(
        "\ufffd"
    ):
        return  # a character that the prompt began comes whole here, and in pieces there
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["llama", "xlm_roberta", "gpt2"])
@given(
    prompt=folders.texts(),
    text=st.one_of(
        folders.texts(), st.text("ab \n", max_size=30).map(lambda t: f" {t}\n    return {t}\n  x")
    ),
    skip_prompt=st.booleans(),
)
def test_spaces_are_kept(kind: str, prompt: str, text: str, skip_prompt: bool) -> None:
    """The first one, and the indentation behind a line break: sentencepiece drops both when what follows is
    decoded alone. All pieces together are what the new tokens add to the text."""
    tokenizer = folder_tokenizer(kind)
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(text, add_special_tokens=False)
    pieces: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    streamer = Streamer(tokenizer, skip_prompt)
    streamer.put(torch.tensor([before], dtype=torch.int64))
    for token in after:
        streamer.put(torch.tensor([token]))
    streamer.end()
    whole, start = tokenizer.decode([*before, *after]), tokenizer.decode(before)
    if whole.startswith(start):
        assert "".join(pieces) == (whole[len(start) :] if skip_prompt else whole)


def test_a_streamer_prints(capsys: pytest.CaptureFixture[str]) -> None:
    d = decoder("llama")
    prompt = d.tokenizer("The cat sat", return_tensors="pt")["input_ids"]
    for skip in (False, True):
        out = d.ours.generate(prompt, max_new_tokens=20, streamer=TextStreamer(d.tokenizer, skip_prompt=skip))
        shown = d.tokenizer.decode(out[0][prompt.shape[1] :] if skip else out[0])
        assert capsys.readouterr().out == shown + "\n"


def test_another_thread_iterates_over_the_pieces() -> None:
    d = decoder("llama")
    call = d.tokenizer("once upon a time", return_tensors="pt")
    streamer = TextIteratorStreamer(d.tokenizer, skip_prompt=True, timeout=600)
    thread = Thread(target=d.ours.generate, kwargs={**call, "streamer": streamer, "max_new_tokens": 25})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = d.ours.generate(**call, max_new_tokens=25)[0, call["input_ids"].shape[1] :]
    assert text == d.tokenizer.decode(expected)


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 9, "num_beams": 2}, {}])
def test_a_failure_reaches_the_thread_that_waits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = decoder("llama")
    streamer = TextIteratorStreamer(d.tokenizer, skip_prompt=True, timeout=60)
    usual, calls = d.ours.step, 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(d.ours, "step", fail)

    def work() -> None:
        with pytest.raises((ValueError, KeyboardInterrupt)):
            d.ours.generate(torch.tensor([[5, 6, 7]]), streamer=streamer, **options)

    thread = Thread(target=work)
    thread.start()
    with pytest.raises(RuntimeError, match="generate failed, so the text is incomplete"):
        list(streamer)
    thread.join()
    monkeypatch.undo()
    d.ours.generate(torch.tensor([[5, 6, 7]]), streamer=streamer, max_new_tokens=4)  # and is good again
    assert "".join(streamer)


def test_threads_each_get_the_whole_text_of_their_streamer() -> None:
    d = decoder("qwen3")
    rows = prompts([3, 5, 4, 6])
    wanted, found = [], dict[int, str]()
    for row in rows:
        out = d.ours.generate(torch.tensor([row]), max_new_tokens=25, eos_token_id=None, pad_token_id=2)
        wanted.append(d.tokenizer.decode(row + out[0, len(row) :].tolist()))

    def write(place: int) -> None:
        streamer = TextIteratorStreamer(d.tokenizer, timeout=60)
        options: dict[str, Any] = {"max_new_tokens": 25, "eos_token_id": None, "pad_token_id": 2}
        Thread(
            target=d.ours.generate,
            args=(torch.tensor([rows[place]]),),
            kwargs={**options, "streamer": streamer},
        ).start()
        found[place] = "".join(streamer)

    threads = [Thread(target=write, args=(place,)) for place in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict(enumerate(wanted))


def test_waiting_has_an_end() -> None:
    streamer = TextIteratorStreamer(tokenizers()[0], timeout=0.01)
    with pytest.raises(Empty):
        next(streamer)


def test_a_streamer_shows_one_text() -> None:
    d = decoder("llama")
    with pytest.raises(ValueError, match="one text, and got a batch of 2"):
        d.ours.generate(torch.tensor(prompts([3, 3])), streamer=TextStreamer(d.tokenizer))


def test_what_a_streamer_is_given() -> None:
    d = decoder("llama")
    given: list[Any] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            given.append(value)

        def end(self) -> None:
            given.append("end")

    ids = torch.tensor(prompts([4, 4]))
    free = d.ours.generate(ids, max_new_tokens=6, eos_token_id=None, pad_token_id=2)
    end = int(free[0, 6])
    out = d.ours.generate(ids, max_new_tokens=6, eos_token_id=end, pad_token_id=2, streamer=Streamer())
    assert torch.equal(given[0], ids)
    assert given[-1] == "end"
    assert torch.equal(torch.stack(given[1:-1], 1), out[:, 4:])


# GrowingText


@given(tokens, st.lists(st.text("abt .京", min_size=1, max_size=3), max_size=3), st.booleans())
def test_pieces_make_the_text_and_the_text_ends_before_the_first_stop_string(
    ids: list[int], stop: list[str], include: bool
) -> None:
    tokenizer, _ = tokenizers()
    growing = GrowingText(tokenizer, stop, include_stop=include)
    pieces, found = [], None
    for count, token in enumerate(ids, 1):
        found = growing.push(token)
        if found is not None:
            ids = ids[:count]
            break
        pieces.append(growing.piece())
        shown = "".join(pieces)
        assert growing.text.startswith(shown)
        assert not any(shown.endswith(s[:size]) for s in stop for size in range(1, len(s))), (
            "could be a stop string"
        )
        assert not any(s in shown for s in stop)
    text = growing.finish()
    pieces.append(growing.piece())
    assert "".join(pieces) == text
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if found is None:
        assert text == whole.rstrip("\ufffd") or whole.startswith(text)
        assert not any(s in text for s in stop)
    else:
        start = min(whole.find(s) for s in stop if s in whole)
        assert whole.startswith(found, start)
        assert text == whole[: start + len(found) if include else start]


def test_a_stop_string_across_tokens_and_within_one() -> None:
    tokenizer, _ = tokenizers()
    ids = tokenizer("the cat sat on the mat")["input_ids"]
    for stop in ("cat", "at s", "the mat", "t o", "t"):
        growing = GrowingText(tokenizer, [stop])
        pushed = 0
        for token in ids:
            pushed += 1
            if growing.push(token) is not None:
                break
        before = "the cat sat on the mat".split(stop)[0]
        assert growing.finish() == before
        assert (
            len(tokenizer.decode(ids[: pushed - 1]))
            < len(before + stop)
            <= len(tokenizer.decode(ids[:pushed]))
        )


def test_no_stop_before_the_least_number_of_tokens() -> None:
    tokenizer, _ = tokenizers()
    ids = tokenizer("a b a b a b a b")["input_ids"]
    growing = GrowingText(tokenizer, ["b"], min_tokens=4)
    stopped = next(count for count, token in enumerate(ids, 1) if growing.push(token))
    assert stopped > 4
    assert growing.text == tokenizer.decode(ids[:stopped]).rsplit("b", 1)[0]


def test_half_a_character_is_never_shown() -> None:
    tokenizer, _ = tokenizers()
    ids = tokenizer("x😀y京z")["input_ids"]
    growing = GrowingText(tokenizer)
    pieces = [(growing.push(token), growing.piece())[1] for token in ids]
    assert "".join(pieces) == "x😀y京z"
    assert not any("\ufffd" in piece for piece in pieces)
    cut = GrowingText(tokenizer)
    for token in tokenizer("x😀")["input_ids"][:-1]:
        cut.push(token)
    assert cut.finish() == "x"


@pytest.mark.parametrize("stop", [[""], [3], ["a", ""]])
def test_stop_strings_are_texts(stop: Any) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        GrowingText(tokenizers()[0], stop)


@examples(60)
@given(st.data())
def test_a_stop_string_may_have_special_tokens_in_it(data: st.DataObject) -> None:
    """Found in the text with them, it ends the text without them, however it lies over the tokens."""
    tokenizer, _ = tokenizers()
    plain, special = tokenizer("the cat sat on a mat")["input_ids"], tokenizer.all_special_ids
    token = st.one_of(st.sampled_from(plain), st.sampled_from(special))
    ids = data.draw(st.lists(token, min_size=1, max_size=12))
    shown = [(letter, i not in special) for i in ids for letter in tokenizer.decode([i])]
    whole = "".join(letter for letter, _ in shown)
    assert whole == tokenizer.decode(ids)
    name = tokenizer.decode([data.draw(st.sampled_from(special))])
    assume(name in whole)
    first = max(0, whole.index(name) - data.draw(st.integers(0, 4)))
    stop = whole[first : whole.index(name) + len(name) + data.draw(st.integers(0, 4))]
    include = data.draw(st.booleans())
    growing = GrowingText(tokenizer, [stop, "user", "/"], include_stop=include)  # others not within a token
    pieces, found, count = list[str](), None, 0
    while found is None and count < len(ids):
        found = growing.push(ids[count])
        pieces.append(growing.piece())
        count += 1
    text = growing.finish()
    pieces.append(growing.piece())
    assert found == stop
    assert stop in tokenizer.decode(ids[:count])
    assert stop not in tokenizer.decode(ids[: count - 1])
    assert "".join(pieces) == text
    before = "".join(letter for letter, is_shown in shown[: whole.index(stop)] if is_shown)
    assert text == before + (stop if include else "")
