"""`LLM.beam_search` against a plain search by vLLM's rules, on transformers' model in float64."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from tiny_decoders import EOS, VOCABULARY, WINDOW, decoder, prompts

from minilm import LLM, BeamSearchParams, SamplingParams
from minilm.generation.rows import BeamRows


@functools.cache
def in_float64() -> Any:
    return copy.deepcopy(decoder("llama").theirs).double()


def llm(**options: Any) -> LLM:
    d = decoder("llama")
    return LLM(d.ours, tokenizer=d.tokenizer, **options)


def plain_search(
    prompt: list[int], width: int, most: int, ends: set[int], penalty: float, temperature: float = 1.0
) -> list[tuple[float, list[int]]]:
    """(sum of log-probabilities, tokens) of the best texts."""
    live, completed = [(0.0, list(prompt))], []
    for _ in range(most):
        with torch.no_grad():
            logits = in_float64()(torch.tensor([tokens for _, tokens in live])).logits[:, -1] / temperature
        new = []
        for (total, tokens), row in zip(live, logits.log_softmax(-1), strict=True):
            best = row.topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                (completed if token in ends else new).append((total + value, [*tokens, token]))
        live = sorted(new, reverse=True)[:width]

    def score(one: tuple[float, list[int]]) -> float:
        total, tokens = one
        return total / (len(tokens) - (tokens[-1] in ends)) ** penalty

    return sorted([*completed, *live], key=score, reverse=True)[:width]


@pytest.mark.parametrize(
    ("ends", "options"),
    [
        ({EOS}, {}),
        ({EOS, *range(40, 90)}, {}),
        ({EOS, *range(40, 90)}, {"length_penalty": 2.0}),
        ({EOS, *range(40, 90)}, {"length_penalty": 0.0, "temperature": 1.7}),
        ({EOS, *range(40, 90)}, {"ignore_eos": True}),
    ],
    ids=str,
)
def test_it_is_the_plain_search(
    ends: set[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm()
    monkeypatch.setattr(model.model, "generation_config", copy.copy(model.model.generation_config))
    model.model.generation_config.eos_token_id = sorted(ends)
    rows = prompts([9, 4])
    outputs = model.beam_search(
        [{"prompt_token_ids": row} for row in rows], BeamSearchParams(beam_width=3, max_tokens=8, **options)
    )
    ended = 0
    for row, output in zip(rows, outputs, strict=True):
        own = set() if options.get("ignore_eos") else ends
        expected = plain_search(
            row, 3, 8, own, options.get("length_penalty", 1.0), options.get("temperature", 1.0)
        )
        assert [sequence.tokens for sequence in output.sequences] == [tokens for _, tokens in expected]
        for sequence, (total, tokens) in zip(output.sequences, expected, strict=True):
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)
            assert sequence.text == decoder("llama").their_tokenizer.decode(tokens)
            new = tokens[len(row) :]
            steps = [step[token] for step, token in zip(sequence.logprobs, new, strict=True)]
            assert sum(step.logprob for step in steps) == pytest.approx(total, abs=1e-4)
            assert all(len(step) == 6 for step in sequence.logprobs)
            stopped = new[-1] in own
            assert sequence.finish_reason == ("stop" if stopped else "length")
            assert sequence.stop_reason == (new[-1] if stopped else None)
            ended += stopped
    assert ended or len(ends) == 1 or options, "some texts should end before the limit"


def test_prompts_are_searched_in_groups_and_all_rows_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts as one by one; with other requests before, between and after."""
    model = llm(max_num_seqs=5)
    params = BeamSearchParams(beam_width=2, max_tokens=6)
    rows = prompts([9, 4, 7, 1, 12], seed=3)
    expected = [model.beam_search(row, params)[0].sequences for row in rows]
    starts: list[int] = []
    read = BeamRows.read

    def counted(self: BeamRows, given: Any, budget: int) -> Any:
        starts.append(len(given))
        return read(self, given, budget)

    monkeypatch.setattr(BeamRows, "read", counted)
    stream = model.stream(rows[0], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    first = next(stream)
    found = model.beam_search(rows, params)
    assert starts == [2, 2, 1]
    for output, sequences in zip(found, expected, strict=True):
        assert [one.tokens for one in output.sequences] == [one.tokens for one in sequences]
    starts.clear()
    model.beam_search(rows, params, concurrency_limit=3, use_tqdm=False)
    assert starts == [3, 2]
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (whole,) = llm().generate(rows[0], greedy, use_tqdm=False)
    assert first + "".join(stream) == whole.outputs[0].text
    assert model._engine.cache.used_pages == 0


def test_threads_share_a_model() -> None:
    model = llm()
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    rows = prompts([9, 4], seed=1)
    expected = [model.beam_search(row, params)[0].sequences[0].tokens for row in rows]
    found: dict[int, list[int]] = {}

    def work(number: int) -> None:
        found[number] = model.beam_search(rows[number], params)[0].sequences[0].tokens

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


def test_an_error_frees_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llm()
    usual, calls = model.model.step, 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(model.model, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        model.beam_search(prompts([40, 3]), BeamSearchParams(beam_width=3, max_tokens=9))
    assert model._engine.cache.used_pages == 0
    assert model._engine.cache.rows == []


def test_the_window_ends_a_text() -> None:
    (prompt,) = prompts([WINDOW - 2])
    (output,) = llm().beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert [len(sequence.tokens) for sequence in output.sequences] == [WINDOW] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beam_width": 0}, "beam_width must be.*0"),
        ({"beam_width": 2.0}, "beam_width must be.*2.0"),
        ({"max_tokens": 0}, "max_tokens must be.*0"),
        ({"temperature": -1.0}, "temperature must be 0 or above.*-1.0"),
        ({"length_penalty": float("nan")}, "length_penalty must be.*nan"),
    ],
    ids=str,
)
def test_params_name_what_is_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **options})


def test_calls_name_what_is_wrong() -> None:
    model, params = llm(), BeamSearchParams(beam_width=2, max_tokens=3)
    for prompt, words in (
        ([], "empty"),
        ([VOCABULARY], f"token {VOCABULARY}"),
        ([5] * WINDOW, f"{WINDOW} tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            model.beam_search([{"prompt_token_ids": prompt}], params)
    with pytest.raises(ValueError, match=r"length_penalty=900\.0 is too large for 6 tokens"):
        model.beam_search([5, 6, 7], BeamSearchParams(beam_width=2, max_tokens=3, length_penalty=900.0))
    with pytest.raises(ValueError, match=r"concurrency_limit must be.*0"):
        model.beam_search([5], params, concurrency_limit=0)
    with pytest.raises(TypeError, match="params must be BeamSearchParams, and is SamplingParams"):
        model.beam_search([5], SamplingParams())  # type: ignore[arg-type]
    assert model.beam_search([], params) == []
